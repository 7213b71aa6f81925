"""Inputs of a merge: the adapter that a path means, and a base model that it can be folded into.

Everything that is wrong with them is said here, before weights are loaded; folding one into the other is `merge`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from llmlab.model import ADAPTER_CONFIG, load_config, read_adapter
from llmlab.runs import checkpoints
from llmlab.runs.record import read_record
from llmlab.runs.run import BEST_ADAPTERS
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.files import check_types
from llmlab.settings.paths import expand, is_local

SEQ_CLS = "SEQ_CLS"  # PEFT's task type of reward models
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_FOUND = "Adapter folder not found"
NO_CONFIG = "Could not load LoRA config"
COMPLETED = "check the path, and that LoRA training completed and saved its adapters"


def find_adapter(source: str) -> Path:
    """Returns the adapter folder that is meant: itself, the best adapters of a run folder, or those of a hub id."""
    folder, where = expand(source), f"adapter = {source}"
    if not is_local(source) and (adapter := read_adapter(source)) is not None:
        return adapter.folder
    if folder.is_file():
        raise UserError(f"{where}: {NOT_FOUND}: this is a file; {COMPLETED}; did you mean {folder.parent}?")
    if not folder.is_dir():
        near = did_you_mean(folder.name, [sibling.name for sibling in folder.parent.glob("*") if sibling.is_dir()])
        raise UserError(f"{where}: {NOT_FOUND}: there is no such folder; {COMPLETED}{near}")
    for place in (folder, folder / BEST_ADAPTERS):
        has_config, has_weights = (place / ADAPTER_CONFIG).is_file(), any((place / name).is_file() for name in WEIGHTS)
        if has_config and has_weights:
            return place
        if has_config or has_weights:
            problem, missing = (NOT_FOUND, WEIGHTS[0]) if has_config else (NO_CONFIG, ADAPTER_CONFIG)
            raise UserError(f"{where}: {problem}: {place} has no {missing}; {COMPLETED}")
    inside = [path.parent for path in sorted(folder.glob(f"[!.]*/{ADAPTER_CONFIG}"))]
    named = [path for path in inside if checkpoints.step_of(path) is None]
    if len(named) > 1:
        raise UserError(
            f"{where}: it holds several adapters ({', '.join(path.name for path in named)}), and merge can't merge "
            f"multiple adapters into one model (they'd interfere); give one of them, such as {named[0]}"
        )
    if inside:
        nearest = max(named or inside, key=lambda path: checkpoints.step_of(path) or 0)
        raise UserError(f"{where}: {NOT_FOUND}: not in this folder itself; did you mean {nearest}?")
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: {NOT_FOUND}: this folder has no {ADAPTER_CONFIG}; {COMPLETED}")
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(path, "pt") as weights:
            if any("lora_" in name for name in weights.keys()):  # noqa: SIM118  no mapping
                raise UserError(f"{where}: {NO_CONFIG}: it has no {ADAPTER_CONFIG}; {COMPLETED}")
    merged = " (it was: its llmlab.json says so)" if read_record(folder).get("stage") == "merge" else ""
    raise UserError(
        f"{where}: Checkpoint doesn't have LoRA parameters: it is a whole model, which was trained without LoRA "
        f"or is merged already{merged}; use it as it is"
    )


def read_config(adapter: Path) -> PeftConfig:
    """Returns the configuration of an adapter, once it is one that changes a model's weights."""
    with reading(f"{adapter / ADAPTER_CONFIG}: {NO_CONFIG}", "an adapter's configuration of this PEFT"):
        config = PeftConfig.from_pretrained(str(adapter))
        check_types(adapter / ADAPTER_CONFIG, vars(config), get_type_hints(type(config)))
        kind = config.peft_type.value
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{adapter}: an adapter of type {kind} adds to a model's inputs, not to its weights: it cannot be merged"
        )
    if config.task_type not in (None, "CAUSAL_LM", SEQ_CLS):
        raise UserError(
            f"{adapter}: this adapter is for {config.task_type}; merge makes causal language models and reward models"
        )
    for key in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        if getattr(config, key, None):
            raise UserError(f"{adapter}: {key} is set, and such an adapter is no change of the base model's weights")
    return config


def check_base(base: str | None, config: PeftConfig, adapter: Path, *, named: bool) -> None:
    """Refuses a base model that an adapter cannot be merged into; `named` says that the user named it."""
    if not base:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: it names no base model; give it with --base")
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"base = {base}: this is an adapter too, and two can't be merged at once (they'd interfere); "
            "merge that one first, then give the result with --base"
        )
    try:
        base_config = load_config(base)
    except UserError as error:
        where = "base =" if named else f"{adapter} is an adapter of {base}, which does not load; give it with --base:"
        raise UserError(f"{where} {error}") from None
    if not named and config.revision not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"{adapter}: it was trained on revision {config.revision} of {base}; "
            "download that revision, and give its folder with --base"
        )
    quantization = getattr(base_config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(
            f"base = {base}: its weights are stored quantized ({getattr(method, 'value', method)}), and merging into "
            "them would lose the adapter's precision; give --base with the unquantized model"
        )


def tokenizer_source(adapter: Path, base: str) -> str:
    """Returns where the tokenizer is: beside the adapter, in its run folder, or with the base model."""
    files = ("tokenizer_config.json", "tokenizer.json")
    places = (place for place in (adapter, adapter.parent) if all((place / file).is_file() for file in files))
    return str(next(places, base))


def describe(adapter: Path, config: PeftConfig) -> dict[str, Any]:
    """Returns what an adapter is, for the record and the terminal."""
    targets = getattr(config, "target_modules", None)
    values = {
        "type": config.peft_type.value,
        "r": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "targets": " ".join(sorted(targets)) if isinstance(targets, (set, list)) else targets,
        "step": checkpoints.saved_step(adapter) if (adapter / checkpoints.STATE).is_file() else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def notes_on(adapter: Path) -> list[str]:
    """Returns what a user should know about an adapter that can be merged."""
    notes = []
    records = (read_record(place) for place in (adapter, adapter.parent))
    if any(record.get("settings", {}).get("use_qlora") for record in records):
        notes.append("trained over a base in 4 bits (QLoRA); merged into the unquantized base, which differs slightly")
    others = sorted(path.parent.name for path in adapter.glob(f"*/{ADAPTER_CONFIG}"))
    if others := [name for name in others if name != BEST_ADAPTERS and not name.startswith("checkpoint-")]:
        notes.append(f"the adapters in its folders {', '.join(others)} are left out")
    return notes
