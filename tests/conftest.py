"""Shared by all tests: no model hub is ever reached, tiny runs do not fight over the cores, and what they train on.

Here are tiny corpora, models and settings of every stage, and runs that are cut off.
"""

import json
import os
import random
import signal
from contextlib import contextmanager
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU else, and says so
# at these sizes more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # some runners set it: a pipe has no width

import hypothesis  # noqa: E402
import pytest  # noqa: E402  # what it imports reads the environment

from llmlab.settings.data import DataSource  # noqa: E402
from llmlab.stages import STAGES  # noqa: E402

hypothesis.settings.register_profile("llmlab", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("llmlab")

WORDS = ["what", "is", "one", "two", "three", "four", "five", "the", "answer", "yes", "no", "maybe", "plus"]
TINY_MODEL = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "n_layers": 2, "max_seq_len": 32}
VOICES = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "pig": "grunts", "hen": "clucks"}
SHARE = '''
def wanted_share(completions, completion_ids, **columns):
    """The share of tokens that are in the first third of the vocabulary."""
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]
'''


@pytest.fixture(scope="session")
def word_tokenizer():
    """Returns a function that makes a tokenizer of these words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(words, **arguments):
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if "cls_token" in arguments:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))],
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **arguments)

    return make


@pytest.fixture(scope="session")
def deberta(tmp_path_factory, word_tokenizer):
    """As `OpenAssistant/reward-model-deberta-v3-large-v2`: a pair of question and answer, no chat template."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    folder = tmp_path_factory.mktemp("deberta")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    tokenizer = word_tokenizer(words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=24)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, type_vocab_size=2, relative_attention=True, pos_att_type=["p2c", "c2p"],
        num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A text of sentences whose second half follows from the first: a model can learn it, a word count cannot."""
    draw = random.Random(0)
    lines = []
    for _ in range(4000):
        animal = draw.choice(sorted(VOICES))
        lines.append(f"The {animal} {VOICES[animal]} {draw.choice(['loudly', 'softly'])}.")
    documents = [" ".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    return write_rows(tmp_path_factory.mktemp("corpus") / "animals.jsonl", [{"text": text} for text in documents])


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    """Questions and answers about the same animals; the answer depends on the question."""
    draw = random.Random(1)
    rows = []
    for number in range(240):
        animal = draw.choice(sorted(VOICES))
        how = draw.choice(["loudly", "softly"])
        rows.append(
            {"question": f"How {how} {number}: the {animal}?", "answer": f"The {animal} {VOICES[animal]} {how}."}
        )
    return write_rows(tmp_path_factory.mktemp("chat") / "chat.jsonl", rows)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """The same questions; the better answer names the animal's own voice, the worse another's."""
    draw = random.Random(2)
    rows = []
    for number in range(160):
        animal, other = draw.sample(sorted(VOICES), 2)
        right, wrong = f"The {animal} {VOICES[animal]}.", f"The {animal} {VOICES[other]}."
        rows.append({"prompt": f"How {number}: the {animal}?", "chosen": right, "rejected": wrong})
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def share_file(tmp_path_factory):
    """A file with a reward that the tiny model can earn: tokens of the first third of the vocabulary."""
    path = tmp_path_factory.mktemp("share") / "mine.py"
    path.write_text(SHARE)
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(corpus_file, tmp_path_factory):
    from llmlab.data.tokenizer import learn_bpe

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    learn_bpe([DataSource(name=str(corpus_file))], 300, folder, show_progress=False)
    return folder


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

    from llmlab.data.tokenizer import load_tokenizer, stop_token_ids
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


@pytest.fixture(scope="session")
def tiny_settings(corpus_file, tokenizer_folder, base_folder, chat_file, pairs_file, share_file, tmp_path_factory):
    """Returns a function that makes settings of a short run of any stage on the tiny data, in fp32.

    A change to `...` takes the stage's own default.
    """
    everywhere = {
        "num_proc": 1,
        "max_steps": 20,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 1000,
        "dtype": "fp32",
        "device": "cpu",
        "seed": 3,
        "report": False,
        "cache_dir": str(tmp_path_factory.getbasetemp() / "cache"),
    }
    pretrain = {
        "datasets": [{"name": str(corpus_file)}],
        "validation_fraction": 0.05,
        "warmup_steps": 4,
        "lr": 3e-3,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "eval_steps": 4,
        "compile": False,
    }
    sft = {
        "policy_checkpoint": str(base_folder),
        "datasets": [{"name": str(chat_file)}],
        "learning_rate": 3e-3,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_seq_len": 96,
        "eval_steps": 4,
    }
    preference = {
        "policy_checkpoint": str(base_folder),
        "datasets": [{"name": str(pairs_file)}],
        "validation_fraction": 0.1,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "mini_batch_size": 4,
        "max_length": 96,
        "max_prompt_length": 64,
    }
    online = {
        "policy_checkpoint": str(base_folder),
        "datasets": [{"name": str(chat_file)}],
        "validation_fraction": 0,
        "rewards": [{"name": f"{share_file}:wanted_share", "min": 0, "max": 1}],
        "allow_code": True,
        "learning_rate": 3e-3,
        "batch_size": 4,
        "mini_batch_size": 4,
        "ppo_epochs": 1,
        "max_new_tokens": 8,
        "stop_patience": None,
    }
    offline = {
        **{name: online[name] for name in online.keys() - {"mini_batch_size", "ppo_epochs", "stop_patience"}},
        "max_prompts": 12,
        "num_samples_per_prompt": 4,
        "temperature": 1.0,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    own = {"pretrain": pretrain, "sft": sft, **dict.fromkeys(("dpo", "orpo", "reward"), preference)}
    own |= dict.fromkeys(("grpo", "ppo"), online)
    own |= {"rs-sft": {**offline, "reward_threshold": 0.0}, "awr": offline}

    def make(stage, output_dir, **changes):
        values = {**everywhere, **own[stage], "output_dir": str(output_dir), **changes}
        if stage == "pretrain":
            shape = {} if "init_from" in changes else {"tokenizer_name": str(tokenizer_folder), **TINY_MODEL}
            values["model"] = {**shape, **changes.get("model", {})}
        if {"epochs", "num_episodes"} & changes.keys():
            del values["max_steps"]
        return STAGES[stage].settings_class(**{name: value for name, value in values.items() if value is not ...})

    return make


@pytest.fixture
def settings(tiny_settings, tmp_path):
    """Returns a function that makes settings of a pretraining run of a second or two."""
    return lambda **changes: tiny_settings("pretrain", **{"output_dir": tmp_path / "run", **changes})


@pytest.fixture
def sft_settings(tiny_settings, tmp_path):
    """Returns a function that makes settings of a short fine-tuning run."""
    return lambda **changes: tiny_settings("sft", **{"output_dir": tmp_path / "run", **changes})


@pytest.fixture
def preference_settings(tiny_settings, tmp_path):
    """Returns a function that makes settings of a short run on pairs, of a settings class."""
    stages = {STAGES[name].settings_class: name for name in ("dpo", "orpo", "reward")}
    return lambda kind, **changes: tiny_settings(stages[kind], **{"output_dir": tmp_path / "run", **changes})


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)


class Killed(BaseException):
    """Ends a run as a kill does: nothing of llmlab catches it."""


@pytest.fixture
def cut_off(monkeypatch):
    """Returns a context in which a run ends early: at the beginning of a step, or in the call of a method.

    `how` is the signal that reaches it, or None for a kill.  A signal lets the step be finished and saved.
    """
    from transformers import Trainer, TrainerCallback

    def stop(how):
        if how is None:
            raise Killed
        signal.raise_signal(how)

    class Stop(TrainerCallback):
        def __init__(self, step, how):
            self.step, self.how = step, how

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step - 1:
                stop(self.how)

    @contextmanager
    def cut(step=None, how=signal.SIGINT, within=None):
        original = Trainer.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Stop(step, how))

        ends = KeyboardInterrupt if how == signal.SIGINT else SystemExit if how else Killed
        with monkeypatch.context() as patch, pytest.raises(ends) as left:
            if within is not None:
                patch.setattr(*within, lambda *args, **kwargs: stop(how))
            else:
                patch.setattr(Trainer, "__init__", init)
            yield left

    cut.kill = partial(cut, how=None)
    return cut
