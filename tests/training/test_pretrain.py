"""Pretraining end to end on a tiny corpus: it learns, saves, stops, resumes, and says what is wrong."""

import io
import json
import math
import re
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.data.text import corpus as corpus_module
from llmlab.data.text import packing
from llmlab.data.text import store as store_module
from llmlab.runs.record import read_metrics, read_record
from llmlab.settings.errors import SettingsError, UserError
from llmlab.training import pretrain as stage
from llmlab.training.pretrain import pretrain

# A rate for each optimizer, and the validation loss (nats per token) that it must get below in 100 steps. A trial gave
# 0.37, 0.39, 1.20, 0.51 and 0.44; knowing only how often each token comes gives 3.2.
LEARNS = {
    "adamw": (1e-2, 0.6),
    "adafactor": (1e-2, 0.6),
    "lion": (3e-3, 1.6),
    "sophia": (1e-2, 0.8),
    "muon": (6e-2, 0.7),
}


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


@pytest.fixture
def seen(monkeypatch):
    """Records the rows of every micro-batch that is trained on, in their order."""
    rows = []
    original = stage.PretrainTrainer.training_step

    def watch(self, model, inputs, *args):
        rows.extend(tuple(row.tolist()) for row in inputs["input_ids"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(stage.PretrainTrainer, "training_step", watch)
    return rows


@pytest.mark.parametrize("optimizer", LEARNS)
def test_each_optimizer_learns(settings, quiet, optimizer):
    rate, enough = LEARNS[optimizer]
    run = settings(optimizer=optimizer, lr=rate, max_steps=100, gradient_accumulation_steps=2)
    result = pretrain(run, console=quiet)
    assert result.metrics["eval_loss"] < enough < result.metrics["unigram_entropy"] / 2


def test_the_run_folder_is_a_transformers_folder_with_a_record(settings, quiet):
    wanted = settings(max_steps=3, eval_every=2)
    result = pretrain(wanted, console=quiet)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.config.use_cache and tokenizer.model_max_length == model.config.max_position_embeddings == 32
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.eos_token_id == stops and len(set(stops)) == 2
    text = tokenizer.decode(model.generate(**tokenizer("The cat", return_tensors="pt"), max_new_tokens=3)[0])
    assert text.startswith("The cat")
    record = read_record(result.folder)
    assert record["stage"] == "pretrain" and record["status"] == "finished" and record["step"] == 3
    assert record["settings"]["model"]["vocab_size"] == 300 and record["settings"]["lr"] == 3e-3
    assert record["metrics"]["eval_loss"] == result.metrics["eval_loss"]
    assert record["data"]["sources"][0]["tokens"] > 10_000 and record["versions"]["transformers"]
    lines = read_metrics(result.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert all(line["tokens"] == line["step"] * 4 * 32 for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 3]
    assert not list(result.folder.glob(".saving-*")) and not (result.folder / "training_args.bin").exists()


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_twice_interrupted_is_as_if_never(settings, quiet, seen, cut_off, tmp_path, streaming):
    make = lambda name: settings(streaming=streaming, model={"dropout": 0.1}, output_dir=str(tmp_path / name))  # noqa: E731
    whole = pretrain(make("whole"), console=quiet)
    expected, rows = losses(whole.folder), list(seen)
    seen.clear()
    folder = tmp_path / "parts"
    for step, resume in ((7, None), (13, folder)):
        with cut_off(step):
            pretrain(make("parts"), resume=resume, console=quiet)
        assert read_record(folder)["status"] == "interrupted"
        assert (folder / f"checkpoint-{step}" / "trainer_state.json").is_file()
    pretrain(make("parts"), resume=folder, console=quiet)
    assert seen == rows and len(rows) == 20 * 4
    assert list(losses(folder)) == list(range(1, 21))
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(expected[step], abs=1e-6)
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole.folder, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "sophia", "muon"])
def test_every_optimizers_state_survives_resuming(settings, quiet, cut_off, tmp_path, optimizer):
    make = lambda name: settings(optimizer=optimizer, max_steps=8, output_dir=str(tmp_path / name))  # noqa: E731
    expected = losses(pretrain(make("whole"), console=quiet).folder)
    with cut_off(3):
        pretrain(make("parts"), console=quiet)
    pretrain(make("parts"), resume=tmp_path / "parts", console=quiet)
    assert losses(tmp_path / "parts") == pytest.approx(expected, abs=1e-6)


def test_extending_a_finished_run_follows_the_longer_schedule(settings, quiet):
    first = pretrain(settings(max_steps=6, scheduler="linear"), console=quiet)
    pretrain(settings(max_steps=12, scheduler="linear"), resume=first.folder, console=quiet)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(first.folder) if "loss" in line}
    # 4 steps of warmup, then linear from 3e-3 to 0 at step 12; update k uses the rate at k - 1
    for step in range(7, 13):
        assert rates[step] == pytest.approx(3e-3 * (12 - (step - 1)) / (12 - 4), rel=1e-6)


def test_wsd_is_constant_and_decays_at_the_end_also_of_an_extended_run(settings, quiet):
    shape = {"scheduler": "wsd", "decay_share": 0.5, "optimizer": "muon", "embedding_lr": 0.05}
    first = pretrain(settings(max_steps=8, **shape), console=quiet)
    pretrain(settings(max_steps=12, **shape), resume=first.folder, console=quiet)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(first.folder) if "loss" in line}
    for step in range(5, 13):  # 4 steps of warmup; update k uses the rate at k - 1
        total = 8 if step <= 8 else 12
        left = (total - (step - 1)) / (total / 2)
        assert rates[step] == pytest.approx(3e-3 * min(left, 1.0), rel=1e-6)


def test_a_rate_for_a_tied_head_is_refused_at_once(settings):
    with pytest.raises(ValueError, match="head_lr = 0.1 beside tie_word_embeddings"):
        settings(head_lr=0.1)


def test_switching_the_optimizer_keeps_weights_and_step_count(settings, quiet):
    first = pretrain(settings(max_steps=6), console=quiet)
    switched = settings(max_steps=9, optimizer="lion", lr=1e-3)
    with pytest.raises(SettingsError, match="--no-load-optimizer"):
        pretrain(switched, resume=first.folder, console=quiet)
    before = losses(first.folder)
    pretrain(switched, resume=first.folder, load_optimizer=False, console=quiet)
    after = losses(first.folder)
    assert list(after) == list(range(1, 10))
    assert after[7] == pytest.approx(before[6], abs=0.3)  # the weights went on; an untrained model is at 5.7
    rates = [line["learning_rate"] for line in read_metrics(first.folder) if line["step"] == 7 and "loss" in line]
    assert rates[0] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * (6 - 4) / (9 - 4))), rel=1e-6)


def test_save_best_only_keeps_the_best_weights(settings, quiet):
    # the rate rises until the loss gets worse: the best weights are not the last ones
    result = pretrain(settings(max_steps=12, eval_every=3, lr=3.0, scheduler="none", warmup_steps=12), console=quiet)
    evaluations = {line["step"]: line["eval_loss"] for line in read_metrics(result.folder) if "eval_loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert best < 12, evaluations
    assert result.metrics["eval_loss"] == evaluations[best]
    names = {path.name for path in result.folder.glob("checkpoint-*")}
    assert names == {f"checkpoint-{best}", "checkpoint-12"}
    kept = AutoModelForCausalLM.from_pretrained(result.folder).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(result.folder / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)


def test_without_save_best_only_the_last_weights_are_kept(settings, quiet):
    result = pretrain(settings(max_steps=6, eval_every=2, save_best_only=False, save_total_limit=None), console=quiet)
    assert {path.name for path in result.folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    kept = AutoModelForCausalLM.from_pretrained(result.folder).state_dict()
    last = AutoModelForCausalLM.from_pretrained(result.folder / "checkpoint-6").state_dict()
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def test_without_validation_data(settings, quiet):
    result = pretrain(settings(max_steps=3, validation_fraction=0.0), console=quiet)
    assert "eval_loss" not in result.metrics and "unigram_entropy" not in result.metrics
    assert (result.folder / "model.safetensors").is_file()


def test_accumulation_changes_nothing(settings, quiet, tmp_path):
    curves = [
        losses(
            pretrain(
                settings(max_steps=4, batch_size=b, gradient_accumulation_steps=a, output_dir=str(tmp_path / n)),
                console=quiet,
            ).folder
        )
        for n, b, a in (("wide", 8, 1), ("narrow", 1, 8))
    ]
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)


def test_pretraining_further_from_a_run_folder(settings, quiet, tmp_path):
    first = pretrain(settings(max_steps=12), console=quiet)
    further = settings(max_steps=2, output_dir=str(tmp_path / "further")).model_copy(
        update={"init_from": str(first.folder)}
    )
    with pytest.raises(UserError, match="the architecture comes from init_from"):
        pretrain(further, console=quiet)
    values = {**further.model_dump(exclude={"model"}), "datasets": further.datasets, "output_dir": str(tmp_path / "g")}
    result = pretrain(type(further)(**values), console=quiet)
    assert losses(result.folder)[1] == pytest.approx(losses(first.folder)[12], abs=0.5)
    assert read_record(result.folder)["parents"] == [str(first.folder)]
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.d_model == 32


def test_pretraining_further_from_a_llama(settings, quiet, tmp_path, tokenizer_folder):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, max_position_embeddings=24, tie_word_embeddings=True, **shape)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    values = {name: value for name, value in dict(settings(max_steps=2)).items() if name != "model"}
    further = type(settings())(**values | {"init_from": str(tmp_path / "llama")})
    result = pretrain(further, console=quiet)
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.model_type == "llmlab"
    assert read_record(result.folder)["settings"]["model"]["max_seq_len"] == 24
    # resuming such a run takes its shape from the model again
    pretrain(further.model_copy(update={"max_steps": 3}), resume=result.folder, console=quiet)
    other = type(settings())(**values | {"init_from": str(tmp_path / "gpt2"), "output_dir": str(tmp_path / "other")})
    with pytest.raises(UserError, match="model_type = gpt2: expected one of llama, mistral, qwen2, qwen3"):
        pretrain(other, console=quiet)


def test_in_a_thread_signals_are_left_alone(settings, quiet):
    results = []
    thread = threading.Thread(target=lambda: results.append(pretrain(settings(max_steps=2), console=quiet)))
    thread.start()
    thread.join()
    assert results[0].metrics["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 200}}, r"vocab_size = 200: the tokenizer .* has 300 tokens"),
        ({"datasets": ["nowhere.txt"]}, "nowhere.txt"),
        ({"model": {"tokenizer_name": "nowhere"}}, "nowhere"),
        ({"dtype": "fp16", "device": "cpu"}, "dtype = fp16"),
        ({"trainer_args": {"neftune_noise_alfa": 1}}, "did you mean 'neftune_noise_alpha'"),
        ({"trainer_args": {"learning_rate": 1}}, "set 'lr' instead"),
        ({"datasets": ["demo/poems"]}, "demo/poems"),
    ],
)
def test_mistakes_are_sentences(settings, quiet, changes, message):
    wanted = settings(**changes)
    with pytest.raises(UserError, match=message):
        pretrain(wanted, console=quiet)
    assert not Path(wanted.output_dir).exists()


def test_a_checkpoint_of_another_architecture_is_refused(settings, quiet):
    first = pretrain(settings(max_steps=2), console=quiet)
    with pytest.raises(SettingsError, match=r"model.d_ff = 128: the run to resume has 64"):
        pretrain(settings(max_steps=4, model={"d_ff": 128}), resume=first.folder, console=quiet)


def test_a_damaged_record_is_a_sentence(settings, quiet):
    first = pretrain(settings(max_steps=2), console=quiet)
    (first.folder / "llmlab.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UserError, match="damaged"):
        pretrain(settings(max_steps=4), resume=first.folder, console=quiet)


def plan_of(settings):
    output = Console(file=io.StringIO(), width=200)
    pretrain(settings, console=output)
    return output.file.getvalue()


def test_the_plan_tells_warmup_in_steps_and_that_it_never_ends(settings, tmp_path):
    assert re.search(r"cosine after 2 steps of warmup *\n", plan_of(settings(max_steps=4, warmup_steps=0.5)))
    told = plan_of(settings(max_steps=4, warmup_steps=4, output_dir=str(tmp_path / "other")))
    assert (
        "cosine after 4 steps of warmup (warmup is as long as the run: the peak learning rate is never reached)"
        in told
    )


def test_perplexity_stands_beside_every_validation_loss(settings):
    chosen = settings(max_steps=4, eval_every=2)
    told = plan_of(chosen)
    lines = [line for line in read_metrics(Path(chosen.output_dir)) if "eval_loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
        assert f"validation loss {line['eval_loss']:.4f}, perplexity {line['eval_perplexity']:.4g}" in told
    assert read_record(Path(chosen.output_dir))["metrics"]["eval_perplexity"] == lines[-1]["eval_perplexity"]


def test_a_run_extended_beyond_what_it_read_sees_what_a_long_run_sees(settings, quiet, seen, tmp_path, monkeypatch):
    """Only the beginning of the corpus is tokenized for the short run; the long one tokenizes on from there."""
    for module in (corpus_module, packing):
        monkeypatch.setattr(module, "WINDOW", 1024)
    monkeypatch.setattr(store_module, "BATCH_CHARACTERS", 1000)

    def make(name, steps, cache="cache"):
        folder = str(tmp_path / name)
        return settings(max_steps=steps, output_dir=folder, cache_dir=str(tmp_path / cache), scheduler="none")

    pretrain(make("long", 30, "other"), console=quiet)
    whole, expected = list(seen), losses(tmp_path / "long")
    seen.clear()
    first = pretrain(make("short", 8), console=quiet)
    documents = read_record(first.folder)["data"]["sources"][0]["documents"]
    assert documents < 250  # of 500
    pretrain(make("short", 30), resume=first.folder, console=quiet)
    assert read_record(first.folder)["data"]["sources"][0]["documents"] > documents
    assert seen == whole
    assert losses(first.folder) == pytest.approx(expected, abs=1e-6)
