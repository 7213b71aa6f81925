"""The model that a stage after pretraining starts from: whole or with adapters, its tokenizer and its chat template.

What it is trained on, and how, is each stage's own business.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmlab.adapters import lora_config, trainable_share
from llmlab.data import load_tokenizer, stop_token_ids
from llmlab.data.chat.rendering import add_chat_template
from llmlab.hardware import Hardware
from llmlab.inference import context_length
from llmlab.model import fit_vocabulary, load_model, read_adapter
from llmlab.runs._trl import show_head_bias
from llmlab.runs.progress import human
from llmlab.settings.base import fields_of, show
from llmlab.settings.errors import UserError
from llmlab.settings.lora import LoraSettings

OF_AN_ADAPTER = {  # settings that an adapter folder has decided: its configuration's field
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}


@dataclass(frozen=True)
class Policy:
    """A model ready to be trained.

    Attributes:
        model: in training form, with adapters where there are any.
        tokenizer: with a chat template.
        parents: the folder or hub id it comes from, and the base of an adapter.
        stops: ids at which it stops.
        new_tokens: tokens that were added for the chat template.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    parents: list[str]
    stops: tuple[int, ...]
    new_tokens: list[str]

    @property
    def continues_adapter(self) -> bool:
        """Whether the adapters are those of an earlier run."""
        return isinstance(self.model, PeftModel) and len(self.parents) > 1

    def new_adapters(self, settings: LoraSettings) -> LoraConfig | None:
        """Returns what a trainer shall attach; None where adapters are not wanted, or there already."""
        if not settings.use_lora or isinstance(self.model, PeftModel):
            return None
        return lora_config(self.model, settings, self.tokenizer.convert_tokens_to_ids(self.new_tokens))

    def fit(self, length: int) -> int:
        """Returns a length in tokens, or the model's context where that is shorter."""
        return min(length, context_length(self.model) or length)

    def rows(self, model: PreTrainedModel | PeftModel | None = None) -> list[tuple[str, str]]:
        """Returns the lines about it for the plan of a run; `model` is it with adapters attached since."""
        model = model or self.model
        trainable, total = trainable_share(model)
        rows = [("model", f"{' on '.join(self.parents)}: {human(total)} parameters")]
        if isinstance(model, PeftModel):
            adapter = model.active_peft_config
            kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
            targets = ", ".join(sorted(adapter.target_modules))
            rows.append(("adapter", f"{kind} r {adapter.r}, alpha {adapter.lora_alpha:g} on {targets}"))
            rows.append(("trained", f"{human(trainable)} parameters, {trainable / total:.2%} of all"))
        if self.new_tokens:
            rows.append(("new tokens", f"{', '.join(self.new_tokens)}: their embeddings are trained"))
        return rows


def load_policy(
    source: str, settings: LoraSettings, hardware: Hardware, *, chat_template: str | None, attach: bool = True
) -> Policy:
    """Loads what a stage trains.

    Whole models are held in fp32 and trained under autocast; under adapters the frozen weights stay in the arithmetic
    of the run.  An adapter folder brings its base, and its adapter is trained further.

    Args:
        source: a run folder or a hub id, of a whole model or of LoRA adapters.
        settings: whether and how adapters are attached.
        hardware: where it will run.
        chat_template: as in `add_chat_template`.
        attach: whether to attach new adapters; without, only the model for them is made ready.

    Raises:
        UserError: there is no such model, a preset matches nothing in it, the LoRA settings contradict the adapter, or
            the device cannot hold 4-bit weights.
    """
    adapter = read_adapter(source, lora_only=True)
    if adapter is not None:
        _check_same_adapter(source, adapter.config, settings)
    quantization = quantization_of(settings, hardware)
    frozen = adapter is not None or settings.use_lora
    options = {
        "dtype": hardware.torch_dtype if frozen else torch.float32,
        "quantization_config": quantization,
    }
    model = load_model(source, **options) if adapter is None else adapter.load_base(load_model, **options)
    tokenizer = load_tokenizer(source if adapter is None else adapter.tokenizer_home)
    new_tokens = add_chat_template(tokenizer, chat_template)
    if new_tokens and adapter is not None:
        raise UserError(
            f"chat_template = {chat_template}: it adds tokens ({', '.join(new_tokens)}), which the adapter in "
            f"{source} cannot train; merge it first: llmlab merge"
        )
    fit_vocabulary(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{source}: its tokenizer names no eos token: is its tokenizer_config.json missing?")
    stops = stop_at(model, tokenizer)
    if quantization is not None:
        model = prepare_quantized(model)
    if adapter is not None:
        model = adapter.attach(model, is_trainable=True)
    elif settings.use_lora and attach:
        ids = tokenizer.convert_tokens_to_ids(new_tokens)
        model = get_peft_model(model, lora_config(model, settings, ids))
    if isinstance(model, PeftModel):
        show_head_bias(model)
    parents = [source] if adapter is None else [source, adapter.base]
    return Policy(model, tokenizer, parents, stops, new_tokens)


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Lets the model's saved generation settings stop at the end of a turn too, and returns all ids it stops at."""
    config = model.generation_config
    known = config.eos_token_id
    known = known if isinstance(known, list) else [known]
    stops = tuple(dict.fromkeys(stop for stop in [*stop_token_ids(tokenizer), *known] if stop is not None))
    config.eos_token_id = list(stops)
    config.pad_token_id = tokenizer.pad_token_id
    return stops


def quantization_of(settings: LoraSettings, hardware: Hardware) -> BitsAndBytesConfig | None:
    """Returns how frozen weights are kept in 4 bits, or None where they are not.

    Raises:
        UserError: this machine cannot.
    """
    if not settings.use_qlora:
        return None
    check_quantization(hardware)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.torch_dtype,
    )


def check_quantization(hardware: Hardware) -> None:
    """Raises UserError where weights cannot be kept in 4 bits."""
    try:
        import bitsandbytes  # noqa: F401  an extra; and a second or two, for those who use it
    except ImportError:
        raise UserError("use_qlora = true: 4-bit weights need bitsandbytes: pip install 'llmlab[gpu]'") from None
    if hardware.device == "mps":
        raise UserError("use_qlora = true: bitsandbytes has no 4-bit weights on mps; expected device cuda or cpu")


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of 4-bit weights ready for adapters: these frozen, the rest in fp32."""
    keep_packing(model)
    # the trainer turns checkpointing on itself where it is wanted
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def keep_packing(model: PreTrainedModel) -> None:
    """Keeps evaluation on CPUs from repacking 4-bit weights, which rounds their scales in the middle of a run."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_same_adapter(source: str, adapter: PeftConfig, settings: LoraSettings) -> None:
    """Refuses LoRA settings that say something else than the adapter to go on with."""
    for setting in fields_of(type(settings)):
        field = OF_AN_ADAPTER.get(setting.name)
        value = setting.of(settings)
        if field is not None and value not in (setting.default, getattr(adapter, field)):
            raise UserError(
                f"{setting.key} = {show(value)}: {source} is trained further, whose adapter has "
                f"{show(getattr(adapter, field))}; leave it out, or merge the adapter first: llmlab merge"
            )
        asked: Iterable[str] | None = value if setting.name == "lora_target_modules" else None
        if asked and set(asked) != set(adapter.target_modules):
            raise UserError(
                f"lora_target_modules: {source} is trained further, whose adapter has "
                f"{', '.join(sorted(adapter.target_modules))}; leave it out, or merge the adapter first: llmlab merge"
            )
