"""Settings of `llmlab merge`."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Settings
from llmlab.settings.paths import PathName, Reads


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
