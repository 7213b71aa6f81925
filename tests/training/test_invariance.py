"""How work is split, and when it is evaluated, changes no result."""

import json

import pytest

from llmlab.runs.record import read_metrics
from llmlab.settings.preference import DPOSettings, ORPOSettings, RewardModelSettings
from llmlab.training.preference.dpo import dpo
from llmlab.training.preference.orpo import orpo
from llmlab.training.preference.reward import reward
from llmlab.training.sft import sft


def logged(folder, name="loss"):
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.fixture(scope="module")
def uneven_files(tmp_path_factory):
    """22 pairs to train on and 7 to validate with, whose answers are of very different lengths."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = [
        {
            "prompt": f"How {n}: the cat?",
            "chosen": "The cat meows. " * (1 + n * n % 5),
            "rejected": "The dog. " * (n % 4 + 1),
        }
        for n in range(29)
    ]
    for name, part in (("train", rows[:22]), ("validation", rows[22:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


PAIRS = [(dpo, DPOSettings), (orpo, ORPOSettings), (reward, RewardModelSettings)]


@pytest.mark.parametrize(("stage", "kind"), PAIRS)
def test_the_split_of_a_batch_of_pairs_changes_nothing(
    stage, kind, preference_settings, uneven_files, tmp_path, quiet
):
    """Three updates of 8, 8 and 6 pairs: in the last one forward passes have unequal numbers of pairs."""
    runs = {}
    sizes = (8, 4, 2, 1) if stage is orpo else (8, 4)
    for size in sizes:
        settings = preference_settings(
            kind,
            datasets=[str(uneven_files / "train.jsonl")],
            validation_datasets=[str(uneven_files / "validation.jsonl")],
            mini_batch_size=size,
            eval_batches=8 // size,
            max_steps=3,
            output_dir=str(tmp_path / str(size)),
        )
        runs[size] = stage(settings, console=quiet).folder
    for name in ("loss", "grad_norm", "eval_loss"):
        whole = logged(runs[8], name)
        assert len(whole) == (2 if name == "eval_loss" else 3)
        for size in sizes[1:]:
            assert logged(runs[size], name) == pytest.approx(whole, abs=1e-5), (name, size)


@pytest.mark.parametrize("packing", [False, True])
def test_the_split_of_a_batch_of_conversations_changes_nothing(packing, sft_settings, uneven_files, tmp_path, quiet):
    runs = {}
    rows = [json.loads(line) for line in (uneven_files / "train.jsonl").read_text().splitlines()]
    for name, part in (("train", rows[:14]), ("validation", rows[14:])):
        text = "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    for size in (8, 2):
        settings = sft_settings(
            datasets=[str(tmp_path / "train.jsonl")],
            validation_datasets=[str(tmp_path / "validation.jsonl")],
            batch_size=size,
            gradient_accumulation_steps=8 // size,
            eval_steps=8 // size,
            max_steps=2,
            packing=packing,
            output_dir=str(tmp_path / str(size)),
        )
        runs[size] = sft(settings, console=quiet).folder
    for name in ("loss", "grad_norm", "eval_loss"):
        assert logged(runs[2], name) == pytest.approx(logged(runs[8], name), abs=1e-5), name
