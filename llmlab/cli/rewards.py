"""`llmlab reward-check`: scores the completions of a file, to debug rewards before training with them.

Scoring is in `rewards`; here are only reading, the tables and the JSON.
"""

import json
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.bar import Bar
from rich.table import Column
from rich.text import Text

from llmlab.cli.options import TrustRemoteCode
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.paths import expand, missing
from llmlab.settings.rewards import RewardsSettings
from llmlab.settings.sources import resolve
from llmlab.terminal import Terminal, draw_bars, make_table, numeric, safe, say_json

if TYPE_CHECKING:
    from llmlab.rewards.compose import ComposedReward, Scores

BINS = 10
LONGEST_BAR = 40
Values = list[float | None]
Bounds = tuple[float | None, float | None]

Named = Annotated[
    str | None,
    typer.Option(
        "--rewards",
        "--reward",
        "-r",
        help="Names with commas between, each with | WEIGHT if wanted, or a YAML list: "
        "'\\[json_valid, {name: length, target: 50}]'.",
        metavar="NAMES",
    ),
]
FromFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="Take `rewards` from a settings file or a recipe.")
]
Normalize = Annotated[
    bool | None,
    typer.Option(
        "--normalize/--no-normalize",
        help="Map the weighted sum to [0, 1]. [dim]\\[true][/dim]",
        show_default=False,
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run reward functions from Python files (path/to/file.py:function).")
]


def reward_check(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Completions: jsonl, json, csv or parquet with `completion` and, beside it, `prompt` and the columns "
            "that rewards ask for.",
            show_default=False,
        ),
    ] = None,
    rewards: Named = None,
    config: FromFile = None,
    normalize: Normalize = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows to show.", min=0, metavar="INT")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    allow_code: AllowCode = False,
    list_rewards: Annotated[bool, typer.Option("--list", help="Show the rewards and their parameters.")] = False,
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
    scores = composed.score(completions, prompts=prompts, **columns)
    groups = _groups(prompts)
    if as_json:
        _print_json(file, composed, scores, groups)
    else:
        _print_tables(composed, scores, groups, completions, rows)


def reward_settings(rewards: str | None, config: Path | None, normalize: bool | None) -> tuple[RewardsSettings, Path]:
    """Returns the settings that the options ask for, and the folder that paths of reward files count from."""
    layers = []
    if config is not None:
        layer = read_layer(config)
        if "stage" in layer.values:  # a recipe: the rest of it is for training
            values = {key: value for key, value in layer.values.items() if key in spellings_of(RewardsSettings)}
            layer = Layer(layer.label, values, layer.lines, layer.path)
        layers.append(layer)
    given: dict[str, Any] = {}
    if rewards is not None:
        listed = parse_scalar(rewards) if rewards.lstrip().startswith(("[", "{")) else rewards
        given["rewards"] = [name.strip() for name in listed.split(",")] if isinstance(listed, str) else listed
    if normalize is not None:
        given["normalize_rewards"] = normalize
    spellings = {name for name, setting in spellings_of(RewardsSettings).items() if setting.name == "rewards"}
    if rewards is None and layers and not spellings & layers[0].values.keys():
        raise UserError(f"{config}: there are no `rewards` in it; expected them there or in --rewards")
    if rewards is None and config is None:
        raise UserError(
            "--rewards or --config is missing: expected what to reward, such as --rewards json_valid,length"
        )
    folder = config.parent if config is not None and rewards is None else Path()
    return resolve(RewardsSettings, *layers, Layer("command line", given)).settings, folder


def _read(path: Path) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Returns prompts, completions and the other columns of a file, as trainers give them to rewards."""
    from llmlab.data import files

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
            _check_readable(row.get(name, ""), f"{path}: row {number}: {name}")
    prompts = [row.get("prompt", "") for row in rows]
    completions = [
        [{"role": "assistant", "content": row["completion"]}]
        if isinstance(prompt, list) and isinstance(row["completion"], str)
        else row["completion"]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    return prompts, completions, {str(name): [row.get(name) for row in rows] for name in names}


def _check_readable(value: Any, where: str) -> None:
    """Raises UserError for what is neither text nor messages that rewards can read."""
    from llmlab.rewards.completions import read_messages

    if isinstance(value, str):
        return
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: expected text or a list of messages, found {type(value).__name__}")
    try:
        read_messages(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _groups(prompts: list[Any]) -> list[list[int]]:
    """Returns the rows of each prompt that has several completions."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_prompt[json.dumps(prompt, sort_keys=True, default=str)].append(row)
    return [rows for prompt, rows in by_prompt.items() if len(rows) > 1 and prompt not in ('""', "[]")]


def _summary(values: Values, groups: list[list[int]]) -> dict[str, Any]:
    """Returns mean, min and max of the values there are, and the share of groups whose values are all the same."""
    numbers = [value for value in values if value is not None]
    flat = [rows for rows in groups if len({values[row] for row in rows}) == 1]
    return {
        "count": len(numbers),
        "mean": statistics.fmean(numbers) if numbers else None,
        "min": min(numbers, default=None),
        "max": max(numbers, default=None),
        "zero_variance": len(flat) / len(groups) if groups else None,
    }


def _histogram(values: Values, bounds: Bounds) -> dict[str, Any]:
    """Returns how many values fall into each tenth of the bounds, or of the values' own range where none are known."""
    numbers = [value for value in values if value is not None]
    low = min(numbers, default=0.0) if bounds[0] is None else bounds[0]
    high = max(numbers, default=0.0) if bounds[1] is None else bounds[1]
    counts = [0] * BINS
    for value in numbers:
        share = (value - low) / (high - low) if high > low else 0.0
        counts[min(max(math.floor(share * BINS + 1e-9), 0), BINS - 1)] += 1
    return {"from": low, "to": high, "counts": counts}


def _bounds(composed: "ComposedReward") -> Bounds:
    return (0.0, 1.0) if composed.normalize else composed.bounds or (None, None)


def _print_json(file: Path, composed: "ComposedReward", scores: "Scores", groups: list[list[int]]) -> None:
    report = {
        "file": str(file),
        "rows": len(scores.totals),
        "groups": len(groups),
        "normalized": composed.normalize,
        "bounds": composed.bounds,
        "reward": _summary(scores.totals, groups) | {"histogram": _histogram(scores.totals, _bounds(composed))},
        "components": {
            label: {"weight": reward.weight, "range": [reward.low, reward.high], "cap": reward.cap}
            | _summary(scores.components[label], groups)
            for label, reward in composed.components.items()
        },
        "scores": [
            {"row": row, "reward": total}
            | {"components": {label: values[row] for label, values in scores.components.items()}}
            for row, total in enumerate(scores.totals)
        ],
    }
    say_json(report, indent=2, allow_nan=False)


def _print_tables(
    composed: "ComposedReward", scores: "Scores", groups: list[list[int]], completions: list[Any], shown: int
) -> None:
    console = Terminal()
    if shown:
        _print_rows(console, scores, completions[:shown])
        if len(completions) > shown:
            console.print(f"[dim]... {len(completions) - shown:,} more rows (--rows)[/dim]")
        console.print()
    _print_components(console, composed, scores, groups)
    _print_histogram(console, _histogram(scores.totals, (0.0, 1.0) if composed.normalize else (None, None)))
    if groups:
        console.print(
            f"[dim]zero variance: share of the {len(groups):,} prompts whose completions all get the same value.[/]"
        )
    else:
        console.print("[dim]No prompt has several completions here, so nothing shows how they differ.[/]")
    same = [label for label, values in scores.components.items() if len(values) > 1 and len(set(values)) == 1]
    if same:
        console.print(f"[yellow]The same value in every row: {safe(', '.join(same))}.[/]")


def _print_rows(console: Terminal, scores: "Scores", completions: list[Any]) -> None:
    from llmlab.rewards.completions import answer, model_text

    labels = list(scores.components)
    fits = 4 + sum(max(len(label), 6) + 2 for label in labels) + 8 + 24 <= console.width
    width, digits, gap = (None, 3, 2) if fits else (5, 2, 1)  # else names are folded
    table = make_table(
        numeric("row", style="dim"),
        numeric("reward", style="bold"),
        *(Column(safe(label), justify="right", width=width, overflow="fold") for label in labels),
        Column("completion", style="dim", no_wrap=True, overflow="ellipsis", ratio=1, min_width=12),
        expand=True,
        gap=gap,
    )
    for row, completion in enumerate(completions):
        values = [_cell(column[row], digits) for column in scores.components.values()]
        text = " ".join((answer(completion) or model_text(completion))[:400].split())
        table.add_row(str(row), _cell(scores.totals[row]), *values, Text(printable(text) or "(empty)"))
    console.print(table)


def _print_components(
    console: Terminal, composed: "ComposedReward", scores: "Scores", groups: list[list[int]]
) -> None:
    """Prints a line for each component, and one for their sum."""
    columns = ("weight", "mean", "min", "max", *(["flat"] if groups else []), "none")
    name = Column("component", no_wrap=True, overflow="ellipsis")
    table = make_table(name, *map(numeric, columns), Column("distribution", no_wrap=True))
    lines = [
        (label, f"{reward.weight:g}", scores.components[label], (reward.low, reward.high))
        for label, reward in composed.components.items()
    ]
    lines.append(("reward", "", scores.totals, _bounds(composed)))
    for label, weight, values, bounds in lines:
        found = _summary(values, groups)
        numbers = [_cell(found[name]) for name in ("mean", "min", "max")]
        flat = [f"{found['zero_variance']:.0%}"] if groups else []
        bars = draw_bars(_histogram(values, bounds)["counts"])[0]
        style = None if weight else "bold"
        table.add_row(safe(label), weight, *numbers, *flat, str(values.count(None) or "-"), bars, style=style)
    console.print(table)
    console.print()


def _print_histogram(console: Terminal, histogram: dict[str, Any]) -> None:
    """Prints a line for each tenth of the range, or one for all where every value is the same."""
    low, high, counts = histogram["from"], histogram["to"], histogram["counts"]
    table = make_table(numeric("reward"), numeric("rows"), Column(no_wrap=True))
    step = (high - low) / BINS
    for number, count in enumerate(counts if step else [sum(counts)]):
        start = low + number * step
        bar = Bar(max(counts), 0, count, width=LONGEST_BAR, color="cyan")
        table.add_row(f"{start:.2f} - {start + step:.2f}" if step else f"{start:.3g}", str(count or "-"), bar)
    console.print(table)
    console.print()


def _print_list() -> None:
    import inspect

    from llmlab.rewards import REWARDS

    table = make_table(
        Column("reward", style="bold", no_wrap=True), numeric("weight"), "what it scores, and its parameters"
    )
    for name, target in REWARDS.items():
        parameters = [
            key if parameter.default is parameter.empty else f"{key}={parameter.default!r}"
            for key, parameter in inspect.signature(target).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        line = str(inspect.getdoc(target)).split("\n\n")[0].replace("\n", " ").removeprefix("Scores ")
        text = f"{line[0].upper()}{line[1:]}\n[dim]{', '.join(parameters) or 'no parameters'}[/dim]"
        table.add_row(name, f"{target.weight:g}", text)
    Terminal().print(table)


def _cell(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"
