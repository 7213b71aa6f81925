"""Makes models from settings, and loads models and adapters from folders and the hub.

Neither choosing a device nor attaching new adapters is done here.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
import transformers
from huggingface_hub import snapshot_download
from pydantic import Field
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmlab.model.auto import load_auto, opening
from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.files import check_types, read_json
from llmlab.settings.model import ModelSettings
from llmlab.settings.paths import check_model
from llmlab.settings.trust import takes_trust

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

Count = Annotated[int, Field(gt=0)] | None
GENERATION_TYPES = {  # Transformers declares none
    **dict.fromkeys(("bos_token_id", "pad_token_id"), int | None),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "output_scores", "use_cache"), bool | None),
    **dict.fromkeys(("num_beams", "num_return_sequences", "max_length", "max_new_tokens"), Count),
    "eos_token_id": int | list[int] | None,
}
SHAPE_FIELDS = ModelSettings.model_fields.keys() & {*LLMLabConfig.__annotations__, *LLMLabConfig.attribute_map} - {
    "n_kv_heads"  # of gqa alone
}
ADAPTER_CONFIG = "adapter_config.json"
CLASSIFIER = "AutoModelForSequenceClassification"


def build_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> LLMLabConfig:
    """Returns the configuration that the settings describe, with the tokenizer's special tokens.

    Source: seed, LLM-Lab document, "Model Configuration".
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": settings.rope_theta}
    if settings.positional_encoding == "yarn":
        rope |= {"rope_type": "yarn", "factor": settings.yarn_factor}
        if settings.yarn_original_max_seq_len is not None:
            rope["original_max_position_embeddings"] = settings.yarn_original_max_seq_len
    return LLMLabConfig(
        **settings.model_dump(include=SHAPE_FIELDS),
        n_kv_heads=settings.n_kv_heads if settings.attention_type == "gqa" else None,
        rope_parameters=rope if settings.positional_encoding in ("rope", "yarn") else None,
        **{name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def new_model(config: LLMLabConfig) -> LLMLabForCausalLM:
    """Returns an untrained decoder in fp32, initialized from torch's random state."""
    return LLMLabForCausalLM(config).float()


def load_config(source: str | Path) -> PreTrainedConfig:
    """Loads the configuration of a model in a folder or on the hub."""
    check_model(str(source))
    _check_architecture(Path(source) / "config.json")
    with opening(source):
        return load_auto("AutoConfig", source)


@takes_trust
def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    quantization_config: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Loads a causal language model of any architecture, from a folder or the hub; dtype None is as saved."""
    check_model(str(source))
    _check_architecture(Path(source) / "config.json", generates=True)
    options = {"dtype": dtype or "auto", "quantization_config": quantization_config, "output_loading_info": True}
    with opening(source):
        model, info = load_auto("AutoModelForCausalLM", source, **options)
    if model.can_generate():
        check_types(f"{source}/generation_config.json", vars(model.generation_config), GENERATION_TYPES)
    if missing_keys := sorted(info["missing_keys"]):  # Transformers would initialize them randomly
        kind = ", ".join(model.config.architectures or ["unknown"])
        problem = f"{len(missing_keys)} weights are missing, such as {missing_keys[0]} (architectures = {kind})"
        raise UserError(f"{source}: no complete language model: {problem}")
    return _with_absolute_path(model, source)


def load_classifier(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantization_config: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Loads a sequence-classification model with one output; a language model gets a newly initialized head, and an
    adapter is merged into its base.
    """
    if (adapter := read_adapter(source)) is not None:
        if adapter.config.task_type != "SEQ_CLS":
            raise UserError(f"{source}: an adapter for {adapter.config.task_type}; expected one of llmlab reward")
        model = adapter.load_base(load_classifier)
        with opening(adapter.tokenizer_source, "a tokenizer"):
            tokenizer = load_auto("AutoTokenizer", adapter.tokenizer_source)
        fit_vocabulary(model, tokenizer)  # tokens added in training; the adapter holds their rows
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return adapter.attach(model).merge_and_unload(safe_merge=True).to(dtype)
    config = load_config(source)
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and CLASSIFIER not in own:
        raise UserError(f"{source}: model_type = {config.model_type}: this has no sequence-classification model")
    config.num_labels = 1
    with opening(source):
        model = load_auto(CLASSIFIER, source, config=config, dtype=dtype, quantization_config=quantization_config)
    return _with_absolute_path(model, source)


def _with_absolute_path(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Makes a model's path absolute: PEFT records it as that of an adapter's base."""
    if Path(source).is_dir():
        model.name_or_path = os.path.abspath(source)
    return model


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model an embedding row for every token; new rows start from the mean of the others."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def fit_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Turns the KV cache on, which trainers turn off, and gives the tokenizer the context length, before saving."""
    model.config.use_cache = True
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None:
        tokenizer.model_max_length = length


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a model and its tokenizer, ready to generate."""
    fit_context(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: the folder or hub id that was asked for, its local folder and its configuration."""

    source: str
    folder: Path
    config: "PeftConfig"

    @property
    def base(self) -> str:
        """The folder or hub id of the base model."""
        return self.config.base_model_name_or_path

    @property
    def tokenizer_source(self) -> str:
        """The folder or hub id of the tokenizer: the adapter's, or the base model's."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else self.base

    def load_base(self, load: Callable[..., PreTrainedModel], **options: Any) -> PreTrainedModel:
        """Returns the base model, loaded by `load_model` or `load_classifier` with these options."""
        try:
            return load(self.base, **options)
        except UserError as error:
            raise UserError(f"{self.source} is an adapter of {self.base}, which does not load: {error}") from None

    def attach(self, model: PreTrainedModel, **options: Any) -> "PeftModel":
        """Returns the model with this adapter."""
        from peft import PeftModel  # a second or two, for those who need it

        with reading(self.source, f"an adapter of {self.base}"), warnings.catch_warnings():
            # PEFT would leave these at their initial values
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, self.folder, **options)


def read_adapter(source: str | Path, *, lora_only: bool = False) -> Adapter | None:
    """Returns the adapter in a folder or on the hub, from where it is fetched; None where the source is a model."""
    check_model(str(source))
    try:
        path = find_adapter_config_file(str(source))
    except OSError:  # there is no such thing on the hub, which loading it will say
        return None
    if path is None:
        return None
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), ignore_patterns=["*/*", "*.pt", "*.gguf"]))
    from peft import PeftConfig  # a second or two, for those who need it

    with reading(f"{source}/{ADAPTER_CONFIG}", "an adapter's configuration"):
        config = PeftConfig.from_pretrained(str(folder))
    check_types(f"{source}/{ADAPTER_CONFIG}", vars(config), get_type_hints(type(config)))
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(f"{source}/{ADAPTER_CONFIG}: base_model_name_or_path = {base!r}: expected the model it adapts")
    if lora_only and config.peft_type != "LORA":
        raise UserError(f"{source}: an adapter of type {config.peft_type}; expected LoRA")
    return Adapter(str(source), folder, config)


def _check_architecture(path: Path, *, generates: bool = False) -> None:
    """Checks the model type of a config.json, and the types of llmlab's own values in it."""
    if not path.is_file():
        return  # a hub id: Transformers reads its configuration
    values = read_json(path)
    kind = values.get("model_type")
    if kind == LLMLabConfig.model_type:
        check_types(path, values, LLMLabConfig.__annotations__)
    elif "auto_map" in values and isinstance(kind, str | None):
        return  # it brings an architecture of its own, which `load_auto` refuses or loads
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING)
        raise UserError(f"{path}: model_type = {kind}: no architecture of that name{near}")
    if CONFIG_MAPPING[kind] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: model_type = {kind}: this architecture is no language model")
    heads = values.get("architectures")
    head = str(heads[0]) if isinstance(heads, list) and heads else ""
    if generates and head.endswith("ForSequenceClassification"):
        what = "this is a sequence-classification model; expected a language model"
        raise UserError(f"{path.parent}: architectures = {head}: {what}")
