"""Settings of `llmlab merge`. Source: seed, LLM-Lab document, "LoRA Adapter Merging"."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Settings
from llmlab.settings.paths import PathName, Reads


def _only_one(value: Any) -> Any:
    """Takes the one entry of a list, which is how the command line gives its words."""
    if isinstance(value, list) and len(value) > 1:
        raise ValueError("can't merge multiple adapters into one model (they'd interfere); merge one of them")
    return value[0] if isinstance(value, list) and value else value


class MergeSettings(Settings):
    """Fold LoRA adapters into their base model, and check that the result computes the same."""

    panel: ClassVar[str] = "Merge"

    adapter: Annotated[PathName, BeforeValidator(_only_one), Reads("path"), Alias("adapter_folder")] = Field(
        description="Adapter folder, a run folder with adapters, or a checkpoint-N in it.", min_length=1
    )
    base: Annotated[PathName | None, Reads("model"), Alias("base_model")] = Field(
        None, description="Run folder or hub id of the unquantized base model; none is the one the adapter names."
    )
    output_dir: Annotated[v.OutputDir, Alias("output")] = "runs/merge"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Precision of the saved weights; auto is the base model's."
    )
