"""LoRA adapters in the words of the LLM-Lab document; the RL guide's (`r`, `target_modules`) are accepted too.
Beside them the settings of `llmlab merge`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import BeforeValidator, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Settings, When
from llmlab.settings.paths import PathName, Reads

ON = When("use_lora", True)


class LoraSettings(Settings, panel="LoRA", inapplicable={"task_type": "it follows from the stage"}):
    """Source: seed, LLM-Lab document, "LoRA Parameters"; RL guide, section 1 (its values are a preset)."""

    use_lora: bool = False
    """Train low-rank adapters instead of all weights; any other LoRA option implies it."""
    lora_preset: Annotated[Literal["minimal", "attention_only", "ffn_only", "all", "custom"], ON] = "minimal"
    """Adapted layers: minimal is query and value projections, custom is lora_target_modules."""
    lora_r: Annotated[int, Gt(0), Alias("r"), ON] = 8
    """Rank of the adapters."""
    lora_alpha: Annotated[float | None, Gt(0), ON] = None
    """LoRA alpha: adapters are scaled by alpha / r; none is 2 x lora_r."""
    lora_dropout: Annotated[float, Ge(0), Lt(1), ON] = 0.05
    """Dropout on the adapters' input."""
    lora_target_modules: Annotated[list[str] | None, Alias("target_modules"), When("lora_preset", "custom")] = None
    """Suffixes of the modules to adapt, such as q_proj; implies lora_preset custom."""
    lora_bias: Annotated[Literal["none", "all", "lora_only"], Alias("bias"), ON] = "none"
    """Biases to train: none, all, or those of adapted modules."""
    modules_to_save: Annotated[list[str] | None, ON] = None
    """Modules trained in full and saved with the adapters, such as embed_tokens and lm_head."""
    use_dora: Annotated[bool, ON] = False
    """DoRA: decompose weights into magnitude and direction (arXiv:2402.09353)."""
    use_rslora: Annotated[bool, ON] = False
    """Rank-stabilized LoRA: scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    use_qlora: Annotated[bool, ON] = False
    """QLoRA: quantize the frozen weights to 4 bits (NF4, arXiv:2305.14314); needs bitsandbytes."""

    @property
    def alpha(self) -> float:
        """LoRA's alpha, before it is divided by the rank."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="before")
    @classmethod
    def imply(cls, values: Any) -> Any:
        """Turns LoRA on where any of its options is set, as the RL guide's block is written."""
        if not isinstance(values, dict):
            return values
        chosen = {name for name in LoraSettings.model_fields if values.get(name) is not None}
        implied = {"lora_preset": "custom"} if "lora_target_modules" in chosen and "lora_preset" not in chosen else {}
        if chosen and "use_lora" not in chosen:
            implied["use_lora"] = True
        return {**values, **implied}

    def contradictions(self) -> Iterator[str]:
        if self.use_lora and self.lora_preset == "custom" and not self.lora_target_modules:
            yield "lora_preset = custom needs lora_target_modules"


def _only_one(value: Any) -> Any:
    """Returns the one entry of a list, as which the command line gives its words."""
    if isinstance(value, list) and len(value) > 1:
        raise ValueError("can't merge multiple adapters into one model (they'd interfere); merge one of them")
    return value[0] if isinstance(value, list) and value else value


class MergeSettings(Settings, panel="Merge"):
    """Adapters and the base model to merge them into. Source: seed, LLM-Lab document, "LoRA Adapter Merging"."""

    adapter: Annotated[PathName, BeforeValidator(_only_one), Reads("path"), Alias("adapter_folder")]
    """Adapter folder, a run folder with adapters, or a checkpoint-N in it."""
    base: Annotated[PathName | None, Reads("model"), Alias("base_model")] = None
    """Unquantized base model: a run folder or hub id; none is the one the adapter names."""
    output_dir: Annotated[v.OutputDir, Alias("output")] = "runs/merge"
    dtype: v.Dtype = "auto"
    """Precision of the saved weights; auto is the base model's."""
