"""Gates: scores of a model's completions of held-out prompts, compared with thresholds and with another model's. The
same functions run after training (`llmlab evaluate`) and during it (`runs/gates.py`). Scores of single completions are
those of `llmlab.rewards`. What a difference means: the null hypothesis is no change. A regression is called where the
paired bootstrap interval (95 % for all gates together, by Bonferroni) lies below 0, a sign-flip test agrees, and the
loss is at least half of the tolerance: the midpoint between no change and the loss to be found. So small changes pass
even where they are certain, and a model fails against itself in at most 2.5 % of all evaluations. Sources: Efron and
Tibshirani 1993, An Introduction to the Bootstrap; Koehn 2004 (W04-3250); Fisher 1935 (sign flips are exact for any
number of prompts)."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.messages import UnusableRow
from llmlab.data.chat.rendering import check_tools, encode_prompt
from llmlab.data.sources import Tally, load_text
from llmlab.episodes import Sampler, Task, play
from llmlab.inference import Model, context_length, end_tokens, generate_tokens
from llmlab.rewards import REWARDS
from llmlab.rewards.function import Reward
from llmlab.rewards.loading import check_parameters, load_rewards
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.gates import GateSettings
from llmlab.settings.paths import check_inputs
from llmlab.simulator.environment import load_environment

Array = NDArray[np.float64]

BATCH = 16  # completions that are generated at the same time
LONGEST_TEXT = 1024  # tokens of a text whose perplexity is measured
PROMPT_TOKENS = 32  # of a text that a model which does not chat continues
NEAR_ZERO = 0.1  # of the range of a score: nearer to 0, losses are shares of this instead of the baseline's score
ALARM = 0.05  # two-sided, all gates together: regressions are the lower half
POWER = 0.97  # aimed at, so that 0.9 is kept where the spread is only estimated
AT_ONCE = 2_000_000  # numbers drawn


class Comparison(NamedTuple):
    """A mean difference and its interval, whether it is a regression, and the prompts that it takes to find one."""

    delta: float
    low: float
    high: float
    regressed: bool
    needed: int


def compare(
    differences: Array, weights: Array, *, tolerance: float, largest: float, tests: int, seed: int, draws: int = 10_000
) -> Comparison:
    """Returns what paired differences, weight x (score - baseline's score), (prompts,), say; higher is better.
    `tolerance` is the loss to be found with a power of 90 %, `largest` the largest difference of a prompt, which is
    counted once more, since few prompts may show none; `tests` gates are judged together."""
    count, total, level = len(differences), weights.sum(), ALARM / tests
    delta = float(differences.sum() / total)
    draw, means, flips = np.random.default_rng(seed), np.empty(draws), np.empty(draws)
    rows = max(AT_ONCE // count, 1)
    for start in range(0, draws, rows):
        part = slice(start, min(start + rows, draws))
        chosen = draw.integers(count, size=(part.stop - start, count))
        means[part] = differences[chosen].sum(1) / weights[chosen].sum(1)
        flips[part] = (1.0 - 2.0 * draw.integers(2, size=chosen.shape)) @ differences / total
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    p = (1 + (flips <= delta + 1e-9 * abs(delta)).sum()) / (1 + draws)
    variance = (np.square(differences - delta * weights).sum() + largest**2) / count / weights.mean() ** 2
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(POWER)
    fewest = math.ceil(math.log2(2 / level)) + 2  # with fewer, equal signs everywhere are no evidence either
    regressed = bool(high < 0 and p <= level / 2 and delta <= -tolerance / 2)
    needed = max(math.ceil(z**2 * variance / tolerance**2), fewest)
    return Comparison(delta, float(low), float(high), regressed, needed)


def distinct_n(texts: Sequence[str], *, n_gram: int = 2) -> Array:
    """Returns the share of distinct n-grams of words among all n-grams, as values of the texts, whose mean it is.
    Source: Li et al. 2016 (arXiv:1510.03055)."""
    own, everywhere = [], Counter[tuple[str, ...]]()
    for words in map(_words, texts):
        own.append(Counter(zip(*(words[k:] for k in range(n_gram)), strict=False)))
        everywhere.update(own[-1])
    shares = np.array([sum(count / everywhere[gram] for gram, count in each.items()) for each in own])
    return shares * len(texts) / max(everywhere.total(), 1)


def self_similarity(texts: Sequence[str]) -> Array:
    """Returns the mean cosine similarity of the word counts of two texts, as values of the texts, whose mean it is."""
    units, whole = [], Counter[str]()
    for vector in map(Counter, map(_words, texts)):
        norm = math.sqrt(sum(count**2 for count in vector.values()))
        units.append({word: count / norm for word, count in vector.items()})
        whole.update(units[-1])  # type: ignore[arg-type]
    near = np.array([sum(share * whole[word] for word, share in unit.items()) - bool(unit) for unit in units])
    near /= max(len(texts) - 1, 1)
    return 2 * near - near.mean()  # each text is in its own pairs and in the others' (Hoeffding 1948, U-statistics)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Example(NamedTuple):
    """What is asked: token ids, the text (for perplexity the whole one) or messages, and the row's other columns."""

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
    source: Any = None
    examples: Sequence[Example] = ()

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
    """A score, its change against a baseline, the interval (of the change where there is one), and why it fails."""

    gate: str
    prompts: int
    score: float
    low: float = math.nan
    high: float = math.nan
    needed: int | None = None
    failures: tuple[str, ...] = ()
    baseline: float | None = None
    change: float | None = None


@torch.no_grad()
def text_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[int]]) -> list[Array]:
    """Returns the sum of token losses in nats, and the number of tokens, of each text's beginning, both (texts,)."""
    losses, longest = [], min(context_length(model) or LONGEST_TEXT, LONGEST_TEXT)
    for ids in texts:
        first = [] if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.eos_token_id]  # of the document before it
        row = torch.tensor([[*first, *ids][:longest]], device=model.device)  # (1, time)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()  # (time - 1, vocabulary)
        losses.append((cross_entropy(logits, row[0, 1:], reduction="sum").item(), len(logits)))
    return list(np.array(losses, float).reshape(-1, 2).T)


def play_tasks(
    tasks: Sequence[Example],
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, Any],
    *,
    environment: str = "simulator",
    max_episode_length: int = 20,
    tool_timeout: float = 30.0,
) -> list[float]:
    """Returns for each task 1 where an episode solves it, else 0; `load_gates` loads the environment."""
    make: Any = environment
    limits = limits | {"max_episode_length": max_episode_length, "tool_timeout": tool_timeout}
    begun = [Task(make(), task.prompt, task.columns, number) for number, task in enumerate(tasks)]
    episodes = play(begun, sample, tokenizer, **limits)
    return [float(episode.environment.success is True) for episode in episodes]


SCORES: dict[str, Callable[..., Any]] = {  # those that are no rewards
    "perplexity": text_losses,
    "distinct_n": distinct_n,
    "self_similarity": self_similarity,
    "episode_success": play_tasks,
}


def find_gates(
    settings: Sequence[GateSettings], default: DataSource | None = None, *, allow_code: bool = False
) -> list[Gate]:
    """Returns gates whose prompts are yet to be read, of the `default` source where they name none."""
    gates: list[Gate] = []
    for entry in settings:
        name, own = entry.name, SCORES.get(entry.name)
        if not own and name not in REWARDS and ".py:" not in name:
            raise UserError(f"gate '{name}': there is no such score{did_you_mean(name, [*SCORES, *REWARDS])}")
        if not (entry.prompts or default):
            raise UserError(f"gate '{name}': it has no prompts; expected a source of held-out ones (prompts: ...)")
        check_inputs(entry, {"prompts": f"gate '{name}'"})
        parameters = check_parameters(own, entry.parameters, custom=False) if own else {}
        if name == "episode_success":
            parameters["environment"] = load_environment(parameters["environment"], allow_code=allow_code)
        reward = None if own else load_rewards([{"name": name, "parameters": entry.parameters}], allow_code)[0]
        count = sum(gate.settings.name == name for gate in gates)
        label = f"{name}_{count + 1}" if count else name
        gates.append(Gate(label, entry, reward, parameters, entry.prompts or default))
    return gates


def load_gates(gates: list[Gate], tokenizer: PreTrainedTokenizerBase, chats: bool, context: int | None) -> list[Gate]:
    """Returns gates with their prompts read, messages where the model `chats`; `context` is its longest sequence."""
    loaded = []
    for gate in gates:
        whole = gate.settings.name == "perplexity"
        source, tokens, texts = gate.source, None if whole else PROMPT_TOKENS, whole or not chats
        found = read_texts(source, tokenizer, tokens) if texts else read_prompts(source, tokenizer, context)
        loaded.append(replace(gate, examples=list(islice(found, gate.settings.n))))
    return loaded


def read_texts(source: DataSource, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> Iterator[Example]:
    """Yields the beginnings of a source's texts, so many tokens long; None: all of them."""
    tally = Tally()
    for text in load_text(source).texts(tally):
        ids = tokenizer(text)["input_ids"][:tokens]
        yield Example(ids, text if tokens is None else tokenizer.decode(ids), {})
    tally.check(source.name, 1.0)


def read_prompts(source: DataSource, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Iterator[Example]:
    """Yields the prompts of a source that the template takes and that fit into the context."""
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
    gates: Sequence[Gate], model: Model, tokenizer: PreTrainedTokenizerBase, *, seed: int, most: int | None = None
) -> dict[str, Scores]:
    """Returns each gate's scores of a model in evaluation mode, on the first `most` prompts (None: all). Gates that
    ask the same share their completions. The global random state is drawn from."""
    scores: dict[str, Scores] = {}
    sampled: dict[str, list[str]] = {}
    for gate in gates:
        entry, examples = gate.settings, gate.examples[:most]
        torch.manual_seed(seed)

        def sample(rows: list[list[int]], entry: GateSettings = entry) -> list[list[int]]:
            return generate_tokens(model, tokenizer, rows, entry.sampling, batch_size=BATCH)

        repeated = [example for example in examples for _ in range(entry.num_samples)]
        if entry.name == "perplexity":
            scores[gate.label] = Scores(*text_losses(model, tokenizer, [example.ids for example in examples]))
            continue
        if entry.name == "episode_success":
            limits = {"max_new_tokens": entry.max_new_tokens, "max_length": context_length(model)}
            limits["ends"] = end_tokens(model, tokenizer)
            found = play_tasks(repeated, sample, tokenizer, limits, **gate.parameters)
        else:
            rows = [example.ids for example in repeated]
            key = str((rows, entry.sampling))
            if key not in sampled:
                sampled[key] = tokenizer.batch_decode(sample(rows), skip_special_tokens=True)
            found = score_texts(gate, repeated, sampled[key])
        values = np.array(found, float).reshape(-1, entry.num_samples)  # NaN where the score does not apply
        counts = np.isfinite(values).sum(1)
        scores[gate.label] = Scores(np.nansum(values, 1) / np.maximum(counts, 1), (counts > 0).astype(float))
    return scores


def score_texts(gate: Gate, examples: Sequence[Example], texts: list[str]) -> Any:
    """Returns a number, or None, for each completion."""
    if gate.reward is None:
        return SCORES[gate.settings.name](texts, **gate.parameters)
    names = {name for example in examples for name in example.columns}
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    columns["prompts"] = [example.prompt for example in examples]
    chats = isinstance(examples[0].prompt, list)
    return gate.reward([[{"role": "assistant", "content": text}] if chats else text for text in texts], **columns)


def judge(gate: Gate, scores: Scores, baseline: Scores | None = None, **options: Any) -> Verdict:
    """Returns what scores say of a gate's thresholds, and of the baseline's scores of the same prompts, where both
    apply; `options` are those of `compare`."""
    entry, other = gate.settings, baseline or scores
    used = (scores.weights > 0) & (other.weights > 0)
    if not used.any():
        return Verdict(gate.label, 0, math.nan, failures=("it applies to no prompt",))
    if not math.isfinite(scores.mean + other.mean):
        whose = "baseline's " if math.isfinite(scores.mean) else ""
        return Verdict(gate.label, int(used.sum()), scores.mean, failures=(f"the {whose}score is not finite",))
    is_perplexity, score, weights = entry.name == "perplexity", gate.score(scores.mean), scores.weights[used]
    if is_perplexity and not np.array_equal(scores.weights, other.weights):
        raise UserError("perplexity: the baseline has another tokenizer, so that losses per token cannot be compared")
    failures = [f"{score:.3g} is below min = {entry.min:g}"] if entry.min is not None and score < entry.min else []
    failures += [f"{score:.3g} is above max = {entry.max:g}"] if entry.max is not None and score > entry.max else []
    applies, applied = scores.weights > 0, other.weights > 0
    if applies.sum() < applied.sum():  # else it would pass on the few prompts that are left
        more = {"tests": 2 * options["tests"], "tolerance": 2 * entry.regression * applied.mean()}  # halved there
        if compare(applies * 1.0 - applied, np.ones(len(applies)), largest=0.0, **options | more).regressed:
            failures += [f"it applies to {applies.sum():,} prompts, and the baseline's to {applied.sum():,}"]
    scores, other = (Scores(one.values[used], one.weights[used]) for one in (scores, other))
    low, high = (gate.reward.low, gate.reward.high) if gate.reward else (None, None)
    means = np.concatenate([one.values / weights for one in (scores, other)])
    spread = float(np.ptp(means)) if low is None or high is None else high - low
    scale = max(abs(other.mean), NEAR_ZERO * spread) or 1.0
    options["tolerance"] = math.log1p(entry.regression) if is_perplexity else entry.regression * scale
    if baseline is None:  # it takes so many prompts where both models' scores are independent
        found = compare(scores.values, weights, largest=0.0, **options)
        ends = gate.score(found.low), gate.score(found.high)
        return Verdict(gate.label, len(weights), score, *ends, 2 * found.needed, tuple(failures))
    score, before = gate.score(scores.mean), gate.score(other.mean)
    differences = gate.sign * (scores.values - other.values)
    found = compare(differences, weights, largest=np.abs(differences).max() or spread * weights.mean(), **options)
    change, *ends = (before * math.expm1(min(-d, 700.0)) if is_perplexity else gate.sign * d + 0.0 for d in found[:3])
    failures += [f"regressed by {abs(change):.3g}"] if found.regressed else []
    return Verdict(gate.label, len(weights), score, *sorted(ends), found.needed, tuple(failures), before, change)
