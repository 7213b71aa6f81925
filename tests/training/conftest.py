"""Tiny corpora, tokenizers and settings for training tests."""

import random

import pytest

from llmlab.settings.data import DataSource
from llmlab.settings.pretrain import PretrainSettings

TINY_MODEL = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "n_layers": 2, "max_seq_len": 32}


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A text of sentences whose second half follows from the first: a model can learn it, a word count cannot."""
    draw = random.Random(0)
    animals = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "pig": "grunts", "hen": "clucks"}
    lines = []
    for _ in range(4000):
        animal = draw.choice(sorted(animals))
        lines.append(f"The {animal} {animals[animal]} {draw.choice(['loudly', 'softly'])}.")
    path = tmp_path_factory.mktemp("corpus") / "animals.jsonl"
    documents = [" ".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    path.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(corpus_file, tmp_path_factory):
    from llmlab.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([DataSource(name=str(corpus_file))], 300, folder, show_progress=False)
    return folder


@pytest.fixture
def settings(corpus_file, tokenizer_folder, tmp_path):
    """Returns a function that makes settings of a run of a second or two on the tiny corpus, in fp32."""

    def make(**changes):
        model = {"tokenizer_name": str(tokenizer_folder), **TINY_MODEL, **changes.pop("model", {})}
        values = {
            "model": model,
            "datasets": [{"name": str(corpus_file)}],
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path.parent / "cache"),
            "num_proc": 1,
            "validation_fraction": 0.05,
            "max_steps": 20,
            "warmup_steps": 4,
            "lr": 3e-3,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "log_every": 1,
            "eval_every": 1000,
            "eval_steps": 4,
            "dtype": "fp32",
            "compile": False,
            "seed": 3,
        }
        return PretrainSettings(**{**values, **changes})

    return make


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)
