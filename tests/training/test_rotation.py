"""Which checkpoints stay: the best and the last, by the validation data."""

import json
import math
import random

import pytest

from llmlab.training.checkpoints import checkpoints, step_of
from llmlab.training.rotation import spare_steps
from llmlab.training.sft import sft


@pytest.mark.parametrize("larger", [False, True])
def test_so_many_of_the_best_and_the_last_stay(larger):
    random.seed(0)
    values = [random.random() for _ in range(30)]
    scores = {10 * (k + 1): value for k, value in enumerate(values)}
    on_disk: list[int] = []
    for step in scores:
        on_disk.append(step)
        for spare in spare_steps(on_disk, scores, 5, larger_is_better=larger):
            on_disk.remove(spare)
    best = sorted(scores, key=scores.get, reverse=larger)[:5]
    assert set(on_disk) == {*best, 300}


def test_without_scores_the_newest_stay():
    assert spare_steps([1, 2, 3, 4], {}, 2, larger_is_better=False) == [1, 2]
    assert spare_steps([1, 2, 3, 4], {1: math.nan, 2: 5.0}, 1, larger_is_better=False) == [1, 3]
    assert spare_steps([], {}, 1, larger_is_better=True) == []


def test_a_run_keeps_its_best_checkpoints_and_the_last(sft_settings, monkeypatch):
    """A rising learning rate of the wrong sign would be slow: the validation losses are dictated instead."""
    from llmlab.training.sft import InstructionTrainer

    losses = iter([9.0, 3.0, 8.0, 1.0, 7.0, 2.0, 6.0, 5.0])
    evaluate = InstructionTrainer.evaluate

    def dictated(self, *args, **kwargs):
        log = self.log
        self.log = lambda logs, *a, **k: None
        metrics = {**evaluate(self, *args, **kwargs), "eval_loss": next(losses)}
        self.log = log
        self.log(metrics)
        return metrics

    monkeypatch.setattr(InstructionTrainer, "evaluate", dictated)
    settings = sft_settings(max_steps=8, eval_every=1, save_every=1, save_best_only=False, save_total_limit=3)
    folder = sft(settings).folder
    assert [step_of(path) for path in checkpoints(folder)] == [2, 4, 6, 8]
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4
