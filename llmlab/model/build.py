"""From settings, or a folder, to a model: the places where llmlab makes or loads a decoder.

Training it is not done here, and neither is choosing a device.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from pydantic import Field
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmlab.model.auto import load_auto
from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError, did_you_mean, reading, reason_of
from llmlab.settings.files import check_types, read_json
from llmlab.settings.model import ModelSettings
from llmlab.settings.paths import check_model
from llmlab.settings.trust import takes_trust

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

Count = Annotated[int, Field(gt=0)] | None
OF_GENERATION = {  # Transformers declares no types for these
    **dict.fromkeys(("bos_token_id", "pad_token_id"), int | None),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "output_scores", "use_cache"), bool | None),
    **dict.fromkeys(("num_beams", "num_return_sequences", "max_length", "max_new_tokens"), Count),
    "eos_token_id": int | list[int] | None,
}
ADAPTER_CONFIG = "adapter_config.json"
SCORES = "AutoModelForSequenceClassification"


def build_config(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> LLMLabConfig:
    """Returns the configuration of the decoder that the settings describe.

    Args:
        settings: the architecture, in the seed's words.
        tokenizer: whose special tokens to take over, where they are not given.
        vocab_size: rows of the embedding; None is the settings'.
        bos_token_id: id of the token that begins a text.
        eos_token_id: id of the token that ends one.
        pad_token_id: id of the token that fills rows up.

    Source: seed, LLM-Lab document, "Model Configuration".
    """
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if tokenizer is not None:
        special = {name: getattr(tokenizer, name) if value is None else value for name, value in special.items()}
    rope = None
    if settings.positional_encoding in ("rope", "yarn"):
        rope = {"rope_type": "default", "rope_theta": settings.rope_theta}
    if settings.positional_encoding == "yarn":
        original = settings.yarn_original_max_seq_len or max(int(settings.max_seq_len / settings.yarn_factor), 1)
        rope |= {
            "rope_type": "yarn",
            "factor": settings.yarn_factor,
            "original_max_position_embeddings": original,
        }
    return LLMLabConfig(
        vocab_size=settings.vocab_size if vocab_size is None else vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads if settings.attention_type == "gqa" else None,
        attention_type=settings.attention_type,
        positional_encoding=settings.positional_encoding,
        norm_type=settings.norm_type,
        hidden_act=settings.activation,
        max_position_embeddings=settings.max_seq_len,
        rope_parameters=rope,
        sliding_window=settings.sliding_window,
        attention_bias=settings.attention_bias,
        dropout=settings.dropout,
        rms_norm_eps=settings.norm_eps,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=settings.tie_word_embeddings,
        **special,
    )


def new_model(config: LLMLabConfig, *, dtype: torch.dtype = torch.float32) -> LLMLabForCausalLM:
    """Returns an untrained decoder, initialized from torch's random state."""
    return LLMLabForCausalLM(config).to(dtype)


def load_config(source: str | Path) -> PreTrainedConfig:
    """Loads a model's configuration.

    Args:
        source: a run folder or a hub id.

    Raises:
        UserError: there is no such model, or its folder is broken.
    """
    check_folder(source)
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
    """Loads a causal language model, llmlab's or any other that Transformers knows.

    Args:
        source: a run folder or a hub id.
        dtype: of the weights; None is as saved.
        quantization_config: keeps the weights in fewer bits.

    Raises:
        UserError: there is no such model, it is incomplete or of an unknown kind, or its folder is broken.
    """
    check_folder(source)
    _check_architecture(Path(source) / "config.json", writes=True)
    extra = {} if quantization_config is None else {"quantization_config": quantization_config}
    with opening(source):
        model, info = load_auto(
            "AutoModelForCausalLM", source, dtype="auto" if dtype is None else dtype, output_loading_info=True, **extra
        )
    _check_generation(source, model)
    if missing := sorted(info["missing_keys"]):  # Transformers would go on with random weights
        kind = ", ".join(model.config.architectures or ["unknown"])
        raise UserError(
            f"{source}: no complete language model: {len(missing)} weights are missing, such as {missing[0]} "
            f"(architectures = {kind})"
        )
    return from_anywhere(model, source)


def load_classifier(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantization_config: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Loads a model with a head of one number, which is new where the source is a language model.

    Adapters of such a model come merged into their base.

    Args:
        source: a run folder, a folder of adapters, or a hub id.
        dtype: of the weights.
        quantization_config: keeps the weights in fewer bits.

    Raises:
        UserError: there is no such model, its architecture has no classification form, or its folder is broken.
    """
    check_folder(source)
    if (adapter := read_adapter(source)) is not None:
        return _merged_classifier(adapter).to(dtype)
    config = load_config(source)
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and SCORES not in own:
        raise UserError(f"{source}: model_type = {config.model_type}: this architecture has no form that scores text")
    config.num_labels = 1
    extra = {} if quantization_config is None else {"quantization_config": quantization_config}
    with opening(source):
        return from_anywhere(load_auto(SCORES, source, config=config, dtype=dtype, **extra), source)


def from_anywhere(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Tells a model the absolute path of its folder, which adapters write down as that of their base."""
    if Path(source).is_dir():
        model.name_or_path = os.path.abspath(source)
    return model


def _merged_classifier(adapter: "Adapter") -> PreTrainedModel:
    if adapter.config.task_type != "SEQ_CLS":
        raise UserError(f"{adapter.source}: an adapter for {adapter.config.task_type}; expected one of llmlab reward")
    model = adapter.load_base(load_classifier)
    with opening(adapter.tokenizer_home, "a tokenizer"):
        tokenizer = load_auto("AutoTokenizer", adapter.tokenizer_home)
    fit_vocabulary(model, tokenizer)  # tokens added in training; the adapter holds their rows
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return adapter.attach(model).merge_and_unload(safe_merge=True)


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model rows for every token; new ones start from the mean of the others."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


def fit_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets a model and its tokenizer say what they can before they are saved: the context's length, and a cache.

    Trainers turn the cache off; a tokenizer that was just trained knows no length.
    """
    model.config.use_cache = True
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is not None:
        tokenizer.model_max_length = length


@dataclass(frozen=True)
class Adapter:
    """PEFT adapters: the folder or hub id asked for, their folder on this machine, and what they say of themselves."""

    source: str
    folder: Path
    config: "PeftConfig"

    @property
    def base(self) -> str:
        """The folder or hub id of the model that it adapts."""
        return self.config.base_model_name_or_path

    @property
    def tokenizer_home(self) -> str:
        """Where the tokenizer is: beside the adapters, or with their base."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else self.base

    def load_base(self, load: Callable[..., PreTrainedModel], **options: Any) -> PreTrainedModel:
        """Returns the model that it adapts, loaded by `load_model` or `load_classifier` with these options.

        Raises:
            UserError: it does not load; the sentence names the adapter too.
        """
        try:
            return load(self.base, **options)
        except UserError as error:
            raise UserError(f"{self.source} is an adapter of {self.base}, which does not load: {error}") from None

    def attach(self, model: PreTrainedModel, **options: Any) -> "PeftModel":
        """Returns the model with these adapters.

        Raises:
            UserError: they are damaged, or do not fit it.
        """
        from peft import PeftModel  # a second or two, for those who need it

        with reading(self.source, f"an adapter of {self.base}"), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # which would stay untrained
            return PeftModel.from_pretrained(model, self.folder, **options)


def read_adapter(source: str | Path) -> Adapter | None:
    """Finds adapters in a folder or on the hub, from where they are fetched; None where the source is none of these.

    Raises:
        UserError: their configuration is damaged.
    """
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
    return Adapter(str(source), folder, config)


def check_folder(source: str | Path) -> None:
    """Raises UserError for a local source that cannot hold a model; what does not exist here may be a hub id."""
    check_model(str(source))


def _check_architecture(path: Path, *, writes: bool = False) -> None:
    if not path.is_file():
        return  # a hub id: Transformers reads its configuration
    values = read_json(path)
    kind = values.get("model_type")
    if kind == LLMLabConfig.model_type:
        check_types(path, values, LLMLabConfig.__annotations__)
    elif "auto_map" in values and isinstance(kind, str | None):
        return  # it brings an architecture of its own, which `load_auto` refuses or loads
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path}: model_type = {kind}: no architecture of that name{did_you_mean(str(kind), CONFIG_MAPPING)}"
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: model_type = {kind}: this architecture is no language model")
    heads = values.get("architectures")
    if writes and isinstance(heads, list) and str(heads[:1]).endswith("ForSequenceClassification']"):
        raise UserError(
            f"{path.parent}: architectures = {heads[0]}: this model scores text; expected a language model"
        )


def _check_generation(source: str | Path, model: PreTrainedModel) -> None:
    """Raises UserError where the generation settings of a model are of other types than generating relies on."""
    if model.can_generate():
        check_types(f"{source}/generation_config.json", vars(model.generation_config), OF_GENERATION)


@contextmanager
def opening(source: str | Path, expected: str = "a model") -> Iterator[None]:
    """Turns whatever Transformers raises while it opens a folder or hub id into one sentence that names it."""
    try:
        with reading(source, expected):
            try:
                yield
            except OSError as error:
                if Path(source).is_dir():
                    raise
                raise UserError(f"{source}: {_not_on_the_hub(source, error)}") from None
            except SafetensorError as error:
                raise UserError(f"{source}: the weights are damaged or incomplete: {reason_of(error)}") from None
    except UserError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        raise UserError(f"{source}: the weights have other shapes than its config.json says") from None


def _not_on_the_hub(source: str | Path, error: Exception) -> str:
    offline = "HF_HUB_OFFLINE is set, and it was not downloaded before"
    reason = offline if is_offline_mode() else reason_of(error)
    return f"there is no such folder{_near(Path(source))}, and the hub gave none: {reason}"


def _near(folder: Path) -> str:
    return did_you_mean(folder.name, [sibling.name for sibling in folder.parent.glob("*") if sibling.is_dir()])
