"""`llmlab model info`, `init` and `convert`: sizes, initialization, conversion from and to related families."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from llmlab.cli.arguments import Seed, TrustRemoteCode
from llmlab.cli.options import command_line_layer, print_warnings
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import Layer, read_layer
from llmlab.settings.model import ModelSettings
from llmlab.settings.sources import resolve
from llmlab.terminal import Terminal, numeric, safe, say

if TYPE_CHECKING:
    from llmlab.model import ModelSize

app = Typer(no_args_is_help=True)

WORDS_HELP = "A model's configuration file (YAML or JSON) or folder, and settings; nothing is the default model."
Words = Annotated[list[str] | None, Argument(metavar="[CONFIG|FOLDER] [KEY=VALUE]...", help=WORDS_HELP)]
OutputDir = Annotated[Path, Option("--output-dir", "-o", help="The folder to write.")]


@app.command()
def info(
    words: Words = None,
    sequence: Annotated[int | None, Option(help="Sequence length; none is the longest.", min=1)] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show exact parameter counts by part, memory for training with each optimizer, FLOPs and cache per token.

    Of other architectures than llmlab's, and of adapters, parameters and the memory for them are shown.
    """
    from rich.table import Column

    from llmlab.model import LLMLabConfig, build_config, measure
    from llmlab.model.size import OPTIMIZERS, PARTS

    source, changes = _split(words)
    adapter = ""
    if source and Path(source).is_dir():
        if changes.values:
            raise UserError(f"{next(iter(changes.values))}: {source} is a finished model, whose shape is fixed")
        config, size, adapter = _of_folder(source)
    else:
        config = build_config(_settings(source, changes))
        size = measure(config)
    ours = isinstance(config, LLMLabConfig)
    if not ours and sequence:
        kind = config.model_type
        raise UserError(f"--sequence: FLOPs are counted for llmlab's own decoder, and this is {kind}")
    length = sequence or (config.max_position_embeddings if ours else 1)
    console = Terminal()
    if source:
        console.print(f"{safe(source)}: {safe(config.model_type)}", soft_wrap=True)
    rows = []
    for part in PARTS:
        count = getattr(size, part)
        if count or part not in ("norms", "other"):
            note = "shared" if part == "head" and not count else f"{count / size.total:.1%}"
            rows.append((part, f"{count:,}", note))
    rows.append(("[bold]total[/]", f"[bold]{size.total:,}[/]", ""))
    columns = ("part", numeric("count"), numeric("share"))
    console.table(columns, rows, title="Parameters", title_justify="left")
    if adapter:
        console.print(f"{'':11}{safe(adapter)}", soft_wrap=True)
    bytes_of = {name: (4 * size.total, 4 * size.total, size.optimizer_bytes(name)) for name in OPTIMIZERS}
    gigabytes = {name: [f"{part / 1e9:.2f}" for part in (*parts, sum(parts))] for name, parts in bytes_of.items()}
    title = "\nTraining memory in GB in fp32, without activations (those: llmlab plan)"
    columns = (Column("optimizer", no_wrap=True), *map(numeric, ("weights", "gradients", "states", "together")))
    console.table(columns, ((name, *row) for name, row in gigabytes.items()), title=title, title_justify="left")
    if ours:
        flops = (count(length) for count in (size.forward_flops_per_token, size.training_flops_per_token))
        cache = (size.kv_cache_bytes_per_token(dtype) for dtype in ("bf16", "fp32"))
        console.print("\nFLOPs per token at {}: {:.3g} forward, {:.3g} training".format(length, *flops))
        console.print("KV cache per token: {:,} bytes in bf16, {:,} in fp32".format(*cache))


def _of_folder(source: str) -> "tuple[Any, ModelSize, str]":
    """Returns the configuration of a folder's model, or of its adapters' base, its size, and a line on adapters."""
    from llmlab.model import measure, opening, read_adapter
    from llmlab.model.auto import load_auto
    from llmlab.model.size import adapter_parameters

    adapter = read_adapter(source)
    home = source if adapter is None else adapter.base
    with opening(home):
        config = load_auto("AutoConfig", home)
    with reading(f"{home}/config.json", "a model's configuration"):
        size = measure(config)
    if adapter is None:
        return config, size, ""
    with reading(f"{source}/adapter_config.json", f"adapters of {home}"):
        count = adapter_parameters(config, adapter.config)
    kind = adapter.config.peft_type.value
    return config, size, f"adapters ({kind}): {count:,} parameters, {count / size.total:.2%} of {home}"


@app.command()
def init(
    output_dir: OutputDir,
    words: Words = None,
    seed: Seed = 42,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an untrained model as a run folder, with its tokenizer where tokenizer_name is set."""
    from transformers import set_seed

    from llmlab.data.tokenizer import load_tokenizer
    from llmlab.model import build_config, measure, new_model, save_model
    from llmlab.runs import checkpoints
    from llmlab.runs.failures import check_memory

    settings = _settings(*_split(words))
    tokenizer = load_tokenizer(settings.tokenizer_name) if "tokenizer_name" in settings.model_fields_set else None
    vocabulary = settings.vocab_size
    if tokenizer is not None and "vocab_size" not in settings.model_fields_set:
        vocabulary = len(tokenizer)
    if tokenizer is not None and vocabulary < len(tokenizer):
        raise UserError(f"vocab_size = {vocabulary}: {settings.tokenizer_name} has {len(tokenizer)} tokens")
    config = build_config(settings.model_copy(update={"vocab_size": vocabulary}), tokenizer)
    check_memory(measure(config).total)
    with checkpoints.claim(output_dir) as folder, checkpoints.staged(folder) as temporary:
        set_seed(seed)
        model = new_model(config)
        if tokenizer is None:
            model.save_pretrained(temporary)
        else:
            save_model(model, tokenizer, temporary)
    say(f"saved {folder}: {model.num_parameters():,} parameters, untrained")


@app.command()
def convert(
    source: Annotated[str, Argument(help="Run folder or hub id of the model to convert.")],
    output_dir: OutputDir,
    to: Annotated[str, Option(help="llmlab, or what runs anywhere: llama, mistral, qwen2, qwen3.")] = "llmlab",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a model between llmlab's architecture and Llama, Mistral, Qwen2 or Qwen3, and verify equal logits."""
    from llmlab.data.tokenizer import load_tokenizer
    from llmlab.model import from_llmlab, load_model, save_model, to_llmlab
    from llmlab.runs import checkpoints

    model = load_model(source, dtype=None)
    converted = to_llmlab(model) if to == "llmlab" else from_llmlab(model, to)  # both compare logits themselves
    with checkpoints.claim(output_dir) as folder, checkpoints.staged(folder) as temporary:
        save_model(converted, load_tokenizer(source), temporary)
    say(f"saved {folder}: the same logits as {source}")


def _split(words: list[str] | None) -> tuple[str | None, Layer]:
    """Returns the source among the words, and the settings that the others change."""
    sources = [word for word in words or () if "=" not in word]
    if len(sources) > 1:
        raise UserError(f"{sources[1]}: expected key=value after {sources[0]}, such as n_layers=12")
    changes = command_line_layer(ModelSettings, [word for word in words or () if "=" in word])
    return next(iter(sources), None), changes


def _settings(source: str | None, *changes: Layer) -> ModelSettings:
    resolved = resolve(ModelSettings, *([read_layer(source)] if source else []), *changes)
    print_warnings(resolved.warnings)
    return resolved.settings
