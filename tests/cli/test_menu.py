"""The menu: questions from the settings, commands and files that load, seen through a pseudo-terminal of 80 x 24."""

import itertools
import json
import subprocess
import sys
import time

import psutil
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llmlab.cli import menu, questions
from llmlab.cli.app import COMMANDS, main
from llmlab.cli.model import _settings as model_settings
from llmlab.cli.questions import TABLES, Form, Planner
from llmlab.settings.base import When, fields_of, spellings_of
from llmlab.settings.errors import UserError
from llmlab.settings.model import ModelSettings
from llmlab.settings.presets import RECIPE_FOLDER
from llmlab.stages import STAGES
from tests.cli.screen import Screen

FORMS = {"model": "pretrain", **{stage: stage for entry in TABLES["entries"] for stage in entry.get("stages", ())}}
# plans are other tests'; a run is written down, and lasts until Ctrl+C
MENU = '''
import json, subprocess, sys
from llmlab.cli import questions
from llmlab.cli.app import main
questions.PLANNER.line = lambda *settings: "about 1 GB"
start = subprocess.call
program = """
import time
try:
    print("it runs", flush=True)
    while True:  # Ctrl+C just before one long wait would be seen after it
        time.sleep(0.01)
except KeyboardInterrupt:
    raise SystemExit(130)
"""
def call(words):
    with open("ran.jsonl", "a") as file:
        print(json.dumps(words[3:]), file=file)
    return start([sys.executable, "-c", program])
subprocess.call = call
main([])
'''


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """Types into questions that this process asks; plans are not made, and commands are noted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(questions.PLANNER, "line", lambda *settings: "about 1 GB")
    commands = []
    monkeypatch.setattr(subprocess, "call", lambda words: commands.append(words[3:]) or 0)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.commands = commands
        yield pipe


def make_run(folder, stage="sft", steps=(5, 10), **settings):
    """A run folder, as far as the menu looks at it."""
    folder.mkdir(parents=True)
    record = {"stage": stage, "status": "interrupted", "step": steps[-1], "settings": settings, "started": str(folder)}
    (folder / "llmlab.json").write_text(json.dumps(record))
    (folder / "config.json").write_text("{}")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def show_config(capsys, words):
    """Reads a command's settings as the command line does, without running it."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--show-config"])
    output = capsys.readouterr()
    assert not end.value.code, output.err
    return output.out


# The tables ------------------------------------------------------------------------------------------------------


def test_tables_name_what_exists():
    for name, stage in FORMS.items():
        assert not [
            key for key in TABLES["first"][name] if spellings_of(STAGES[stage].settings_class)[key].name != key
        ]
    every = {setting.name for stage in STAGES.values() for setting in fields_of(stage.settings_class)}
    assert not {key.rpartition(".")[2] for key in TABLES["advice"]} - every
    assert {key.rpartition(".")[0] for key in TABLES["advice"]} - {""} <= STAGES.keys()
    assert all(entry["words"][0] in COMMANDS for entry in TABLES["entries"] if "words" in entry)
    assert [entry["key"] for entry in TABLES["entries"][:6]] == list("123456")  # the seed's
    assert (RECIPE_FOLDER / "first_chat.yaml").exists()


@pytest.mark.parametrize(("name", "stage"), FORMS.items(), ids=FORMS)
def test_only_what_is_relevant_is_asked(name, stage, monkeypatch):
    """Whatever the choices, exactly those are asked whose conditions, and those of what they depend on, hold."""
    names = TABLES["first"][name]
    settings = {setting.name: setting for setting in fields_of(STAGES[stage].settings_class)}
    deciders = {settings[key].marker(When).field for key in names if settings[key].marker(When)} & set(names)
    choices = [settings[key].choices or (False, True) for key in sorted(deciders)]
    for values in itertools.product(*choices):
        chosen, asked = dict(zip(sorted(deciders), values, strict=True)), []

        def ask(form, key, later, chosen=chosen, asked=asked):
            asked.append(key)
            form.answers += [(form.find(key).key, chosen[key])] if key in chosen else []

        monkeypatch.setattr(Form, "ask", ask)
        form = Form(stage)
        form.ask_all(names, lambda following: None)

        def holds(key, chosen=chosen, form=form):
            condition = settings[key].marker(When)
            if condition is None:
                return True
            value = chosen.get(condition.field, form.value(settings[condition.field]))
            return holds(condition.field) and condition.holds(value)

        assert asked == [key for key in names if holds(key)], chosen


def test_the_optimizers_own_settings_are_asked():
    form = Form("sft", answers=[("optimizer", "sophia")])
    beside = [name for name in TABLES["after"]["optimizer"] if form.asks(form.find(name))]
    assert beside == ["sophia_beta1", "sophia_beta2", "sophia_rho"]
    assert not form.asks(form.find("lora_r")) and not form.asks(form.find("lora_target_modules"))
    for names in TABLES["first"].values():
        assert ("optimizer" in names) == ("sophia_rho" in names) and ("use_lora" in names) == ("lora_r" in names)
    assert "lora_dropout" not in TABLES["first"]["ppo"]  # where it can only be 0


# Answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_validated_by_the_settings():
    form = Form("pretrain")
    lr, width, heads, rows = map(form.find, ("lr", "d_model", "n_heads", "datasets"))
    assert form.refusal(lr, "0") == "lr = 0: expected greater than 0"
    assert form.refusal(lr, "1e-3") == form.refusal(lr, "") == ""
    assert form.refusal(rows, "a | b | c | d | e").startswith("datasets")
    steps = form.find("max_steps")  # a text that is another setting's name is no contradiction to it
    assert form.refusal(steps, "lr", later=["lr"]).startswith("max_steps = lr: expected a valid integer")
    assert form.refusal(rows, "[1]") == "datasets[0] = 1: expected text or a mapping"
    # a contradiction waits for the setting that is asked later, which is then refused as it is
    assert form.refusal(width, "128", later=["n_heads"]) == ""
    assert "not divisible by n_heads = 14" in form.refusal(width, "128")
    form.answers.append((width.key, 128))
    form.update()
    assert "nearest number of heads that divides it is 16" in form.refusal(heads, "")
    assert form.refusal(heads, "16") == "" and "n_heads = 14" in form.status()[1]


def test_a_list_is_typed_without_brackets():
    rewards, data = Form("grpo").find("rewards"), Form("sft").find("datasets")
    assert questions.parse_answer(data, "demo/chat | | 4, demo/arithmetic") == ["demo/chat | | 4", "demo/arithmetic"]
    assert questions.parse_answer(data, "demo/chat | | 4") == ["demo/chat | | 4"]
    assert questions.parse_answer(rewards, "numeric_match | 2, json_valid") == ["numeric_match | 2", "json_valid"]


def test_none_is_no_value():
    form = Form("grpo")
    assert questions.parse_answer(form.find("reward_model"), "none") is None
    assert questions.parse_answer(form.find("num_episodes"), "None") is None
    assert questions.parse_answer(form.find("scheduler"), "none") == "none"  # a schedule


def test_a_later_choice_leaves_earlier_answers_without_effect():
    form = Form("sft", answers=[("optimizer", "sophia"), ("sophia_rho", 0.1), ("optimizer", "adamw")])
    assert not form.problems and "ignored" in form.resolved.warnings[0]
    form = Form("orpo", answers=[("epochs", 2.0), ("max_steps", 7)])  # the last of two units for one quantity
    assert (form.resolved.settings.max_steps, form.resolved.settings.epochs) == (7, None)


# Paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage for stage in FORMS if stage not in ("model", "merge")])
def test_every_stage_reaches_its_command(keys, stage, capsys):
    """Enter to everything: the new configuration is saved and runs by a command that loads it."""
    keys.send_text("\r" * (len(TABLES["first"]["model"]) * (stage == "pretrain") + len(TABLES["first"][stage]) + 5))
    menu.train(stage)
    (words,) = keys.commands
    start = ["tokenizer", "train"] if stage == "tokenizer" else [stage]
    assert words == [*start, "--config", TABLES["files"].get(stage, "rlhf_config.json")]
    output = show_config(capsys, words)
    settings = STAGES[stage].resolve([], below=[]).settings
    saved = json.loads(menu.Path(words[-1]).read_text())
    assert saved.pop("stage") == stage and "vocab_size" not in saved.get("model", {})
    assert STAGES[stage].settings_class.model_validate(saved) == settings
    assert f"{words[-1]}:" in output and not list(menu.Path().glob(".llmlab*"))
    assert not menu._refusal(stage, words[-1]) and menu._configurations(stage) == [words[-1]]
    other = "sft" if stage != "sft" else "dpo"
    assert menu._refusal(other, words[-1]).endswith(f"it is of stage {stage}")


def test_merge_asks_for_adapters(keys, tmp_path):
    assert Form("merge").problems == ["adapter: a value is required"]
    assert Form("merge").refusal(Form("merge").find("adapter"), "", ["base"]) == "adapter: required"
    make_run(tmp_path / "runs" / "sft")
    (tmp_path / "runs" / "sft" / "adapter_config.json").write_text("{}")
    keys.send_text("\r" * 7)  # the run, its base, the folder, the precision, "Run it"
    menu.train("merge")
    assert keys.commands == [["merge", "--config", "merge_config.json"]]
    assert json.loads((tmp_path / "merge_config.json").read_text())["adapter"] == "runs/sft"


def test_a_models_configuration_is_saved_and_used(keys, tmp_path, capsys):
    keys.send_text("\r" * 5 + "256\r" + "8\r")  # up to d_model and n_heads
    keys.send_text("\x04" + "\r")  # keep the rest, save
    menu.configure_model()
    saved = json.loads((tmp_path / "model_config.json").read_text())
    assert saved["d_model"] == 256 and saved["n_heads"] == 8 and saved["n_layers"] == 24 and "model" not in saved
    output = show_config(capsys, ["pretrain", "--config", "model_config.json"])
    assert "model.d_model" in output and "model_config.json:" in output
    assert model_settings("model_config.json").d_model == 256  # of `llmlab model`
    keys.send_text("\x1b[B\r" + "77\r" + "\x04" + "\r")  # a new training configuration for this model, 77 steps
    menu.train("pretrain")
    settings = Form("pretrain", [keys.commands[0][-1]]).resolved.settings
    assert (settings.model.d_model, settings.max_steps) == (256, 77)
    keys.send_text("\r" * 20)  # a second one has its own name
    menu.configure_model()
    assert (tmp_path / "model_config-2.json").exists()


def test_resume_asks_for_checkpoint_length_and_optimizer(keys, tmp_path):
    make_run(tmp_path / "runs" / "a", max_steps=10, epochs=None)
    make_run(tmp_path / "runs" / "b", steps=(3,), epochs=2.0)
    make_run(tmp_path / "runs" / "c", stage="dpo")
    runs = [run for run in questions.find_runs(tmp_path) if run.stage == "sft"]
    keys.send_text("\x1b[B\x1b[B\r" + "20\r" + "y" + "y")  # b's checkpoint, a's later one, a's earlier one
    menu.resume("sft", runs)
    assert keys.commands == [["sft", "--resume", str(tmp_path / "runs/a/checkpoint-5"), "max_steps=20"]]
    keys.send_text(
        "\r" + "2.0000001\r" + "n" + "\x1b[B\x1b[B\r" + "\r\r" + "y"
    )  # no state: lion, with its own parameters
    menu.resume("sft", runs)
    words = ["epochs=2.0000001", "optimizer=lion", "--no-load-optimizer"]
    assert keys.commands[1] == ["sft", "--resume", str(tmp_path / "runs/b/checkpoint-3"), *words]
    make_run(tmp_path / "d", steps=(5,))  # its record says no length
    keys.send_text("\r" + "y" + "y")
    menu.resume("sft", [questions.find_runs(tmp_path / "d")[0]])
    assert keys.commands[2] == ["sft", "--resume", str(tmp_path / "d/checkpoint-5")]


@pytest.mark.parametrize(
    "draft",
    [
        {},
        {"stage": "other", "files": [], "answers": [], "names": [], "next": 0},
        {"stage": "sft", "files": [], "answers": [], "names": ["gone"], "next": 0},
        {"stage": "sft", "files": [], "answers": [["gone", 1]], "names": ["optimizer"], "next": 0},
    ],
)
def test_a_draft_of_another_version_is_refused(keys, tmp_path, draft):
    (tmp_path / ".llmlab_draft_sft.json").write_text(json.dumps(draft))
    with pytest.raises(UserError, match="as a draft of the menu"):
        menu.go_on("sft")


def test_a_draft_with_a_choice_of_another_version_asks_again(keys, tmp_path):
    draft = {"stage": "sft", "files": [], "answers": [["optimizer", "gone"]], "names": ["optimizer"], "next": 0}
    (tmp_path / ".llmlab_draft_sft.json").write_text(json.dumps(draft))
    keys.send_text("\r" * 2)  # the first choice, "Run it"
    menu.go_on("sft")
    assert keys.commands == [["sft", "--config", "sft_config.json"]]


def test_an_existing_configuration_runs_as_it_is(keys, tmp_path):
    (tmp_path / "mine.yaml").write_text("stage: dpo\npolicy_checkpoint: x\n")
    keys.send_text("\x1b[A\r" + "mine.yaml\r" + "\r")  # "another file" is the last way; "Run it" the first action
    menu.train("dpo")
    assert keys.commands == [["dpo", "--config", "mine.yaml"]] and not (tmp_path / "rlhf_config.json").exists()


def test_quick_start_and_other_entries_run_commands(keys, tmp_path):
    make_run(tmp_path / "runs" / "sft")
    keys.send_text("\r\r\r")
    menu.quick_start()
    assert keys.commands == [["run", "first_chat"], ["chat", "runs/first_chat/sft"]]
    keys.send_text("demo/stories\r\r\r")
    menu.quick_start()
    data = [f'{stage}.datasets=["demo/stories"]' for stage in ("tokenizer", "pretrain")]
    assert keys.commands[2] == ["run", "first_chat", *data]
    keys.send_text("\r\r\r\r")
    menu.open_entry(next(entry for entry in TABLES["entries"] if entry["key"] == "8"))
    assert keys.commands[4] == ["evaluate", "runs/sft", "--gates", "distinct_n", "--prompts", "demo/chat"]
    make_run(tmp_path / "runs" / "died", stage="reward")
    (tmp_path / "runs" / "died" / "config.json").unlink()
    keys.send_text("\x1b[B\r" + "\x1b[B\r")
    menu.open_entry(next(entry for entry in TABLES["entries"] if entry["key"] == "9"))
    assert keys.commands[5] == ["runs", "show", "runs/died"]  # runs without a model too
    (tmp_path / "a.yaml").write_bytes(b"\xff\nstages:")  # no pipelines
    (tmp_path / "b.yaml").mkdir()
    keys.send_text("\r" + "y")
    menu.run_pipeline()
    assert keys.commands[6:] == [["run", "first_chat", "--dry-run"], ["run", "first_chat"]]


def test_reward_models_are_offered_as_reward_models_alone(tmp_path):
    make_run(tmp_path / "runs" / "reward", stage="reward")
    make_run(tmp_path / "a" / "b" / "c" / "sft")
    reward, policy = sorted(questions.find_runs(tmp_path), key=lambda run: run.stage)
    assert questions.has_model(policy) and not questions.has_model(policy, scores=True)
    assert questions.has_model(reward, scores=True) and not questions.has_model(reward)
    assert [run.stage for run in questions.find_runs(tmp_path, deepest=3)] == [
        "reward"
    ]  # a home folder is not walked whole


def test_a_killed_run_names_the_signal(keys, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "call", lambda words: -9)
    assert not menu.run("doctor") and "SIGKILL" in capsys.readouterr().err


# On a terminal ----------------------------------------------------------------------------------------------------


def test_on_a_terminal(tmp_path):
    """Opening, refusals as typed, Esc, Ctrl+C and its draft, a run, and the end."""
    make_run(tmp_path / "runs" / "base", stage="pretrain")
    with Screen(tmp_path, "-c", MENU) as screen:
        screen.wait("What next?", "1) Configure new model", "4) RLHF training (PPO/DPO/GRPO)", "x) Leave")
        screen.type("3", "enter")
        screen.answer("Start from", "enter")
        screen.answer("? policy_checkpoint", "enter")
        screen.wait("policy_checkpoint runs/base (pretrain, interrupted)")
        screen.answer("? datasets", "demo/chat", "enter")
        screen.wait("batch_size (4)", "plan: about 1 GB")
        screen.type("0")
        screen.wait("batch_size = 0: expected greater than 0")
        screen.type("enter", "backspace", "2", "enter")  # Enter did nothing
        screen.wait("batch_size (4) 2", "gradient_accumulation_steps (16)")
        screen.type("escape")
        screen.wait("? batch_size", times=2)  # asked again
        screen.type("8", "enter")
        screen.wait("? gradient_accumulation_steps", times=2)
        screen.type("ctrl-c")
        screen.wait("the answers so far are kept", "x) Leave")
        assert json.loads((tmp_path / ".llmlab_draft_sft.json").read_text())["answers"][-1] == ["batch_size", 8]
        screen.type("3", "enter")
        screen.answer("Draft: go on where you stopped", "enter")
        screen.wait("go on where you stopped Enter keeps", "? gradient_accumulation_steps (16) plan")
        screen.type("ctrl-d")
        screen.wait("policy_checkpoint: runs/base", "batch_size: 8", "$ llmlab sft --config sft_config.json", "Run it")
        screen.type("enter")
        screen.answer("it runs", "ctrl-c")
        screen.wait("it ended with exit code 130", "? Next (Use arrow keys)")  # to change something
        assert json.loads((tmp_path / "ran.jsonl").read_text()) == ["sft", "--config", "sft_config.json"]
        screen.type("escape")
        screen.wait("x) Leave")
        assert not (tmp_path / ".llmlab_draft_sft.json").exists()
        assert max(map(len, screen.lines)) <= 80
        screen.type("ctrl-c")
        assert screen.end() == 0 and screen.text.endswith("then Enter) left the menu")


@pytest.mark.parametrize("words", [[], ["menu"]])
def test_without_a_terminal_it_lists_the_commands(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    output = capsys.readouterr().out
    assert not end.value.code and "pretrain" in output and "What next?" not in output


def test_the_menu_imports_no_torch():
    code = "import sys, llmlab.cli.menu; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Plans ------------------------------------------------------------------------------------------------------------


def test_plans_come_from_a_process_of_their_own():
    from llmlab.model import build_config, measure

    shape = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "n_layers": 1, "vocab_size": 100}
    values = {"model": {**shape, "max_seq_len": 16}, "max_steps": 3}
    count = measure(build_config(ModelSettings(**shape))).total
    planner = Planner()

    def wait(result):
        finish = time.monotonic() + 240
        while (found := result()) is None and time.monotonic() < finish:
            time.sleep(0.05)
        return found

    line = wait(lambda: planner.line("pretrain", values))
    assert line.startswith(f"{count / 1e3:.1f} k parameters, ") and ", fits, about " in line
    problems = wait(lambda: planner.line("sft", {"lr": 0, "batch_size": 0}))  # of which the first is said
    assert problems == "not known: menu: learning_rate = 0: expected greater than 0"
    assert "nowhere: there is no such" in wait(lambda: planner.line("sft", {"policy_checkpoint": "./nowhere"}))
    questions.active_children()[0].kill()  # as for lack of memory
    assert "not known: " in wait(lambda: planner.line("pretrain", {}))
    assert planner.line("pretrain", {"lr": 1}) is None and planner.pool is None  # the next one is planned anew
    assert planner.line("pretrain", {"lr": 1}) is None and planner.pool is not None
    planner.close()  # meanwhile
    assert wait(lambda: not questions.active_children() or None) and planner.pool is None


def test_no_planner_outlives_the_menu():
    code = """
import os, time
from llmlab.cli import questions
while questions.PLANNER.line("none", {}) is None:
    time.sleep(0.05)
print(questions.active_children()[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""
    script = f"if __name__ == '__main__':\n    exec({code!r})"
    child = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=240).stdout
    finish = time.monotonic() + 30
    while psutil.pid_exists(int(child)) and time.monotonic() < finish:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(child))
