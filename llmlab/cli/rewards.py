"""`llmlab reward-check` scores the completions of a file, to debug rewards before training with them; `llmlab data
pairs` turns a model's completions, scored by rewards, into preference pairs. Scoring is in `rewards`, sampling in
`training/preference/pairs.py`; here are only reading, the tables and the JSON."""

import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ValidationError
from rich.bar import Bar
from rich.table import Column
from rich.text import Text
from typer import Argument, Option

from llmlab.cli.arguments import AllowCode, AsJson, Seed, TrustRemoteCode
from llmlab.cli.chat import MaxNewTokens, Temperature, TopP
from llmlab.cli.options import resolve_options
from llmlab.settings.base import spellings_of
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import expand, missing
from llmlab.settings.rewards import RewardsSettings
from llmlab.settings.sources import resolve
from llmlab.terminal import Terminal, draw_bars, numeric, safe, say_json, track

if TYPE_CHECKING:
    from llmlab.rewards.compose import ComposedReward, Scores
    from llmlab.training.preference.pairs import PairsReport

BINS = 10
LONGEST_BAR = 40
SHOWN = 2  # pairs that are printed
LONGEST = 400  # characters of a text that is printed
OUTPUT = Path("pairs.jsonl")

PROMPTS_HELP = (
    "File, hub id or demo/...: a `prompt` column (text or messages), or conversations, whose last turn of the user is "
    "the prompt. Rewards are given the other columns."
)
Prompts = Annotated[str | None, Option("--prompts", "-p", help=PROMPTS_HELP, metavar="FILE")]
SAMPLES_HELP = "Compare the samples.jsonl of rs-sft or awr instead; rewards score them again."
NumSamples = Annotated[int, Option("--num-samples", "-n", help="Completions a prompt.", min=2, metavar="INT")]

NAMED_HELP = "Names with commas, each with | WEIGHT if wanted, or YAML: '\\[json_valid, {name: length, target: 50}]'."
Named = Annotated[str | None, Option("--rewards", "--reward", "-r", help=NAMED_HELP, metavar="NAMES")]
FromFile = Annotated[Path | None, Option("--config", "-c", help="Take `rewards` from a file or a recipe.")]
NORMALIZE_HELP = "Map the sum to [0, 1]. [dim]\\[true][/dim]"
Normalize = Annotated[bool | None, Option("--normalize/--no-normalize", help=NORMALIZE_HELP, show_default=False)]
FILE_HELP = "jsonl, json, csv or parquet with `completion`, and beside it `prompt` and the columns of rewards."


def reward_check(
    file: Annotated[Path | None, Argument(help=FILE_HELP)] = None,
    rewards: Named = None,
    config: FromFile = None,
    normalize: Normalize = None,
    rows: Annotated[int, Option("--rows", "-n", help="Rows to show.", min=0, metavar="INT")] = 10,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
    list_rewards: Annotated[bool, Option("--list", help="Show the rewards and their parameters.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score completions in a file with rewards, and show each component: debug rewards before you train with them."""
    if list_rewards:
        return _print_list()
    if file is None:
        raise UserError("FILE is missing: expected a file with a `completion` in each row (--list shows the rewards)")
    settings, folder = reward_settings(rewards, config, normalize)

    from llmlab.rewards.compose import compose

    composed = compose(settings.rewards, normalize=settings.normalize_rewards, allow_code=allow_code, folder=folder)
    prompts, completions, columns = _read(file)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_prompt[json.dumps(prompt, sort_keys=True, default=str)].append(row)
    groups = [rows for prompt, rows in by_prompt.items() if len(rows) > 1 and prompt not in ('""', "[]")]
    report = _report(file, composed, composed.score(completions, prompts=prompts, **columns), groups)
    if as_json:
        say_json(report, indent=2, allow_nan=False)
    else:
        _print_tables(report, completions, rows)


def reward_settings(rewards: str | None, config: Path | None, normalize: bool | None) -> tuple[RewardsSettings, Path]:
    """Returns the settings that the options ask for, and the folder that paths of reward files count from."""
    layers, spellings = [], spellings_of(RewardsSettings)
    if config is not None:
        layer = read_layer(config)
        if "stage" in layer.values:  # a recipe: the rest of it is for training
            layer = replace(layer, values={key: value for key, value in layer.values.items() if key in spellings})
        layers.append(layer)
    elif rewards is None:
        raise UserError("--rewards or --config is missing: expected rewards, such as --rewards json_valid,length")
    options: dict[str, Any] = {} if normalize is None else {"normalize_rewards": normalize}
    if rewards is not None:
        listed = parse_scalar(rewards) if rewards.lstrip().startswith(("[", "{")) else rewards
        options["rewards"] = [name.strip() for name in listed.split(",")] if isinstance(listed, str) else listed
    elif not any(spellings[key].name == "rewards" for key in layer.values.keys() & spellings.keys()):
        raise UserError(f"{config}: there are no `rewards` in it; expected them there or in --rewards")
    folder = config.parent if config is not None and rewards is None else Path()
    return resolve(RewardsSettings, *layers, Layer("command line", options)).settings, folder


def _read(path: Path) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Returns prompts, completions and the other columns of a file, as trainers give them to rewards."""
    from llmlab.data import files
    from llmlab.rewards.completions import read_messages

    if not os.path.exists(expand(path)):
        raise missing(str(path))
    shards = files.shards_of(files.find_files(expand(path)).get("train", []))
    rows = [row for shard in shards for row in files.read_shard(shard)]
    if not rows:
        raise UserError(f"{path}: there is no row in it")
    for number, row in enumerate(rows):
        if "completion" not in row:
            found = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"{path}: row {number} has no 'completion' (found {found})")
        for name in ("prompt", "completion"):
            value, where = row.get(name, ""), f"{path}: row {number}: {name}"
            if not isinstance(value, (str, list)):
                raise UserError(f"{where}: expected text or a list of messages, found {type(value).__name__}")
            try:
                read_messages(value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    prompts, completions = [row.get("prompt", "") for row in rows], [row["completion"] for row in rows]
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(prompt, list) and isinstance(completion, str):
            completions[number] = [{"role": "assistant", "content": completion}]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    return prompts, completions, {str(name): [row.get(name) for row in rows] for name in names}


def _report(file: Path, composed: "ComposedReward", scores: "Scores", groups: list[list[int]]) -> dict[str, Any]:
    """Returns everything that is shown, as plain values."""
    bounds = (0.0, 1.0) if composed.normalize else composed.bounds or (None, None)
    return {
        "file": str(file),
        "rows": len(scores.totals),
        "groups": len(groups),
        "normalized": composed.normalize,
        "bounds": composed.bounds,
        "reward": _summarize(scores.totals, bounds, groups),
        "components": {
            label: {"weight": reward.weight, "range": [reward.low, reward.high], "cap": reward.cap}
            | _summarize(scores.components[label], (reward.low, reward.high), groups)
            for label, reward in composed.components.items()
        },
        "scores": [
            {"row": row, "reward": total}
            | {"components": {label: values[row] for label, values in scores.components.items()}}
            for row, total in enumerate(scores.totals)
        ],
    }


def _summarize(
    values: list[float | None], bounds: tuple[float | None, float | None], groups: list[list[int]]
) -> dict[str, Any]:
    """Returns statistics of the values that are not None; `zero_variance` is the share of groups with one value."""
    numbers = [value for value in values if value is not None]
    flat = [rows for rows in groups if len({values[row] for row in rows}) == 1]
    low = min(numbers, default=0.0) if bounds[0] is None else bounds[0]
    high = max(numbers, default=0.0) if bounds[1] is None else bounds[1]
    counts = [0] * BINS
    for value in numbers:
        share = (value - low) / (high - low) if high > low else 0.0
        counts[min(max(math.floor(share * BINS + 1e-9), 0), BINS - 1)] += 1
    return {
        "count": len(numbers),
        "mean": statistics.fmean(numbers) if numbers else None,
        "min": min(numbers, default=None),
        "max": max(numbers, default=None),
        "zero_variance": len(flat) / len(groups) if groups else None,
        "histogram": {"from": low, "to": high, "counts": counts},
    }


def _print_tables(report: dict[str, Any], completions: list[Any], shown: int) -> None:
    console, groups = Terminal(), report["groups"]
    if shown:
        _print_rows(console, report["scores"], completions[:shown])
        if len(completions) > shown:
            console.print(f"[dim]... {len(completions) - shown:,} more rows (--rows)[/dim]")
        console.print()
    _print_components(console, report)
    _print_histogram(console, *report["reward"]["histogram"].values())
    if groups:
        console.print(f"[dim]flat: share of the {groups:,} prompts whose completions all get the same value.[/]")
    else:
        console.print("[dim]No prompt has several completions here, so nothing shows how they differ.[/]")
    components, rows = report["components"].items(), report["rows"]
    same = [label for label, of in components if of["min"] == of["max"] and of["count"] in (0, rows) and rows > 1]
    if same:
        console.print(f"[yellow]The same value in every row: {safe(', '.join(same))}.[/]")


def _print_rows(console: Terminal, scores: list[dict[str, Any]], completions: list[Any]) -> None:
    from llmlab.rewards.completions import answer, model_text

    labels = list(scores[0]["components"])
    fits = 4 + sum(max(len(label), 6) + 2 for label in labels) + 8 + 24 <= console.width
    width, digits, gap = (None, 3, 2) if fits else (5, 2, 1)  # else names are folded
    columns = [numeric("row", style="dim"), numeric("reward", style="bold")]
    columns += [Column(safe(label), justify="right", width=width, overflow="fold") for label in labels]
    columns += [Column("completion", style="dim", no_wrap=True, overflow="ellipsis", ratio=1, min_width=12)]
    rows = []
    for score, completion in zip(scores, completions, strict=False):
        values = (_cell(value, digits) for value in score["components"].values())
        text = " ".join((answer(completion) or model_text(completion))[:400].split())
        rows.append((str(score["row"]), _cell(score["reward"]), *values, safe(text) or "(empty)"))
    console.table(columns, rows, expand=True, gap=gap)


def _print_components(console: Terminal, report: dict[str, Any]) -> None:
    """Prints a line for each component, and one for their sum."""
    flat, rows = ["flat"] if report["groups"] else [], []
    for label, found in [*report["components"].items(), ("reward", report["reward"])]:
        cells = [safe(label), f"{found['weight']:g}" if "weight" in found else ""]
        cells += [_cell(found[name]) for name in ("mean", "min", "max")]
        cells += [f"{found['zero_variance']:.0%}" for _ in flat]
        cells += [str(report["rows"] - found["count"] or "-"), draw_bars(found["histogram"]["counts"])[0]]
        rows.append(cells if "weight" in found else [f"[bold]{cell}[/]" for cell in cells])
    columns = [Column("component", no_wrap=True, overflow="ellipsis"), Column("distribution", no_wrap=True)]
    columns[1:1] = map(numeric, ("weight", "mean", "min", "max", *flat, "none"))
    console.table(columns, rows)
    console.print()


def _print_histogram(console: Terminal, low: float, high: float, counts: list[int]) -> None:
    """Prints a line for each bin, or one for all where every value is the same."""
    step, rows = (high - low) / BINS, []
    for number, count in enumerate(counts if step else [sum(counts)]):
        start = low + number * step
        bar = Bar(max(counts), 0, count, width=LONGEST_BAR, color="cyan")
        rows.append((f"{start:.2f} - {start + step:.2f}" if step else f"{start:.3g}", str(count or "-"), bar))
    console.table((numeric("reward"), numeric("rows"), Column(no_wrap=True)), rows)
    console.print()


def _print_list() -> None:
    import inspect

    from llmlab.rewards import REWARDS

    rows = []
    for name, target in REWARDS.items():
        parameters = [
            key if parameter.default is parameter.empty else f"{key}={parameter.default!r}"
            for key, parameter in inspect.signature(target).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        line = str(inspect.getdoc(target)).split("\n\n")[0].replace("\n", " ").removeprefix("Scores ")
        text = f"{line[0].upper()}{line[1:]}\n[dim]{', '.join(parameters) or 'no parameters'}[/dim]"
        rows.append((name, f"{target.weight:g}", text))
    columns = (Column("reward", style="bold", no_wrap=True), numeric("weight"), "what it scores, and its parameters")
    Terminal().table(columns, rows)


def _cell(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def pairs(
    run: Annotated[str | None, Argument(metavar="RUN", help="Run folder, adapter or hub id, of a chat model.")] = None,
    prompts: Prompts = None,
    samples: Annotated[Path | None, Option(help=SAMPLES_HELP)] = None,
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
    """Sample completions, score them, and write the best and the worst of each prompt: data for llmlab dpo."""
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
    _print_pairs(report, output)


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


def _print_pairs(report: "PairsReport", output: Path) -> None:
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


def parse_source(text: str, option: str = "") -> DataSource:
    """Returns a data source in either form, `name | subset | weight | split` or a mapping; `option` is for errors."""
    try:
        return DataSource.model_validate(parse_scalar(text) if text.startswith("{") else text)
    except ValidationError as error:
        details = "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors())
        raise UserError(f"{option}{text}: {details.removeprefix('Value error, ')}") from None
