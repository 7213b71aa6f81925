"""The tokenizer stage: text in, a run folder with a tokenizer out."""

from rich.console import Console
from rich.markup import escape

from llmlab.data.tokenizer import train_tokenizer as learn
from llmlab.runs import checkpoints
from llmlab.runs.record import RunRecord, RunResult
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.tokenizer import TokenizerSettings
from llmlab.terminal import Terminal


def train_tokenizer(
    settings: TokenizerSettings | Resolved[TokenizerSettings], *, console: Console | None = None
) -> RunResult:
    """Learns a byte-level BPE vocabulary from text and writes its run folder.

    Args:
        settings: the text, and the size of the vocabulary.
        console: where to print; None is the terminal.

    Returns:
        The run folder, and how many entries the vocabulary has.

    Raises:
        UserError: the text is missing or too small for the vocabulary, or the folder cannot be written.
    """
    resolved = as_resolved(settings)
    settings = resolved.settings
    console = console or Terminal()
    with checkpoints.claim(settings.output_dir) as folder:
        tokenizer = learn(
            settings.datasets,
            settings.vocab_size,
            folder,
            max_bytes=settings.max_bytes,
            show_progress=console.is_terminal,
        )
        metrics: dict[str, float] = {"vocab_size": len(tokenizer)}
        record = RunRecord(
            folder,
            stage="tokenizer",
            settings=settings.model_dump(mode="json"),
            sources=resolved.sources,
            parents=[],
            hardware={},
        )
        record.finish("finished", metrics=metrics)
    saved = f"[green]saved[/green] {escape(str(folder))}  {len(tokenizer):,} entries"
    console.print(saved, highlight=False, soft_wrap=True)
    return RunResult(folder, metrics)
