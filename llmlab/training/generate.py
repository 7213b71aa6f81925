"""The generate stage: a model's completions of a few prompts, printed and kept in a run folder."""

import json
from pathlib import Path

from rich.console import Console

from llmlab.inference import answers_chats, generate_text, load_for_inference
from llmlab.runs import checkpoints
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunRecord, RunResult
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import GenerateSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.terminal import Terminal

SAMPLES = "samples.jsonl"


def write_samples(
    settings: GenerateSettings | Resolved[GenerateSettings], *, console: Console | None = None
) -> RunResult:
    """Writes completions of prompts to `samples.jsonl` in a run folder, and prints them.

    Args:
        settings: the model, the prompts, and how to sample.
        console: where to print; None is the terminal.

    Returns:
        The run folder, and how many completions it holds.

    Raises:
        UserError: there is no such model, or a prompt fills its context.
    """
    resolved = as_resolved(settings)
    settings = resolved.settings
    console = console or Terminal()
    with checkpoints.claim(settings.output_dir) as folder:
        return _write_samples(folder, resolved, console)


def _write_samples(folder: Path, resolved: Resolved[GenerateSettings], console: Console) -> RunResult:
    settings = resolved.settings
    with quiet_libraries():
        model, tokenizer = load_for_inference(settings.model)
        chats = answers_chats(settings.model, tokenizer)
        prompts = [[{"role": "user", "content": prompt}] if chats else prompt for prompt in settings.prompts]
        completions = list(
            generate_text(model, tokenizer, prompts, settings, num_samples=settings.num_samples, seed=settings.seed)
        )
    rows = []
    for prompt, samples in zip(settings.prompts, completions, strict=True):
        for completion in samples:
            rows.append(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
            console.print(prompt, style="bold", markup=False, highlight=False, end="\n" if chats else "")
            console.print(completion.strip() if chats else completion, markup=False, highlight=False, end="\n\n")
    write_atomically(folder / SAMPLES, "".join(rows))
    metrics: dict[str, float] = {"completions": len(rows)}
    record = RunRecord(
        folder,
        stage="generate",
        settings=settings.model_dump(mode="json"),
        sources=resolved.sources,
        parents=[settings.model],
        hardware={},
    )
    record.finish("finished", metrics=metrics)
    return RunResult(folder, metrics)
