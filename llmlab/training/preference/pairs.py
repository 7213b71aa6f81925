"""Preference pairs from a model's own completions: sampled, scored by rewards, the best against the worst.

Nothing is trained here: `dpo.py` and `orpo.py` train on the file.  Prompts are read by `data/chat`, rewards are
`rewards`' business, sampling is `inference.py`.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.messages import Message, Row
from llmlab.data.sources import Tally
from llmlab.inference import Model, context_length, encode_prompt, generate_text
from llmlab.rewards.compose import ComposedReward
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import SamplingSettings


class Prompt(NamedTuple):
    """A prompt, and the other columns of its row, which rewards get."""

    messages: list[Message]
    columns: dict[str, Any]


class Comparison(NamedTuple):
    """The completions of a prompt, their scores, and the best against the worst, or why there is no pair."""

    completions: list[str]
    scores: list[float | None]
    pair: Row | None
    reason: str = ""


class PairsReport(NamedTuple):
    """The result of sampling; scores are None where no reward applied, `without` counts prompts that gave no pair."""

    pairs: list[Row]
    prompts: int  # those that could not be read included
    completions: int
    mean: float | None  # of all completions
    best: float | None  # mean over prompts
    worst: float | None
    without: Counter[str]


def load_prompts(source: DataSource, *, limit: int | None = None) -> tuple[list[Prompt], Counter[str]]:
    """Returns the prompts of at most `limit` rows of any format, and how many rows hold none, by reason."""
    tally, prompts = Tally(), []
    for row in load_conversations(source, "prompts or text", at_most=limit).conversations(tally, limit):
        if row["tools"]:
            tally.dropped["prompts with tools are not supported here"] += 1
        else:
            prompts.append(Prompt(row["prompt"], row["columns"]))
    if not prompts:
        reasons = _reasons(tally.dropped)
        raise UserError(f"{source.name}: there is no prompt in its {tally.dropped.total():,} rows ({reasons})")
    return prompts, tally.dropped


def sample_pairs(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward: ComposedReward,
    sampling: SamplingSettings,
    *,
    num_samples: int = 4,
    min_difference: float = 0.1,
    seed: int | None = None,
) -> Iterator[Comparison]:
    """Samples completions of each prompt; the best and the worst are a pair where scores differ by `min_difference`.

    An empty completion is in no pair. A truncated one is never chosen: the chat template would end the turn there.
    """
    if num_samples < 2:
        raise UserError(f"num_samples = {num_samples}: a pair takes at least 2 completions of a prompt")
    if not min_difference > 0:
        raise UserError(f"min_difference = {min_difference:g}: expected more than 0, so that chosen is better")
    context = context_length(model)
    lengths = [len(encode_prompt(tokenizer, prompt.messages)) for prompt in prompts]
    fits = [context is None or length < context for length in lengths]
    texts = generate_text(
        model,
        tokenizer,
        [prompt.messages for prompt, fit in zip(prompts, fits, strict=True) if fit],
        sampling,
        num_samples=num_samples,
        seed=seed,
    )
    for prompt, length, fit in zip(prompts, lengths, fits, strict=True):
        if not fit:
            yield Comparison([], [], None, f"longer than the model's context of {context:,} tokens")
            continue
        completions = next(texts)
        room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - length)
        # the text of a completion that ended has fewer tokens than there was room for
        whole = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) < room for text in completions]
        columns = {name: [value] * num_samples for name, value in prompt.columns.items()}
        answers = [[{"role": "assistant", "content": text}] for text in completions]
        scores = reward.score(answers, prompts=[prompt.messages] * num_samples, **columns).totals
        pair, reason = _choose(prompt.messages, completions, scores, whole, min_difference)
        yield Comparison(completions, scores, pair, reason)


def summarize(judged: Iterable[Comparison], unusable: Counter[str]) -> PairsReport:
    """Returns pairs and counts of `sample_pairs`; `unusable` counts the rows without a prompt by reason."""
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
    """Writes the pairs as JSON lines, which `llmlab dpo` and `llmlab data check` read."""
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
        return None, "fewer than two non-empty completions"
    if not ended:
        return None, "no completion ended before max_new_tokens or the model's context"
    (high, best), (low, worst) = max(ended, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if high - low < min_difference:
        return None, f"scores differ by less than {min_difference:g}"
    if completions[best].strip() == completions[worst].strip():
        return None, "chosen and rejected are the same"
    chosen, rejected = ([{"role": "assistant", "content": completions[k]}] for k in (best, worst))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "scores": [high, low]}, ""


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())
