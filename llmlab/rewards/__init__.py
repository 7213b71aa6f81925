"""Rewards: what a completion is worth, as functions that TRL's trainers, YAML files and notebooks all take.

A reward is called with the completions of a batch (texts, or lists of messages) and every column of the data set as a
keyword list, and returns one number a completion, or None where it does not apply. Parameters are keyword-only:
`functools.partial(length, target=200)` in Python, `{name: length, target: 200}` in YAML. None of them ever executes
what a model wrote, and none but `reward_model` imports torch. Weights and bounds are `compose`'s business.
"""

from importlib import import_module
from typing import Any

REWARDS = {
    "json_valid": "llmlab.rewards.structured:json_valid",
    "schema_pass": "llmlab.rewards.structured:schema_pass",
    "tool_success": "llmlab.rewards.tools:tool_success",
    "lint_pass": "llmlab.rewards.python:lint_pass",
    "ast_correct": "llmlab.rewards.python:ast_correct",
    "guardrail_pass": "llmlab.rewards.guardrails:guardrail_pass",
    "verbosity_penalty": "llmlab.rewards.tools:verbosity_penalty",
    "off_policy_penalty": "llmlab.rewards.tools:off_policy_penalty",
    "exact_match": "llmlab.rewards.matching:exact_match",
    "numeric_match": "llmlab.rewards.numeric:numeric_match",
    "regex_match": "llmlab.rewards.matching:regex_match",
    "length": "llmlab.rewards.shape:length",
    "repetition_penalty": "llmlab.rewards.shape:repetition_penalty",
    "reward_model": "llmlab.rewards.learned:RewardModel",
}

WEIGHTS = {
    "json_valid": 1.0,
    "schema_pass": 1.0,
    "tool_success": 1.0,
    "lint_pass": 1.0,
    "ast_correct": 0.5,
    "guardrail_pass": 2.0,
    "verbosity_penalty": -0.1,
    "off_policy_penalty": -0.5,
    "repetition_penalty": -1.0,
}
"""Default weights, 1 for every other. Source: seed, RL guide, section 3, `reward_weights`; the last is ours."""

RANGES: dict[str, tuple[float | str, float | str]] = {
    "guardrail_pass": ("violation", 1.0),
    "verbosity_penalty": (0.0, "most"),
}
"""Smallest and largest value where that is not 0 and 1; a word is the parameter that says it."""

_FUNCTIONS = {path.partition(":")[2]: path for path in (*REWARDS.values(), "llmlab.rewards.reward:Reward")}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'llmlab.rewards' has no attribute '{name}'")
    module, _, attribute = _FUNCTIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return ["RANGES", "REWARDS", "WEIGHTS", *_FUNCTIONS]
