"""Which checkpoints stay: the best and the last, by the validation data."""

import json

from llmlab.runs.checkpoints import checkpoints, step_of
from llmlab.training.sft import sft


def test_a_run_keeps_its_best_checkpoints_and_the_last(sft_settings, monkeypatch):
    """A rising learning rate of the wrong sign would be slow: the validation losses are dictated instead."""
    from llmlab.training.sft import LLMLabSFTTrainer

    losses = iter([9.0, 3.0, 8.0, 1.0, 7.0, 2.0, 6.0, 5.0])
    evaluate = LLMLabSFTTrainer.evaluate

    def dictated(self, *args, **kwargs):
        log = self.log
        self.log = lambda logs, *a, **k: None
        metrics = {**evaluate(self, *args, **kwargs), "eval_loss": next(losses)}
        self.log = log
        self.log(metrics)
        return metrics

    monkeypatch.setattr(LLMLabSFTTrainer, "evaluate", dictated)
    settings = sft_settings(max_steps=8, eval_every=1, save_every=1, save_best_only=False, save_total_limit=3)
    folder = sft(settings).folder
    assert [step_of(path) for path in checkpoints(folder)] == [2, 4, 6, 8]
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4
