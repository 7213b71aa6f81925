"""Plain `trl.GRPOTrainer` takes single and composed rewards as they are, and reports their components."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmlab.rewards import json_valid, length
from llmlab.rewards.compose import compose
from llmlab.settings.errors import UserError


@pytest.fixture(scope="module")
def policy():
    words = ["[PAD]", "</s>", "[UNK]", "say", "one", "two", "1", "2", "####"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def trainer(policy, folder, rewards):
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = policy
    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1, num_generations=4,
        per_device_train_batch_size=4, max_completion_length=8, logging_steps=1, report_to=[], disable_tqdm=True,
        save_strategy="no", seed=1,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "say one", "answer": "1"}, {"prompt": "say two", "answer": "2"}])
    return GRPOTrainer(model, rewards, args=arguments, train_dataset=rows, processing_class=tokenizer)


def test_one_step(policy, tmp_path):
    composed = compose(
        ["json_valid", "numeric_match | 2", {"name": "length", "target": 8, "unit": "tokens"}, "repetition_penalty"]
    )
    seen = []
    score = composed.score
    composed.score = lambda completions, **columns: seen.append(score(completions, **columns)) or seen[-1]
    running = trainer(policy, tmp_path, [composed, json_valid, partial(length, target=4)])
    running.train()
    logs = running.state.log_history[0]
    (scores,) = seen
    assert len(scores.totals) == 4
    assert logs["rewards/reward/mean"] == pytest.approx(sum(scores.totals) / 4, abs=1e-6)
    for label, values in scores.components.items():
        assert logs[f"reward_components/{label}/mean"] == pytest.approx(sum(values) / 4, abs=1e-6)
    assert logs["reward"] == pytest.approx(
        logs["rewards/reward/mean"] + logs["rewards/json_valid/mean"] + logs["rewards/length/mean"], abs=1e-5
    )


def test_a_wrong_value_stops_the_run(policy, tmp_path):
    def broken(completions, **columns):
        return [0.0, float("nan"), 0.0, 0.0]

    running = trainer(policy, tmp_path, compose(["json_valid", broken], normalize=False))
    with pytest.raises(UserError, match="'broken' gave nan at row 1 of 4"):
        running.train()
