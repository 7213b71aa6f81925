"""llmlab: from an architecture to a language model you can chat with.

Public names are imported when they are first used, so that `import llmlab` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("DPOSettings", "ORPOSettings", "RewardModelSettings"), "llmlab.settings.preference"),
    **dict.fromkeys(("AWRSettings", "RSSFTSettings"), "llmlab.settings.offline"),
    **dict.fromkeys(("GRPOSettings", "PPOSettings"), "llmlab.settings.rl"),
    **dict.fromkeys(("generate_text", "load_for_inference"), "llmlab.inference"),
    "MergeSettings": "llmlab.settings.lora",
    "ModelSettings": "llmlab.settings.model",
    "PretrainSettings": "llmlab.settings.pretrain",
    "SFTSettings": "llmlab.settings.training",
    "TokenizerSettings": "llmlab.settings.data",
    "awr": "llmlab.training.offline.awr",
    "dpo": "llmlab.training.preference.dpo",
    "grpo": "llmlab.training.online.grpo",
    "load": "llmlab.settings.sources",
    "merge": "llmlab.training.merge",
    "orpo": "llmlab.training.preference.orpo",
    "ppo": "llmlab.training.online.ppo",
    "pretrain": "llmlab.training.pretrain",
    "reward": "llmlab.training.preference.reward",
    "rs_sft": "llmlab.training.offline.rs_sft",
    "sft": "llmlab.training.sft",
    "train_tokenizer": "llmlab.training.tokenizer",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlab' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
