"""Settings of `llmlab tokenizer train`: a byte-level BPE vocabulary learned from text."""

from typing import Annotated, ClassVar

from annotated_types import Gt
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Settings
from llmlab.settings.data import Datasets, DataSource


class TokenizerSettings(Settings):
    """Learn a vocabulary from text, with ChatML tokens and a chat template that knows tools."""

    panel: ClassVar[str] = "Tokenizer"

    datasets: Datasets = [DataSource(name="HuggingFaceFW/fineweb-edu")]
    vocab_size: Annotated[int, Gt(0)] = Field(32768, description="Entries in all, special tokens included.")
    max_bytes: Annotated[int, Gt(0)] = Field(
        200_000_000, description="Bytes of text to learn from, taken from the start of the sources by their weights."
    )
    output_dir: v.OutputDir = "runs/tokenizer"
