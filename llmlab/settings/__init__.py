"""Settings: one small frozen class a stage, from which options, help, schema, docs and trainer arguments follow.
Nothing here imports more than pydantic and PyYAML."""

from importlib import import_module
from typing import Any

CLASSES = {  # by stage
    "tokenizer": "data:TokenizerSettings",
    "pretrain": "training:PretrainSettings",
    "merge": "lora:MergeSettings",
    "sft": "training:SFTSettings",
    "dpo": "preference:DPOSettings",
    "orpo": "preference:ORPOSettings",
    "reward": "preference:RewardModelSettings",
    "grpo": "rl:GRPOSettings",
    "ppo": "rl:PPOSettings",
    "rs-sft": "offline:RSSFTSettings",
    "awr": "offline:AWRSettings",
    "sample": "generation:SampleSettings",
}


def settings_class(stage: str) -> Any:
    """Returns the settings class of a stage, imported when it is first needed."""
    module, _, name = CLASSES[stage].partition(":")
    return getattr(import_module(f"llmlab.settings.{module}"), name)
