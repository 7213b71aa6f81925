"""`llmlab model info`, `init` and `convert`: what an architecture costs, untrained models, and relatives' weights."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmlab.cli.options import print_warnings
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer, parse_scalar, read_layer
from llmlab.settings.model import ModelSettings
from llmlab.settings.sources import resolve
from llmlab.settings.vocabulary import LARGEST_SEED

app = typer.Typer(no_args_is_help=True)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG|FOLDER] [KEY=VALUE]...",
        help="A model configuration file (YAML or JSON) or a run folder, and settings; nothing is the default model.",
    ),
]


@app.command()
def info(
    words: Words = None,
    sequence: Annotated[int | None, typer.Option(help="Sequence length; none is the longest.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.", min=1)] = 1,
) -> None:
    """Show exact parameter counts by part, memory for training with each optimizer, FLOPs and cache per token."""
    from rich.console import Console
    from rich.table import Table

    from llmlab.model import measure
    from llmlab.settings.base import fields_of
    from llmlab.settings.optimizer import OptimizerSettings

    config = _config(words)
    size = measure(config)
    length = sequence or config.max_position_embeddings
    console = Console(highlight=False)
    shape = Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
    shape.add_column("part")
    shape.add_column("count", justify="right")
    shape.add_column("share", justify="right")
    parts = ("embeddings", "attention", "mlp", "norms", "head")
    for part in parts:
        count = getattr(size, part)
        note = "shared" if part == "head" and not count else f"{count / size.total:.1%}"
        shape.add_row(part, f"{count:,}", note)
    shape.add_row("total", f"{size.total:,}", "", style="bold")
    console.print(shape)
    memory = Table(
        title=f"\nTraining memory in GB, {batch_size} x {length} tokens, weights in fp32",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("optimizer", "weights", "gradients", "states", "activations fp32", "bf16", "total fp32", "bf16"):
        memory.add_column(column, justify="left" if column == "optimizer" else "right")
    optimizer = next(setting for setting in fields_of(OptimizerSettings) if setting.name == "optimizer")
    for name in optimizer.choices:
        wide, narrow = (
            size.training_memory(name, rows=batch_size, sequence=length, dtype=dtype) for dtype in ("fp32", "bf16")
        )
        values = (wide.weights, wide.gradients, wide.optimizer, wide.activations, narrow.activations)
        memory.add_row(name, *(f"{value / 1e9:.2f}" for value in (*values, wide.total, narrow.total)))
    console.print(memory)
    console.print(
        f"\nFLOPs per token at {length}: {size.forward_flops_per_token(length):.3g} forward, "
        f"{size.training_flops_per_token(length):.3g} training\n"
        f"KV cache per token: {size.kv_cache_bytes_per_token('bf16'):,} bytes in bf16, "
        f"{size.kv_cache_bytes_per_token('fp32'):,} in fp32"
    )


@app.command()
def init(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The run folder to write.")],
    words: Words = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.", min=0, max=LARGEST_SEED)] = 42,
) -> None:
    """Write an untrained model as a run folder, with its tokenizer where tokenizer_name is set."""
    from transformers import set_seed

    from llmlab.data import load_tokenizer
    from llmlab.model import build_config, measure, new_model
    from llmlab.training import checkpoints
    from llmlab.training.failures import check_memory

    settings = _settings(*_split(words))
    tokenizer = load_tokenizer(settings.tokenizer_name) if "tokenizer_name" in settings.model_fields_set else None
    vocabulary = settings.vocab_size
    if tokenizer is not None and "vocab_size" not in settings.model_fields_set:
        vocabulary = len(tokenizer)
    if tokenizer is not None and vocabulary < len(tokenizer):
        raise UserError(f"vocab_size = {vocabulary}: {settings.tokenizer_name} has {len(tokenizer)} tokens")
    folder = checkpoints.claim(str(output_dir), resume=False)
    set_seed(seed)
    config = build_config(settings, tokenizer, vocab_size=vocabulary)
    check_memory(measure(config).total)
    model = new_model(config)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

    checkpoints.publish(folder, write)
    typer.echo(f"saved {folder}: {model.num_parameters():,} parameters, untrained")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Run folder or hub id of the model to convert.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="llmlab, or a family that runs anywhere: llama, mistral, qwen2.")] = "llmlab",
) -> None:
    """Convert weights to llmlab's decoder or from it, and check that both give the same logits."""
    from llmlab.data import load_tokenizer
    from llmlab.model import from_llmlab, load_model, to_llmlab
    from llmlab.training import checkpoints

    model = load_model(source, dtype=None)
    converted = to_llmlab(model) if to == "llmlab" else from_llmlab(model, to)  # both compare logits themselves
    folder = checkpoints.claim(str(output_dir), resume=False)

    def write(temporary: Path) -> None:
        converted.save_pretrained(temporary)
        load_tokenizer(source).save_pretrained(temporary)

    checkpoints.publish(folder, write)
    typer.echo(f"saved {folder}: the same logits as {source}")


def _split(words: list[str] | None) -> tuple[str | None, dict[str, Any]]:
    """Returns the source among the words, and the settings that the others change."""
    sources = [word for word in words or () if "=" not in word]
    if len(sources) > 1:
        raise UserError(f"{sources[1]}: expected key=value after {sources[0]}, such as n_layers=12")
    changes: dict[str, Any] = {}
    for key, text in (word.split("=", 1) for word in words or () if "=" in word):
        if key in changes:
            raise UserError(f"command line: '{key}' is given twice; keep one")
        changes[key] = parse_scalar(text, key)
    return next(iter(sources), None), changes


def _settings(source: str | None, changes: dict[str, Any]) -> ModelSettings:
    layers = [read_layer(source)] if source else []
    resolved = resolve(ModelSettings, *layers, Layer("command line", changes))
    print_warnings(resolved.warnings)
    return resolved.settings


def _config(words: list[str] | None) -> Any:
    from llmlab.model import build_config, load_config

    source, changes = _split(words)
    if source and Path(source).is_dir():
        if changes:
            raise UserError(f"{next(iter(changes))}: {source} is a finished model, whose shape is fixed")
        return load_config(source)
    return build_config(_settings(source, changes))
