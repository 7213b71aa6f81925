"""Preference pairs from a model's own completions: sampled, scored by rewards, the best against the worst. Nothing is
trained here: `dpo.py` and `orpo.py` train on the file. Prompts are read by `data/chat`, rewards are `rewards`'
business, sampling is `inference.py`."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.messages import Row
from llmlab.data.samples import Prompt, Sample
from llmlab.data.sources import Tally
from llmlab.inference import Model, context_length, encode_prompt, end_tokens, generate_tokens
from llmlab.rewards.compose import ComposedReward
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import SamplingSettings
from llmlab.training.offline.sampling import complete, draw, make_batches


class Comparison(NamedTuple):
    """The samples of a prompt, and the best against the worst, or why there is no pair."""

    prompt_id: int
    samples: list[Sample]
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
    seed: int = 0,
) -> Iterator[Comparison]:
    """Samples completions of each prompt, shorter prompts first, scores and compares them."""
    if num_samples < 2:
        raise UserError(f"num_samples = {num_samples}: a pair takes at least 2 completions of a prompt")
    if sampling.temperature == 0:
        raise UserError(f"num_samples = {num_samples}: with temperature 0 all samples are the same")
    context, fitting = context_length(model), {}
    for number, prompt in enumerate(prompts):
        if context is None or len(encode_prompt(tokenizer, prompt.messages)) < context:
            fitting[number] = prompt
        else:
            yield Comparison(number, [], None, f"longer than the model's context of {context:,} tokens")
    sample = partial(generate_tokens, model, tokenizer, sampling=sampling)
    fill = partial(complete, sample=sample, tokenizer=tokenizer, ends=end_tokens(model, tokenizer))
    for batch in make_batches(tokenizer, fitting, num_samples):
        for samples in draw(batch, fill, reward, seed):
            yield compare(samples, min_difference)


def summarize(comparisons: Iterable[Comparison], unusable: Counter[str]) -> PairsReport:
    """Returns pairs and counts of `sample_pairs`; `unusable` counts the rows without a prompt by reason."""
    comparisons = sorted(comparisons, key=lambda each: each.prompt_id)
    scores = [[sample.reward for sample in each.samples if sample.reward is not None] for each in comparisons]
    scored = [each for each in scores if each]
    without = unusable + Counter(each.reason for each in comparisons if each.pair is None)
    return PairsReport(
        pairs=[each.pair for each in comparisons if each.pair is not None],
        prompts=len(comparisons) + unusable.total(),
        completions=sum(len(each.samples) for each in comparisons),
        mean=statistics.fmean(score for each in scored for score in each) if scored else None,
        best=statistics.fmean(map(max, scored)) if scored else None,
        worst=statistics.fmean(map(min, scored)) if scored else None,
        without=without,
    )


def write_pairs(report: PairsReport, path: Path) -> None:
    """Writes the pairs as JSON lines, which `llmlab dpo` and `llmlab data check` read."""
    if not report.pairs:
        why = f"none of the {report.prompts:,} prompts gave a pair ({_reasons(report.without)})"
        advice = "sample more completions, or with a higher temperature"
        raise UserError(f"{path}: not written, since {why}; {advice}")
    write_atomically(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in report.pairs))


def compare(samples: Sequence[Sample], min_difference: float = 0.1) -> Comparison:
    """Returns the best and the worst sample of a prompt as a pair, where rewards differ by `min_difference`. An empty
    completion is in no pair. A truncated one is never chosen: the chat template would end the turn there."""
    if not min_difference > 0:
        raise UserError(f"min_difference = {min_difference:g}: expected more than 0, so that chosen is better")
    no_pair = partial(Comparison, samples[0].prompt_id, list(samples), None)
    scored = [each for each in samples if each.reward is not None]
    if not scored:
        return no_pair("no reward applies to it")
    if any(each.calls for each in scored):
        return no_pair("an episode with tool calls is no answer to its prompt alone")
    scored = [each for each in scored if _text(each)]
    ended = [each for each in scored if each.ended]
    if len(scored) < 2:
        return no_pair("fewer than two non-empty completions")
    if not ended:
        return no_pair("no completion ended before max_new_tokens or the model's context")
    best, worst = max(ended, key=lambda each: each.reward), min(scored, key=lambda each: each.reward)
    if best.reward - worst.reward < min_difference:
        return no_pair(f"scores differ by less than {min_difference:g}")
    if _text(best) == _text(worst):
        return no_pair("chosen and rejected are the same")
    pair = {"prompt": best.prompt, "chosen": best.completion, "rejected": worst.completion}
    pair |= {"tools": best.tools} if best.tools else {}
    return Comparison(best.prompt_id, list(samples), {**pair, "scores": [best.reward, worst.reward]})


def _text(sample: Sample) -> str:
    return str(sample.completion[-1].get("content") or "").strip()


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())
