"""`reward_model`: models with tokenizers of their own, fed as these say."""

import pytest
import torch
from transformers import DebertaV2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from llmlab.rewards import RewardModel
from llmlab.rewards.compose import compose
from llmlab.settings.errors import SettingsError, UserError

WORDS = ["what", "is", "one", "two", "three", "four", "five", "the", "answer", "yes", "no", "maybe", "plus"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
PROMPTS = ["what is one", "what is two plus two", "maybe", "the answer"]
COMPLETIONS = ["one", "the answer is four four four", "", "yes no yes no yes no yes no yes"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory, word_tokenizer):
    """A decoder with a chat template, no padding token and another vocabulary."""
    folder = tmp_path_factory.mktemp("llama")
    words = ["</s>", "[UNK]", "<user>", "<assistant>", *reversed(WORDS)]
    tokenizer = word_tokenizer(words, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=1, initializer_range=0.5, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_is_no_module(deberta):
    assert not isinstance(RewardModel(model=str(deberta)), torch.nn.Module)  # TRL would feed that its own way


def test_a_pair_is_encoded_as_a_pair(deberta):
    reward = RewardModel(model=str(deberta), squash=False, batch_size=3)
    scores = reward(COMPLETIONS, PROMPTS)
    model = DebertaV2ForSequenceClassification.from_pretrained(deberta).eval()
    for question, text, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        inputs = reward.tokenizer([question], [text], return_tensors="pt")  # (q, "") would make no pair
        ids = reward.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        assert ids[0] == "[CLS]" and ids.count("[SEP]") == 2
        assert model(**inputs).logits.item() == pytest.approx(score, abs=1e-5)
        if text == COMPLETIONS[0]:
            assert (
                inputs["input_ids"].tolist()
                == reward.tokenizer(question, text, return_tensors="pt")["input_ids"].tolist()
            )
        run_together = reward.tokenizer(question + text, return_tensors="pt", add_special_tokens=False)
        assert abs(model(**run_together).logits.item() - score) > 1e-3  # what TRL's own path would give
    assert len({round(score, 3) for score in scores}) == 4


def test_messages_go_through_the_models_own_template(llama):
    reward = RewardModel(model=str(llama), squash=False, batch_size=2)
    assert reward.config.pad_token_id is None
    scores = reward(COMPLETIONS, PROMPTS)
    model = LlamaForSequenceClassification.from_pretrained(llama).eval()
    for question, text, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        rendered = f"<user> {question} </s> <assistant> {text} </s> "
        inputs = reward.tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
        assert "[UNK]" not in reward.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        assert model(**inputs).logits.item() == pytest.approx(score, abs=1e-5)
    as_messages = reward(
        [[{"role": "assistant", "content": text}] for text in COMPLETIONS],
        [[{"role": "user", "content": text}] for text in PROMPTS],
    )
    assert as_messages == pytest.approx(scores, abs=1e-6)


def test_padding_may_be_an_id_that_is_no_token(llama, tmp_path):
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(llama), RewardModel(model=str(llama)).tokenizer
    model.resize_token_embeddings(len(tokenizer) + 8)  # a vocabulary rounded up, with padding in the part that is new
    model.config.pad_token_id = len(tokenizer) + 5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one, many = (RewardModel(model=str(tmp_path), batch_size=size)(COMPLETIONS, PROMPTS) for size in (1, 4))
    assert one == pytest.approx(many, abs=1e-5)


@pytest.mark.parametrize("kind", ["deberta", "llama"])
def test_batches_do_not_matter(kind, request):
    path = str(request.getfixturevalue(kind))
    one, many = (RewardModel(model=path, batch_size=size)(COMPLETIONS, PROMPTS) for size in (1, 4))
    assert one == pytest.approx(many, abs=1e-5)
    assert all(0 < score < 1 for score in one)
    plain = RewardModel(model=path, squash=False)(COMPLETIONS, PROMPTS)
    assert torch.tensor(plain).sigmoid().tolist() == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("kind", ["deberta", "llama"])
def test_long_text_is_cut_and_counted(kind, request):
    reward = RewardModel(model=str(request.getfixturevalue(kind)), max_length=12)
    logged = {}
    long = reward(["one", "yes " * 100], ["what is", "no " * 40], log_metric=logged.__setitem__)
    assert logged == {"reward_model/truncated": 0.5}
    assert all(0 < score < 1 for score in long)
    inputs, cut = reward._encode("no " * 40, "yes " * 100)
    tokens = reward.tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    assert cut and len(tokens) == 12
    assert tokens[-1] == ("[SEP]" if kind == "deberta" else "</s>")  # the end of the answer's turn stays
    assert ("no" in tokens) == (kind == "deberta")


def test_composed_it_has_a_range(deberta):
    composed = compose([{"name": "reward_model", "model": str(deberta)}, "length"])
    assert composed.bounds == (0, 2)
    assert all(0 <= score <= 1 for score in composed(COMPLETIONS, prompts=PROMPTS, model=["a column"] * 4))
    with pytest.raises(SettingsError, match="'reward_model': its range is not known"):
        compose([{"name": "reward_model", "model": str(deberta), "squash": False}])


def test_several_labels(llama, tmp_path):
    config = LlamaConfig.from_pretrained(llama, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    RewardModel(model=str(llama)).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="label = none: .* has bad, good"):
        RewardModel(model=str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'good'"):
        RewardModel(model=str(tmp_path), label="goodd")
    good, bad = (RewardModel(model=str(tmp_path), label=name)(COMPLETIONS, PROMPTS) for name in ("good", "bad"))
    assert [a + b for a, b in zip(good, bad, strict=True)] == pytest.approx([1] * 4)


def test_models_that_are_none(tmp_path, llama):
    with pytest.raises(SettingsError, match="'reward_model': model = /nowhere: there is no such folder"):
        compose([{"name": "reward_model", "model": "/nowhere"}])
    with pytest.raises(UserError, match="there is no such folder, and the hub gave none"):
        RewardModel(model="nobody/nothing")
    config = LlamaConfig.from_pretrained(llama, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    RewardModel(model=str(llama)).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a sequence-classification model, found LlamaForCausalLM"):
        RewardModel(model=str(tmp_path))
