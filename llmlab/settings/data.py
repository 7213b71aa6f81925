"""Where training data comes from: sources in the form `name | subset | weight | split`, mixed by weight.

Reading them is the business of `llmlab.data`.
"""

from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt
from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator

from llmlab.settings.base import Alias, Settings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.vocabulary import AllowDropped, CacheDir, NumProc, Streaming, ValidationFraction


class DataSource(Settings):
    """One data set: a hub id, a local file or folder, or `demo/...`.

    Source of the form `name | subset | weight`: seed, LLM-Lab document, "Dataset Configuration".
    """

    type_name: ClassVar[str] = "name | subset | weight | split"

    name: PathName = Field(
        min_length=1, description="Hub id, file (txt, json, jsonl, csv, parquet, each also .gz), folder or demo/..."
    )
    subset: str | None = Field(None, description="Configuration of a data set, from the hub or a copy of it.")
    weight: Annotated[float, Gt(0)] = Field(1.0, description="Relative share: [2.0, 1.0] gives 66.7 % and 33.3 %.")
    split: str | None = Field(
        None, description="Split, or several as a+b; none is train, else train_sft or its like, else every named set."
    )
    column: str | None = Field(None, description="Column that holds the text; none recognizes it.")
    text_unit: Literal["document", "paragraph", "line"] = Field(
        "document",
        description="What a row of a text file is: what stands between <|endoftext|>, a paragraph or a line.",
    )

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
    Reads("path"),
    Field(
        min_length=1,
        description="Training data, one source an entry: name | subset | weight | split; all but the name optional.",
    ),
    Alias("dataset", "dataset_name"),
]
ValidationDatasets = Annotated[
    list[DataSource] | None,
    BeforeValidator(_as_list),
    Reads("path"),
    Field(description="Validation data; none holds out a share of each training source."),
]


class DataSettings(Settings):
    """The data sets of a stage. Source: seed, LLM-Lab document, "Dataset Configuration"."""

    panel: ClassVar[str] = "Data"

    datasets: Datasets = [DataSource(name="HuggingFaceFW/fineweb-edu")]
    validation_datasets: ValidationDatasets = None
    validation_fraction: ValidationFraction = 0.01
    allow_dropped: AllowDropped = 0.05
    num_proc: NumProc = None
    cache_dir: CacheDir = None


class TextDataSettings(DataSettings):
    """Plain text, which may also be read as it comes."""

    streaming: Streaming = False
