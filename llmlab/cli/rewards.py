"""`llmlab reward-check`: what rewards say about completions in a file, before anything is trained with them.

Scoring is in `rewards`; here are only reading, the tables and the JSON.
"""

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.options import TrustRemoteCode
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.paths import expand, missing
from llmlab.settings.rewards import RewardsSettings
from llmlab.settings.sources import resolve
from llmlab.terminal import say_json

if TYPE_CHECKING:
    from rich.table import Table

    from llmlab.rewards.compose import ComposedReward, Scores

BARS = "▁▂▃▄▅▆▇█"
BINS = 10
LONGEST_BAR = 40
Values = list[float | None]

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
        if not _is_text_or_messages(row["completion"]):
            kind = type(row["completion"]).__name__
            raise UserError(f"{path}: row {number}: completion: expected text or a list of messages, found {kind}")
        if not _is_text_or_messages(row.get("prompt", "")):
            kind = type(row["prompt"]).__name__
            raise UserError(f"{path}: row {number}: prompt: expected text or a list of messages, found {kind}")
        for name in ("prompt", "completion"):
            if isinstance(row.get(name), list):
                try:
                    read_messages(row[name])
                except UserError as error:
                    raise UserError(f"{path}: row {number}: {name}: {error}") from None
    prompts = [row.get("prompt", "") for row in rows]
    completions = [
        [{"role": "assistant", "content": row["completion"]}]
        if isinstance(prompt, list) and isinstance(row["completion"], str)
        else row["completion"]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    return prompts, completions, {str(name): [row.get(name) for row in rows] for name in names}


def _is_text_or_messages(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, dict) for part in value))


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


def _histogram(values: Values, low: float, high: float) -> list[int]:
    """Returns how many values fall into each tenth from low to high."""
    counts = [0] * BINS
    for value in values:
        if value is not None:
            share = (value - low) / (high - low) if high > low else 0.0
            counts[min(max(math.floor(share * BINS + 1e-9), 0), BINS - 1)] += 1
    return counts


def _span(values: Values, bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    """Returns a range to draw values in: the known bounds, else the values' own."""
    numbers = [value for value in values if value is not None] or [0.0]
    low, high = bounds
    return min(numbers) if low is None else low, max(numbers) if high is None else high


def _print_json(file: Path, composed: "ComposedReward", scores: "Scores", groups: list[list[int]]) -> None:
    bounds = (0.0, 1.0) if composed.normalize else composed.bounds or (None, None)
    total_span = _span(scores.totals, bounds)
    report = {
        "file": str(file),
        "rows": len(scores.totals),
        "groups": len(groups),
        "normalized": composed.normalize,
        "bounds": composed.bounds,
        "reward": {
            **_summary(scores.totals, groups),
            "histogram": {
                "from": total_span[0],
                "to": total_span[1],
                "counts": _histogram(scores.totals, *total_span),
            },
        },
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
    from rich.markup import escape

    from llmlab.terminal import Terminal

    console = Terminal()
    labels = list(scores.components)
    # names head the rows' table where they fit, else letters that the components' table explains
    width = 4 + sum(max(len(label), 6) + 2 for label in labels) + 8 + 24
    keys = labels if width <= console.width else [_letter(number) for number in range(len(labels))]
    if shown:
        console.print(_rows_table(keys, scores, completions[:shown], digits=3 if keys == labels else 2))
        if len(completions) > shown:
            console.print(f"[dim]... {len(completions) - shown:,} more rows (--rows)[/dim]")
        console.print()
    console.print(_components_table(composed, scores, groups, keys if keys != labels else None))
    console.print()
    console.print(_histogram_table(composed, scores))
    console.print()
    if groups:
        console.print(
            f"[dim]flat: share of the {len(groups):,} prompts whose completions all get the same value.[/dim]"
        )
    else:
        console.print("[dim]No prompt has several completions here, so nothing shows how they differ.[/dim]")
    same = [label for label, values in scores.components.items() if len(values) > 1 and len(set(values)) == 1]
    if same:
        console.print(f"[yellow]The same value in every row: {escape(', '.join(same))}.[/yellow]")


def _rows_table(keys: Sequence[str], scores: "Scores", completions: list[Any], digits: int) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", expand=True)
    table.add_column("row", justify="right", style="dim", no_wrap=True)
    table.add_column("reward", justify="right", style="bold", no_wrap=True)
    for key in keys:
        table.add_column(escape(key), justify="right", no_wrap=True)
    table.add_column("completion", style="dim", no_wrap=True, overflow="ellipsis", ratio=1, min_width=12)
    for row, completion in enumerate(completions):
        values = [column[row] for column in scores.components.values()]
        table.add_row(
            str(row), _cell(scores.totals[row]), *(_cell(value, digits) for value in values), _preview(completion)
        )
    return table


def _components_table(
    composed: "ComposedReward", scores: "Scores", groups: list[list[int]], keys: Sequence[str] | None
) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    if keys:
        table.add_column("", style="bold", no_wrap=True)
    table.add_column("component", no_wrap=True, overflow="ellipsis")
    for name in ("weight", "mean", "min", "max", *(("flat",) if groups else ()), "none"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("distribution", no_wrap=True)

    def add(key: str, label: str, weight: str, values: Values, bounds: Any, style: str | None = None) -> None:
        found = _summary(values, groups)
        flat = [f"{found['zero_variance']:.0%}"] if groups else []
        none = str(len(values) - found["count"]) if len(values) > found["count"] else "-"
        numbers = [_cell(found[name]) for name in ("mean", "min", "max")]
        spark = _spark(_histogram(values, *_span(values, bounds)))
        table.add_row(*([key] if keys else []), escape(label), weight, *numbers, *flat, none, spark, style=style)

    for number, (label, reward) in enumerate(composed.components.items()):
        bounds = (reward.low, reward.high)
        add(keys[number] if keys else "", label, f"{reward.weight:g}", scores.components[label], bounds)
    bounds = (0.0, 1.0) if composed.normalize else composed.bounds or (None, None)
    add("", "reward", "", scores.totals, bounds, style="bold")
    return table


def _histogram_table(composed: "ComposedReward", scores: "Scores") -> "Table":
    from rich.table import Table

    low, high = _span(scores.totals, (0.0, 1.0) if composed.normalize else (None, None))
    counts = _histogram(scores.totals, low, high)
    if low == high:
        counts = [sum(counts)]
    table = Table(box=None, pad_edge=False, show_edge=False, show_header=True, header_style="bold")
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("", style="cyan", no_wrap=True)
    step = (high - low) / len(counts)
    for number, count in enumerate(counts):
        start = low + number * step
        size = count / max(counts) * LONGEST_BAR if count else 0
        bar = "█" * int(size) + ("▌" if size % 1 >= 0.5 or 0 < size < 1 else "")
        place = f"{start:.2f} - {start + step:.2f}" if step else f"{start:.3g}"
        table.add_row(place, str(count) if count else "-", bar)
    return table


def _print_list() -> None:
    import inspect

    from rich.table import Table

    from llmlab.rewards import REWARDS
    from llmlab.terminal import Terminal

    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for name, justify in (("reward", "left"), ("weight", "right"), ("what it scores, and its parameters", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "what it scores, and its parameters")  # type: ignore[arg-type]
    for name, target in REWARDS.items():
        parameters = [
            key if parameter.default is parameter.empty else f"{key}={parameter.default!r}"
            for key, parameter in inspect.signature(target).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        line = str(inspect.getdoc(target)).split("\n\n")[0].replace("\n", " ").removeprefix("Scores ")
        text = f"{line[0].upper()}{line[1:]}\n[dim]{', '.join(parameters) or 'no parameters'}[/dim]"
        table.add_row(f"[bold]{name}[/bold]", f"{target.weight:g}", text)
    Terminal().print(table)


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _cell(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def _spark(counts: list[int]) -> str:
    """Returns counts as a line of bars; a bin that has anything is never shown empty."""
    top = max(counts) or 1
    return "".join(BARS[math.ceil(count / top * (len(BARS) - 1))] if count else " " for count in counts)


def _preview(completion: Any) -> Any:
    from rich.text import Text

    from llmlab.rewards.completions import answer, model_text

    text = " ".join((answer(completion) or model_text(completion))[:400].split())
    return Text(printable(text) or "(empty)")
