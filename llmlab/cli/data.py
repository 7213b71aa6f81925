"""`llmlab data check` and `preview`: statistics and problems of data sources, and their rows as tokenized."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich.rule import Rule
from rich.table import Column
from rich.text import Text
from typer import Argument, Option, Typer

from llmlab.cli.arguments import AsJson, Seed, TrustRemoteCode
from llmlab.cli.options import setting_option
from llmlab.cli.rewards import pairs, parse_source
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError, printable
from llmlab.settings.paths import expand
from llmlab.settings.training import SFTSettings
from llmlab.terminal import Terminal, draw_bars, numeric, percent, safe, say_json, track

if TYPE_CHECKING:
    from llmlab.data.chat.conversations import ConversationSource
    from llmlab.data.chat.rendering import RenderedRow, Renderer
    from llmlab.data.inspect import DataReport, Lengths

app = Typer(no_args_is_help=True)

HEIGHT = 5  # lines of a histogram
TICKS = 10  # bins between two labels of its axis
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colors
STYLES = {  # of tokens that are trained, and special: what the legend calls them, and the style of their text
    (True, False): ("trained", "black on green"),
    (True, True): ("special, trained", "bold magenta on green"),
    (False, False): ("not trained", "dim"),
    (False, True): ("special", "magenta"),
}
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}

SOURCE_HELP = "name | subset | weight | split: hub id, file, folder or demo/...; or a mapping: '{name: x, column: y}'."
LossOn = setting_option(SFTSettings, "loss_on", panel=False)
MaxSeqLen = Annotated[int, Option("--max-seq-len", help="Where rows are truncated.", min=1, metavar="TOKENS")]
ChatTemplate = setting_option(SFTSettings, "chat_template", panel=False)


@app.command()
def check(
    sources: Annotated[list[str], Argument(metavar="SOURCE...", help=SOURCE_HELP)],
    tokenizer: Annotated[str | None, Option("--tokenizer", "-t", help="Run or hub id, to count tokens.")] = None,
    max_seq_len: MaxSeqLen = 1024,
    loss_on: LossOn = "assistant",
    chat_template: ChatTemplate = None,
    limit: Annotated[int | None, Option(help="Maximal number of rows per source.", min=1, metavar="INT")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check data before training: formats, unusable rows, duplicates, turns out of order, scripts, lengths."""
    from llmlab.data.inspect import inspect_rows

    found = [_load(parse_source(text), limit) for text in sources]  # all of them, before the first is read
    renderer = _renderer(tokenizer, loss_on, chat_template)
    reports = [inspect_rows(source, _rows(source, limit), renderer, max_seq_len) for source in found]
    if as_json:
        return say_json({"sources": [asdict(report) for report in reports]})
    console, rows = Terminal(), []
    for report in reports:
        counts = (report.rows - report.usable, report.exact_duplicates.rows, report.near_duplicates.rows)
        marked = (f"[yellow]{count:,}[/]" if count else "[dim]0[/]" for count in counts)
        tokens = f"{report.tokens.lengths.total:,}" if report.tokens else "-"
        source = f"{safe(_short(report.name))}\n[dim]{safe(report.format)}[/]"
        rows.append((source, f"{report.rows:,}", *marked, tokens))
    counted = map(numeric, ("rows", "dropped", "duplicate", "similar", "tokens"))
    console.table([Column("source", overflow="fold", ratio=1), *counted], rows)
    for report in reports:
        _print_details(console, report)


@app.command()
def preview(
    source: Annotated[str, Argument(metavar="SOURCE", help=SOURCE_HELP)],
    tokenizer: Annotated[str, Option("--tokenizer", "-t", help="Run folder or hub id.")],
    count: Annotated[int, Option("--count", "-n", help="Rows to show.", min=1, metavar="INT")] = 3,
    max_seq_len: MaxSeqLen = 1024,
    loss_on: LossOn = "assistant",
    chat_template: ChatTemplate = None,
    seed: Seed = 42,
    limit: Annotated[int, Option(help="Rows to sample from, and to tokenize.", min=1, metavar="INT")] = 2000,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show rows as tokenized: special tokens, the loss mask, and where rows are truncated."""
    from random import Random

    from llmlab.data.chat.messages import UnusableRow
    from llmlab.data.inspect import Lengths
    from llmlab.data.sources import Tally

    found = _load(parse_source(source), limit)
    renderer = _renderer(tokenizer, loss_on, chat_template)
    tally, rendered = Tally(), []
    for number, row in enumerate(_rows(found, limit), 1):
        try:
            rendered.append((number, renderer.render(found.read(row))))
            tally.documents += 1
        except UnusableRow as reason:
            tally.dropped[str(reason)] += 1
    tally.check(found.name, 1.0)
    console = Terminal()
    for number, row in sorted(Random(seed).sample(rendered, min(count, len(rendered))), key=lambda pair: pair[0]):
        _print_row(console, number, row, renderer, max_seq_len)
    legend = (Text(f" {name} ", style=style) for name, style in STYLES.values())
    console.print(f"{OPEN}trained{CLOSE}  not trained" if console.plain else Text("  ").join(legend))
    lengths = Lengths.of([len(row.input_ids) for _, row in rendered])
    over = sum(len(row.input_ids) > max_seq_len for _, row in rendered)
    dropped = f", {tally.dropped.total():,} dropped" if tally.dropped else ""
    counts = f"{len(rendered):,}; {over:,} longer than {max_seq_len:,}{dropped}"
    console.print(f"\n[bold]Tokens a row[/] of {counts}", soft_wrap=True)
    _print_histogram(console, lengths)


app.command()(pairs)


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
    from llmlab.data.chat.rendering import Renderer, add_chat_template
    from llmlab.data.tokenizer import load_tokenizer

    if name is None:
        return None
    tokenizer = load_tokenizer(name)
    tokenizer.model_max_length = sys.maxsize  # long rows are what is looked for, not a reason to warn
    add_chat_template(tokenizer, chat_template)
    return Renderer(tokenizer, loss_on)


def _rows(source: "ConversationSource", limit: int | None) -> Iterator[dict[str, Any]]:
    return track(itertools.islice(source.rows, limit), limit, _short(source.name))


def _short(name: str) -> str:
    """Returns a source's name for a place with little room."""
    return path.name if (path := expand(name)).exists() else name


def _print_details(console: Terminal, report: "DataReport") -> None:
    console.print()
    console.print(Rule(f"[bold]{safe(report.name)}[/]", align="left", style="dim"))
    console.print(f"[dim]columns[/]  {safe(', '.join(report.columns))}")
    if report.scripts:
        shares = [f"{script} {percent(share)}" for script, share in list(report.scripts.items())[:6]]
        console.print(f"[dim]letters[/]  {', '.join(shares)}{', ...' if len(report.scripts) > 6 else ''}")
    if report.labels:
        counts = ", ".join(f"{label} {count:,}" for label, count in sorted(report.labels.items(), reverse=True))
        console.print(f"[dim]labels[/]   {counts}; llmlab sft learns one of them: --only-label true")
    if report.tokens:
        console.print(f"[dim]trained[/]  {percent(report.tokens.trained / report.tokens.lengths.total)} of the tokens")
    findings = [("red", f"dropped: {why}", rows) for why, rows in report.dropped.items()]
    findings.append(("yellow", "same as an earlier row", report.exact_duplicates))
    findings.append(("yellow", "nearly the same as an earlier row", report.near_duplicates))
    findings += [("yellow", problem, rows) for problem, rows in report.problems.items()]
    if report.tokens:
        findings.append(("red", "no trained token left after truncation", report.tokens.lost))
        findings.append(("yellow", f"longer than {report.tokens.max_seq_len:,} tokens", report.tokens.truncated))
    rows = []
    for style, what, found in findings:
        if found.rows:
            first = ", ".join(map(str, found.first)) + (", ..." if found.rows > len(found.first) else "")
            rows.append((f"[{style}]{safe(what)}[/]", f"{found.rows:,}", percent(found.rows / report.rows), first))
    console.print()
    if rows:
        columns = (Column("found", overflow="fold", ratio=1), numeric("rows"), numeric("share"), "first rows")
        console.table(columns, rows)
    else:
        console.print("[green]No problems were found.[/]")
    if report.characters is None:
        return
    measured = {"characters": report.characters}
    if report.tokens:
        measured["tokens"] = report.tokens.lengths
    marks = (*(f"{mark} %" for mark in report.characters.percentiles), "longest", "total")
    numbers = {unit: (*each.percentiles.values(), each.longest, each.total) for unit, each in measured.items()}
    rows = ((unit, *(f"{value:,}" for value in values)) for unit, values in numbers.items())
    console.print()
    console.table(["length of a row", *(numeric(mark, min_width=8) for mark in marks)], rows)


def _print_histogram(console: Terminal, lengths: "Lengths") -> None:
    """Prints upright bars, one a bin, over an axis of lengths."""
    top = f"{max(lengths.counts):,}"
    margin = " " * len(top)
    for number, bars in enumerate(draw_bars(lengths.counts, HEIGHT)):
        console.print(f"[dim]{margin if number else top} │[/][cyan]{bars}[/]")
    starts = range(0, len(lengths.counts), TICKS)
    axis = "".join(f"{start * lengths.bin_width:,}".ljust(TICKS) for start in starts)
    beyond = lengths.longest >= len(lengths.counts) * lengths.bin_width
    note = f"last column: up to {lengths.longest:,}" if beyond else ""
    console.print(f"[dim]{margin} └{'─' * len(lengths.counts)}\n{margin}  {axis}{note}[/]")


def _print_row(console: Terminal, number: int, row: "RenderedRow", renderer: "Renderer", max_seq_len: int) -> None:
    """Prints a row's text up to where it is cut; colors or brackets show which tokens are trained."""
    total, trained = len(row.input_ids), sum(row.trained)
    counts = f"{total:,} tokens, {trained:,} trained ({percent(trained / max(total, 1))})"
    console.print(Rule(f"[bold]row {number:,}[/]  {counts}", align="left", style="dim"))
    special = set(renderer.tokenizer.all_special_ids)
    kinds = [(on, token in special) for token, on in zip(row.input_ids, row.trained, strict=True)][:max_seq_len]
    text, position = Text(), 0
    for on, parts in itertools.groupby(kinds, key=lambda kind: kind[0]):
        text.append(OPEN if console.plain and on else "")
        for is_special, run in itertools.groupby(parts, key=lambda kind: kind[1]):
            end = position + sum(1 for _ in run)
            piece = renderer.tokenizer.decode(row.input_ids[position:end], skip_special_tokens=False)
            text.append(printable(piece.translate(CONTROLS)), style=STYLES[on, is_special][1])
            position = end
        text.append(CLOSE if console.plain and on else "")
    console.print(text, soft_wrap=True)
    if total > max_seq_len:
        lost = sum(row.trained[max_seq_len:])
        cut = f"truncated here: max_seq_len = {max_seq_len:,}; {total - max_seq_len:,} tokens more, {lost:,} trained"
        console.print(Rule(f"[bold red]✂ {cut}[/]", align="left", style="red", characters="╌"))
    if total > max_seq_len or not text.plain.endswith("\n"):
        console.print()
