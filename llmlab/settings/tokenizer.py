"""Settings of `llmlab tokenizer train`."""

from typing import Annotated

from annotated_types import Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Settings
from llmlab.settings.data import Datasets, DataSource


class TokenizerSettings(Settings, panel="Tokenizer"):
    """A byte-level BPE tokenizer with ChatML tokens and a chat template that supports tools."""

    datasets: Datasets = [DataSource.model_construct(name="HuggingFaceFW/fineweb-edu")]
    vocab_size: Annotated[int, Gt(0)] = 32768
    """Size of the vocabulary, special tokens included."""
    max_bytes: Annotated[int, Gt(0)] = 200_000_000
    """Bytes of text to train on, from the start of the sources in proportion to their weights."""
    output_dir: v.OutputDir = "runs/tokenizer"
