"""Running out of memory: which phase it was, and runs that go on with smaller batches."""

import gc
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import Trainer

from llmlab.runs import plan
from llmlab.runs.record import read_metrics, read_record
from llmlab.runs.start import smaller_batch
from llmlab.settings.errors import OutOfMemory
from llmlab.settings.sources import Resolved
from llmlab.stages import STAGES

TRAINING = ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo"]
FORWARD, GET_BATCHES = torch.nn.Embedding.forward, Trainer.get_batch_samples


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Leaves the modules out of garbage collections, of which each run has some."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def limit(monkeypatch):
    """Returns a function after which forward passes on more rows run out of memory: those with gradients, from the
    second of a step on."""

    def set_limit(rows, *, step=1, when=torch.is_grad_enabled, times=1000):
        counts = {"steps": 0, "passes": 0, "refused": 0}

        def get_batch_samples(self, *args, **kwargs):
            counts.update(steps=counts["steps"] + 1, passes=0)
            return GET_BATCHES(self, *args, **kwargs)

        def forward(self, ids):
            counts["passes"] += when()
            late = counts["steps"] > step or (counts["steps"] == step and counts["passes"] > 1)
            if when() and late and len(ids) > rows and counts["refused"] < times:
                counts["refused"] += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return FORWARD(self, ids)

        monkeypatch.setattr(Trainer, "get_batch_samples", get_batch_samples)
        monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
        return counts

    return set_limit


def run(stage, settings, **options):
    STAGES[stage].function(settings, console=Console(quiet=True), **options)
    return read_metrics(Path(settings.output_dir)), read_record(Path(settings.output_dir))


TIMES = ("seconds", "tokens_per_second", "step_time")
SIZES = {  # of the whole run, and the same with a batch of half
    **dict.fromkeys(
        ("pretrain", "sft"), [("batch_size", 4, 2), ("gradient_accumulation_steps", 2, 4), ("eval_steps", 2, 4)]
    ),
    **dict.fromkeys(
        ("dpo", "orpo", "reward"), [("batch_size", 8, 8), ("mini_batch_size", 4, 2), ("eval_batches", 2, 4)]
    ),
    **dict.fromkeys(
        ("grpo", "ppo"),
        [("batch_size", 8, 8), ("mini_batch_size", 4, 2), ("gradient_accumulation_steps", 2, 4), ("ppo_epochs", 2, 2)],
    ),
}
ROWS = dict.fromkeys(("dpo", "orpo", "reward"), 4)  # chosen and rejected


@pytest.mark.parametrize("stage", TRAINING)
def test_the_rest_is_as_with_half_the_batch_from_the_start(stage, tiny_settings, tmp_path, limit):
    """Out of memory at the second step: from there on, and before, the losses are those of the smaller batch."""
    changes = {"max_steps": 3, "eval_every": 3, "learning_rate": 1e-3} | ({"group_size": 2} if stage == "grpo" else {})
    changes |= {"lr": changes.pop("learning_rate")} if stage == "pretrain" else {}
    whole, half = ({name: values[i] for name, *values in SIZES[stage]} for i in (0, 1))
    expected, _ = run(stage, tiny_settings(stage, tmp_path / "half", **changes, **half))
    calls = limit(ROWS.get(stage, 2), step=2)
    found, record = run(stage, tiny_settings(stage, tmp_path / "whole", **changes, **whole, auto_batch=True))
    assert calls["refused"] == 1
    assert len(found) == len(expected) >= 3
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        names = {name for name in one if name not in TIMES and not name.endswith(("_runtime", "_per_second"))}
        names -= {"logits/chosen", "logits/rejected"}  # means over padding too
        # TRL's other metrics are means of the means of forward passes
        for name in names if one["step"] >= 2 else names & {"loss", "grad_norm", "tokens", "reward", "kl"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), (one["step"], name)
    for name, before, after in SIZES[stage]:
        assert record["settings"].get(name, after) == after
        assert (record["sources"][name] == "auto-batch") == (before != after)


def test_the_message_has_changes_that_fit_by_the_plan(tiny_settings, tmp_path, limit):
    limit(1, step=0, times=1)
    with pytest.raises(OutOfMemory) as caught:
        run("sft", tiny_settings("sft", tmp_path / "run", batch_size=32, max_seq_len=128, max_steps=1))
    message = str(caught.value)
    assert re.search(r"by the plan most of it is [a-z ]+, [0-9.]+ [MG]B of [0-9.]+ [MG]B; set ", message), message
    rows, passes = map(
        int, re.search(r"batch_size = (\d+) with gradient_accumulation_steps = (\d+)", message).groups()
    )
    length = int(re.search(r"max_seq_len = (\d+)", message).group(1))
    assert rows < 32 == rows * passes and length in (32, 64) and "or --auto-batch" in message
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())  # it can be started again


def test_the_message_has_what_the_hardware_preset_says(tiny_settings, tmp_path, limit, monkeypatch):
    monkeypatch.setattr("llmlab.runs.plan.make_plan", refuse)
    settings = tiny_settings("sft", tmp_path / "run", max_seq_len=4096, max_steps=1)
    sources = {"max_seq_len": "hardware m1_max_64gb, 2 processes:12", "batch_size": "arguments"}
    limit(1, step=0, times=1)
    with pytest.raises(
        OutOfMemory, match=r"; set max_seq_len = 2048 \(hardware m1_max_64gb\), or batch_size = 2 with"
    ):
        STAGES["sft"].function(Resolved(settings, sources), console=Console(quiet=True))


def test_few_plans_are_made(tiny_settings, tmp_path, monkeypatch):
    """The smallest change comes first; where nothing fits, the number of plans is bounded."""
    made = []

    def fake(function, settings, hardware):
        made.append(settings.batch_size)
        return SimpleNamespace(total=settings.batch_size, parts={})

    monkeypatch.setattr(plan, "make_plan", fake)
    settings, cpu = tiny_settings("sft", tmp_path, batch_size=64), SimpleNamespace(device="cpu")
    words = ["batch_size = 8 with gradient_accumulation_steps = 8"]
    assert plan.fitting_changes(None, settings, cpu, 8, at_most=1) == words
    assert made == [64, 1, 32, 16, 8]  # as it is, whether the smallest is enough at all, then the smallest change
    made.clear()
    assert plan.fitting_changes(None, settings, cpu, 0.5, at_most_plans=5) == [] and len(made) == 1 + 5


def test_at_one_row_the_run_ends(tiny_settings, tmp_path, limit, no_plan):
    counts = limit(0)
    with pytest.raises(OutOfMemory, match="^out of memory .forward pass.*GB$"):
        run("sft", tiny_settings("sft", tmp_path / "run", auto_batch=True))
    assert counts["refused"] == 3  # 4, 2 and 1 rows


@pytest.mark.parametrize(
    ("rows", "sizes"), [(32, [16, 8, 4, 2, 1]), (6, [3, 1]), (7, [1]), (12, [6, 3, 1]), (9, [3, 1]), (1, [])]
)
def test_every_batch_has_the_same_rows_in_a_step(rows, sizes, tiny_settings, tmp_path):
    settings = tiny_settings("sft", tmp_path, batch_size=rows, gradient_accumulation_steps=2)
    found = []
    while changes := smaller_batch(settings):
        settings = settings.model_copy(update=changes)
        found.append(settings.batch_size)
        assert settings.batch_size * settings.gradient_accumulation_steps == 2 * rows
        assert settings.batch_size * settings.eval_steps == 4 * rows
    assert found == sizes


@pytest.fixture
def no_plan(monkeypatch):
    """Leaves the plan, which takes seconds, out of messages."""
    monkeypatch.setattr("llmlab.runs.failures.plan_less_memory", lambda run: [])


def refuse(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("stage", "place", "phase"),
    [
        ("sft", "llmlab.runs.run.load_policy", "loading"),
        ("dpo", "llmlab.runs.run.build_rows", "reading the data"),
        ("pretrain", "llmlab.training.pretrain.new_model", "loading"),
        ("grpo", "transformers.GenerationMixin.generate", "sampling"),
        ("ppo", "llmlab.training.online.passes.ForwardPasses._get_per_token_logps_and_entropies", "scoring"),
        ("orpo", "torch.nn.functional.embedding", "evaluation"),
        ("pretrain", "torch.nn.functional.embedding", "forward pass"),
        ("reward", "torch.Tensor.backward", "backward pass"),
        ("sft", "torch.optim.AdamW.step", "optimizer step"),
        ("sft", "transformers.PreTrainedModel.save_pretrained", "saving"),
    ],
)
def test_the_phase_is_named(stage, place, phase, tiny_settings, tmp_path, monkeypatch, no_plan):
    monkeypatch.setattr(place, refuse)
    changes = {"ppo_epochs": 2} if stage == "ppo" else {}
    with pytest.raises(
        OutOfMemory, match=rf"^out of memory \({phase}\): .*[0-9] [MG]B were in use of .*'s .* [MG]B; or --auto-batch"
    ):
        run(stage, tiny_settings(stage, tmp_path / "run", max_steps=1, **changes))


def test_an_evaluation_in_smaller_batches_finds_the_same(tiny_settings, tmp_path, limit):
    changes = {"max_steps": 2, "eval_every": 1}
    expected, _ = run("sft", tiny_settings("sft", tmp_path / "whole", **changes))
    counts = limit(1, step=0, when=lambda: not torch.is_grad_enabled())
    found, record = run("sft", tiny_settings("sft", tmp_path / "parts", **changes, auto_batch=True))
    assert counts["refused"] == 2  # 4 rows, 2 rows
    losses = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 2
    assert record["settings"]["batch_size"] == 4  # training fits


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_with_a_smaller_batch_resumes(stage, tiny_settings, tmp_path, limit, cut_off):
    changes = {"max_steps": 4, "save_every": 3, "auto_batch": True}
    changes |= {name: whole for name, whole, _ in SIZES[stage]}
    limit(2, step=2)
    expected, _ = run(stage, tiny_settings(stage, tmp_path / "whole", **changes))
    limit(2, step=2)
    settings = tiny_settings(stage, tmp_path / "cut", **changes)
    with cut_off.kill(step=4):
        run(stage, settings)
    record = read_record(tmp_path / "cut")["settings"]
    split = {name: record[name] for name, *_ in SIZES[stage]}
    found, _ = run(stage, settings.model_copy(update=split), resume=tmp_path / "cut")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-6)


def test_sophia_estimates_in_smaller_parts_too(tiny_settings, tmp_path, limit):
    changes = {"max_steps": 3, "optimizer": "sophia", "sophia_update_every": 2, "gradient_accumulation_steps": 2}
    expected, _ = run("sft", tiny_settings("sft", tmp_path / "half", **{**changes, "gradient_accumulation_steps": 4},
                                           batch_size=2, eval_steps=8))  # fmt: skip
    counts = limit(2, step=0)
    found, _ = run("sft", tiny_settings("sft", tmp_path / "whole", **changes, auto_batch=True))
    assert counts["refused"] == 1
    for one, other in zip(found, expected, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_sophia_estimates_in_smaller_parts_of_a_rollout(stage, tiny_settings, tmp_path, limit):
    """The first estimate comes before the first step: going back forgets the micro-batch that did not fit."""
    changes = {name: whole for name, whole, _ in SIZES[stage]} | ({"group_size": 2} if stage == "grpo" else {})
    changes |= {"max_steps": 2, "optimizer": "sophia", "sophia_update_every": 2, "auto_batch": True}
    counts = limit(2, step=0)
    found, record = run(stage, tiny_settings(stage, tmp_path / "run", **changes))
    assert counts["refused"] == 1 and record["settings"]["mini_batch_size"] == 2
    assert [line["step"] for line in found] == [1, 2]
