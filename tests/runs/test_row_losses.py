"""Losses of single validation rows: by source and the hardest, padded or packed, without changing a result."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from llmlab.data.chat.rows import Rows
from llmlab.data.text.packing import Mixture
from llmlab.runs.record import read_hardest_rows, read_metrics
from llmlab.runs.trainer import RowLosses
from llmlab.stages import STAGES
from tests.conftest import write_rows

ROWS = {("a", 1): [5, 6, 7], ("a", 2): [5, 8], ("b", 1): [9, 9, 9, 9]}


@pytest.fixture
def rows():
    made = RowLosses(lambda: ((np.array(ids), *place) for place, ids in ROWS.items()), str)
    model = torch.nn.Identity()
    with made.watch(model):
        yield made, lambda losses: model(SimpleNamespace(log_probs=-torch.tensor(losses)))


def found(rows):
    return {(source, -row): (loss, tokens) for loss, row, tokens, source, _ in rows.hardest}


def test_padded_rows(rows):
    rows, forward = rows
    forward([[1.0, 3.0, 0.0], [4.0, 0.0, 0.0], [2.0, 2.0, 5.0]])  # of the second token on
    ids = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0], [9, 9, 9, 9]])
    labels = torch.tensor([[5, 6, 7, -100], [-100, 8, -100, -100], [-100, -100, 9, 9]])
    rows.add({"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()})
    assert found(rows) == {("a", 1): (2.0, 2), ("a", 2): (4.0, 1), ("b", 1): (3.5, 2)}
    metrics = rows.metrics(Accelerator(cpu=True))
    assert metrics == {"eval_loss/a": pytest.approx(8 / 3), "eval_loss/b": pytest.approx(3.5)}


def test_packed_rows_are_rows_again(rows):
    """Two conversations and padding, whose positions are 0, in one row; one that nobody knows, such as a cut one."""
    rows, forward = rows
    ids = torch.tensor([[5, 8, 9, 9, 9, 9, 1, 0]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 3, 0, 0]])
    labels = torch.tensor([[-100, 8, -100, 9, 9, 9, -100, -100]])
    forward([[6.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0]])
    rows.add({"input_ids": ids, "labels": labels, "position_ids": positions})
    assert found(rows) == {("a", 2): (6.0, 1), ("b", 1): (2.0, 3)}


@pytest.mark.parametrize(("stage", "packing"), [("pretrain", None), ("sft", False), ("sft", True)])
def test_sources_and_hardest_rows_of_a_run(tiny_settings, chat_file, tmp_path, quiet, monkeypatch, stage, packing):
    """The rows' losses sum up to the validation loss, that of every source too."""
    if stage == "pretrain":
        text = [{"text": " ".join(f"{n} and {m}." for m in range(n, n + 30))} for n in range(60)]
        sources = [{"name": str(write_rows(tmp_path / "other.jsonl", text))}]
    else:
        other = [{"question": f"Say {n}", "answer": f"{n} it is"} for n in range(80)]
        sources = [{"name": str(write_rows(tmp_path / "other.jsonl", other))}]
    own = {} if packing is None else {"packing": packing}
    run, losses, sums, metrics = STAGES[stage].function, [], [], RowLosses.metrics
    monkeypatch.setattr(RowLosses, "metrics", lambda rows, *args: sums.append(rows.sums) or metrics(rows, *args))
    for name in ("with", "without"):
        settings = tiny_settings(stage, tmp_path / name, max_steps=2, eval_every=1, eval_steps=4, **own)
        settings = settings.model_copy(update={"datasets": [*settings.datasets, *_sources(settings, sources)]})
        folder = run(settings, console=quiet).folder
        losses.append([[line[key] for key in ("loss", "eval_loss") if key in line] for line in read_metrics(folder)])
        monkeypatch.setattr({"pretrain": Mixture, "sft": Rows}[stage], "origins", None)
    assert losses[0] == losses[1] and any(losses[0])  # bit by bit
    assert not read_hardest_rows(tmp_path / "without")
    lines, hardest = read_metrics(tmp_path / "with"), read_hardest_rows(tmp_path / "with")
    last = [line for line in lines if "eval_loss" in line][-1]
    assert {line["step"] for line in hardest} == {2} and all(line["text"] for line in hardest)
    assert [line["loss"] for line in hardest] == sorted((line["loss"] for line in hardest), reverse=True)

    totals, tokens = sums[-1].T
    assert totals.sum() / tokens.sum() == pytest.approx(last["eval_loss"], rel=1e-5)
    by_source = sorted(value for name, value in last.items() if name.startswith("eval_loss/"))
    assert by_source == pytest.approx(sorted(totals / tokens), rel=1e-5) and len(by_source) == 2
    if stage == "sft":  # numbers are those of the files
        texts = {name: (tmp_path / name if name == "other.jsonl" else chat_file) for name in ("other.jsonl", "chat")}
        row = next(line for line in hardest if line["source"].endswith("other.jsonl"))
        written = texts["other.jsonl"].read_text().splitlines()[row["row"] - 1]
        assert json.loads(written)["question"] in row["text"]


def _sources(settings, sources):
    return [settings.datasets[0].model_copy(update=source) for source in sources]


def test_a_repeated_row_is_written_once_though_its_loss_differs_a_little(rows, tmp_path):
    rows, forward = rows
    for loss in (4.0, 4.001):
        forward([[loss]])
        rows.add({"input_ids": torch.tensor([[5, 8]]), "labels": torch.tensor([[-100, 8]])})
    rows.write(tmp_path, 1, Accelerator(cpu=True))
    assert [(line["source"], line["row"]) for line in read_hardest_rows(tmp_path)] == [("a", 2)]
