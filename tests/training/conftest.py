"""Tiny corpora, tokenizers and settings for training tests."""

import json
import random

import pytest

from llmlab.settings.data import DataSource
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sft import SFTSettings

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
    from llmlab.data import learn_bpe

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    learn_bpe([DataSource(name=str(corpus_file))], 300, folder, show_progress=False)
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


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    """Questions and answers about the same animals; the answer depends on the question."""
    draw = random.Random(1)
    animals = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "pig": "grunts", "hen": "clucks"}
    rows = []
    for number in range(240):
        animal = draw.choice(sorted(animals))
        how = draw.choice(["loudly", "softly"])
        rows.append(
            {"question": f"How {how} {number}: the {animal}?", "answer": f"The {animal} {animals[animal]} {how}."}
        )
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def base_folder(tokenizer_folder, tmp_path_factory):
    """A run folder with an untrained model, its weights large enough for adapters to have something to steer."""
    return make_base(tokenizer_folder, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def wide_base_folder(tokenizer_folder, tmp_path_factory):
    """The same with a longer context, and the widths in blocks of 64 that 4-bit weights come in."""
    return make_base(tokenizer_folder, tmp_path_factory.mktemp("wide") / "base", d_model=64, d_ff=128, max_seq_len=512)


def make_base(tokenizer_folder, folder, **shape):
    import torch

    from llmlab.data import load_tokenizer, stop_token_ids
    from llmlab.model import build_config, new_model
    from llmlab.settings.model import ModelSettings

    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    shape = ModelSettings(
        vocab_size=len(tokenizer), initializer_range=0.2, **{**TINY_MODEL, "max_seq_len": 128, **shape}
    )
    model = new_model(build_config(shape, tokenizer))
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sft_settings(base_folder, chat_file, tmp_path):
    """Returns a function that makes settings of a short fine-tuning run on the tiny model, in fp32."""

    def make(**changes):
        values = {
            "policy_checkpoint": str(base_folder),
            "datasets": [{"name": str(chat_file)}],
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path.parent / "cache"),
            "num_proc": 1,
            "max_steps": 20,
            "warmup_steps": 2,
            "learning_rate": 3e-3,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_seq_len": 96,
            "log_every": 1,
            "eval_every": 1000,
            "eval_steps": 4,
            "dtype": "fp32",
            "seed": 3,
        }
        if "epochs" in changes:
            del values["max_steps"]
        return SFTSettings(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """The same questions; the better answer names the animal's own voice, the worse another's."""
    draw = random.Random(2)
    animals = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "pig": "grunts", "hen": "clucks"}
    rows = []
    for number in range(160):
        animal, other = draw.sample(sorted(animals), 2)
        right, wrong = f"The {animal} {animals[animal]}.", f"The {animal} {animals[other]}."
        rows.append({"prompt": f"How {number}: the {animal}?", "chosen": right, "rejected": wrong})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def preference_settings(base_folder, pairs_file, tmp_path):
    """Returns a function that makes settings of a short preference run on the tiny model, in fp32."""

    def make(kind, **changes):
        values = {
            "policy_checkpoint": str(base_folder),
            "datasets": [{"name": str(pairs_file)}],
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path.parent / "cache"),
            "num_proc": 1,
            "validation_fraction": 0.1,
            "max_steps": 20,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "mini_batch_size": 4,
            "max_length": 96,
            "max_prompt_length": 64,
            "log_every": 1,
            "eval_every": 1000,
            "dtype": "fp32",
            "seed": 3,
        }
        return kind(**{**values, **changes})

    return make


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Returns a function that lets runs of a trainer be interrupted by a signal, in the middle of a step."""
    import signal

    from transformers import TrainerCallback

    def interrupt(trainer_class, step, number=signal.SIGINT):
        class CtrlC(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step - 1:
                    signal.raise_signal(number)

        original = trainer_class.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(CtrlC())

        monkeypatch.setattr(trainer_class, "__init__", init)
        return lambda: monkeypatch.setattr(trainer_class, "__init__", original)

    return interrupt
