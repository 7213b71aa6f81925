"""Losses that read the output head's weight would leave out LoRA adapters of it: every stage refuses them."""

import pytest
from peft import LoraConfig, get_peft_model

from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import load_model
from llmlab.settings.errors import UserError
from llmlab.stages import STAGES


@pytest.fixture
def adapter_of(base_folder, tmp_path):
    def make(target):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=[target], task_type="CAUSAL_LM")
        get_peft_model(load_model(base_folder), config).save_pretrained(tmp_path / "adapter")
        load_tokenizer(base_folder).save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return make


@pytest.mark.parametrize("stage", ["sft", "dpo", "orpo", "rs-sft", "awr", "ppo", "grpo"])
def test_adapters_of_the_head_are_refused(stage, adapter_of, tiny_settings, tmp_path):
    settings = tiny_settings(stage, tmp_path / "run", policy_checkpoint=adapter_of("lm_head"), max_steps=1)
    with pytest.raises(UserError, match="LoRA weights of the output head.* merge it first: llmlab merge"):
        STAGES[stage].function(settings)


@pytest.mark.parametrize("stage", ["sft", "orpo"])
def test_others_are_trained_further(stage, adapter_of, tiny_settings, tmp_path):
    settings = tiny_settings(stage, tmp_path / "run", policy_checkpoint=adapter_of("q_proj"), max_steps=1)
    assert STAGES[stage].function(settings).metrics["loss"] > 0
