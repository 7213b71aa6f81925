"""`llmlab data check` and `llmlab data preview`: what a source holds, and its rows as the model will see them."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from llmlab.cli.options import TrustRemoteCode, setting_option
from llmlab.cli.pairs import pairs
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import parse_scalar
from llmlab.settings.paths import expand
from llmlab.settings.sft import SFTSettings
from llmlab.settings.vocabulary import LARGEST_SEED
from llmlab.terminal import say_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llmlab.data.chat.conversations import ConversationSource
    from llmlab.data.chat.rendering import RenderedRow, Renderer
    from llmlab.data.inspect import DataReport, Finding, Lengths

app = typer.Typer(no_args_is_help=True)

HEIGHT = 5  # lines of a histogram
TICKS = 10  # bins between two labels of its axis
BLOCKS = " ▁▂▃▄▅▆▇█"
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colors
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}

SOURCE_HELP = "name | subset | weight | split: hub id, file, folder or demo/...; or a mapping: '{name: x, column: y}'."
LossOn = setting_option(SFTSettings, "loss_on", panel=False)
MaxSeqLen = Annotated[int, typer.Option("--max-seq-len", help="Tokens where rows are cut.", min=1, metavar="INT")]
ChatTemplate = setting_option(SFTSettings, "chat_template", panel=False)


@app.command()
def check(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=SOURCE_HELP)],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="Run folder or hub id: also count tokens.", show_default=False),
    ] = None,
    max_seq_len: MaxSeqLen = 1024,
    loss_on: LossOn = "assistant",
    chat_template: ChatTemplate = None,
    limit: Annotated[
        int | None, typer.Option(help="Read so many rows of each source.", min=1, metavar="INT", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check data before training: formats, unusable rows, duplicates, turns out of order, scripts, lengths."""
    from llmlab.data.chat.rendering import find_problem
    from llmlab.data.inspect import inspect_rows

    found = [_load(_parse(text), limit) for text in sources]  # a bad source is told before the first is read
    renderer = _renderer(tokenizer, loss_on, chat_template)
    reports = [
        inspect_rows(
            _progress(source, limit),
            source.read,
            name=source.name,
            form=source.form.name + (", unpaired" if source.label else ""),
            label=source.label,
            render=renderer.render if renderer else None,
            find_problem=(lambda row: find_problem(row, renderer.tokenizer, renderer.stops)) if renderer else None,
            max_seq_len=max_seq_len,
        )
        for source in found
    ]
    if as_json:
        say_json({"sources": [asdict(report) for report in reports]})
        return
    console = _console()
    console.print(_overview(reports))
    for report in reports:
        _print_details(console, report)


@app.command()
def preview(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="Run folder or hub id.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Rows to show.", min=1, metavar="INT")] = 3,
    max_seq_len: MaxSeqLen = 1024,
    loss_on: LossOn = "assistant",
    chat_template: ChatTemplate = None,
    seed: Annotated[
        int, typer.Option(help="Another seed shows other rows.", min=0, max=LARGEST_SEED, metavar="INT")
    ] = 42,
    limit: Annotated[int, typer.Option(help="Rows to choose from and to measure.", min=1, metavar="INT")] = 2000,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show rows as the model will see them: special tokens, what is trained, and where rows are cut."""
    from random import Random

    from llmlab.data.chat.messages import UnusableRow
    from llmlab.data.inspect import Lengths
    from llmlab.data.sources import Tally

    found = _load(_parse(source), limit)
    renderer = _renderer(tokenizer, loss_on, chat_template)
    tally, rendered = Tally(), []
    for number, row in enumerate(_progress(found, limit), 1):
        try:
            rendered.append((number, renderer.render(found.read(row))))
            tally.documents += 1
        except UnusableRow as reason:
            tally.dropped[str(reason)] += 1
    tally.check(found.name, 1.0)
    console = _console()
    for number, row in sorted(Random(seed).sample(rendered, min(count, len(rendered))), key=lambda pair: pair[0]):
        _print_row(console, number, row, renderer, max_seq_len)
    _print_legend(console)
    lengths = Lengths.of([len(row.input_ids) for _, row in rendered])
    over = sum(len(row.input_ids) > max_seq_len for _, row in rendered)
    dropped = f", {tally.dropped.total():,} dropped" if tally.dropped else ""
    console.print(
        f"\n[bold]Tokens a row[/] of {len(rendered):,}; {over:,} longer than {max_seq_len:,}{dropped}", soft_wrap=True
    )
    _print_histogram(console, lengths)


app.command()(pairs)


def _parse(text: str) -> DataSource:
    try:
        return DataSource.model_validate(parse_scalar(text) if text.startswith("{") else text)
    except ValidationError as error:
        details = "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in error.errors())
        raise UserError(f"{text}: {details.removeprefix('Value error, ')}") from None


def _load(source: DataSource, limit: int | None) -> "ConversationSource":
    """Finds a source of conversations or, as pretraining would, of plain text in a column of a usual name."""
    from llmlab.data.chat.conversations import load_conversations
    from llmlab.data.sources import TEXT_COLUMNS, load_text

    try:
        return load_conversations(source, at_most=limit)
    except UserError as error:
        try:
            column = load_text(source, streaming=limit is not None).column
        except UserError:
            raise error from None
        if column not in TEXT_COLUMNS:
            raise
        return load_conversations(source.model_copy(update={"column": column}), at_most=limit)


def _renderer(name: str | None, loss_on: Any, chat_template: str | None) -> Any:
    from llmlab.data import load_tokenizer
    from llmlab.data.chat.rendering import Renderer, add_chat_template

    if name is None:
        return None
    tokenizer = load_tokenizer(name)
    tokenizer.model_max_length = sys.maxsize  # long rows are what is looked for, not a reason to warn
    add_chat_template(tokenizer, chat_template)
    return Renderer(tokenizer, loss_on)


def _console() -> "Console":
    from llmlab.terminal import Terminal

    return Terminal()


def _progress(source: "ConversationSource", limit: int | None) -> Iterator[dict[str, Any]]:
    """Yields the rows, with a bar on standard error where somebody may watch it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from llmlab.terminal import Terminal

    console = Terminal(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(itertools.islice(source.rows, limit), total=limit, description=_short(source.name))


def _short(name: str) -> str:
    """Returns a source's name for a place with little room."""
    from rich.markup import escape

    path = expand(name)
    return escape(path.name if path.exists() else name)


def _overview(reports: "Iterable[DataReport]") -> "Table":
    """Returns a source each: its name and format, and what counts."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold", ratio=1)
    for heading in ("rows", "dropped", "duplicate", "similar", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        counts = (report.dropped.total, report.exact_duplicates.rows, report.near_duplicates.rows)
        tokens = f"{report.tokens.lengths.total:,}" if report.tokens else "-"
        marked = (f"[yellow]{count:,}[/]" if count else "[dim]0[/]" for count in counts)
        source = f"{_short(report.name)}\n[dim]{escape(report.format)}[/]"
        table.add_row(source, f"{report.rows:,}", *marked, tokens)
    return table


def _print_details(console: "Console", report: "DataReport") -> None:
    from rich.markup import escape
    from rich.rule import Rule

    console.print()
    console.print(Rule(f"[bold]{escape(report.name)}[/]", align="left", style="dim"))
    console.print(f"[dim]columns[/]  {escape(', '.join(report.columns))}")
    if report.scripts:
        shares = [f"{script} {_percent(share)}" for script, share in list(report.scripts.items())[:6]]
        console.print(f"[dim]letters[/]  {', '.join(shares)}{', ...' if len(report.scripts) > 6 else ''}")
    if report.labels:
        counts = ", ".join(f"{label} {count:,}" for label, count in sorted(report.labels.items(), reverse=True))
        console.print(f"[dim]labels[/]   {counts}; llmlab sft learns one of them: --only-label true")
    if report.tokens:
        share = report.tokens.trained / report.tokens.lengths.total
        console.print(f"[dim]trained[/]  {_percent(share)} of the tokens")
    _print_findings(console, report)
    if report.characters is None or report.words is None:
        return
    _print_lengths(console, report)
    if report.tokens:
        console.print("\n[bold]Tokens a row[/]")
        _print_histogram(console, report.tokens.lengths)
    else:
        console.print("\n[bold]Words a row[/]")
        _print_histogram(console, report.words)


def _print_findings(console: "Console", report: "DataReport") -> None:
    from rich.table import Table
    from rich.text import Text

    findings: list[tuple[str, str, Finding]] = [
        ("red", f"dropped: {why}", rows) for why, rows in report.dropped.items()
    ]
    findings.append(("yellow", "same as an earlier row", report.exact_duplicates))
    findings.append(("yellow", "nearly the same as an earlier row", report.near_duplicates))
    findings += [("yellow", problem, rows) for problem, rows in report.problems.items()]
    if report.tokens:
        findings.append(("red", "nothing left to train after cutting", report.tokens.lost))
        findings.append(("yellow", f"longer than {report.tokens.max_seq_len:,} tokens", report.tokens.truncated))
    findings = [finding for finding in findings if finding[2].rows]
    if not findings:
        console.print("\n[green]Nothing to mend was found.[/]")
        return
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("found", overflow="fold", ratio=1)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("first rows", no_wrap=True)
    for style, what, found in findings:
        first = ", ".join(map(str, found.first)) + (", ..." if found.rows > len(found.first) else "")
        table.add_row(Text(printable(what), style=style), f"{found.rows:,}", _percent(found.rows / report.rows), first)
    console.print(table)


def _print_lengths(console: "Console", report: "DataReport") -> None:
    from rich.table import Table

    from llmlab.data.inspect import PERCENTILES

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("length of a row")
    for heading in (*(f"{mark} %" for mark in PERCENTILES), "longest", "total"):
        table.add_column(heading, justify="right", min_width=8, no_wrap=True)
    measured = [("characters", report.characters), ("words", report.words)]
    if report.tokens:
        measured.append(("tokens", report.tokens.lengths))
    for unit, lengths in measured:
        if lengths:
            values = (*lengths.percentiles.values(), lengths.longest, lengths.total)
            table.add_row(unit, *(f"{value:,}" for value in values))
    console.print()
    console.print(table)


def _print_histogram(console: "Console", lengths: "Lengths") -> None:
    """Prints block characters, one column a bin, over an axis of lengths."""
    from llmlab.data.inspect import BINS

    peak = max(lengths.counts)
    top = f"{peak:,}"
    heights = [max(round(count / peak * HEIGHT * 8), int(count > 0)) for count in lengths.counts]
    for line in range(HEIGHT - 1, -1, -1):
        bars = "".join(BLOCKS[min(max(height - 8 * line, 0), 8)] for height in heights)
        label = top if line == HEIGHT - 1 else ""
        console.print(f"[dim]{label:>{len(top)}} │[/][cyan]{bars}[/]")
    starts = range(0, len(lengths.counts), TICKS)
    axis = "".join(f"{start * lengths.bin_width:,}".ljust(TICKS) for start in starts)
    beyond = lengths.longest >= BINS * lengths.bin_width
    note = f"last column: up to {lengths.longest:,}" if beyond else ""
    console.print(f"[dim]{' ' * len(top)} └{'─' * len(lengths.counts)}\n{' ' * len(top)}  {axis}{note}[/]")


def _print_row(console: "Console", number: int, row: "RenderedRow", renderer: "Renderer", max_seq_len: int) -> None:
    """Prints a row's text, its tokens' part in training shown by color or brackets, up to where it is cut."""
    from rich.rule import Rule
    from rich.text import Text

    plain = console.color_system is None or console.no_color
    total, trained = len(row.input_ids), sum(row.trained)
    counts = f"{total:,} tokens, {trained:,} trained ({_percent(trained / max(total, 1))})"
    console.print(Rule(f"[bold]row {number:,}[/]  {counts}", align="left", style="dim"))
    special = set(renderer.tokenizer.all_special_ids)
    kinds = [(on, token in special) for token, on in zip(row.input_ids, row.trained, strict=True)][:max_seq_len]
    text, position = Text(), 0
    for on, parts in itertools.groupby(kinds, key=lambda kind: kind[0]):
        text.append(OPEN if plain and on else "")
        for is_special, run in itertools.groupby(parts, key=lambda kind: kind[1]):
            end = position + sum(1 for _ in run)
            piece = renderer.tokenizer.decode(row.input_ids[position:end], skip_special_tokens=False)
            text.append(printable(piece.translate(CONTROLS)), style=_style(on, is_special))
            position = end
        text.append(CLOSE if plain and on else "")
    console.print(text, soft_wrap=True)
    if total > max_seq_len:
        lost = sum(row.trained[max_seq_len:])
        cut = f"cut here: max_seq_len = {max_seq_len:,}; {total - max_seq_len:,} tokens more, {lost:,} of them trained"
        console.print(Rule(f"[bold red]✂ {cut}[/]", align="left", style="red", characters="╌"))
    if total > max_seq_len or not text.plain.endswith("\n"):
        console.print()


def _print_legend(console: "Console") -> None:
    from rich.text import Text

    if console.color_system is None or console.no_color:
        console.print(f"{OPEN}trained{CLOSE}  not trained")
        return
    parts = (("trained", True, False), ("special, trained", True, True), ("not trained", False, False))
    legend = [Text(f" {what} ", style=_style(on, special)) for what, on, special in (*parts, ("special", False, True))]
    console.print(Text("  ").join(legend))


def _style(trained: bool, special: bool) -> str:
    if trained:
        return "bold magenta on green" if special else "black on green"
    return "magenta" if special else "dim"


def _percent(share: float) -> str:
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return "<0.1 %" if 0 < share < 0.001 else f"{share:.1%}".replace("%", " %")
