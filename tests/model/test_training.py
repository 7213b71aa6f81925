"""The decoder under the trainers: losses, accumulation, checkpointing, adapters, and TRL with packed rows."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from llmlab.model import LLMLabForSequenceClassification

ENCODINGS = ["sinusoidal", "rope", "alibi", "yarn"]


def rows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def test_loss_is_the_mean_negative_log_likelihood_of_next_tokens(tiny_model):
    model = tiny_model()
    tokens = rows(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    outputs = model(tokens, labels=labels)
    log_probs = model(tokens).logits.log_softmax(-1)
    terms = [-log_probs[0, t - 1, tokens[0, t]] for t in range(4, 9)]
    terms += [-log_probs[1, t - 1, tokens[1, t]] for t in range(1, 9)]
    torch.testing.assert_close(outputs.loss, torch.stack(terms).mean())
    divided = model(tokens, labels=labels, num_items_in_batch=torch.tensor(26)).loss
    torch.testing.assert_close(divided, torch.stack(terms).sum() / 26)


@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_without_logits_is_the_same(tiny_model, items, tied):
    model = tiny_model(tie_word_embeddings=tied)
    tokens = rows(2, 9)
    labels = tokens.clone()
    labels[1, 3:6] = -100
    whole = model(tokens, labels=labels, num_items_in_batch=items)
    whole.loss.backward()
    expected = gradients(model)
    pieces = model(tokens, labels=labels, num_items_in_batch=items, return_logits=False)
    pieces.loss.backward()
    assert pieces.logits is None and pieces.loss.dtype == torch.float32
    torch.testing.assert_close(pieces.loss, whole.loss)
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


def test_loss_without_logits_says_what_it_cannot_do(tiny_model):
    model = tiny_model()
    tokens = rows(1, 5)
    with pytest.raises(ValueError, match="does not support shift_labels"):
        model(tokens, labels=tokens, shift_labels=tokens, return_logits=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)  # as an adapter around the head
    with pytest.raises(ValueError, match="does not support Sequential"):
        model(tokens, labels=tokens, return_logits=False)


def test_autocast_loss_is_fp32_and_near(tiny_model):
    model = tiny_model()
    tokens = rows(2, 16)
    exact = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(tokens, labels=tokens)
        pieces = model(tokens, labels=tokens, return_logits=False)
    for loss in (outputs.loss, pieces.loss):
        assert loss.dtype == torch.float32
        assert abs(loss - exact) < 0.02 * exact


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradient_checkpointing_changes_no_gradient(tiny_model, encoding):
    model = tiny_model(positional_encoding=encoding, sliding_window=4).train()
    tokens = rows(2, 9)
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    outputs = model(tokens, labels=tokens, use_cache=True)
    outputs.loss.backward()
    assert outputs.past_key_values is None
    torch.testing.assert_close(gradients(model), expected)


def test_dropout_acts_in_training_alone(tiny_model):
    model = tiny_model(dropout=0.5)
    tokens = rows(1, 9)
    torch.testing.assert_close(model(tokens).logits, tiny_model()(tokens).logits)
    model.train()
    assert (model(tokens).logits - model(tokens).logits).abs().max() > 0.1


class KeepsGradient(Trainer):
    """Keeps the gradient that the optimizer's step sees."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(self.keep)
        return optimizer

    def keep(self, *_):
        self.seen = {name: p.grad.clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("return_logits", [True, False])
def test_eight_rows_at_once_or_one_by_one_give_the_same_gradient(tiny_model, tmp_path, return_logits):
    tokens = rows(8, 12)
    labels = tokens.clone()
    for i in range(8):
        labels[i, : i + 2] = -100  # rows of different weight
    dataset = [{"input_ids": tokens[i], "labels": labels[i]} for i in range(8)]

    def collate(rows):
        return {
            "input_ids": torch.stack([row["input_ids"] for row in rows]),
            "labels": torch.stack([row["labels"] for row in rows]),
            "return_logits": return_logits,
        }

    seen = []
    for batch in (8, 1):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            max_steps=1,
            max_grad_norm=0,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = KeepsGradient(tiny_model(), arguments, train_dataset=dataset, data_collator=collate)
        trainer.train()
        seen.append(trainer.seen)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 10
    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_trl_fused_head_gives_the_models_own_log_probabilities(tiny_model, encoding):
    model = tiny_model(positional_encoding=encoding)
    tokens = rows(2, 9)
    expected = model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    loss = model(tokens, labels=tokens).loss
    add_fused_lm_head(model)
    fused = model(tokens, labels=tokens, fused_lm_head=True)
    torch.testing.assert_close(fused.log_probs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.loss, loss)


@pytest.mark.parametrize(
    ("packing", "encoding", "window"),
    [("bfd", "rope", None), ("bfd", "sinusoidal", 4)] + [("wrapped", "alibi", 4), ("wrapped", "yarn", None)],
)
def test_sft_with_packed_rows(tiny_model, tokenizer, tmp_path, packing, encoding, window):
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(3 + i % 9)) for i in range(48)]
    model = tiny_model(positional_encoding=encoding, sliding_window=window, initializer_range=0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = SFTConfig(
        str(tmp_path / "run"),
        max_steps=24,
        lr_scheduler_type="constant",
        packing=True,
        packing_strategy=packing,
        max_length=16,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    )
    if packing == "bfd":
        batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist() + [batch["input_ids"].shape[1]]
        assert len(starts) > 4
        with torch.no_grad():
            packed = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            for start, end in pairwise(starts):
                alone = model(batch["input_ids"][:, start:end]).logits
                torch.testing.assert_close(packed[:, start:end], alone, atol=1e-5, rtol=0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lora_trains_only_its_adapters_and_merges_exactly(tiny_model):
    model = tiny_model()
    tokens = rows(2, 9)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    first = adapted(tokens, labels=tokens).loss
    for _ in range(5):
        optimizer.zero_grad()
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
    after = adapted(tokens, labels=tokens)
    assert after.loss < first - 0.05
    adapted_names = {
        name.rsplit(".lora_", 1)[0].split("layers.0.")[-1]
        for name, p in adapted.named_parameters()
        if p.requires_grad and "layers.0." in name
    }
    assert adapted_names == {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after.logits, atol=1e-5, rtol=0)


def test_classifier_scores_the_last_token_whatever_the_padding(tiny_config):
    torch.manual_seed(0)
    model = LLMLabForSequenceClassification(tiny_config(num_labels=1)).eval()
    assert "score.weight" in model.state_dict() and not any("lm_head" in name for name in model.state_dict())
    tokens = rows(1, 5)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), tokens), 1)
    scores = model(
        torch.cat((padded, torch.cat((tokens, padded[:, :3]), 1))),
        attention_mask=torch.tensor([[0] * 3 + [1] * 5, [1] * 5 + [0] * 3]),
    ).logits
    expected = model.score(model.model(tokens).last_hidden_state[:, -1])
    torch.testing.assert_close(scores, expected.expand(2, 1), atol=1e-5, rtol=0)
