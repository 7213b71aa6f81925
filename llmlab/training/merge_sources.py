"""What a merge starts from: the adapter that a path means, and the base model that it can be folded into.

Every way in which these are not what they should be is told apart here; folding one into the other is `merge`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from llmlab.model import ADAPTER_CONFIG as CONFIG
from llmlab.model import load_config, read_adapter
from llmlab.runs import checkpoints
from llmlab.runs.record import read_record
from llmlab.runs.run import BEST_ADAPTERS as BEST
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.files import check_types, read_json
from llmlab.settings.paths import expand, is_local

SCORES = "SEQ_CLS"  # the task of a reward model in PEFT's words
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # safetensors' names


def find_adapter(source: str | Path) -> Path:
    """Returns the adapter folder that is meant: itself, the best adapters of a run folder, or those fetched by hub id.

    Raises:
        UserError: there is none, or several.
    """
    folder, where = expand(source), f"adapter = {source}"
    if not is_local(str(source)) and (adapter := read_adapter(source)) is not None:
        return adapter.folder
    if not folder.is_dir():
        what = "this is a file" if folder.is_file() else "there is no such folder"
        near = [sibling.name for sibling in folder.parent.glob("*") if sibling.is_dir()]
        hint = f"; did you mean {folder.parent}?" if folder.is_file() else did_you_mean(folder.name, near)
        raise UserError(
            f"{where}: Adapter folder not found: {what}; check the path, and that LoRA training completed and saved "
            f"its adapters{hint}"
        )
    for place in (folder, folder / BEST):
        config, weights = (place / CONFIG).is_file(), any((place / name).is_file() for name in WEIGHTS)
        if config and weights:
            return place
        if config:
            raise UserError(
                f"{where}: Adapter folder not found: {place} has {CONFIG} but no {WEIGHTS[0]}; "
                "check that LoRA training completed and saved its adapters"
            )
        if weights:
            raise UserError(f"{where}: Could not load LoRA config: {place} has no {CONFIG}; {_whole_folder()}")
    inside = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG}"))
    named = [path for path in inside if checkpoints.step_of(path) is None]
    if len(named) > 1:
        raise UserError(
            f"{where}: it holds several adapters ({', '.join(path.name for path in named)}), and merge can't merge "
            f"multiple adapters into one model (they'd interfere); give one of them, such as {named[0]}"
        )
    if inside:
        last = named[0] if named else max(inside, key=lambda path: checkpoints.step_of(path) or 0)
        raise UserError(f"{where}: Adapter folder not found: not in this folder itself; did you mean {last}?")
    if (folder / "config.json").is_file():
        if any("lora_" in name for path in folder.glob("*.safetensors") for name in _weight_names(path)):
            raise UserError(f"{where}: Could not load LoRA config: it has no {CONFIG}; {_whole_folder()}")
        merged = " (it was: its llmlab.json says so)" if read_record(folder).get("stage") == "merge" else ""
        raise UserError(
            f"{where}: Checkpoint doesn't have LoRA parameters: it is a whole model, which was trained without LoRA "
            f"or is merged already{merged}; check that its training used LoRA, or use it as it is"
        )
    raise UserError(
        f"{where}: Adapter folder not found: this folder has no {CONFIG}; "
        "check the path, and that LoRA training completed and saved its adapters"
    )


def _whole_folder() -> str:
    return f"give an adapter folder as training saves it: {CONFIG} and {WEIGHTS[0]}"


def _weight_names(path: Path) -> list[str]:
    with suppress(SafetensorError), safe_open(path, "pt") as weights:
        return list(weights.keys())
    return []


def read_config(adapter: Path) -> PeftConfig:
    try:
        values = read_json(adapter / CONFIG)
        config = PeftConfig.from_pretrained(str(adapter))
        check_types(adapter / CONFIG, vars(config), get_type_hints(type(config)))
        kind = config.peft_type.value
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # PEFT's, for values it does not know
        raise UserError(
            f"{adapter / CONFIG}: Could not load LoRA config: it is damaged or of another PEFT: {error}; "
            f"{_whole_folder()}"
        ) from None
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{adapter}: an adapter of type {kind} adds to a model's inputs, not to its weights: it cannot be merged"
        )
    if config.task_type not in (None, "CAUSAL_LM", SCORES):
        raise UserError(
            f"{adapter}: this adapter is for {config.task_type}; merge makes causal language models and reward models"
        )
    for key in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        if values.get(key):
            raise UserError(f"{adapter}: {key} is set, and such an adapter is no change of the base model's weights")
    return config


def check_base(base: str | None, config: PeftConfig, adapter: Path, *, named: bool) -> PreTrainedConfig:
    """Returns the base model's configuration, once it is one that an adapter can be merged into."""
    if not base:
        raise UserError(f"{adapter / CONFIG}: it names no base model; give it with --base")
    if (Path(base) / CONFIG).is_file():
        raise UserError(
            f"base = {base}: this is an adapter too, and two can't be merged at once (they'd interfere); "
            "merge that one first, then give the result with --base"
        )
    try:
        base_config = load_config(base)
    except UserError as error:
        if named:
            raise UserError(f"base = {error}") from None
        raise UserError(
            f"{adapter} is an adapter of {base}, which does not load; give it with --base: {error}"
        ) from None
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
    return base_config


def saved_dtype(base: str, config: PreTrainedConfig) -> torch.dtype:
    """Returns the precision that a model's weights are saved in: as its configuration says, or its first weights."""
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
        cached = None if Path(base).is_dir() else try_to_load_from_cache(base, "model.safetensors")
        for path in [*files, *([cached] if isinstance(cached, str) else [])]:
            with safe_open(path, "pt") as weights:
                dtype = STORED.get(weights.get_slice(next(iter(weights.keys()))).get_dtype())
            break
    return dtype if dtype in STORED.values() else torch.float32


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file()


def describe(adapter: Path, config: PeftConfig) -> dict[str, Any]:
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
    notes = []
    records = (read_record(place) for place in (adapter, adapter.parent))
    if any(record.get("settings", {}).get("use_qlora") for record in records):
        notes.append("trained over a base in 4 bits (QLoRA); merged into the unquantized base, which differs slightly")
    if others := sorted(path.parent.name for path in adapter.glob(f"*/{CONFIG}")):
        others = [name for name in others if name != BEST and not name.startswith("checkpoint-")]
        notes += [f"the adapters in its folders {', '.join(others)} are left out"] if others else []
    return notes
