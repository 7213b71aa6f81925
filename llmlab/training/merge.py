"""The merge stage: an adapter merged into its base model, checked, and saved as an ordinary model. PEFT merges, in
float64; here are the checks around it. The run folder appears only after the model, read back from disk, was shown to
give the same logits as base + adapter."""

import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmlab.data.tokenizer import load_tokenizer
from llmlab.hardware import DTYPES
from llmlab.inference import context_length, encode_prompt
from llmlab.model import fit_vocabulary, load_classifier, load_config, load_model, read_adapter, save_model
from llmlab.model.build import ADAPTER_CONFIG
from llmlab.runs import checkpoints
from llmlab.runs.failures import check_disk
from llmlab.runs.policy import set_stop_tokens
from llmlab.runs.progress import human, print_plan, print_result, quiet_libraries
from llmlab.runs.record import RunResult, read_record, record_result
from llmlab.runs.run import BEST_ADAPTERS
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.files import check_types
from llmlab.settings.lora import MergeSettings
from llmlab.settings.paths import expand, is_local
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.trust import takes_trust
from llmlab.terminal import Terminal

SEQ_CLS = "SEQ_CLS"  # PEFT's task type of reward models
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_FOUND = "Adapter folder not found"
NO_CONFIG = "Could not load LoRA config"
COMPLETED = "check the path, and that LoRA training completed and saved its adapters"
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(xs):\n    return sum(xs) / len(xs)",
    "What is 12 + 30? Explain it step by step.",
)
PROBE_TOKENS = 48
TOLERANCE = 1e-5  # of the largest logit, or of 1 where all are smaller


@takes_trust
def merge(settings: MergeSettings | Resolved[MergeSettings], *, console: Console | None = None) -> RunResult:
    """Merges adapters into their base model, checks the result against both, and saves it as an ordinary model.

    Args:
        settings: the adapter, the base model where it is another than the adapter names, and where to save.
        console: where to print; None is the terminal.

    Returns:
        The run folder, and how far its logits are from the adapter's and from the base model's.

    Raises:
        RuntimeError: the merged model computes something else, which is a fault of this module or of PEFT.

    Source: seed, LLM-Lab document, "LoRA Adapter Merging".
    """
    resolved = as_resolved(settings)
    with checkpoints.claim(resolved.settings.output_dir) as folder, quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of here (tied embeddings, missing weights) is checked below
        metrics, plan = _merge(folder, resolved)
    console = console or Terminal()
    print_plan(console, "merge", plan)
    print_result(console, folder, metrics)
    return RunResult(folder, metrics)


def _merge(folder: Path, resolved: Resolved[MergeSettings]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Writes the merged model into the run folder; returns the metrics and the lines to print."""
    settings = resolved.settings
    adapter = find_adapter(settings.adapter)
    config = read_config(adapter)
    base = settings.base or config.base_model_name_or_path
    base_dtype = check_base(base, config, adapter, named=settings.base is not None).get_text_config().dtype
    tokenizer = load_tokenizer(tokenizer_source(adapter, base))
    load = load_classifier if config.task_type == SEQ_CLS else load_model
    # stored weights may be wider than the configuration says: none is rounded before the adapter is merged
    model = load(base, dtype="auto" if base_dtype is None else torch.float64)
    saved = base_dtype or model.dtype
    saved = saved if saved in DTYPES.values() else torch.float32
    dtype = saved if settings.dtype == "auto" else DTYPES[settings.dtype]
    model = model.double().eval()
    with reading(adapter, "an adapter's weights"):
        renamed = getattr(model, "_checkpoint_conversion_mapping", None) or None
        weights = load_peft_weights(str(adapter), device="cpu", key_mapping=renamed)

    notes: list[str] = []
    probes = _probes(model, tokenizer, _fit_vocabulary(model, config, tokenizer, adapter))
    base_logits = _logits(model, probes)  # before the adapter, which may bring biases of its own
    tied_head = _tied_head(model)
    wrapped = _attach(model, config, weights, f"{adapter}: this adapter does not fit base = {base}")
    if tied_head is not None:  # merging in place would change both (peft#2018); PEFT had to see them tied
        tied_head.weight = nn.Parameter(tied_head.weight.detach().clone())
    adapted_logits = _logits(wrapped, probes)
    effect = _distance(base_logits, adapted_logits)
    _check_effect(wrapped, effect, adapted_logits, adapter)
    modules = sum(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in wrapped.modules())
    try:
        model = wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:  # some types of PEFT have no merging
        raise UserError(f"{adapter}: an adapter of type {config.peft_type.value} cannot be merged: {error}") from None
    if tied_head is not None:
        _tie_where_equal(model, notes)
    logits = _logits(model, probes)
    difference = _distance(adapted_logits, logits)
    if not difference <= TOLERANCE * _scale(adapted_logits):
        raise RuntimeError(f"the merged model's logits differ by {difference:.2g} from those of base and adapter")

    model.to(dtype)
    pad = model.can_generate() and model.generation_config.pad_token_id
    set_stop_tokens(model, tokenizer)
    if model.can_generate():
        if pad is not None:
            model.generation_config.pad_token_id = pad
        ends = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # many published models name a temperature without saying that they sample
            model.generation_config.do_sample = True
    check_disk(folder, needed=sum(weight.nbytes for weight in model.parameters()))
    try:
        with checkpoints.staged(folder) as place:
            save_model(model, tokenizer, place)
            saved_logits = _logits_on_disk(model, load(place, dtype=torch.float64).eval(), probes)
            rounding = _check_rounding(base_logits, logits, saved_logits, effect, dtype)
            metrics: dict[str, float] = {
                "max_difference": difference,
                "difference_to_base": effect,
                "rounding_difference": rounding,
                "merged_modules": modules,
                "bytes": sum(path.stat().st_size for path in place.glob("*.safetensors")),
            }
            parents, kind = [settings.adapter, base], describe(adapter, config)
            record_result(place, stage="merge", resolved=resolved, parents=parents, metrics=metrics, adapter=kind)
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir = {folder}: writing stopped: {error}") from error

    name = str(dtype).removeprefix("torch.")
    plan = [
        ("base", base),
        ("adapter", f"{adapter}: {', '.join(f'{key} {value}' for key, value in kind.items())}"),
        ("merged modules", str(modules)),
        ("saved", f"{human(metrics['bytes'], 'B')} in {name}"),
        ("logits", f"differ by at most {difference:.2g} from base + adapter, in float64 ({TOLERANCE:g} is allowed)"),
        ("effect", f"the adapter moves logits by at most {effect:.3g}"),
    ]
    if dtype != torch.float32:
        plan.append(("rounding", f"to {name} moves logits by at most {rounding:.2g}"))
        if rounding > effect / 2:
            notes.append("rounding moves logits almost as much as the adapter does; dtype=fp32 keeps it whole")
    records = (read_record(place) for place in (adapter, adapter.parent))
    if any(record.get("settings", {}).get("use_qlora") for record in records):
        notes.append("trained over a base in 4 bits (QLoRA); merged into the unquantized base, which differs slightly")
    return metrics, plan + [("note", note) for note in notes]


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
        problem = "merge can't merge multiple adapters into one model (they'd interfere)"
        several = f"it holds several adapters ({', '.join(path.name for path in named)})"
        raise UserError(f"{where}: {several}, and {problem}; give one of them, such as {named[0]}")
    if inside:
        nearest = max(named or inside, key=lambda path: checkpoints.step_of(path) or 0)
        raise UserError(f"{where}: {NOT_FOUND}: not in this folder itself; did you mean {nearest}?")
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: {NOT_FOUND}: this folder has no {ADAPTER_CONFIG}; {COMPLETED}")
    merged = " (it was: its llmlab.json says so)" if read_record(folder).get("stage") == "merge" else ""
    problem = f"it is a whole model, which was trained without LoRA or is merged already{merged}"
    raise UserError(f"{where}: Checkpoint doesn't have LoRA parameters: {problem}; use it as it is")


def read_config(adapter: Path) -> PeftConfig:
    """Returns the configuration of an adapter, once it is one that changes a model's weights."""
    with reading(f"{adapter / ADAPTER_CONFIG}: {NO_CONFIG}", "an adapter's configuration of this PEFT"):
        config = PeftConfig.from_pretrained(str(adapter))
        check_types(adapter / ADAPTER_CONFIG, vars(config), get_type_hints(type(config)))
        kind = config.peft_type.value
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(f"{adapter}: an adapter of type {kind} adds to a model's inputs, not to its weights")
    if config.task_type not in (None, "CAUSAL_LM", SEQ_CLS):
        raise UserError(f"{adapter}: this adapter is for {config.task_type}; expected a language or reward model's")
    return config


def check_base(base: str | None, config: PeftConfig, adapter: Path, *, named: bool) -> PreTrainedConfig:
    """Returns the configuration of a base that an adapter can be merged into; `named` says that the user named it."""
    if not base:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: it names no base model; give it with --base")
    if (Path(base) / ADAPTER_CONFIG).is_file():
        problem = "this is an adapter too, and two can't be merged at once (they'd interfere)"
        raise UserError(f"base = {base}: {problem}; merge that one first, then give the result with --base")
    try:
        base_config = load_config(base)
    except UserError as error:
        where = "base =" if named else f"{adapter} is an adapter of {base}, which does not load; give it with --base:"
        raise UserError(f"{where} {error}") from None
    if not named and config.revision not in (None, "main") and not Path(base).is_dir():
        problem = f"it was trained on revision {config.revision} of {base}"
        raise UserError(f"{adapter}: {problem}; download that revision, and give its folder with --base")
    quantization = getattr(base_config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        problem = f"its weights are stored quantized ({getattr(method, 'value', method)})"
        advice = "merging into them would lose the adapter's precision; give --base with the unquantized model"
        raise UserError(f"base = {base}: {problem}, and {advice}")
    return base_config


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


def _fit_vocabulary(
    model: PreTrainedModel, config: PeftConfig, tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> list[int]:
    """Gives the model an embedding row for each token, and returns the rows that the adapter changes."""
    rows = model.get_input_embeddings().num_embeddings
    vocabulary = max(rows, len(tokenizer))
    trained = getattr(config, "trainable_token_indices", None) or []
    indices = {index for listed in (trained.values() if isinstance(trained, dict) else [trained]) for index in listed}
    if indices and max(indices) >= vocabulary:
        problem = f"it trains token {max(indices)}, and base model and tokenizer have {vocabulary} tokens"
        raise UserError(f"{adapter}: {problem}; expected the base model and the tokenizer that it was trained with")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the rows that no adapter holds are the same each time
        fit_vocabulary(model, tokenizer)
    return sorted(indices.union(range(rows, vocabulary)))


def _tied_head(model: PreTrainedModel) -> nn.Module | None:
    """Returns the output head where it shares the embedding's weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head if head is not None and head.weight is embedding.weight else None


def _tie_where_equal(model: PreTrainedModel, notes: list[str]) -> None:
    """Re-ties embedding and output head if still equal, else sets tie_word_embeddings=false."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(embedding.weight, head.weight)
    if equal:
        head.weight = embedding.weight
    else:
        notes.append("the adapter changes embedding or output head alone: they are no longer tied")
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal


def _attach(model: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor], misfit: str) -> Any:
    """Returns the model with the adapter, all of whose weights have a place there."""
    config.inference_mode = True
    try:
        wrapped = PeftModel(model, config).eval()
        loaded = set_peft_model_state_dict(wrapped, weights)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if "Error(s) in loading" not in line]
        raise UserError(f"{misfit}: {lines[0]}; expected the model that it was trained on") from None
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    missing = [name for name in loaded.missing_keys if prefix in name or "modules_to_save" in name]
    # PEFT saves the rows of new tokens once more for a tied head, and has no place for them then
    rows = {name: weight for name, weight in weights.items() if name.endswith("token_adapter.trainable_tokens_delta")}
    twice = rows if len({tuple(weight.flatten().tolist()) for weight in rows.values()}) == 1 else {}
    unexpected = [name for name in loaded.unexpected_keys if name not in twice]
    for names, what in ((unexpected, "has no place there"), (missing, "is there and not in the adapter")):
        if names:
            count = f"{names[0]} {what} ({len(names)} such weights)"
            raise UserError(f"{misfit}: {count}; expected the model that it was trained on")
    return wrapped


def _check_effect(wrapped: Any, effect: float, adapted_logits: list[Tensor], adapter: Path) -> None:
    """Refuses an adapter that breaks the model or changes nothing."""
    if not math.isfinite(effect):
        raise UserError(f"{adapter}: with this adapter the model's logits are not finite; its training went wrong")
    zero_at_first = [p for name, p in wrapped.named_parameters() if ".lora_B." in name or "lora_embedding_A" in name]
    untrained = bool(zero_at_first) and not any(p.any() for p in zero_at_first)
    if effect == 0 or (untrained and effect <= TOLERANCE * _scale(adapted_logits)):  # DoRA's norms round
        reason = "every lora_B is zero, as before the first training step" if untrained else ""
        reason = reason or "its weights do not reach the logits, as with lora_alpha = 0"
        raise UserError(f"{adapter}: the adapter changes nothing: {reason}")


def _probes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_rows: list[int]) -> list[Tensor]:
    """Returns tokens to compare logits on, (1, time) each: texts, a conversation, the whole vocabulary, new rows."""
    rows = model.get_input_embeddings().num_embeddings
    probes = [encode_prompt(tokenizer, text) for text in PROBE_TEXTS]
    if tokenizer.chat_template is not None:
        with suppress(UserError):  # a template may want more than one message
            probes.append(encode_prompt(tokenizer, [{"role": "user", "content": PROBE_TEXTS[2]}]))
    probes.append(torch.randint(rows, (PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist())
    probes.append(new_rows[:: max(len(new_rows) // PROBE_TOKENS, 1)])
    length = min(PROBE_TOKENS, context_length(model) or PROBE_TOKENS)
    return [torch.tensor([ids[:length]]) for ids in probes if ids]


@torch.no_grad()
def _logits(model: Any, probes: list[Tensor]) -> list[Tensor]:  # (1, time, vocabulary) each, or (1, 1) scores
    return [model(input_ids=ids, use_cache=False).logits.double() for ids in probes]


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Returns the largest difference of logits; NaN where one of them is."""
    return torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max().item()


def _scale(logits: list[Tensor]) -> float:
    """Returns the size that differences of logits are relative to."""
    return max(1.0, *(part.abs().max().item() for part in logits))


def _logits_on_disk(model: PreTrainedModel, reloaded: PreTrainedModel, probes: list[Tensor]) -> list[Tensor]:
    """Returns the logits of the model that was read back, once its weights are those that were written."""
    read, written = reloaded.state_dict(), model.state_dict()
    wrong = list(read.keys() ^ written.keys())
    wrong += [name for name in read.keys() & written.keys() if not torch.equal(read[name], written[name].double())]
    if wrong:
        raise RuntimeError(f"the merged model differs after reading it back: {len(wrong)} weights, such as {wrong[0]}")
    return _logits(reloaded, probes)


def _check_rounding(
    base_logits: list[Tensor], logits: list[Tensor], saved_logits: list[Tensor], effect: float, dtype: torch.dtype
) -> float:
    """Returns how far rounding to the saved precision moves the logits, unless it loses the adapter or a weight."""
    rounding, name = _distance(logits, saved_logits), str(dtype).removeprefix("torch.")
    if not math.isfinite(rounding):
        raise UserError(f"the merged weights do not fit into {name}: the logits are not finite; expected dtype=fp32")
    if dtype == torch.float32 and rounding > 10 * TOLERANCE * _scale(saved_logits):  # half an ulp a weight
        raise RuntimeError(f"the merged model's logits differ by {rounding:.2g} after reading it back")
    if _distance(base_logits, saved_logits) == 0:
        problem = f"the adapter's changes (of logits by {effect:.2g}) vanish when rounded to {name}"
        raise UserError(f"{problem}: expected dtype=fp32, or an adapter that was trained for longer")
    return rounding
