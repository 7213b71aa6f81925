"""The sample stage: a model's completions of a few prompts, printed and kept in a run folder."""

import json

from rich.console import Console

from llmlab.inference import generate_text, is_chat_model, load_for_inference
from llmlab.runs import checkpoints
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult, record_result
from llmlab.settings.files import write_atomically
from llmlab.settings.generation import SampleSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.terminal import Terminal

SAMPLES = "samples.jsonl"


def write_samples(settings: SampleSettings | Resolved[SampleSettings], *, console: Console | None = None) -> RunResult:
    """Writes completions of prompts to `samples.jsonl` in a run folder, and prints them."""
    resolved = as_resolved(settings)
    settings = resolved.settings
    console = console or Terminal()
    with checkpoints.claim(settings.output_dir) as folder:
        with quiet_libraries():
            model, tokenizer = load_for_inference(settings.model)
            chats = is_chat_model(settings.model, tokenizer)
            prompts = [[{"role": "user", "content": prompt}] if chats else prompt for prompt in settings.prompts]
            options = {"num_samples": settings.num_samples, "seed": settings.seed}
            completions = list(generate_text(model, tokenizer, prompts, settings, **options))
        rows = []
        for prompt, samples in zip(settings.prompts, completions, strict=True):
            for completion in samples:
                rows.append(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
                console.print(prompt, style="bold", markup=False, highlight=False, end="\n" if chats else "")
                console.print(completion.strip() if chats else completion, markup=False, highlight=False, end="\n\n")
        write_atomically(folder / SAMPLES, "".join(rows))
        metrics = {"completions": len(rows)}
        return record_result(folder, stage="sample", resolved=resolved, parents=[settings.model], metrics=metrics)
