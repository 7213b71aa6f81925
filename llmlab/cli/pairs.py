"""`llmlab data pairs`: a model's completions, scored by rewards, as preference pairs for `llmlab dpo` and `orpo`.
Sampling, scoring and choosing are in `training/preference/pairs.py`; here are only options, progress and tables."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ValidationError
from rich.table import Column
from rich.text import Text
from typer import Argument, Option

from llmlab.cli.chat import MaxNewTokens, Temperature, TopP
from llmlab.cli.options import AllowCode, Seed, TrustRemoteCode, resolve_options
from llmlab.cli.rewards import FromFile, Named, Normalize, reward_settings
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import parse_scalar
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import expand
from llmlab.terminal import Terminal, numeric, safe, track

if TYPE_CHECKING:
    from llmlab.training.preference.pairs import PairsReport

SHOWN = 2  # pairs that are printed
LONGEST = 400  # characters of a text that is printed
OUTPUT = Path("pairs.jsonl")

source_help = (
    "File, hub id or demo/...: a `prompt` column (text or messages), or conversations, whose last turn of the user is "
    "the prompt. Rewards are given the other columns."
)
Prompts = Annotated[str | None, Option("--prompts", "-p", help=source_help, metavar="FILE")]
samples_help = "Compare the samples.jsonl of rs-sft or awr instead; rewards score them again."
NumSamples = Annotated[int, Option("--num-samples", "-n", help="Completions a prompt.", min=2, metavar="INT")]


def pairs(
    run: Annotated[str | None, Argument(metavar="RUN", help="Run folder, adapter or hub id, of a chat model.")] = None,
    prompts: Prompts = None,
    samples: Annotated[Path | None, Option(help=samples_help)] = None,
    rewards: Named = None,
    config: FromFile = None,
    normalize: Normalize = None,
    allow_code: AllowCode = False,
    num_samples: NumSamples = 4,
    min_difference: Annotated[float, Option(help="Minimal score difference of a pair.", metavar="FLOAT")] = 0.1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 42,
    limit: Annotated[int | None, Option(help="Read so many rows of the prompts.", min=1, metavar="INT")] = None,
    output: Annotated[Path, Option("--output", "-o", help="File (.jsonl) to write or replace.")] = OUTPUT,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Sample completions, score them, and write the best and the worst completion of each prompt: data for llmlab
    dpo."""
    if (run is None) != (prompts is None) or (run is None) == (samples is None):
        raise UserError("expected RUN and --prompts FILE, or --samples FILE alone")
    sampling = resolve_options(SamplingSettings, locals())
    source = DataSource(name=str(samples)) if prompts is None else parse_source(prompts, "--prompts ")
    scores = samples is None or rewards is not None or config is not None
    settings, folder = reward_settings(rewards, config, normalize) if scores else (None, Path())
    _check_output(output, source)

    from llmlab.data.samples import group_samples, read_samples
    from llmlab.inference import is_chat_model, load_for_inference
    from llmlab.rewards.compose import compose
    from llmlab.runs.progress import quiet_libraries
    from llmlab.training.offline.sampling import score_samples
    from llmlab.training.preference.pairs import compare, load_prompts, sample_pairs, summarize, write_pairs

    if settings is not None:
        options = {"normalize": settings.normalize_rewards, "allow_code": allow_code, "folder": folder}
        reward = compose(settings.rewards, **options)
    if samples is not None:
        groups = group_samples([each for each in read_samples(samples) if not each.validation])[:limit]
        for group in track(groups if scores else [], len(groups), "Scoring"):
            score_samples(group, reward)
        report = summarize([compare(group, min_difference) for group in groups], Counter())
    else:
        examples, unusable = load_prompts(source, limit=limit)
        with quiet_libraries():
            model, tokenizer = load_for_inference(run)
            if not is_chat_model(run, tokenizer):
                expected = "this model continues text and answers no prompts; expected one from llmlab sft"
                raise UserError(f"{run}: {expected}")
            options = {"num_samples": num_samples, "min_difference": min_difference, "seed": seed}
            comparisons = sample_pairs(model, tokenizer, examples, reward, sampling, **options)
            report = summarize(track(comparisons, len(examples), "Sampling"), unusable)
    write_pairs(report, output)
    _print(report, output)


def parse_source(text: str, option: str = "") -> DataSource:
    """Returns a data source in either form, `name | subset | weight | split` or a mapping; `option` is for errors."""
    try:
        return DataSource.model_validate(parse_scalar(text) if text.startswith("{") else text)
    except ValidationError as error:
        details = "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors())
        raise UserError(f"{option}{text}: {details.removeprefix('Value error, ')}") from None


def _check_output(output: Path, source: DataSource) -> None:
    """Checks the output path before sampling."""
    if output.is_dir():
        raise UserError(f"--output {output}: this is a folder; expected a file, such as {output / 'pairs.jsonl'}")
    if not output.name.endswith(".jsonl"):
        raise UserError(f"--output {output}: pairs are JSON lines; expected a name that ends in .jsonl")
    prompts = expand(source.name)
    if output.exists() and prompts.exists() and output.samefile(prompts):
        raise UserError(f"--output {output}: these are the prompts; expected another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written: the folder is read-only")


def _print(report: "PairsReport", output: Path) -> None:
    console = Terminal()
    for pair in report.pairs[:SHOWN]:
        scores = pair["scores"]
        for name, style, messages in (
            ("prompt", "bold", pair["prompt"]),
            (f"chosen, {scores[0]:.3f}", "green", pair["chosen"]),
            (f"rejected, {scores[1]:.3f}", "red", pair["rejected"]),
        ):
            text = re.sub(r"\s*\n\s*", "\n", messages[-1]["content"].strip())
            shown = printable(text[:LONGEST]) + (" ..." if len(text) > LONGEST else "")
            console.print(Text.assemble((f"{name}: ", style), shown))
        console.print()
    means = {"mean score": report.mean, "best, mean": report.best, "worst, mean": report.worst}
    rows = [(name, "-" if value is None else f"{value:.3f}") for name, value in means.items()]
    rows += [("completions", f"{report.completions:,}"), ("prompts", f"{report.prompts:,}")]
    rows += [(f"[yellow]no pair: {safe(why)}[/]", f"{count:,}") for why, count in report.without.most_common()]
    rows.append(("[bold]pairs[/]", f"[bold]{len(report.pairs):,}[/]"))
    console.table((Column(overflow="fold"), numeric("")), rows, show_header=False)
    console.print(f"\nWritten to {output}", markup=False, soft_wrap=True)
