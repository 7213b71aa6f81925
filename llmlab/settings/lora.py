"""LoRA adapters in the words of the LLM-Lab document; the RL guide's (`r`, `target_modules`) are accepted too."""

from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import Field, model_validator

from llmlab.settings.base import Alias, Settings, When
from llmlab.settings.vocabulary import conflict

ON = When("use_lora", True)


class LoraSettings(Settings):
    """Source: seed, LLM-Lab document, "LoRA Parameters"; RL guide, section 1 (its values are a preset)."""

    panel: ClassVar[str] = "LoRA"
    inapplicable: ClassVar[dict[str, str]] = {"task_type": "it follows from the stage"}

    use_lora: bool = Field(
        False, description="Train small adapter matrices instead of the whole model; any other LoRA option implies it."
    )
    lora_preset: Annotated[Literal["minimal", "attention_only", "ffn_only", "all", "custom"], ON] = Field(
        "minimal",
        description="Where adapters go: queries and values, all of attention, feed-forward, both, or your list.",
    )
    lora_r: Annotated[int, Gt(0), Alias("r"), ON] = Field(8, description="Rank of the adapters.")
    lora_alpha: Annotated[float | None, Gt(0), ON] = Field(
        None, description="Scale of the adapters: alpha / r; none is 2 x lora_r."
    )
    lora_dropout: Annotated[float, Ge(0), Lt(1), ON] = Field(0.05, description="Dropout before the adapters.")
    lora_target_modules: Annotated[list[str] | None, Alias("target_modules"), When("lora_preset", "custom")] = Field(
        None, description="Endings of module names that get adapters; implies lora_preset custom."
    )
    lora_bias: Annotated[Literal["none", "all", "lora_only"], Alias("bias"), ON] = Field(
        "none", description="Which biases are trained too."
    )
    modules_to_save: Annotated[list[str] | None, ON] = Field(
        None, description="Modules trained whole beside the adapters, such as embed_tokens and lm_head."
    )
    use_dora: Annotated[bool, ON] = Field(False, description="DoRA: magnitude and direction apart (arXiv:2402.09353).")
    use_rslora: Annotated[bool, ON] = Field(False, description="Scale by alpha / sqrt(r) (arXiv:2312.03732).")
    use_qlora: Annotated[bool, ON] = Field(
        False, description="Keep the frozen weights in 4 bits (NF4, arXiv:2305.14314); needs bitsandbytes."
    )

    @property
    def alpha(self) -> float:
        """The scale of the adapters before it is divided by their rank."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="before")
    @classmethod
    def imply(cls, values: Any) -> Any:
        """Takes LoRA options without `use_lora` as the wish for it, as the RL guide's block is written."""
        if not isinstance(values, dict):
            return values
        given = {name for name in LoraSettings.model_fields if values.get(name) is not None}
        implied = {"lora_preset": "custom"} if "lora_target_modules" in given and "lora_preset" not in given else {}
        if given and "use_lora" not in given:
            implied["use_lora"] = True
        return {**values, **implied}

    @model_validator(mode="after")
    def check_targets(self) -> "LoraSettings":
        if self.use_lora and self.lora_preset == "custom" and not self.lora_target_modules:
            raise conflict("lora_preset = custom needs lora_target_modules", "lora_target_modules", "lora_preset")
        return self
