"""Samples of RS-SFT and AWR: none is lost or drawn twice, whatever ends the run, and other runs take them over."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import time

import pytest
from rich.console import Console

from llmlab.data import samples as store
from llmlab.data.samples import read_samples
from llmlab.settings.errors import UserError
from llmlab.settings.paths import expand
from llmlab.training.offline import sampling
from llmlab.training.offline.awr import awr
from llmlab.training.offline.rs_sft import rs_sft
from tests.conftest import Killed

SMALL = {"max_prompts": 20, "num_samples_per_prompt": 2, "sampling_batch_size": 4, "max_steps": 1, "warmup_steps": 1}


@pytest.fixture
def settings(tiny_settings, tmp_path):
    return lambda stage="awr", folder="run", **changes: tiny_settings(
        stage, tmp_path / folder, **{**SMALL, "max_steps": 1, **changes}
    )


@pytest.fixture(scope="module")
def whole(tiny_settings, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return awr(tiny_settings("awr", folder, **SMALL), console=Console(quiet=True)).folder


def go_on(settings, quiet):
    """Starts a run, or goes on with it."""
    folder = expand(settings.output_dir)
    return awr(settings, resume=folder if (folder / "llmlab.json").exists() else None, console=quiet)


def test_fifty_kills_lose_no_sample_and_repeat_none(settings, whole, quiet, monkeypatch):
    draw, kills, append = random.Random(0), 0, store.append_samples
    mine = settings()

    def torn(path, samples):
        """Appends, or is killed before, amid or after that."""
        if draw.random() < 0.4:
            whole_text = "".join(each.model_dump_json() + "\n" for each in samples)
            with path.open("a") as file:
                file.write(whole_text[: draw.randrange(len(whole_text) + 1)])
            raise Killed
        append(path, samples)

    monkeypatch.setattr(store, "append_samples", torn)
    while kills < 50:
        try:
            run = go_on(mine, quiet)
        except Killed:
            kills += 1
        else:
            assert (run.folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
            assert (run.folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
            shutil.rmtree(run.folder)


def sample_slowly(settings, pause):
    fill = sampling.complete

    def slow(*args, **kwargs):
        time.sleep(pause)
        fill(*args, **kwargs)

    sampling.complete = slow
    go_on(settings, Console(quiet=True))


def test_real_kills(settings, whole):
    mine, context = settings(), multiprocessing.get_context("fork")
    path = expand(mine.output_dir) / "samples.jsonl"
    for lines in (3, 11, 30):
        child = context.Process(target=sample_slowly, args=(mine, 0.05))
        child.start()
        while child.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert lines <= path.read_bytes().count(b"\n") < 2 * SMALL["max_prompts"]
    run = go_on(mine, Console(quiet=True))
    assert (run.folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_ctrl_c_can_be_resumed(settings, whole, quiet, monkeypatch):
    mine, append = settings(), store.append_samples

    def interrupt(path, samples):
        append(path, samples)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "append_samples", interrupt)
        go_on(mine, quiet)
    record = json.loads((expand(mine.output_dir) / "llmlab.json").read_text())
    assert (record["stage"], record["status"]) == ("awr", "interrupted")
    assert (go_on(mine, quiet).folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_what_a_sample_holds(whole):
    samples = read_samples(whole / "samples.jsonl")
    assert [(each.prompt_id, each.sample) for each in samples] == [(p, k) for p in range(20) for k in range(2)]
    for each in samples:
        assert each.rewards == {"wanted_share": each.reward} and set(each.columns) == {"question", "answer"}
        share = sum(token < 100 for token in each.completion_ids) / len(each.completion_ids)
        assert each.reward == pytest.approx(share) and each.ended == (len(each.completion_ids) < 8)
        assert each.labels == [-100] * len(each.prompt_ids) + each.completion_ids
    described = json.loads((whole / "samples.json").read_text())
    assert described["num_samples_per_prompt"] == 2 and described["rewards"][0]["name"].endswith("wanted_share")


def test_samples_of_another_run_are_not_drawn_again(settings, whole, quiet, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "complete", None)
    run = awr(settings(samples=str(whole), temperature=1.3), console=Console(width=200))
    assert "temperature = 1.3 has no effect: the samples were drawn with 1" in capsys.readouterr().out
    for name in ("samples.jsonl", "model.safetensors"):
        assert (run.folder / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match="rewards: the samples in .* were scored by others; expected rescore=true"):
        awr(settings(folder="other", samples=str(whole), rewards=["length"]), console=quiet)


def test_scoring_again_samples_nothing(settings, whole, quiet, monkeypatch):
    monkeypatch.setattr(sampling, "complete", None)
    changes = {"samples": str(whole / "samples.jsonl"), "rescore": True, "rewards": [{"name": "length", "target": 1}]}
    run = awr(settings(**changes), console=quiet)
    before, after = read_samples(whole / "samples.jsonl"), read_samples(run.folder / "samples.jsonl")
    assert [each.completion_ids for each in before] == [each.completion_ids for each in after]
    assert all(set(each.rewards) == {"length"} for each in after)
    assert json.loads((run.folder / "samples.json").read_text())["rewards"][0]["name"] == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"prompt_id": "x"}, "samples.jsonl:1: cannot be read as a sample: "),
        (lambda row: row | {"mask": [1]}, "samples.jsonl:1: this is no sample: expected a completion, and a mask"),
        (lambda row: row | {"completion": []}, "samples.jsonl:1: this is no sample"),
        (None, "there is no sample in it"),
    ],
)
def test_wrong_samples_are_one_sentence(settings, whole, quiet, tmp_path, change, message):
    row = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    (tmp_path / "samples.jsonl").write_text("" if change is None else json.dumps(change(row)) + "\n")
    with pytest.raises(UserError, match=message):
        awr(settings(samples=str(tmp_path / "samples.jsonl")), console=quiet)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused(settings, whole, quiet, tmp_path):
    shutil.copy(whole / "samples.jsonl", tmp_path / "samples.jsonl")
    (tmp_path / "samples.json").write_text('{"vocabulary": 1}')
    with pytest.raises(UserError, match="its tokens are of another vocabulary than that of .*expected the same token"):
        awr(settings(samples=str(tmp_path)), console=quiet)


def test_nothing_kept_shows_the_rewards(settings, whole, quiet, tmp_path):
    with pytest.raises(UserError) as error:
        rs_sft(settings("rs-sft", samples=str(whole), reward_threshold=2), console=quiet)
    lines, rewards = str(error.value).split("\n"), [each.reward for each in read_samples(whole / "samples.jsonl")]
    assert lines[0].startswith("none of the 40 samples is left to train on: ")
    assert len(lines) == 6 and "█" in lines[3]
    assert lines[4].split() == [f"{min(rewards):.3g}", f"{max(rewards):.3g}"]
    assert f"quantiles of the rewards: 50% {statistics.median(rewards):.3g}, " in lines[5] and "samples=" in lines[5]


def test_a_failing_reward_leaves_no_record(settings, quiet, tmp_path):
    with pytest.raises(UserError, match="numeric_match"):
        awr(settings(rewards=["numeric_match"], datasets=[str(bare(tmp_path))]), console=quiet)
    assert not (tmp_path / "run").exists()


def bare(folder):
    rows = [{"prompt": f"What is {k} + 1?"} for k in range(30)]
    path = folder / "bare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
