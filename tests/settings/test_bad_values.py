"""Values that no setting can have: one sentence with key, value and file, before anything is imported or written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.cli.app import main
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer, load_yaml, parse_scalar, read_layer
from llmlab.settings.model import nearest_divisor
from llmlab.settings.paths import check_inputs, check_model, check_output, is_local
from llmlab.settings.preference import DPOSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings

# nine aliases of nine aliases of ...: 9**9 values in a few lines
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def run(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", BOMB, "holds more than 100,000 values, aliases counted"),
        ("a.yaml", "trainer_args: &a {again: *a}", "nested more than 50 levels deep"),
        ("a.yaml", "[" * 5000, "nested too deeply"),
        ("a.yaml", "lr: " + "9" * 5000, "Exceeds the limit"),
        ("a.yaml", "max_steps: " + "9" * 25, "max_steps = " + "9" * 25 + ": expected a number of at most"),
        ("a.yaml", "max_steps: 0x" + "f" * 5000, "a number of more than 100 digits"),
        ("a.yaml", "lr: 2024-02-30", "learning_rate = 2024-02-30: expected a valid number"),
        ("a.yaml", 'output_dir: "a\\0b"', "expected text without NUL characters"),
        ("a.yaml", 'output_dir: "\\ud800"', "expected valid Unicode"),
        ("a.yaml", "output_dir: ''", "expected a path, found nothing"),
        ("a.yaml", "output_dir: " + "x" * 300, "too long for a path"),
        ("a.yaml", "seed: 4294967296", "less than or equal to 4294967295"),
        ("a.yaml", "trainer_args: {max_grad_norm: " + "9" * 25 + "}", "expected a number of at most"),
        ("a.yaml", b"lr: caf\xe9", "it is not text"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"trainer_args": ' + '{"a": ' * 60 + "1" + "}" * 61, "nested more than 50 levels"),
        ("a.json", '{"max_steps": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("a.py", "x = {'max_steps': " + "9" * 5000 + "}", "Exceeds the limit"),
        ("a.py", "x = {[1]: 1}", "only literal values"),
        ("a.py", "x = {\x00}", "null bytes"),
        ("a.py", "x = " + "[" * 5000, "not valid Python"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used(capsys, tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    code, errors = run(capsys, "sft", "--config", path, "--show-config")
    assert code == 2 and words in errors and str(path) in errors
    assert len(errors.splitlines()) == 1 and len(errors) < 500 and "Traceback" not in errors


def test_dates_stay_text(tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: 2024-02-30\nchat_template: 2001-12-14t21:59:43.10-05:00\n")
    resolved = resolve(SFTSettings, read_layer(tmp_path / "a.yaml")).settings
    assert (resolved.output_dir, resolved.chat_template) == ("2024-02-30", "2001-12-14t21:59:43.10-05:00")
    assert parse_scalar("2024-02-28") == "2024-02-28"


def test_aliases_that_stay_small_are_welcome():
    assert load_yaml("a: &a {lr: 1}\nb: {<<: *a, x: [*a, *a]}") == {
        "a": {"lr": 1},
        "b": {"lr": 1, "x": [{"lr": 1}, {"lr": 1}]},
    }


@pytest.mark.parametrize(
    "words",
    [
        ["sft", "learning_rate=1", "learning_rate=2", "--show-config"],
        ["model", "info", "n_layers=2", "n_layers=3"],
    ],
)
def test_a_key_given_twice_is_an_error(capsys, words):
    code, errors = run(capsys, *words)
    assert code == 2 and "is given twice" in errors and "; keep one" in errors


@pytest.mark.parametrize("word", ["runs/caf\udce9", "a\0b"])
def test_arguments_are_text(capsys, word):
    code, errors = run(capsys, "runs", "show", word)
    assert code == 2 and "argument 3" in errors and "not UTF-8 text" in errors


def test_a_path_that_no_file_system_takes_is_a_sentence(capsys):
    code, errors = run(capsys, "runs", "show", "x" * 300)
    assert code == 2 and "there is no such run folder" in errors
    code, errors = run(capsys, "sft", "--save-config", "x" * 300 + ".yaml")
    assert code == 2 and "too long" in errors


def test_what_can_only_be_a_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert all(map(is_local, ("runs/scorer", "./x", "../x", "/x", "~/x", "a.jsonl", "a.csv.gz", "a/b/c", "a b", "")))
    assert not any(map(is_local, ("gpt2", "Qwen/Qwen2.5-0.5B", "owner/name", "sft_checkpoints")))
    with pytest.raises(UserError, match=r"^runs/scorer: there is no such folder$"):
        check_model("runs/scorer")
    (tmp_path / "runs" / "score").mkdir()
    with pytest.raises(UserError, match=r"^runs/scorer: there is no such folder; did you mean 'score'\?$"):
        check_model("runs/scorer")
    with pytest.raises(UserError, match="this folder holds no model"):
        check_model("runs/score")
    check_model("owner/name")  # perhaps on the hub


def test_everything_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    resolved = resolve(
        DPOSettings,
        Layer("here", {"policy_checkpoint": "runs/sft", "reference_checkpoint": "./x", "datasets": ["a.jsonl"]}),
    )
    with pytest.raises(SettingsError) as caught:
        check_inputs(resolved.settings, resolved.sources)
    assert sorted(line.split(" = ")[0] for line in caught.value.problems) == [
        "here: datasets",
        "here: policy_checkpoint",
        "here: reference_checkpoint",
    ]
    with pytest.raises(SettingsError) as caught:  # an earlier stage will have made it
        check_inputs(resolved.settings, resolved.sources, made=[tmp_path / "runs" / "sft", "runs/sft"])
    assert len(caught.value.problems) == 2


def test_a_taken_output_folder(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("")
    check_output(str(tmp_path / "new" / "run"))
    with pytest.raises(UserError, match="already holds other files"):
        check_output(str(tmp_path / "taken"))
    with pytest.raises(UserError, match="notes.txt is no folder"):
        check_output(str(tmp_path / "taken" / "notes.txt" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@given(st.integers(1, 500), st.integers(1, 600))
def test_the_nearest_divisor_is_the_nearest(number, wanted):
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    assert nearest_divisor(number, wanted) == min(divisors, key=lambda d: (abs(d - wanted), -d))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SFTSettings.model_fields)), JSON)
def test_any_value_is_a_setting_or_a_sentence(key, value):
    try:
        resolved = resolve(SFTSettings, Layer("here", {key: value}))
    except SettingsError as error:
        assert all(problem.startswith("here: ") and len(problem) < 500 for problem in error.problems)
    else:
        json.dumps(resolved.settings.model_dump(mode="json"))


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=20))
def test_any_text_is_a_value_or_a_sentence(text):
    try:
        parse_scalar(text, "key")
    except UserError as error:
        assert str(error).startswith("command line: key = ")


def test_a_lock_that_a_killed_run_left_does_not_take_the_folder(tmp_path):
    (tmp_path / ".llmlab.lock").write_text("1234 on host")
    check_output(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="already holds other files; choose another folder"):
        check_output(str(tmp_path))
