"""The tokenizer stage: text in, a run folder with a tokenizer out."""

from rich.console import Console
from rich.markup import escape

from llmlab.data.tokenizer import learn_bpe
from llmlab.runs import checkpoints
from llmlab.runs.record import RunResult, record_result
from llmlab.settings.data import TokenizerSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.terminal import Terminal


def train_tokenizer(
    settings: TokenizerSettings | Resolved[TokenizerSettings], *, console: Console | None = None
) -> RunResult:
    """Trains a byte-level BPE tokenizer on text and writes its run folder.

    Args:
        settings: the text, and the size of the vocabulary.
        console: where to print; None is the terminal.

    Returns:
        The run folder, and the metric `vocab_size`.
    """
    resolved = as_resolved(settings)
    settings = resolved.settings
    console = console or Terminal()
    with checkpoints.claim(settings.output_dir) as folder:
        options = {"max_bytes": settings.max_bytes, "show_progress": console.is_terminal}
        tokenizer = learn_bpe(settings.datasets, settings.vocab_size, folder, **options)
        metrics = {"vocab_size": len(tokenizer)}
        result = record_result(folder, stage="tokenizer", resolved=resolved, parents=[], metrics=metrics)
    saved = f"[green]saved[/green] {escape(str(folder))}  {len(tokenizer):,} entries"
    console.print(saved, highlight=False, soft_wrap=True)
    return result
