"""The encoder gives the ids that the tokenizer itself gives, each document ended by one eos."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies
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
from llmlab.data.text import encoder as encoder_module
from llmlab.data.text.encoder import LLAMA3, TextEncoder, fast_encoder
from llmlab.data.tokenizer import QWEN_PATTERN

EOS = "<eos>"


def split(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt2": GPT2,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "qwen": split(QWEN_PATTERN),
    "llama3": split(LLAMA3),
}
TEXTS = [row["text"] for shard in demo_shards("demo/stories", size="60kB") for row in read_shard(shard)]
CODE = "def f(x):\n    return  x + 1\t# don't\r\n\r\n\n\tif x: pass\n" * 3
SPACED = (
    "a.\n b.\n\n c \n d\n \n e  \n f\r\n g.\r\n\r\n\th\n\ni.\n'\n'\n\n1\n1\n\n. \n.\n \na. a, a' 's 't b.a b's .a ,b"
    * 50
)  # merged where it can be


def train(cut, vocab_size=500, normalizer=None, alphabet=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = alphabet or pre_tokenizers.ByteLevel.alphabet()
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


@pytest.mark.parametrize("name", [*CUTS, "nfc"])
def test_batches_equal_single_documents(tokenizers, name, monkeypatch):
    monkeypatch.setattr(encoder_module, "SMALL", 0)
    texts = ["\n\n".join(TEXTS[:20]), CODE, SPACED, f"a {EOS} <tag>b", "e\u0301 日本語", *TEXTS[20:]]
    encoded = encoder_of(tokenizers[name]).encode(texts)
    expected = [reference(tokenizers[name], text) for text in texts]
    assert encoded.tokens.tolist() == [number for ids in expected for number in ids]
    assert encoded.documents["tokens"].tolist() == [len(ids) for ids in expected]
    assert encoded.characters == sum(map(len, texts))


PIECES = strategies.sampled_from(
    ["a", "'s", "'S", " ", "  ", "\n", "\r\n", "\t", "1", "²", "٣", "e\u0301", "é", "ſ", "!", "日"]
)
ANY_TEXT = strategies.one_of(strategies.text(), strategies.lists(PIECES).map("".join))


@pytest.mark.parametrize("name", [*CUTS, "nfc"])
def test_the_fast_encoder_gives_the_tokenizers_ids_for_any_text(tokenizers, name):
    tokenizer = Tokenizer.from_str(tokenizers[name].to_str())
    tokenizer.encode_special_tokens = True
    encode = fast_encoder(tokenizer)

    @settings(max_examples=200, deadline=None)
    @given(ANY_TEXT)
    def check(text):
        assert encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids

    check()
    for first, last in ((0, 0x3400), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xE000, 0x11000), (0x1E000, 0x1F000)):
        text = "".join(f"a{c} {c} 1{c}{c}'{c}\n" for c in map(chr, range(first, last)))
        assert encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_what_the_fast_encoder_cannot_do_is_left_to_the_tokenizer(tokenizers):
    encode = fast_encoder(tokenizers["qwen"])
    assert encode("a <tag> b") is None is encode("a" + 10_000 * " \t")
    spaces = "a" + 1_000_000 * " " + "b"
    assert encoder_of(tokenizers["qwen"]).encode([spaces]).tokens.tolist() == reference(tokenizers["qwen"], spaces)
    assert fast_encoder(train(GPT2, alphabet=["a", "b"]))("a\x04") is None
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # "abc" is a and bc, which are not on the list
    words = [EOS, *letters, *map("".join, merges)]
    for steps, fast in ((merges, False), (merges[:2], True)):
        vocabulary = {word: number for number, word in enumerate(words[: 257 + len(steps)])}
        tokenizer = Tokenizer(models.BPE(vocabulary, steps))
        tokenizer.pre_tokenizer = GPT2
        tokenizer.add_special_tokens([EOS])
        assert (fast_encoder(tokenizer) is not None) is fast
        assert encoder_of(tokenizer).encode(["abc ab"]).tokens.tolist() == reference(tokenizer, "abc ab")


def test_tokens_that_stand_for_whole_words_are_the_tokenizers(tokenizers):
    tokenizer = Tokenizer.from_str(tokenizers["nfc"].to_str())
    tokenizer.add_tokens([AddedToken("e\u0301x", normalized=True)])
    assert fast_encoder(tokenizer)("éx") is None
    state = json.loads(tokenizers["gpt2"].to_str())
    state["model"]["vocab"]["PAD"] = 10_000
    for ignores, expected in ((False, True), (True, False)):
        state["model"]["ignore_merges"] = ignores
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.add_special_tokens(["PAD"])
        assert (fast_encoder(tokenizer) is not None) is expected
        text = "PAD " * 50_000
        assert encoder_of(tokenizer).encode([text]).tokens.tolist() == reference(tokenizer, text)


def test_a_vocabulary_without_the_letter_that_shows_the_frame():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = GPT2
    trainer = trainers.BpeTrainer(vocab_size=20, special_tokens=[EOS, "<bos>"], show_progress=False)
    tokenizer.train_from_iterator(["ACGTTGCA" * 50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    for text in ("ACGT", "ACGT" * 30_000):
        assert encoder_of(tokenizer).encode([text]).tokens.tolist() == [1, *reference(tokenizer, text)]


@pytest.mark.parametrize(
    "change",
    [
        {"model": models.BPE(dropout=0.1)},
        {"model": models.Unigram([("a", 0.0)], unk_id=0)},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": split(r"\w+|\s+")},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
)
def test_other_tokenizers_have_no_fast_encoder(tokenizers, change):
    tokenizer = Tokenizer.from_str(tokenizers["gpt2"].to_str())
    for name, value in change.items():
        setattr(tokenizer, name, value)
    assert fast_encoder(tokenizer) is None


@pytest.mark.parametrize("small", [0, 10_000])
def test_the_tokenizers_own_frame_is_kept_and_eos_is_not_doubled(tokenizers, small, monkeypatch):
    monkeypatch.setattr(encoder_module, "SMALL", small)
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


def test_identity_and_pickle(tokenizers):
    identities = {encoder_of(tokenizer).identity for tokenizer in tokenizers.values()}
    assert len(identities) == len(tokenizers)
    encoder = encoder_of(tokenizers["qwen"])
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.identity == encoder.identity
    assert np.array_equal(copy.encode(TEXTS[:3]).tokens, encoder.encode(TEXTS[:3]).tokens)


def test_hashes_are_of_the_text(tokenizers):
    first = encoder_of(tokenizers["qwen"]).encode(["a", "b", "a"]).documents["hash"]
    second = encoder_of(tokenizers["gpt2"]).encode(["a"]).documents["hash"]
    assert first[0] == first[2] == second[0] != first[1]
