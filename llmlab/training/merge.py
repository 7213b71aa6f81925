"""The merge stage: an adapter folded into its base model, checked, and saved as an ordinary model.

Loading an adapter beside its base, to talk to it, is `inference`; making one is the training stages' business.  The
run folder appears only after the model, read back from disk, computed what base and adapter compute together.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmlab.data import load_tokenizer, stop_token_ids
from llmlab.hardware import DTYPES
from llmlab.inference import context_length, encode_prompt
from llmlab.model import fit_context, load_classifier, load_model
from llmlab.runs import checkpoints
from llmlab.runs.failures import check_disk
from llmlab.runs.progress import human, print_plan, print_result, quiet_libraries
from llmlab.runs.record import RunRecord, RunResult
from llmlab.settings.errors import UserError
from llmlab.settings.merge import MergeSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.trust import takes_trust
from llmlab.terminal import Terminal
from llmlab.training.merge_sources import (
    SCORES,
    check_base,
    describe,
    find_adapter,
    has_tokenizer,
    notes_on,
    read_config,
    saved_dtype,
)

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(xs):\n    return sum(xs) / len(xs)",
    "What is 12 + 30? Explain it step by step.",
)
PROBE_TOKENS = 48
TOLERANCE = 1e-5  # of the largest logit, or of 1 where all are smaller


@takes_trust
def merge(settings: MergeSettings | Resolved[MergeSettings], *, console: Console | None = None) -> RunResult:
    """Folds adapters into their base model, checks the result against both, and saves it as an ordinary model.

    Args:
        settings: the adapter, the base model where it is another than the adapter names, and where to save.
        console: where to print; None is the terminal.

    Returns:
        The run folder, and how far its logits are from the adapter's and from the base model's.

    Raises:
        UserError: there is no adapter, it does not fit the base model or changes nothing, or it cannot be merged.
        RuntimeError: the merged model computes something else, which is a fault of this module or of PEFT.

    Source: seed, LLM-Lab document, "LoRA Adapter Merging".
    """
    resolved = as_resolved(settings)
    settings = resolved.settings
    console = console or Terminal()
    with checkpoints.claim(settings.output_dir) as folder:
        return _merge(folder, resolved, console)


def _merge(folder: Path, resolved: Resolved[MergeSettings], console: Console) -> RunResult:
    settings = resolved.settings
    adapter = find_adapter(settings.adapter)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of here (tied embeddings, missing weights) is checked below
        config = read_config(adapter)
        base = settings.base or config.base_model_name_or_path
        base_config = check_base(base, config, adapter, named=settings.base is not None)
        dtype = saved_dtype(base, base_config) if settings.dtype == "auto" else DTYPES[settings.dtype]
        home = next((str(place) for place in (adapter, adapter.parent) if has_tokenizer(place)), base)
        tokenizer = load_tokenizer(home)
        merged = _merge_weights(adapter, config, base, tokenizer)
        merged.prepare_to_save(dtype, tokenizer)
        check_disk(folder, needed=sum(weight.nbytes for weight in merged.model.parameters()))
        with _staged(folder) as place:
            _write(merged.model, tokenizer, place)
            rounding = _check_saved(merged, _loader(config)(place, dtype=torch.float64).eval(), dtype)
            size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
            metrics: dict[str, float] = {
                "max_difference": merged.difference,
                "difference_to_base": merged.effect,
                "rounding_difference": rounding,
                "merged_modules": merged.modules,
                "bytes": size,
            }
            record = RunRecord(
                place,
                stage="merge",
                settings=settings.model_dump(mode="json"),
                sources=resolved.sources,
                parents=[settings.adapter, base],
                hardware={},
            )
            record.finish("finished", metrics=metrics, adapter=describe(adapter, config))
    name = str(dtype).removeprefix("torch.")
    rows = [
        ("base", base),
        ("adapter", f"{adapter}: {', '.join(f'{key} {value}' for key, value in describe(adapter, config).items())}"),
        ("merged modules", str(merged.modules)),
        ("saved", f"{human(size, 'B')} in {name}"),
        (
            "logits",
            f"off base + adapter by at most {merged.difference:.2g} in float64 ({TOLERANCE:g} is allowed), off the "
            f"base by {merged.effect:.3g}",
        ),
    ]
    if dtype != torch.float32:
        rows.append(("rounding", f"to {name} moves logits by at most {rounding:.2g}"))
        if rounding > merged.effect / 2:
            merged.notes.append("rounding moves logits almost as much as the adapter does; dtype=fp32 keeps it whole")
    print_plan(console, "merge", rows + [("note", note) for note in merged.notes + notes_on(adapter)])
    print_result(console, folder, metrics)
    return RunResult(folder, metrics)


# Merging ----------------------------------------------------------------------------------------------------------


@dataclass
class Merged:
    """A merged model, in memory and in float64, with what its probes showed.

    `difference` is the largest of its logits from base and adapter's, `effect` of theirs from the base's.
    """

    model: PreTrainedModel
    modules: int
    probes: list[Tensor]
    base_logits: list[Tensor]
    logits: list[Tensor]
    difference: float
    effect: float
    notes: list[str]

    def prepare_to_save(self, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rounds the weights, and lets generation stop where the base or the tokenizer ends a text or a turn."""
        self.model.to(dtype)
        if not self.model.can_generate():  # it scores
            self.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            return
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stops = [stop for stop in dict.fromkeys([*ends, *stop_token_ids(tokenizer)]) if stop is not None]
        config.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        try:
            config.validate(strict=True)
        except ValueError:  # many published models name a temperature without saying that they sample
            config.do_sample = True


def _merge_weights(adapter: Path, config: PeftConfig, base: str, tokenizer: PreTrainedTokenizerBase) -> Merged:
    model = _loader(config)(base, dtype=torch.float64).eval()
    try:
        weights = load_peft_weights(
            str(adapter), device="cpu", key_mapping=getattr(model, "_checkpoint_conversion_mapping", None) or None
        )
    except SafetensorError as error:
        raise UserError(f"{adapter}: the adapter's weights are damaged or incomplete: {error}") from None
    notes: list[str] = []
    new_rows = _fit_vocabulary(model, config, weights, tokenizer, adapter, notes)
    probes = _probes(model, tokenizer, new_rows)
    base_logits = _logits(model, probes)  # before the adapter, which may bring biases of its own
    tied_head = _tied_head(model)
    wrapped = _wrap(model, config, weights, adapter, base)
    if tied_head is not None:  # merging in place would change both (peft#2018); PEFT had to see them tied
        tied_head.weight = nn.Parameter(tied_head.weight.detach().clone())
    adapted = _logits(wrapped, probes)
    effect = _distance(base_logits, adapted)
    _check_effect(wrapped, effect, adapted, adapter)
    modules = sum(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in wrapped.modules())
    try:
        model = wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:  # some types of PEFT have no merging
        raise UserError(f"{adapter}: an adapter of type {config.peft_type.value} cannot be merged: {error}") from None
    if tied_head is not None:
        _tie_where_equal(model, notes)
    logits = _logits(model, probes)
    difference = _distance(adapted, logits)
    if not difference <= TOLERANCE * max(_largest(adapted), 1.0):
        raise RuntimeError(f"the merged model's logits differ by {difference:.2g} from those of base and adapter")
    return Merged(model, modules, probes, base_logits, logits, difference, effect, notes)


def _loader(config: PeftConfig) -> Callable[..., PreTrainedModel]:
    """Returns what loads the kind of model that an adapter belongs to."""
    return load_classifier if config.task_type == SCORES else load_model


def _fit_vocabulary(
    model: PreTrainedModel,
    config: PeftConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
    notes: list[str],
) -> list[int]:
    """Gives the model as many rows as the adapter was trained with, and returns those that the adapter changes."""
    rows = model.get_input_embeddings().num_embeddings
    names = {id(module): name for name, module in model.named_modules()}
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    tied = _tied_head(model) is not None
    saved = [_saved_rows(weights, names[id(module)]) for module in ends]
    wanted = next((count for count in saved if count), max(rows, len(tokenizer)))
    if len(tokenizer) > wanted:
        raise UserError(
            f"{adapter}: the tokenizer has {len(tokenizer)} tokens and the adapter was trained with {wanted}; "
            "expected the tokenizer that it was trained with"
        )
    chosen = getattr(config, "trainable_token_indices", None) or {}
    chosen = chosen if isinstance(chosen, dict) else {names[id(ends[0])].rpartition(".")[2]: chosen}
    indices = {index for listed in chosen.values() for index in listed}
    if indices and max(indices) >= wanted:
        raise UserError(
            f"{adapter}: it trains token {max(indices)}, and base model and tokenizer have {wanted} tokens; "
            "expected the base model and the tokenizer that it was trained with"
        )
    added = set(range(rows, wanted))
    for module, count in zip(ends[:1] if tied else ends, saved, strict=False):
        leaf = names[id(module)].rpartition(".")[2]
        untrained = set() if count else added - set(chosen.get(leaf, ()))
        if untrained:
            notes.append(f"{leaf}: {len(untrained)} rows of new tokens are in no adapter, and get the others' mean")
    if wanted != rows:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the rows that no adapter holds are the same each time
            model.resize_token_embeddings(wanted)
    return sorted(indices | added)


def _saved_rows(weights: dict[str, Tensor], module: str) -> int | None:
    """Returns how many rows an embedding has that the adapter saved whole, or adapts; None where it does neither."""
    for name, weight in weights.items():
        if name.endswith(
            (f"{module}.weight", f"{module}.base_layer.weight", f"{module}.token_adapter.base_layer.weight")
        ):
            return weight.shape[0]
        if name.endswith((f"{module}.lora_embedding_A", f"{module}.lora_B.weight")):
            return weight.shape[name.endswith("lora_embedding_A")]
    return None


def _tied_head(model: PreTrainedModel) -> nn.Module | None:
    """Returns the output head where it shares the embedding's weights."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head if head is not None and head.weight is embedding.weight else None


def _tie_where_equal(model: PreTrainedModel, notes: list[str]) -> None:
    """Ties embedding and head again where merging left them equal, and else lets the configuration say so."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(embedding.weight, head.weight)
    if equal:
        head.weight = embedding.weight
    else:
        notes.append("the adapter changes embedding or output head alone: they are no longer tied")
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = equal


def _wrap(model: PreTrainedModel, config: PeftConfig, weights: dict[str, Tensor], adapter: Path, base: str) -> Any:
    misfit = f"{adapter}: this adapter does not fit base = {base}"
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
    twice = rows if all(torch.equal(weight, other) for weight in rows.values() for other in rows.values()) else {}
    unexpected = [name for name in loaded.unexpected_keys if name not in twice]
    for names, what in ((unexpected, "has no place there"), (missing, "is there and not in the adapter")):
        if names:
            raise UserError(
                f"{misfit}: {names[0]} {what} ({len(names)} such weights); expected the model that it was trained on"
            )
    return wrapped


def _check_effect(wrapped: Any, effect: float, adapted: list[Tensor], adapter: Path) -> None:
    if not math.isfinite(effect):
        raise UserError(f"{adapter}: with this adapter the model's logits are not finite; its training went wrong")
    first_zero = [
        weight for name, weight in wrapped.named_parameters() if ".lora_B." in name or "lora_embedding_A" in name
    ]
    untrained = bool(first_zero) and not any(weight.any() for weight in first_zero)
    if effect > 0 and not (untrained and effect <= 1e-5 * _largest(adapted)):  # DoRA's norms round
        return
    reason = "its weights do not reach the logits, as with lora_alpha = 0"
    if untrained:
        reason = (
            "every lora_B is zero, as before the first training step: it was never trained, or with learning rate 0"
        )
    raise UserError(f"{adapter}: the adapter changes nothing: {reason}")


# Checking ---------------------------------------------------------------------------------------------------------


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


def _largest(logits: list[Tensor]) -> float:
    return max(part.abs().max().item() for part in logits)


def _check_saved(merged: Merged, reloaded: PreTrainedModel, dtype: torch.dtype) -> float:
    """Returns how far rounding moved the logits, once what was read back from disk is what was merged.

    Raises:
        UserError: rounding lost the adapter, or a weight that is too large for the precision.
        RuntimeError: the model on disk is another.
    """
    written, kept = reloaded.state_dict(), merged.model.state_dict()
    wrong = list(written.keys() ^ kept.keys())
    wrong += [name for name in written.keys() & kept.keys() if not torch.equal(written[name], kept[name].double())]
    if wrong:
        raise RuntimeError(f"the merged model differs after reading it back: {len(wrong)} weights, such as {wrong[0]}")
    logits = _logits(reloaded, merged.probes)
    rounding, name = _distance(merged.logits, logits), str(dtype).removeprefix("torch.")
    if not math.isfinite(rounding):
        raise UserError(f"the merged weights do not fit into {name}: the logits are not finite; expected dtype=fp32")
    if dtype == torch.float32 and rounding > 10 * TOLERANCE * max(_largest(logits), 1.0):  # half an ulp a weight
        raise RuntimeError(f"the merged model's logits differ by {rounding:.2g} after reading it back")
    if _distance(merged.base_logits, logits) == 0:
        raise UserError(
            f"the adapter's changes (of logits by {merged.effect:.2g}) vanish when rounded to {name}: "
            "expected dtype=fp32, or an adapter that was trained for longer"
        )
    return rounding


# Saving -----------------------------------------------------------------------------------------------------------


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    fit_context(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which takes its place when all went well; otherwise nothing is left behind."""
    try:
        with checkpoints.staged(folder) as place:
            yield place
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir = {folder}: writing stopped: {error}") from error
