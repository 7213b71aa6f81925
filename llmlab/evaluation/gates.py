"""Gates: scores of a model's completions of held-out prompts, compared with thresholds and with another model's.

The same functions run after training (`llmlab evaluate`) and during it (`runs/gates.py`). Scores of single completions
are those of `llmlab.rewards`; what a difference means is `statistics.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.rendering import check_tools, encode_prompt
from llmlab.data.sources import Tally, load_text
from llmlab.evaluation.perplexity import text_losses
from llmlab.evaluation.statistics import Array, compare, distinct_n, self_similarity
from llmlab.inference import Model, context_length, generate_tokens
from llmlab.rewards import REWARDS
from llmlab.rewards.function import Reward
from llmlab.rewards.loading import check_parameters, load_rewards
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.gates import GateSettings

PROMPT_TOKENS = 32  # of a text that a model which does not chat continues
NEAR_ZERO = 0.1  # of the range of a score: nearer to 0, losses are shares of this instead of the baseline's score


class Example(NamedTuple):
    """What is asked: the prompt's token ids, its text or messages, and the row's other columns."""

    ids: list[int]
    prompt: Any
    columns: dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A gate that can be measured: the reward that it is, or the parameters of another score, and its examples."""

    label: str
    settings: GateSettings
    reward: Reward | None
    parameters: dict[str, Any]
    examples: list[Any]  # texts for perplexity

    @property
    def sign(self) -> int:
        """1 where higher scores are better, else -1."""
        lower = self.reward.weight < 0 if self.reward else self.settings.name in ("perplexity", "self_similarity")
        return -1 if lower else 1

    def score(self, mean: float) -> float:
        """Returns the score of a mean over prompts: the exponential for perplexity."""
        return math.exp(min(mean, 700.0)) if self.settings.name == "perplexity" else mean


class Scores(NamedTuple):
    """Weight x score, and weight, of each prompt, both (prompts,); the weight is 0 where the score does not apply."""

    values: Array
    weights: Array

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum()) if self.weights.any() else math.nan


class Verdict(NamedTuple):
    """A gate's score, its change as a share of the baseline's score, and why the gate fails, if it does.

    The interval from `low` to `high` is the change's, or without a baseline the score's.
    """

    gate: str
    prompts: int
    score: float
    baseline: float | None
    change: float | None
    low: float
    high: float
    needed: int | None
    failures: list[str]


def play_tasks(
    examples: list[Example],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Callable[[list[list[int]]], list[list[int]]],
    max_new_tokens: int,
    *,
    environment: str = "simulator",
    max_episode_length: int = 20,
    tool_timeout: float = 30.0,
) -> Array:
    """Returns 1 for each task that an episode solves, else 0, (tasks,)."""
    from llmlab.episodes import Task, play
    from llmlab.simulator.loading import load_environment

    make = load_environment(environment)
    episodes = play(
        [Task(make(), example.prompt, example.columns) for example in examples],
        sample,
        tokenizer,
        max_episode_length=max_episode_length,
        max_new_tokens=max_new_tokens,
        max_length=context_length(model),
        tool_timeout=tool_timeout,
    )
    return np.array([float(episode.environment.success is True) for episode in episodes])


SCORES: dict[str, Callable[..., Any]] = {  # those that are no rewards
    "perplexity": text_losses,
    "distinct_n": distinct_n,
    "self_similarity": self_similarity,
    "episode_success": play_tasks,
}


def load_gates(
    settings: Sequence[GateSettings],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chats: bool,
    context: int | None,
    default: DataSource | None = None,
    allow_code: bool = False,
) -> list[Gate]:
    """Returns gates with their prompts read, of the `default` source where they name none; `chats` says that the model
    answers messages, `context` is its longest sequence."""
    read: dict[str, list[Any]] = {}
    gates: list[Gate] = []
    for entry in settings:
        name, source = entry.name, entry.prompts or default
        if name not in SCORES and name not in REWARDS and ".py:" not in name:
            raise UserError(f"gate '{name}': there is no such score{did_you_mean(name, [*SCORES, *REWARDS])}")
        own = SCORES.get(name)
        parameters = check_parameters(own, entry.parameters, custom=False) if own else {}
        reward = None if own else load_rewards([{"name": name, "parameters": entry.parameters}], allow_code)[0]
        if source is None:
            raise UserError(f"gate '{name}': it has no prompts; expected a source of held-out ones (prompts: ...)")
        key = str((name == "perplexity", source, entry.n))
        if key not in read:
            texts = name == "perplexity"
            found = read_texts(source) if texts else read_prompts(source, tokenizer, chats=chats, context=context)
            read[key] = list(islice(found, entry.n))
        count = sum(gate.settings.name == name for gate in gates)
        gates.append(Gate(f"{name}_{count + 1}" if count else name, entry, reward, parameters, read[key]))
    return gates


def read_texts(source: DataSource) -> Iterator[str]:
    """Yields the texts of a source, of which there must be one."""
    tally = Tally()
    yield from load_text(source).texts(tally)
    tally.check(source.name, 1.0)


def read_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, *, chats: bool, context: int | None
) -> Iterator[Example]:
    """Yields the prompts of a source that fit the context; a model that does not chat gets beginnings of texts."""
    if not chats:
        for text in read_texts(source):
            ids = tokenizer(text)["input_ids"][:PROMPT_TOKENS]
            yield Example(ids, tokenizer.decode(ids), {})
        return
    tally = Tally()
    for row in load_conversations(source, "prompts or text").conversations(tally):
        tools = row["tools"]
        try:
            ids, prompt = encode_prompt(tokenizer, row["prompt"], tools)
            check_tools(tokenizer.decode(ids), prompt, tools)
            if context is not None and len(ids) >= context:
                raise UnusableRow(f"longer than the model's context of {context:,} tokens")
        except UnusableRow as reason:
            tally.documents -= 1
            tally.dropped[str(reason)] += 1
        else:
            yield Example(ids, prompt, row["columns"] | ({"tools": tools} if tools else {}))
    tally.check(source.name, 1.0)


def measure(
    gates: Sequence[Gate],
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    batch_size: int = 16,
    most: int | None = None,
) -> dict[str, Scores]:
    """Returns each gate's scores of a model in evaluation mode, on the first `most` prompts (None: all).

    Gates that ask the same share their completions. Draws from the global random state.
    """
    scores: dict[str, Scores] = {}
    sampled: dict[str, list[str]] = {}
    for gate in gates:
        entry, examples = gate.settings, gate.examples[:most]
        if entry.name == "perplexity":
            scores[gate.label] = Scores(*text_losses(model, tokenizer, examples))
            continue

        def sample(rows: list[list[int]], entry: GateSettings = entry) -> list[list[int]]:
            return list(generate_tokens(model, tokenizer, rows, entry.sampling, seed=seed, batch_size=batch_size))

        repeated = [example for example in examples for _ in range(entry.num_samples)]
        if entry.name == "episode_success":
            found = play_tasks(repeated, model, tokenizer, sample, entry.max_new_tokens, **gate.parameters)
        else:
            key = str((id(gate.examples), entry.num_samples, entry.sampling))
            if key not in sampled:
                ids = sample([example.ids for example in repeated])
                sampled[key] = tokenizer.batch_decode(ids, skip_special_tokens=True)
            found = score_texts(gate, repeated, sampled[key])
        values = np.array(found, float).reshape(-1, entry.num_samples)  # NaN where the score does not apply
        counts = np.isfinite(values).sum(1)
        scores[gate.label] = Scores(np.nansum(values, 1) / np.maximum(counts, 1), (counts > 0).astype(float))
    return scores


def score_texts(gate: Gate, examples: Sequence[Example], texts: list[str]) -> Any:
    """Returns a number, or None, for each completion."""
    if gate.reward is None:
        return SCORES[gate.settings.name](texts, **gate.parameters)
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    chats = bool(examples) and isinstance(examples[0].prompt, list)
    completions = [[{"role": "assistant", "content": text}] if chats else text for text in texts]
    return gate.reward(completions, **{**columns, "prompts": [example.prompt for example in examples]})


def judge(
    gate: Gate, scores: Scores, baseline: Scores | None = None, *, tests: int = 1, seed: int = 0, **options: Any
) -> Verdict:
    """Returns what scores say of a gate's thresholds, and of the baseline's scores of the same prompts; `tests` counts
    the gates that are judged together."""
    entry, pair = gate.settings, [scores, scores if baseline is None else baseline]
    used = (pair[0].weights > 0) & (pair[1].weights > 0)
    if not used.any():
        return Verdict(gate.label, 0, math.nan, None, None, math.nan, math.nan, None, ["it applies to no prompt"])
    is_perplexity, score = entry.name == "perplexity", gate.score(scores.mean)
    if is_perplexity and not np.array_equal(pair[0].weights, pair[1].weights):
        raise UserError("perplexity: the baseline has another tokenizer, so that losses per token cannot be compared")
    failures = [f"below min = {entry.min:g}"] if entry.min is not None and score < entry.min else []
    failures += [f"above max = {entry.max:g}"] if entry.max is not None and score > entry.max else []
    weights = scores.weights[used]
    each = np.concatenate([one.values[used] / one.weights[used] for one in pair])
    known = gate.reward is not None and None not in (gate.reward.low, gate.reward.high)
    spread = gate.reward.high - gate.reward.low if known else float(np.ptp(each))  # type: ignore[union-attr,operator]
    scale = max(abs(pair[1].mean), NEAR_ZERO * spread) or 1.0
    options |= {"tests": tests, "seed": seed}
    options["tolerance"] = math.log1p(entry.regression) if is_perplexity else entry.regression * scale
    if baseline is None:  # needed are as many prompts as it takes where both models' scores are independent
        found = compare(scores.values[used], weights, largest=0.0, **options)
        ends = gate.score(found.low), gate.score(found.high)
        return Verdict(gate.label, int(used.sum()), score, None, None, *ends, 2 * found.needed, failures)
    differences = gate.sign * (scores.values - baseline.values)[used]
    largest = np.abs(differences).max() or spread * weights.mean()
    found = compare(differences, weights, largest=largest, **options)
    change, *ends = (math.expm1(-d) if is_perplexity else gate.sign * d / scale + 0.0 for d in found[:3])
    if found.regressed:
        failures.append(f"regressed by {abs(change):.1%}")
    before = gate.score(baseline.mean)
    return Verdict(gate.label, int(used.sum()), score, before, change, *sorted(ends), found.needed, failures)
