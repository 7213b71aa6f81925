"""Draws completions or episodes of prompts and scores them, as `data/samples.py` keeps them. What is sampled depends
on seed and prompts alone: not on the number of processes, nor on where a run was killed."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmlab.data.samples import Prompt, Sample, group_samples
from llmlab.episodes import NO_TURN, Sampler, Task, play
from llmlab.inference import encode_prompt
from llmlab.rewards.compose import ComposedReward
from llmlab.rewards.function import TRL_INPUTS
from llmlab.settings.errors import UserError, reading
from llmlab.simulator.environment import schemas_of

PLAYED = ("prompt", "prompt_ids", "completion", "completion_ids", "mask", "calls")  # of samples and episodes


def make_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Mapping[int, Prompt], num_samples: int, batch_size: int = 32
) -> list[list[Sample]]:
    """Returns samples of the prompts, still without completions, in batches of like length, always the same ones."""
    groups = []
    for number, (messages, columns, tools) in prompts.items():
        ids = encode_prompt(tokenizer, messages, tools)
        values = {"prompt": messages, "columns": columns, "tools": tools, "prompt_ids": ids}
        groups.append([Sample(prompt_id=number, sample=k, **values) for k in range(num_samples)])
    groups.sort(key=lambda group: (len(group[0].prompt_ids), group[0].prompt_id))
    size = max(batch_size // num_samples, 1)
    return [sum(groups[first : first + size], []) for first in range(0, len(groups), size)]


def draw(
    batch: Sequence[Sample], fill: Callable[[Sequence[Sample]], None], reward: ComposedReward, seed: int
) -> list[list[Sample]]:
    """Adds to a batch what `fill` samples, the same whatever was sampled before it, and rewards; by prompt."""
    torch.manual_seed(random.Random(f"{seed} {batch[0].prompt_id}").getrandbits(63))
    fill(batch)
    groups = group_samples(batch)
    for group in groups:
        score_samples(group, reward)
    return groups


def complete(
    samples: Sequence[Sample], sample: Sampler, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> None:
    """Adds the completions."""
    for each, ids in zip(samples, sample([each.prompt_ids for each in samples]), strict=True):
        each.completion_ids, each.ended = ids, ids[-1] in ends
        each.completion = [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]


def play_episodes(
    samples: Sequence[Sample], *options: Any, factories: Mapping[str | None, Callable[[], Any]], **limits: Any
) -> None:
    """Adds episodes, each in an environment of its own, as the row's column `environment` says; the rest of `play`."""
    names = [None if None in factories else each.columns.get("environment") for each in samples]
    if unknown := {*names} - factories.keys():
        raise UserError(f"environment: a row names {unknown.pop()}; expected one of {', '.join(map(str, factories))}")
    tasks = [
        Task(factories[name](), each.prompt, each.columns, each.prompt_id)
        for name, each in zip(names, samples, strict=True)
    ]
    for each, episode in zip(samples, play(tasks, *options, **limits), strict=True):
        world = episode.environment
        values = {"ended": episode.end != "length", "success": getattr(world, "success", None)}
        for name, value in {**{name: getattr(episode, name) for name in PLAYED}, **values}.items():
            setattr(each, name, value)
        each.completion, each.tools = each.completion or [NO_TURN], schemas_of(type(world))
        with reading(f"environment {type(world).__name__}: its reward", "a number"):
            parts = {name: float(value) for name, value in getattr(world, "rewards", {}).items()}
            bounds = getattr(world, "reward_range", None)
            bounds = bounds and tuple(map(float, bounds))
            each.environment = {"reward": float(world.get_reward()), "reward_range": bounds, "rewards": parts}


def score_samples(samples: Sequence[Sample], reward: ComposedReward) -> None:
    """Sets the rewards of one prompt's samples; what an environment gave is as it was recorded."""
    worlds = [each.environment or {} for each in samples]
    scores = reward.score(
        [each.completion for each in samples],
        prompts=[each.prompt for each in samples],
        completion_ids=[each.completion_ids for each in samples],
        environments=[
            SimpleNamespace(**world, done=True, success=each.success, get_reward=partial(world.get, "reward"))
            for each, world in zip(samples, worlds, strict=True)
        ],
        **{name: [each.columns.get(name) for each in samples] for name in {*samples[0].columns} - {*TRL_INPUTS}},
    )
    for k, (each, world) in enumerate(zip(samples, worlds, strict=True)):
        parts = {f"environment/{name}": value for name, value in world.get("rewards", {}).items()}
        each.rewards = {name: values[k] for name, values in scores.components.items()} | parts
        each.reward = scores.totals[k]


def vllm_sampler(source: str, ends: Collection[int], seed: int, **options: Any) -> Sampler:
    """Returns what samples with vLLM, by its own `options`, from the model of a folder or hub id."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=source, seed=seed)

    def sample(rows: list[list[int]]) -> list[list[int]]:
        seeded = [
            SamplingParams(**options, stop_token_ids=sorted(ends), seed=int(torch.randint(2**31, ()))) for _ in rows
        ]
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], seeded, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return sample
