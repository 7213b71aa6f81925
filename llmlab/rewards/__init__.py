"""Rewards: scores of completions, as functions that TRL's trainers, YAML files and notebooks all take. A reward is
called with the completions of a batch (texts, or lists of messages) and the columns of the dataset as lists, and
returns one number a completion, or None where it does not apply. Parameters are keyword-only:
`functools.partial(length, target=200)` in Python, `{name: length, target: 200}` in YAML. None executes model output,
and only a reward model needs torch. `compose` weighs and adds them."""

from typing import Any

from llmlab.rewards.function import Reward
from llmlab.rewards.matching import exact_match, json_valid, numeric_match, regex_match, schema_pass
from llmlab.rewards.python import ast_correct, lint_pass
from llmlab.rewards.reward_model import RewardModel
from llmlab.rewards.shape import guardrail_pass, length, repetition_penalty
from llmlab.rewards.tools import off_policy_penalty, tool_success, verbosity_penalty

GUIDE = (json_valid, schema_pass, tool_success, lint_pass, ast_correct, guardrail_pass)  # of the RL guide, section 3
GUIDE_PENALTIES = (verbosity_penalty, off_policy_penalty)
OTHERS = (exact_match, numeric_match, regex_match, length, repetition_penalty)
REWARDS: dict[str, Any] = {reward.__name__: reward for reward in (*GUIDE, *GUIDE_PENALTIES, *OTHERS)}
REWARDS["reward_model"] = RewardModel

__all__ = ["REWARDS", "Reward", "RewardModel", *REWARDS]
