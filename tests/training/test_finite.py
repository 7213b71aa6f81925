"""Runs whose numbers are no longer finite: they end as `diverged`, and nothing of it is saved."""
import torch, pytest, json, math
from llmlab.settings.errors import Diverged, UserError
from llmlab.training.pretrain import pretrain
from llmlab.training.sft import sft

def test_a(settings, quiet, tmp_path):
    with pytest.raises(Diverged, match="step"):
        pretrain(settings(lr=1e30, warmup_steps=0, eval_every=2), console=quiet)
    print((tmp_path/"run"/"metrics.jsonl").read_text())
    print((tmp_path/"run"/"llmlab.json").read_text()[:400])
    print(list((tmp_path/"run").iterdir()))

def test_b(sft_settings, quiet, tmp_path):
    with pytest.raises(Diverged, match="step") as e:
        sft(sft_settings(learning_rate=1e30, warmup_steps=0, max_steps=1), console=quiet)
    print(e.value)
    print((tmp_path/"run"/"metrics.jsonl").read_text())
    print(list((tmp_path/"run").iterdir()))
