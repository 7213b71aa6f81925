"""Preference pairs from a model's own completions: sampled, scored by rewards, the best against the worst.

Nothing is trained here: `dpo.py` and `orpo.py` take the file. Pairs of a data set are read by `data/chat/pairs.py`;
rewards are `rewards`' business, sampling is `inference.py`.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.formats import PLAIN_TEXT, Format, read_system, read_tools, recognize
from llmlab.data.chat.messages import Message, Row, UnusableRow
from llmlab.data.chat.prompts import PROMPT, user_turn
from llmlab.data.sources import load_rows
from llmlab.inference import Model, context_length, encode_prompt, generate_text
from llmlab.rewards.compose import ComposedReward
from llmlab.rewards.function import TRL_INPUTS
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import SamplingSettings

NOT_COLUMNS = {*TRL_INPUTS, "prompt", "completion"}


class Asked(NamedTuple):
    """A prompt, and the columns beside it, which rewards are given."""

    prompt: list[Message]
    columns: dict[str, Any]


class Judged(NamedTuple):
    """What became of a prompt: its completions, their scores, and a pair, or the reason why there is none."""

    completions: list[str]
    scores: list[float | None]
    pair: Row | None
    reason: str = ""


class PairsReport(NamedTuple):
    """What a round of sampling gave.

    Attributes:
        pairs: the rows for the file.
        prompts: how many there were, those that could not be read included.
        completions: how many were sampled.
        mean: the mean score of all completions; None where there is no score.
        best: the mean over prompts of their best score.
        worst: the mean over prompts of their worst score.
        without: prompts that gave no pair, by reason.
    """

    pairs: list[Row]
    prompts: int
    completions: int
    mean: float | None
    best: float | None
    worst: float | None
    without: Counter[str]


def load_prompts(source: DataSource, *, limit: int | None = None) -> tuple[list[Asked], Counter[str]]:
    """Reads prompts: a `prompt` or `text` column, or conversations, whose last turn of the user is the prompt.

    Args:
        source: a file, a folder, a hub id or `demo/...`.
        limit: read so many rows.

    Returns:
        The prompts, and how many rows hold none, by reason.

    Raises:
        UserError: there is no such source, its columns tell no prompts, or no row holds one.
    """
    found = load_rows(source, at_most=limit)
    columns = list(dict.fromkeys(name for row in found.first() for name in row))
    if not columns:
        raise UserError(f"{source.name}: it has no rows")
    form = PROMPT if "prompt" in columns else recognize(columns, source.name)
    form = _TEXT if form is PLAIN_TEXT else form
    prompts, unusable = [], Counter[str]()
    for row in islice(found.rows, limit):
        try:
            prompts.append(Asked(_prompt_of(row, form), {k: v for k, v in row.items() if k not in NOT_COLUMNS}))
        except UnusableRow as reason:
            unusable[str(reason)] += 1
    if not prompts:
        raise UserError(f"{source.name}: there is no prompt in its {unusable.total():,} rows ({_reasons(unusable)})")
    return prompts, unusable


def judge_samples(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Asked],
    reward: ComposedReward,
    sampling: SamplingSettings,
    *,
    num_samples: int = 4,
    min_difference: float = 0.1,
    seed: int | None = None,
    batch_size: int = 16,
) -> Iterator[Judged]:
    """Yields for each prompt its completions, their scores, and the best against the worst where they differ enough.

    An empty completion is in no pair.  One that was cut off, as far as its text tells, is never the chosen one: the
    chat template would end it where it breaks off.

    Args:
        model: from `load_for_inference`.
        tokenizer: from `load_for_inference`.
        prompts: from `load_prompts`.
        reward: scores completions; is called with those of one prompt at a time.
        sampling: how tokens are chosen.
        num_samples: completions of each prompt.
        min_difference: smallest difference between the scores of a pair.
        seed: makes sampling repeatable; None leaves the random state as it is.
        batch_size: completions generated at the same time.

    Raises:
        UserError: fewer than two samples, no difference is asked for, or a reward fails.
    """
    if num_samples < 2:
        raise UserError(f"num_samples = {num_samples}: a pair takes at least 2 completions of a prompt")
    if not min_difference > 0:
        raise UserError(f"min_difference = {min_difference:g}: expected more than 0, so that a pair has a better side")
    context = context_length(model)
    lengths = [len(encode_prompt(tokenizer, asked.prompt)) for asked in prompts]
    fits = [context is None or length < context for length in lengths]
    texts = generate_text(
        model,
        tokenizer,
        [asked.prompt for asked, fit in zip(prompts, fits, strict=True) if fit],
        sampling,
        num_samples=num_samples,
        seed=seed,
        batch_size=batch_size,
    )
    for asked, length, fit in zip(prompts, lengths, fits, strict=True):
        if not fit:
            yield Judged([], [], None, f"longer than the model's context of {context:,} tokens")
            continue
        completions = next(texts)
        room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - length)
        # the text of a completion that ended has fewer tokens than there was room for
        whole = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) < room for text in completions]
        columns = {name: [value] * num_samples for name, value in asked.columns.items()}
        answers = [[{"role": "assistant", "content": text}] for text in completions]
        scores = reward.score(answers, prompts=[asked.prompt] * num_samples, **columns).totals
        pair, reason = _choose(asked.prompt, completions, scores, whole, min_difference)
        yield Judged(completions, scores, pair, reason)


def summarize(judged: Iterable[Judged], unusable: Counter[str]) -> PairsReport:
    """Returns pairs and counts of a round of sampling.

    Args:
        judged: from `judge_samples`.
        unusable: rows that held no prompt, by reason.
    """
    judged = list(judged)
    scores = [[score for score in each.scores if score is not None] for each in judged]
    scored = [each for each in scores if each]
    without = unusable + Counter(each.reason for each in judged if each.pair is None)
    return PairsReport(
        pairs=[each.pair for each in judged if each.pair is not None],
        prompts=len(judged) + unusable.total(),
        completions=sum(len(each.completions) for each in judged),
        mean=statistics.fmean(score for each in scored for score in each) if scored else None,
        best=statistics.fmean(map(max, scored)) if scored else None,
        worst=statistics.fmean(map(min, scored)) if scored else None,
        without=without,
    )


def write_pairs(report: PairsReport, path: Path) -> None:
    """Writes the pairs as JSON lines, which `llmlab dpo` and `llmlab data check` read.

    Raises:
        UserError: there is no pair, or the file cannot be written.
    """
    if not report.pairs:
        raise UserError(
            f"{path}: not written, since none of the {report.prompts:,} prompts gave a pair "
            f"({_reasons(report.without)}); sample more completions, or with a higher temperature"
        )
    write_atomically(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in report.pairs))


def _choose(
    prompt: list[Message],
    completions: Sequence[str],
    scores: Sequence[float | None],
    whole: Sequence[bool],
    min_difference: float,
) -> tuple[Row | None, str]:
    """Returns a pair, or why there is none."""
    scored = [(score, k) for k, score in enumerate(scores) if score is not None]
    if not scored:
        return None, "no reward applies to it"
    scored = [(score, k) for score, k in scored if completions[k].strip()]
    ended = [(score, k) for score, k in scored if whole[k]]
    if len(scored) < 2:
        return None, "fewer than two completions that say something"
    if not ended:
        return None, "no completion ended before max_new_tokens or the model's context"
    (high, best), (low, worst) = max(ended, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if high - low < min_difference:
        return None, f"scores differ by less than {min_difference:g}"
    if completions[best].strip() == completions[worst].strip():
        return None, "chosen and rejected are the same"
    chosen, rejected = ([{"role": "assistant", "content": completions[k]}] for k in (best, worst))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "scores": [high, low]}, ""


def _prompt_of(row: Row, form: Format) -> list[Message]:
    for column in form.columns:
        if row.get(column) is None:
            raise UnusableRow(f"without '{column}'")
    messages = read_system(row, form) + form.read(row)
    last = max((k for k, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None or not messages[last]["content"].strip():
        raise UnusableRow("nothing is asked in it")
    if read_tools(row, form):
        raise UnusableRow("it has tools, which are not called here")
    return messages[: last + 1]


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())


_TEXT = Format("text", ("text",), lambda row: user_turn(row["text"]))
