"""Gates: scores of a model's completions of held-out prompts, compared with thresholds and with another model's.

The same functions run after training (`llmlab evaluate`) and during it (`runs/gates.py`). Scores of single completions
are those of `llmlab.rewards`; what a difference means is `statistics.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.rendering import check_tools, encode_prompt
from llmlab.data.sources import Tally, load_rows, load_text
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
    """A gate that can be measured: its settings, the reward that it is (None for other scores), and its examples."""

    label: str
    settings: GateSettings
    reward: Reward | None
    parameters: dict[str, Any]
    examples: list[Any]  # texts for perplexity

    @property
    def higher_is_better(self) -> bool:
        lower = self.reward.weight < 0 if self.reward else self.settings.name in ("perplexity", "self_similarity")
        return not lower

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
    """A gate's score, what became of it against the baseline, and why the gate fails, if it does.

    `change` and its interval, `low` to `high`, are shares of the baseline's score; without one they are of the score.
    `needed` are the prompts at which a regression is found.
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
    settings: GateSettings,
    *,
    environment: str = "simulator",
    max_episode_length: int = 20,
    tool_timeout: float = 30.0,
) -> Scores:
    """Returns the share of episodes of each task that solve it."""
    from llmlab.episodes import Task, play
    from llmlab.simulator.loading import load_environment

    make, count = load_environment(environment), settings.num_samples
    episodes = play(
        [Task(make(), example.prompt, example.columns) for example in examples for _ in range(count)],
        sample,
        tokenizer,
        max_episode_length=max_episode_length,
        max_new_tokens=settings.max_new_tokens,
        max_length=context_length(model),
        tool_timeout=tool_timeout,
    )
    solved = np.array([float(episode.environment.success is True) for episode in episodes])
    return Scores(solved.reshape(-1, count).mean(1), np.ones(len(examples)))


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
    """Returns gates with their prompts read.

    Args:
        settings: the gates.
        tokenizer: of the model that will be measured.
        chats: whether it answers messages; else it continues texts.
        context: its longest sequence, in tokens; longer prompts are left out.
        default: the source of prompts of gates that name none.
        allow_code: load rewards from Python files, which runs these files.
    """
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
            found = read_texts(source) if name == "perplexity" else read_prompts(source, tokenizer, chats, context)
            read[key] = list(islice(found, entry.n))
        count = sum(gate.settings.name == name for gate in gates)
        gates.append(Gate(f"{name}_{count + 1}" if count else name, entry, reward, parameters, read[key]))
    return gates


def read_texts(source: DataSource) -> Iterator[str]:
    """Yields the texts of a source, which has some."""
    tally = Tally()
    yield from load_text(source).texts(tally)
    tally.check(source.name, 1.0)


def read_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, chats: bool, context: int | None
) -> Iterator[Example]:
    """Yields the prompts of a source that fit: of conversations, or for a model that does not chat its column `prompt`
    or the beginnings of its texts."""
    tally = Tally()
    if chats:
        found = load_conversations(source, "prompts or text").conversations(tally)
    elif "prompt" in (rows := load_rows(source, "text")).first()[0]:
        found = ({"prompt": str(row["prompt"]), "columns": row} for row in rows.rows)
    else:
        starts = (tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in read_texts(source))
        found = ({"prompt": tokenizer.decode(ids), "columns": {}} for ids in starts)
    usable = 0
    for row in found:
        prompt, columns, tools = row["prompt"], row["columns"], row.get("tools")
        try:
            if chats:
                ids, prompt = encode_prompt(tokenizer, prompt, tools)
                check_tools(tokenizer.decode(ids), prompt, tools)
            else:
                ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
            if context is not None and len(ids) >= context:
                raise UnusableRow(f"longer than the model's context of {context:,} tokens")
        except UnusableRow as reason:
            tally.dropped[str(reason)] += 1
        else:
            usable += 1
            yield Example(ids, prompt, columns | ({"tools": tools} if tools else {}))
    tally.documents = usable
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
    sampled: dict[str, list[list[str]]] = {}
    for gate in gates:
        entry, examples = gate.settings, gate.examples[:most]

        def sample(rows: list[list[int]], entry: GateSettings = entry) -> list[list[int]]:
            return list(generate_tokens(model, tokenizer, rows, entry.sampling, seed=seed, batch_size=batch_size))

        if entry.name == "perplexity":
            scores[gate.label] = Scores(*text_losses(model, tokenizer, examples))
        elif entry.name == "episode_success":
            scores[gate.label] = play_tasks(examples, model, tokenizer, sample, entry, **gate.parameters)
        else:
            count = entry.num_samples
            key = str((id(gate.examples), count, entry.sampling))
            if key not in sampled:
                rows = [example.ids for example in examples for _ in range(count)]
                texts = iter(tokenizer.batch_decode(sample(rows), skip_special_tokens=True))
                sampled[key] = [list(islice(texts, count)) for _ in examples]
            scores[gate.label] = _score(gate, examples, sampled[key])
    return scores


def _score(gate: Gate, examples: list[Example], completions: list[list[str]]) -> Scores:
    """Returns a gate's scores of the completions of each prompt."""
    if gate.reward is None:
        values = SCORES[gate.settings.name](completions, **gate.parameters)
        return Scores(values, np.ones(len(values)))
    pairs = [(example, text) for example, samples in zip(examples, completions, strict=True) for text in samples]
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [example.columns.get(name) for example, _ in pairs] for name in names}
    answers = [[{"role": "assistant", "content": text}] if isinstance(e.prompt, list) else text for e, text in pairs]
    found = iter(gate.reward(answers, **{**columns, "prompts": [example.prompt for example, _ in pairs]}))
    rows = [[value for value in islice(found, len(samples)) if value is not None] for samples in completions]
    return Scores(
        np.array([sum(row) / max(len(row), 1) for row in rows]), np.array([float(bool(row)) for row in rows])
    )


def judge(
    gate: Gate, scores: Scores, baseline: Scores | None = None, *, tests: int = 1, seed: int = 0, **options: Any
) -> Verdict:
    """Returns what scores say of a gate's thresholds, and of the baseline's scores of the same prompts.

    `tests` counts the gates that are judged together; `options` are those of `compare`.
    """
    entry, pair = gate.settings, [scores] if baseline is None else [scores, baseline]
    is_perplexity, sign = entry.name == "perplexity", 1 if gate.higher_is_better else -1
    used = np.all([each.weights > 0 for each in pair], axis=0)
    if not used.any():
        return Verdict(gate.label, 0, math.nan, None, None, math.nan, math.nan, None, ["it applies to no prompt"])
    if is_perplexity and not np.array_equal(scores.weights, pair[-1].weights):
        raise UserError("perplexity: the baseline has another tokenizer, so that losses per token cannot be compared")
    score = gate.score(scores.mean)
    failures = [f"below min = {entry.min:g}"] if entry.min is not None and score < entry.min else []
    failures += [f"above max = {entry.max:g}"] if entry.max is not None and score > entry.max else []
    weights = scores.weights[used]
    means = np.concatenate([(each.values[used] / each.weights[used]) for each in pair])
    bounds = (gate.reward.low, gate.reward.high) if gate.reward else (None, None)
    spread = float(np.ptp(means)) if None in bounds else bounds[1] - bounds[0]
    scale = max(abs(pair[-1].mean), NEAR_ZERO * spread) or 1.0
    tolerance = math.log1p(entry.regression) if is_perplexity else entry.regression * scale
    judged = partial(compare, tolerance=tolerance, tests=tests, seed=seed, **options)
    if baseline is None:  # as many prompts as two models take whose scores are independent
        found = judged(scores.values[used], weights, largest=0.0)
        low, high = gate.score(found.low), gate.score(found.high)
        return Verdict(gate.label, int(used.sum()), score, None, None, low, high, 2 * found.needed, failures)
    differences = sign * (scores.values - baseline.values)[used]
    found = judged(differences, weights, largest=np.abs(differences).max() or spread * weights.mean())
    change, low, high = (math.expm1(-d) if is_perplexity else sign * d / scale for d in found[:3])
    if found.regressed:
        failures.append(f"regressed by {abs(change):.1%}")
    before, ends = gate.score(baseline.mean), sorted((low, high))
    return Verdict(gate.label, int(used.sum()), score, before, change, *ends, found.needed, failures)
