"""`llmlab reward-check` scores the completions of a file, to debug rewards before training with them; `llmlab data
pairs` turns a model's completions, scored by rewards, into preference pairs. Scoring is in `rewards`, sampling in
`training/preference/pairs.py`; here are only reading, the tables and the JSON."""

import os
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ValidationError
from rich.table import Column
from typer import Argument, Option

from llmlab.cli.arguments import AllowCode, AsJson, Seed, TrustRemoteCode
from llmlab.cli.options import with_settings
from llmlab.settings.base import spellings_of
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import expand, missing
from llmlab.settings.rewards import RewardsSettings
from llmlab.settings.sources import resolve
from llmlab.terminal import Terminal, numeric, safe, say_json, track

if TYPE_CHECKING:
    from llmlab.rewards.compose import ComposedReward, Scores
    from llmlab.training.preference.pairs import PairsReport

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
    report = _report(file, composed, composed.score(completions, prompts=prompts, **columns))
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


def _report(file: Path, composed: "ComposedReward", scores: "Scores") -> dict[str, Any]:
    """Returns everything that is shown, as plain values."""
    return {
        "file": str(file),
        "rows": len(scores.totals),
        "normalized": composed.normalize,
        "bounds": composed.bounds,
        "reward": _summarize(scores.totals),
        "components": {
            label: {"weight": reward.weight, "range": [reward.low, reward.high], "cap": reward.cap}
            | _summarize(scores.components[label])
            for label, reward in composed.components.items()
        },
        "scores": [
            {"row": row, "reward": total}
            | {"components": {label: values[row] for label, values in scores.components.items()}}
            for row, total in enumerate(scores.totals)
        ],
    }


def _summarize(values: list[float | None]) -> dict[str, Any]:
    """Returns statistics of the values that are not None."""
    numbers = [value for value in values if value is not None]
    mean = statistics.fmean(numbers) if numbers else None
    return {"count": len(numbers), "mean": mean, "min": min(numbers, default=None), "max": max(numbers, default=None)}


def _print_tables(report: dict[str, Any], completions: list[Any], shown: int) -> None:
    """Prints the first rows with their completions, then a line for each component and for the sum."""
    from llmlab.rewards.completions import answer, model_text

    console, components = Terminal(), report["components"]
    rows = []
    for score, completion in zip(report["scores"], completions[:shown], strict=False):
        values = (_cell(value, 2) for value in score["components"].values())
        text = " ".join((answer(completion) or model_text(completion))[:400].split())
        rows.append((str(score["row"]), _cell(score["reward"]), *values, safe(text) or "(empty)"))
    if rows:
        columns = [numeric("row", style="dim"), numeric("reward", style="bold")]
        width = 5 if len(components) > 4 else None  # folded, so that completions have room
        columns += [Column(safe(label), justify="right", width=width, overflow="fold") for label in components]
        columns += [Column("completion", style="dim", no_wrap=True, overflow="ellipsis", ratio=1, min_width=12)]
        console.table(columns, rows, expand=True, gap=1)
    if shown and len(completions) > shown:
        console.print(f"[dim]... {len(completions) - shown:,} more rows (--rows)[/dim]")
    rows = []
    for label, found in [*components.items(), ("reward", report["reward"])]:
        cells = [safe(label), f"{found['weight']:g}" if "weight" in found else ""]
        cells += [_cell(found[name]) for name in ("mean", "min", "max")]
        rows.append([*cells, str(report["rows"] - found["count"] or "-")])
    named = Column("component", no_wrap=True, overflow="ellipsis")
    console.print()
    console.table((named, *map(numeric, ("weight", "mean", "min", "max", "none"))), rows)


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


@with_settings(SamplingSettings, "temperature", "top_p", "max_new_tokens", temperature=1.0, top_p=1.0)
def pairs(
    settings: SamplingSettings,
    run: Annotated[str | None, Argument(metavar="RUN", help="Run folder, adapter or hub id, of a chat model.")] = None,
    prompts: Prompts = None,
    samples: Annotated[Path | None, Option(help=SAMPLES_HELP)] = None,
    rewards: Named = None,
    config: FromFile = None,
    normalize: Normalize = None,
    allow_code: AllowCode = False,
    num_samples: NumSamples = 4,
    min_difference: Annotated[float, Option(help="Minimal score difference of a pair.", metavar="FLOAT")] = 0.1,
    seed: Seed = 42,
    limit: Annotated[int | None, Option(help="Read so many rows of the prompts.", min=1, metavar="INT")] = None,
    output: Annotated[Path, Option("--output", "-o", help="File (.jsonl) to write or replace.")] = OUTPUT,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Sample completions, score them, and write the best and the worst of each prompt: data for llmlab dpo."""
    if (run is None) != (prompts is None) or (run is None) == (samples is None):
        raise UserError("expected RUN and --prompts FILE, or --samples FILE alone")
    source = DataSource(name=str(samples)) if prompts is None else parse_source(prompts, "--prompts ")
    scores = samples is None or rewards is not None or config is not None
    scoring, folder = reward_settings(rewards, config, normalize) if scores else (None, Path())
    _check_output(output, source)

    from llmlab.data.samples import group_samples, read_samples
    from llmlab.inference import is_chat_model, load_for_inference
    from llmlab.rewards.compose import compose
    from llmlab.runs.progress import quiet_libraries
    from llmlab.training.offline.sampling import score_samples
    from llmlab.training.preference.pairs import compare, load_prompts, sample_pairs, summarize, write_pairs

    if scoring is not None:
        options = {"normalize": scoring.normalize_rewards, "allow_code": allow_code, "folder": folder}
        reward = compose(scoring.rewards, **options)
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
            comparisons = sample_pairs(model, tokenizer, examples, reward, settings, **options)
            report = summarize(track(comparisons, len(examples), "Sampling"), unusable)
    write_pairs(report, output)
    _print_pairs(report, output)


def _check_output(output: Path, source: DataSource) -> None:
    """Checks the output path before sampling."""
    if output.is_dir() or output.suffix != ".jsonl":
        raise UserError(f"--output {output}: expected a file whose name ends in .jsonl")
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
