"""Draws completions or episodes of prompts and scores them, as `data/samples.py` keeps them.

What is sampled depends on the seed and the prompts alone: not on the number of processes, nor on where a run was
killed. Nothing is trained here.
"""

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmlab.data.samples import Prompt, Sample
from llmlab.episodes import Task, play
from llmlab.inference import Model, context_length, encode_prompt, end_tokens, generate_tokens
from llmlab.rewards.compose import ComposedReward
from llmlab.rewards.function import TRL_INPUTS
from llmlab.settings.errors import UserError
from llmlab.settings.generation import SamplingSettings

ENVIRONMENT = "environment"  # the reward of an environment itself; its components have this and a slash before them
Generate = Callable[[list[list[int]]], list[list[int]]]
Fill = Callable[[list[Sample]], None]
"""Adds the completions to samples that have a prompt."""


def draw_samples(
    prompts: Mapping[int, Prompt],
    tokenizer: PreTrainedTokenizerBase,
    fill: Fill,
    *,
    num_samples: int,
    seed: int,
    batch_size: int = 32,
    done: Collection[int] = (),
    share: tuple[int, int] = (0, 1),
) -> Iterator[list[Sample]]:
    """Yields the samples of each prompt, without rewards.

    Prompts of like length are sampled together, always the same ones, from a seed of their own.

    Args:
        prompts: by their number.
        tokenizer: with the chat template of the prompts.
        fill: adds the completions.
        num_samples: completions of each prompt.
        seed: of all prompts.
        batch_size: completions sampled at the same time.
        done: numbers of prompts that have their samples.
        share: of processes that share the work this one's index, and their number.
    """
    ids = {number: encode_prompt(tokenizer, prompt.messages, prompt.tools) for number, prompt in prompts.items()}
    order, size = sorted(prompts, key=lambda number: (len(ids[number]), number)), max(batch_size // num_samples, 1)
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    for batch in batches[share[0] :: share[1]]:
        if all(number in done for number in batch):
            continue
        samples = [
            Sample(
                prompt_id=number,
                sample=k,
                prompt=prompts[number].messages,
                tools=prompts[number].tools,
                columns=prompts[number].columns,
                prompt_ids=ids[number],
            )
            for number in batch
            for k in range(num_samples)
        ]
        torch.manual_seed(random.Random(f"{seed} {batch}").getrandbits(63))
        fill(samples)
        for first in range(0, len(samples), num_samples):
            if samples[first].prompt_id not in done:
                yield samples[first : first + num_samples]


def complete(
    samples: list[Sample], generate: Generate, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> None:
    """Adds one completion to each sample."""
    for sample, ids in zip(samples, generate([sample.prompt_ids for sample in samples]), strict=True):
        sample.completion_ids, sample.ended = ids, ids[-1] in ends
        sample.completion = [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]


def play_episodes(
    samples: list[Sample],
    generate: Generate,
    tokenizer: PreTrainedTokenizerBase,
    make_environment: Callable[[dict[str, Any]], Any],
    settings: Any,
    max_length: int | None,
) -> None:
    """Adds one episode to each sample, in an environment made for its columns, with the environment's rewards."""
    tasks = [Task(make_environment(sample.columns), sample.prompt, sample.columns) for sample in samples]
    episodes = play(
        tasks,
        generate,
        tokenizer,
        max_episode_length=settings.max_episode_length,
        max_new_tokens=settings.max_new_tokens,
        max_length=max_length,
        tool_timeout=settings.tool_timeout,
    )
    for sample, episode in zip(samples, episodes, strict=True):
        environment = episode.environment
        for name in ("prompt", "prompt_ids", "completion", "completion_ids", "mask", "calls"):
            setattr(sample, name, getattr(episode, name))
        sample.ended, sample.success = episode.end != "length", getattr(environment, "success", None)
        total, bounds = float(environment.get_reward()), getattr(environment, "reward_range", None)
        if settings.normalize_rewards and bounds is not None:
            total = (total - bounds[0]) / (bounds[1] - bounds[0])
        parts = getattr(environment, "rewards", {})
        sample.rewards = {f"{ENVIRONMENT}/{name}": value for name, value in parts.items()} | {ENVIRONMENT: total}


def score_samples(samples: Sequence[Sample], reward: ComposedReward | None) -> None:
    """Sets the rewards of one prompt's samples; an environment's own stays as it was recorded, and is added."""
    totals: list[float | None] = [None] * len(samples)
    own = [{name: v for name, v in each.rewards.items() if name.partition("/")[0] == ENVIRONMENT} for each in samples]
    if reward is not None:
        columns = {name: [sample.columns.get(name) for sample in samples] for name in samples[0].columns}
        inputs = {
            "prompts": [sample.prompt for sample in samples],
            "completion_ids": [sample.completion_ids for sample in samples],
        }
        columns = {name: values for name, values in columns.items() if name not in TRL_INPUTS}
        totals, components = reward.score([sample.completion for sample in samples], **inputs, **columns)
        own = [{**{name: components[name][k] for name in components}, **each} for k, each in enumerate(own)]
    for sample, total, rewards in zip(samples, totals, own, strict=True):
        known = [value for value in (total, rewards.get(ENVIRONMENT)) if value is not None]
        sample.rewards, sample.reward = rewards, sum(known) if known else None


def generate_with(
    model: Model, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings, dtype: torch.dtype = torch.float32
) -> Generate:
    """Returns what samples from a model, computing in a dtype."""

    def generate(rows: list[list[int]]) -> list[list[int]]:
        half = dtype != torch.float32
        with torch.autocast(model.device.type, dtype=dtype) if half else nullcontext():
            return generate_tokens(model, tokenizer, rows, sampling)

    return generate


def generate_with_vllm(source: str, model: Model, tokenizer: PreTrainedTokenizerBase, settings: Any) -> Generate:
    """Returns what samples with vLLM from the model of a folder or hub id."""
    if find_spec("vllm") is None:
        raise UserError("use_vllm = true: vLLM is not installed: pip install vllm (it needs a GPU)")
    from vllm import LLM, SamplingParams

    engine, context = LLM(model=source, seed=settings.seed), context_length(model)

    def generate(rows: list[list[int]]) -> list[list[int]]:
        options = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k or -1,
                repetition_penalty=settings.repetition_penalty,
                max_tokens=min(settings.max_new_tokens, (context or 10**9) - len(row)),
                stop_token_ids=sorted(end_tokens(model, tokenizer)),
                seed=int(torch.randint(2**31, ())),
            )
            for row in rows
        ]
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], options, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
