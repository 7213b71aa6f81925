"""Pipelines: read as a whole, skipped where nothing changed, rerun where something did, resumed where interrupted."""

import json
import shutil
from pathlib import Path

import pytest

from llmlab.pipeline import execute, plan, read_pipeline
from llmlab.pipeline.running import _identity
from llmlab.runs.record import RunResult
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import read_layer
from llmlab.settings.presets import RECIPE_FOLDER, SECTIONS, read_preset
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES

PIPELINE = """
output_dir: {output}
stages:
  tokenizer: {{datasets: [{text}], vocab_size: 300}}
  pretrain:
    tokenizer_name: ${{tokenizer}}
    datasets: [{text}]
    max_steps: 5
  more:
    stage: pretrain
    init_from: ${{pretrain}}
    datasets: [demo/stories]
"""


@pytest.fixture
def ran(monkeypatch):
    """Replaces what stages do by a note of (folder, resumed); a folder named in `fails` is interrupted."""
    ran, fails = [], set()

    def function(resolved, resume=None):
        folder = Path(resolved.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        ran.append((folder.name, resume is not None))
        status = "interrupted" if folder.name in fails else "finished"
        (folder / "llmlab.json").write_text(json.dumps({"status": status}))
        if folder.name in fails:
            raise KeyboardInterrupt
        return RunResult(folder, {})

    for stage in STAGES.values():
        monkeypatch.setattr(type(stage), "function", property(lambda self: function))
    return ran, fails


@pytest.fixture
def pipeline(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    path = tmp_path / "p.yaml"
    path.write_text(PIPELINE.format(output=tmp_path / "out", text=text))
    return path


def run(path, *overrides):
    parsed = read_pipeline(path, list(overrides))
    for _ in execute(parsed, plan(parsed)):
        pass


def actions(path, *overrides):
    return {step.stage.name: step.action for step in plan(read_pipeline(path, list(overrides)))}


def test_references_become_run_folders(pipeline, tmp_path):
    tokenizer, pretrain, more = read_pipeline(pipeline).stages
    assert pretrain.resolved.settings.model.tokenizer_name == str(tmp_path / "out" / "tokenizer")
    assert more.resolved.settings.init_from == str(pretrain.folder) and more.needs == ("pretrain",)
    assert more.stage.name == "pretrain" and tokenizer.resolved.sources["vocab_size"].startswith(str(pipeline))


def test_a_rerun_skips_what_is_finished(pipeline, ran):
    done, _ = ran
    run(pipeline)
    assert done == [("tokenizer", False), ("pretrain", False), ("more", False)]
    assert set(actions(pipeline).values()) == {"skip"}
    run(pipeline)
    assert len(done) == 3


def test_its_page_follows_each_stage_also_one_that_fails(pipeline, ran, tmp_path):
    ran[1].add("pretrain")
    with pytest.raises(KeyboardInterrupt):
        run(pipeline)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 2" in page and 'interrupted">interrupted' in page  # the third has not begun
    ran[1].clear()
    run(pipeline, "pretrain.report=false")  # the other stages want one
    assert "3 of 3" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "tokenizer" / "report.html").is_file()  # which has no steps


def test_a_page_that_is_written_again_makes_no_stage_run_again(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    before = _identity(tmp_path)
    (tmp_path / "report.html").write_text("again")
    assert _identity(tmp_path) == before


def test_a_change_reruns_that_stage_and_what_depends_on_it(pipeline, ran, tmp_path):
    run(pipeline)
    assert actions(pipeline, "pretrain.max_steps=6") == {"tokenizer": "skip", "pretrain": "run", "more": "run"}
    assert set(actions(pipeline, f"pretrain.cache_dir={tmp_path}", "pretrain.num_proc=1").values()) == {"skip"}
    assert actions(pipeline, "more.lr=1") == {"tokenizer": "skip", "pretrain": "skip", "more": "run"}
    (tmp_path / "text.txt").write_text("Other words, which the tokenizer has not seen.")
    assert set(actions(pipeline).values()) == {"run"}
    run(pipeline)
    assert (tmp_path / "out" / "pretrain.previous").is_dir()


def test_a_missing_run_folder_is_made_again(pipeline, ran, tmp_path):
    run(pipeline)
    shutil.rmtree(tmp_path / "out" / "pretrain")
    assert actions(pipeline) == {"tokenizer": "skip", "pretrain": "run", "more": "run"}


def test_an_interrupted_stage_resumes(pipeline, ran):
    done, fails = ran
    fails.add("pretrain")
    with pytest.raises(KeyboardInterrupt):
        run(pipeline)
    assert actions(pipeline) == {"tokenizer": "skip", "pretrain": "resume", "more": "run"}
    # changed in between: what was begun is of no use
    assert actions(pipeline, "pretrain.lr=1")["pretrain"] == "run"
    fails.clear()
    run(pipeline)
    assert done[-2:] == [("pretrain", True), ("more", False)]


def test_all_problems_of_all_stages_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "outputdir: x\nstages:\n  tokenizer: {vocab: 3}\n  pretrain:\n    lrr: 1\n    tokenizer_name: ${tokenizr}\n"
        "  dance: {}\n"
    )
    with pytest.raises(SettingsError) as caught:
        read_pipeline(path, ["pretrian.lr=1"])
    text = str(caught.value)
    for part in (
        f"{path}:1: unknown key 'outputdir'",
        f"{path}:3: unknown key 'vocab'",
        f"{path}:5: unknown key 'lrr'; did you mean 'lr'?",
        f"{path}:6: ${{tokenizr}}: expected an earlier stage",
        f"{path}:7: unknown stage 'dance'",
        "there is no stage 'pretrian'; did you mean 'pretrain'?",
    ):
        assert part in text, text


def test_no_pipeline(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lr: 3\n")
    with pytest.raises(UserError, match="expected 'stages'"):
        read_pipeline(path)


def test_a_damaged_record_is_a_sentence(pipeline, ran, tmp_path):
    run(pipeline)
    (tmp_path / "out" / "pipeline.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        actions(pipeline)


RECIPES = sorted(path for path in RECIPE_FOLDER.rglob("*.yaml") if path.parent.name != "cluster")


def test_there_are_recipes():
    assert len(RECIPES) >= 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(RECIPE_FOLDER)))
def test_every_shipped_recipe_is_read(path, tmp_path):
    layer = read_layer(path)
    if "stages" in layer.values:
        assert read_pipeline(path, [f"output_dir={tmp_path}"]).stages
    elif path.parent.name == "hardware":
        assert all(STAGES[stage].resolve([], below=[], hardware=path.stem).settings for stage in SECTIONS)
    elif "stage" not in layer.values:
        assert all(STAGES[stage].resolve([], below=[read_preset(stage, path.stem)]).settings for stage in SECTIONS)
    else:
        stage = STAGES[layer.values["stage"]]
        resolved = resolve(stage.settings_class, layer)
        assert json.loads(resolved.settings.model_dump_json())


REWARDED = """
output_dir: {output}
stages:
  tokenizer: {{datasets: [{text}]}}
  grpo:
    policy_checkpoint: ${{tokenizer}}
    datasets: [{text}]
    rewards: [{reward}]
    reward_model: ${{tokenizer}}
"""


def test_functions_of_ones_own_are_allowed_by_hand_alone(tmp_path, ran):
    (tmp_path / "mine.py").write_text("def score(completions, **columns): return [0.0] * len(completions)\n")
    path = tmp_path / "p.yaml"
    values = {"output": tmp_path / "out", "text": path}
    path.write_text(REWARDED.format(**values, reward="mine.py:score"))
    with pytest.raises(SettingsError, match=r"p.yaml:8: reward .*mine.py:score': this is Python code.*--allow-code"):
        read_pipeline(path)
    pipeline = read_pipeline(path, allow_code=True)
    assert pipeline.stages[1].resolved.settings.rewards[0].name == f"{tmp_path / 'mine.py'}:score"
    assert read_pipeline(path, ["grpo.allow_code=true"]).stages[1].resolved.settings.allow_code
    list(execute(pipeline, plan(pipeline)))
    # the leave is no setting of the run, but the code is one of its inputs
    assert [step.action for step in plan(read_pipeline(path, allow_code=True))] == ["skip", "skip"]
    (tmp_path / "mine.py").write_text("def score(completions, **columns): return [1.0] * len(completions)  # more\n")
    assert [step.action for step in plan(read_pipeline(path, allow_code=True))] == ["skip", "run"]
    path.write_text(path.read_text() + "    allow_code: true\n")
    with pytest.raises(SettingsError, match="allow_code cannot be set in a file"):
        read_pipeline(path)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("numeric_mach", "p.yaml:8: .*did you mean 'numeric_match'"),
        ("{name: length, tarket: 3}", "p.yaml:8: .*unknown parameter 'tarket'.*did you mean 'target'"),
        ("your.py:score", "p.yaml:8: .*your.py: there is no such file"),
    ],
)
def test_rewards_are_checked_before_the_first_stage(reward, message, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(REWARDED.format(output=tmp_path / "out", text=path, reward=reward))
    with pytest.raises(SettingsError, match=message):
        read_pipeline(path, allow_code=True)


def test_machines_and_presets_of_stages(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "hardware: rtx_4090\nstages:\n  tokenizer: {datasets: [x.txt]}\n"
        "  sft: {preset: small, datasets: [x.txt]}\n  dpo: {hardware: cpu, batch_size: 32}\n"
    )

    def batches(*words, **options):
        stages = {stage.name: stage.resolved for stage in read_pipeline(path, list(words), **options).stages}
        sft, dpo = stages["sft"], stages["dpo"]
        size, accumulation = sft.settings.batch_size, sft.settings.gradient_accumulation_steps
        assert size * accumulation == 64 and sft.sources["learning_rate"] == "preset small"
        return size, sft.sources["tf32"], dpo.settings.mini_batch_size, dpo.sources["mini_batch_size"]

    assert batches() == (4, "hardware rtx_4090", 2, "hardware cpu")
    assert batches(hardware="m1_max_64gb") == (1, "default", 2, "hardware cpu")
    assert batches("dpo.hardware=h100_80gb")[2:] == (8, "hardware h100_80gb")
    path.write_text(
        path.read_text().replace("[x.txt]}\n  sft", "[x.txt], hardware: cpu}\n  sft").replace("small", "smal")
    )
    with pytest.raises(SettingsError) as caught:
        read_pipeline(path)
    assert "unknown key 'hardware'" in str(caught.value) and "did you mean 'small'? (stage 'sft')" in str(caught.value)


def test_a_machine_keeps_a_stage_on_other_processes(pipeline, ran):
    """Its batch is split for them, which changes nothing of what a finished or interrupted stage computes."""
    done, fails = ran
    fails.add("more")

    def read(processes):
        return read_pipeline(pipeline, hardware="rtx_4090", processes=processes)

    with pytest.raises(KeyboardInterrupt):
        list(execute(read(1), plan(read(1))))
    splits = [read(n).stages[1].resolved.settings for n in (1, 2)]
    assert [(each.batch_size, each.gradient_accumulation_steps) for each in splits] == [(4, 4), (4, 2)]
    for processes, pretrain in ((1, "skip"), (2, "skip"), (16, "skip"), (3, "run")):  # 3 cannot share 16 rows
        steps = {step.stage.name: step for step in plan(read(processes))}
        assert steps["pretrain"].action == pretrain, processes
        assert steps["more"].action == ("resume" if pretrain == "skip" else "run")
    assert steps["pretrain"].reason == "its settings changed (effective batch 16 → 15)"
    assert actions(pipeline)["pretrain"] == "run"  # without the machine: 8 x 4
