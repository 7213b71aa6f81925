"""Folders: with llmlab they load through the Auto classes, without it through the code saved beside the weights."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmlab.model import (
    LLMLabConfig,
    LLMLabForCausalLM,
    LLMLabForSequenceClassification,
    LLMLabModel,
    load_model,
)
from llmlab.model.configuration import CODE_FILES
from llmlab.settings.errors import UserError

TOKENS = torch.arange(3, 12)[None]
ENCODINGS = ["sinusoidal", "rope", "alibi", "yarn"]

ELSEWHERE = """
import sys, torch
sys.modules["llmlab"] = None  # as if it were not installed
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for encoding in sys.argv[1:]:
    expected = torch.load(f"{encoding}.pt")
    tokens = torch.arange(3, 12)[None]
    model = AutoModelForCausalLM.from_pretrained(encoding, trust_remote_code=True)
    assert torch.equal(model(tokens).logits, expected["logits"])
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected["generated"])
    model.save_pretrained(f"{encoding}-again")
    again = AutoModelForCausalLM.from_pretrained(f"{encoding}-again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, expected["logits"])
headless = AutoModel.from_pretrained(encoding, trust_remote_code=True)
assert headless(tokens).last_hidden_state.shape == (1, 9, 32)
classifier = AutoModelForSequenceClassification.from_pretrained(encoding, trust_remote_code=True, num_labels=1)
assert classifier(tokens).logits.shape == (1, 1)
classifier.save_pretrained("classifier")
assert AutoModel.from_pretrained("classifier", trust_remote_code=True)
AutoConfig.from_pretrained(encoding, trust_remote_code=True).save_pretrained("configuration-alone")
"""


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(tiny_model, tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, positional_encoding="yarn", sliding_window=5, dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LLMLabForCausalLM and not any(report.values())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_folder_holds_the_code_and_nothing_half_written(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*CODE_FILES, "config.json", "generation_config.json", "model.safetensors"}


def test_auto_classes_know_the_model_and_prefer_it_to_saved_code(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLMLabConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is LLMLabModel
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted) is LLMLabForCausalLM
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(classifier) is LLMLabForSequenceClassification
    classifier.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert again.config.num_labels == 1 and torch.equal(again(TOKENS).logits, classifier(TOKENS).logits)


def test_folders_load_where_llmlab_is_not_installed(tiny_model, tmp_path):
    for encoding in ENCODINGS:
        model = tiny_model(positional_encoding=encoding, sliding_window=4 if encoding == "alibi" else None)
        model.save_pretrained(tmp_path / encoding)
        generated = model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None)
        torch.save({"logits": model(TOKENS).logits, "generated": generated}, tmp_path / f"{encoding}.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *ENCODINGS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def break_folder(model, folder, case):
    if case == "missing":
        return
    folder.mkdir()
    if case == "broken configuration":
        (folder / "config.json").write_text("{")
    elif case != "empty":
        model.save_pretrained(folder)
    if case == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if case == "weights of another model":
        save_file({"transformer.wte.weight": torch.zeros(64, 32)}, folder / "model.safetensors", {"format": "pt"})
    if case == "unknown family":
        (folder / "config.json").write_text('{"model_type": "perceptron"}')


@pytest.mark.parametrize(
    "case",
    ["missing", "empty", "broken configuration", "cut weights", "weights of another model", "unknown family"],
)
def test_what_is_no_model_is_said(tiny_model, tmp_path, case):
    folder = tmp_path / case.replace(" ", "-")
    break_folder(tiny_model(), folder, case)
    with pytest.raises(UserError, match=str(folder)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_load_model_gives_the_wanted_precision(tiny_model, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype=None).dtype == torch.bfloat16
