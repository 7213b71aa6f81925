"""Where training data comes from: sources in the form `name | subset | weight | split`, mixed by weight. Beside them
the settings of `llmlab tokenizer train`, which reads nothing else."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, GetJsonSchemaHandler, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Help, Resume, Settings
from llmlab.settings.paths import PathName, Reads


class DataSource(Settings, type_name="name | subset | weight | split"):
    """One dataset, `name | subset | weight`. Source: seed, LLM-Lab document, "Dataset Configuration"."""

    name: PathName
    """Hub id, file (txt, json, jsonl, csv, parquet, each also .gz), folder or demo/..."""
    subset: str | None = None
    """Configuration of a dataset on the hub, or of a copy of one."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Relative weight in the mixture: [2.0, 1.0] gives 66.7 % and 33.3 %."""
    split: str | None = None
    """Split, or several as a+b; none is train, else train_sft or its like, else every named set."""
    column: str | None = None
    """Column that holds the text; none recognizes it."""
    text_unit: Literal["document", "paragraph", "line"] = "document"
    """A row of a text file: a document (ended by <|endoftext|>), a paragraph or a line."""

    @model_validator(mode="before")
    @classmethod
    def parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split("|")]
        if not parts[0] or len(parts) > 4:
            raise ValueError("expected 'name | subset (optional) | weight (optional) | split (optional)'")
        return {key: part for key, part in zip(("name", "subset", "weight", "split"), parts, strict=False) if part}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "description": cls.type_name}, handler(core_schema)]}

    def __str__(self) -> str:
        if self.split is None and self.subset is None and self.weight == 1:
            return self.name
        return " | ".join([self.name, self.subset or "", f"{self.weight:g}", *filter(None, [self.split])])


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


Datasets = Annotated[
    list[DataSource],
    BeforeValidator(_as_list),
    MinLen(1),
    Reads("path"),
    Alias("dataset", "dataset_name"),
    Help("Training data, one source an entry: name | subset | weight | split; only the name is required."),
]


class DataSettings(Settings, panel="Data"):
    """The datasets of a stage. Source: seed, LLM-Lab document, "Dataset Configuration"."""

    datasets: Datasets = [DataSource.model_construct(name="HuggingFaceFW/fineweb-edu")]
    validation_datasets: Annotated[list[DataSource] | None, BeforeValidator(_as_list), Reads("path")] = None
    """Validation data; none holds out a share of each training source."""
    validation_fraction: v.ValidationFraction = 0.01
    """Share of the rows held out for validation, by hash, unless validation_datasets is set."""
    allow_dropped: Annotated[float, Ge(0), Le(1), Resume.FREE] = 0.05
    """Largest share of unusable rows (empty, not text, unknown form) before the run is refused."""
    num_proc: Annotated[int | None, Gt(0), Le(1024), Alias("dataset_num_proc"), Resume.LOCAL] = None
    """Processes that tokenize; none uses every core."""
    cache_dir: Annotated[PathName | None, Resume.LOCAL] = None
    """Folder of tokenized data; none is ~/.cache/llmlab (or $LLMLAB_CACHE)."""


class TextDataSettings(DataSettings):
    """Plain text, which may also be streamed."""

    streaming: bool = False
    """Tokenize the sources while training, without a tokenized copy on disk."""


class TokenizerSettings(Settings, panel="Tokenizer"):
    """A byte-level BPE tokenizer with ChatML tokens and a chat template that supports tools."""

    datasets: Datasets = [DataSource.model_construct(name="HuggingFaceFW/fineweb-edu")]
    vocab_size: Annotated[int, Gt(0)] = 32768
    """Size of the vocabulary, special tokens included."""
    max_bytes: Annotated[int, Gt(0)] = 200_000_000
    """Bytes of text to train on, from the start of the sources in proportion to their weights."""
    output_dir: v.OutputDir = "runs/tokenizer"
