"""ORPO's loss reads the output head's weight, so adapters of the head are refused instead of left out."""

import pytest
from peft import LoraConfig, get_peft_model

from llmlab.data.tokenizer import load_tokenizer
from llmlab.model import load_model
from llmlab.settings.errors import UserError
from llmlab.training.preference.orpo import orpo


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_adapters_of_the_head_are_refused(target, tiny_settings, base_folder, tmp_path):
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[target], task_type="CAUSAL_LM")
    get_peft_model(load_model(base_folder), config).save_pretrained(adapter)
    load_tokenizer(base_folder).save_pretrained(adapter)
    settings = tiny_settings("orpo", tmp_path / "run", policy_checkpoint=str(adapter), max_steps=1)
    if target == "q_proj":
        assert orpo(settings).metrics["loss"] > 0
        return
    with pytest.raises(UserError, match="LoRA weights of the output head, which ORPO's loss does not support"):
        orpo(settings)
