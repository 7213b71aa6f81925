"""The word-by-word encoder gives the ids that the tokenizer itself gives, to the last one."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from llmlab.data.demo import demo_shards, read_shard
from llmlab.data.text.encoding import GPT2_WORDS, LLAMA_PATTERN, PATTERN_WORDS, QWEN_PATTERN, TextEncoder, words_of

EOS = "<eos>"


def split(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt2": GPT2,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "qwen": split(QWEN_PATTERN),
    "llama": split(LLAMA_PATTERN),
}
TEXTS = [row["text"] for shard in demo_shards("demo/stories", size="60kB") for row in read_shard(shard)]
CODE = "def f(x):\n    return  x + 1\t# don't\r\n\r\n\n\tif x: pass\n" * 3
SPACED = (
    "a.\n b.\n\n c \n d\n \n e  \n f\r\n g.\r\n\r\n\th\n\ni.\n'\n'\n\n1\n1\n\n. \n.\n \na. a, a' 's 't b.a b's .a ,b"
    * 50
)  # merged where it can be


def train(cut, vocab_size=500, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, CODE, SPACED], trainer)
    tokenizer.add_tokens([AddedToken("<tag>", special=False, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    trained = {name: train(cut) for name, cut in CUTS.items()}
    return {**trained, "nfc": train(CUTS["qwen"], normalizer=normalizers.NFC())}


def reference(tokenizer, text):
    fresh = Tokenizer.from_str(tokenizer.to_str())
    fresh.encode_special_tokens = True
    return [*fresh.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id(EOS)]


def encoder_of(tokenizer):
    return TextEncoder(tokenizer.to_str(), tokenizer.token_to_id(EOS))


SPACES = st.text(st.sampled_from(list(" \n\t\r\u00a0\u2003\u3000\x1c\x85abst1.,'-<é\u0301")), max_size=30)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=100)
@given(st.lists(st.one_of(ANY, SPACES), min_size=1, max_size=4))
@example(
    [
        "a  b",
        " a\n b ",
        "x.\n\n y",
        "don't 12 345",
        f"a {EOS} <tag>b",
        "e\u0301 e\u0301",
        "日本語 テキスト",
        "\u2028 x",
    ]
)
def test_word_by_word_equals_the_tokenizer(tokenizers, texts):
    for name, tokenizer in tokenizers.items():
        encoder = encoder_of(tokenizer)
        assert encoder.cut is not None, name
        for _ in range(2):  # once learning the words, once knowing them
            encoded = encoder.encode(texts)
            expected = [reference(tokenizer, text) for text in texts]
            assert encoded.tokens.tolist() == [number for ids in expected for number in ids], name
            assert encoded.lengths.tolist() == [len(ids) for ids in expected]


@pytest.mark.parametrize("name", CUTS)
@given(text=st.one_of(SPACES, ANY))
def test_words_are_cut_as_the_text_is(name, text):
    words = (GPT2_WORDS if name in ("gpt2", "digits") else PATTERN_WORDS).pattern.findall(text)
    assert "".join(words) == text
    apart = [piece for word in words for piece, _ in CUTS[name].pre_tokenize_str(word)]
    assert apart == [piece for piece, _ in CUTS[name].pre_tokenize_str(text)]


@pytest.mark.parametrize("name", [*CUTS, "nfc"])
def test_long_texts_and_forgotten_words(tokenizers, name, monkeypatch):
    monkeypatch.setattr("llmlab.data.text.encoding.MOST_WORDS", 50)
    texts = ["\n\n".join(TEXTS[:20]), CODE, SPACED, *TEXTS[20:]]
    encoder = encoder_of(tokenizers[name])
    for text in texts:
        assert encoder.encode([text]).tokens.tolist() == reference(tokenizers[name], text)


def test_characters_that_the_vocabulary_lacks():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = CUTS["qwen"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=[EOS], show_progress=False)
    tokenizer.train_from_iterator(["only a few letters are known here"], trainer)
    text = "only few known letters über ßtreet and more known letters"
    assert encoder_of(tokenizer).encode([text]).tokens.tolist() == reference(tokenizer, text)


def test_tokenizers_that_look_across_spaces_are_encoded_whole():
    metaspace = Tokenizer(models.BPE())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.train_from_iterator(TEXTS[:20], trainers.BpeTrainer(special_tokens=[EOS], show_progress=False))
    encoder = encoder_of(metaspace)
    assert encoder.cut is None
    assert encoder.encode([TEXTS[0]]).tokens.tolist() == reference(metaspace, TEXTS[0])
    for odd in (
        split(r"[^z]+"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ):
        assert encoder_of(train(odd, 300)).cut is None
    for token in ("two words", "e.g."):
        spaced = train(GPT2, 300)
        spaced.add_tokens([AddedToken(token, special=False)])
        assert encoder_of(spaced).cut is None


def test_the_tokenizers_own_frame_is_kept_and_eos_is_not_doubled(tokenizers):
    tokenizer = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    tokenizer.add_special_tokens(["<bos>"])
    ids = {token: tokenizer.token_to_id(token) for token in (EOS, "<bos>")}
    plain = reference(tokenizer, "Hello")[:-1]
    for template in ("<bos> $A", f"<bos> $A {EOS}"):
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(ids.items()))
        assert encoder_of(tokenizer).encode(["Hello"]).tokens.tolist() == [ids["<bos>"], *plain, ids[EOS]]


def test_large_vocabularies_get_wider_ids(tokenizers):
    tokenizer = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    assert encoder_of(tokenizer).dtype == np.uint16
    tokenizer.add_tokens([f"<{number}>" for number in range(1 << 16)])
    encoder = encoder_of(tokenizer)
    assert encoder.dtype == np.uint32
    assert encoder.encode(["<65535>"]).tokens.tolist() == [tokenizer.token_to_id("<65535>"), 0]


def test_fingerprint_and_pickle(tokenizers):
    prints = {encoder_of(tokenizer).fingerprint for tokenizer in tokenizers.values()}
    assert len(prints) == len(tokenizers)
    encoder = encoder_of(tokenizers["qwen"])
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.fingerprint == encoder.fingerprint
    assert np.array_equal(copy.encode(TEXTS[:3]).tokens, encoder.encode(TEXTS[:3]).tokens)


def test_hashes_are_of_the_text(tokenizers):
    first = encoder_of(tokenizers["qwen"]).encode(["a", "b", "a"]).hashes
    second = encoder_of(tokenizers["gpt2"]).encode(["a"]).hashes
    assert first[0] == first[2] == second[0] != first[1]


def test_what_changes_merges_is_encoded_whole(tokenizers):
    serialized = json.loads(tokenizers["qwen"].to_str())
    assert words_of(serialized) is not None
    assert words_of({**serialized, "normalizer": {"type": "Lowercase"}}) is None
    assert words_of({**serialized, "model": {**serialized["model"], "dropout": 0.1}}) is None
    assert words_of({**serialized, "pre_tokenizer": None}) is None
