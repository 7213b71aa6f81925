"""Draws completions or episodes of prompts and scores them, as `data/samples.py` keeps them.

What is sampled depends on seed and prompts alone: not on the number of processes, nor on where a run was killed.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmlab.data.samples import Prompt, Sample
from llmlab.episodes import Sampler, Task, play
from llmlab.inference import Model, encode_prompt, end_tokens
from llmlab.rewards.compose import ComposedReward
from llmlab.rewards.function import TRL_INPUTS
from llmlab.settings.errors import UserError


def make_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Mapping[int, Prompt], num_samples: int, batch_size: int = 32
) -> list[list[Sample]]:
    """Returns samples of the prompts, still without completions, in batches of like length, always the same ones."""
    ids = {number: encode_prompt(tokenizer, prompt.messages, prompt.tools) for number, prompt in prompts.items()}
    order, size = sorted(prompts, key=lambda number: (len(ids[number]), number)), max(batch_size // num_samples, 1)

    def make(number: int, k: int) -> Sample:
        messages, columns, tools = prompts[number]
        values = {"prompt": messages, "columns": columns, "tools": tools, "prompt_ids": ids[number]}
        return Sample(prompt_id=number, sample=k, **values)

    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [[make(number, k) for number in batch for k in range(num_samples)] for batch in batches]


def seed_batch(batch: Sequence[Sample], seed: int) -> None:
    """Seeds torch for a batch, whatever was sampled before it."""
    torch.manual_seed(random.Random(f"{seed} {batch[0].prompt_id}").getrandbits(63))


def complete(
    samples: Sequence[Sample], sample: Sampler, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> None:
    """Adds the completions."""
    for each, ids in zip(samples, sample([each.prompt_ids for each in samples]), strict=True):
        each.completion_ids, each.ended = ids, ids[-1] in ends
        each.completion = [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]


def play_episodes(
    samples: Sequence[Sample],
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    factories: Mapping[str | None, Callable[[], Any]],
    **limits: Any,
) -> None:
    """Adds episodes, each in an environment of its own, as the row's column `environment` says."""
    names = [None if None in factories else each.columns.get("environment") for each in samples]
    if unknown := {*names} - factories.keys():
        expected = ", ".join(map(str, factories))
        raise UserError(f"environment = {unknown.pop()}: a row of the data names none of {expected}")
    tasks = [Task(factories[name](), each.prompt, each.columns) for name, each in zip(names, samples, strict=True)]
    for each, episode in zip(samples, play(tasks, sample, tokenizer, **limits), strict=True):
        for name in ("prompt", "prompt_ids", "completion", "completion_ids", "mask", "calls"):
            setattr(each, name, getattr(episode, name))
        world = episode.environment
        each.ended, each.success = episode.end != "length", getattr(world, "success", None)
        parts, bounds = dict(getattr(world, "rewards", {})), getattr(world, "reward_range", None)
        each.environment = {"reward": float(world.get_reward()), "reward_range": bounds, "rewards": parts}


def score_samples(samples: Sequence[Sample], reward: ComposedReward) -> None:
    """Sets the rewards of one prompt's samples; what an environment gave is as it was recorded."""
    worlds = [each.environment or {} for each in samples]
    columns: dict[str, Any] = {
        name: [each.columns.get(name) for each in samples] for name in samples[0].columns if name not in TRL_INPUTS
    }
    columns["prompts"] = [each.prompt for each in samples]
    columns["completion_ids"] = [each.completion_ids for each in samples]
    columns["environments"] = [SimpleNamespace(**world, get_reward=partial(world.get, "reward")) for world in worlds]
    scores = reward.score([each.completion for each in samples], **columns)
    for k, (each, world) in enumerate(zip(samples, worlds, strict=True)):
        parts = {f"environment/{name}": value for name, value in world.get("rewards", {}).items()}
        each.rewards = {name: values[k] for name, values in scores.components.items()} | parts
        each.reward = scores.totals[k]


def vllm_sampler(model: Model, tokenizer: PreTrainedTokenizerBase, settings: Any) -> Sampler:
    """Returns what samples with vLLM from the policy of the settings."""
    if find_spec("vllm") is None:
        raise UserError("use_vllm = true: vLLM is not installed: pip install vllm (it needs a GPU)")
    from vllm import LLM, SamplingParams

    names = ("temperature", "top_p", "repetition_penalty")
    options = {name: getattr(settings, name) for name in names} | {"top_k": settings.top_k or -1}
    options |= {"max_tokens": settings.max_new_tokens, "stop_token_ids": sorted(end_tokens(model, tokenizer))}
    engine = LLM(model=settings.policy_checkpoint, seed=settings.seed)

    def sample(rows: list[list[int]]) -> list[list[int]]:
        seeded = [SamplingParams(**options, seed=int(torch.randint(2**31, ()))) for _ in rows]
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], seeded, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return sample
