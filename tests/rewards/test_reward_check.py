"""`llmlab reward-check` in a terminal's words."""

import json
import re

import pytest
import yaml

from llmlab.cli.app import main

ROWS = [
    {"prompt": "p", "completion": "[1]", "answer": "1"},
    {"prompt": "p", "completion": "one", "answer": "1"},
    {"prompt": "q", "completion": "2", "answer": "2"},
    {"prompt": "q", "completion": "#### 3 [bold]x[/bold] \x1b[31m", "answer": "3"},
    {"prompt": "r", "completion": "", "answer": None},
]


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["reward-check", *(str(word) for word in words)])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_json(cli, file):
    code, output, errors = cli(file, "--rewards", "json_valid, numeric_match | 3", "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert [row["reward"] for row in report["scores"]] == [1, 0, 1, 0.75, 0]
    assert [row["components"]["numeric_match"] for row in report["scores"]] == [1, 0, 1, 1, None]
    assert (report["rows"], report["bounds"]) == (5, [0, 4])
    numeric = report["components"]["numeric_match"]
    assert (numeric["weight"], numeric["count"], numeric["mean"], numeric["min"]) == (3, 4, 0.75, 0)


MANY = (
    "json_valid,tool_success,lint_pass,ast_correct,guardrail_pass,verbosity_penalty,repetition_penalty,"
    "numeric_match,length"
)


@pytest.mark.parametrize("rewards", ["json_valid,length", MANY])
def test_tables_fit_the_terminal(cli, file, rewards):
    code, output, errors = cli(file, "--rewards", rewards)
    assert code == 0, errors
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    for name in rewards.split(","):
        assert name in output
    assert "[bold]x[/bold]" in output or "#### 3" in output  # a completion is text, not markup
    assert "\x1b[31m" not in output  # nor a command to the terminal
    assert "(empty)" in output
    assert [line.split() for line in lines if line.startswith("json_valid")] == [
        ["json_valid", "1", "0.400", "0.000", "1.000", "-"]
    ]


def test_fewer_rows(cli, file):
    _, output, _ = cli(file, "--rewards", "json_valid", "--rows", 2)
    assert "... 3 more rows" in output and "(empty)" not in output
    _, output, _ = cli(file, "--rewards", "json_valid", "--rows", 0)
    assert "completion" not in output


def test_settings_files_and_recipes(cli, file, tmp_path):
    (tmp_path / "mine.py").write_text("def two(completions, **columns):\n    return [2] * len(completions)\n")
    path = tmp_path / "rewards.yaml"
    mine = {"name": "mine.py:two", "min": 0, "max": 4}
    path.write_text(yaml.safe_dump({"rewards": ["json_valid | 2", mine], "normalize_rewards": True}))
    code, _, errors = cli(file, "--config", path)
    assert code == 2 and "--allow-code" in errors
    code, output, errors = cli(file, "--config", path, "--allow-code", "--json")
    assert code == 0, errors
    assert json.loads(output)["scores"][0]["reward"] == pytest.approx((2 + 2) / 6)
    _, output, _ = cli(file, "--config", path, "--allow-code", "--json", "--no-normalize")
    assert json.loads(output)["scores"][0]["reward"] == 4
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "grpo", "learning_rate": 1e-6, "rewards": ["length"]}))
    code, output, _ = cli(file, "--config", recipe, "--json")
    assert code == 0 and list(json.loads(output)["components"]) == ["length"]
    _, output, _ = cli(file, "--config", recipe, "--rewards", "[{name: length, target: 1}]", "--json")
    assert json.loads(output)["scores"][0]["reward"] == 1


def test_messages_and_other_formats(cli, tmp_path):
    path = tmp_path / "rows.json"
    prompt = [{"role": "user", "content": "p"}]
    rows = [
        {"prompt": prompt, "completion": "1"},
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "x"}]},
    ]
    path.write_text(json.dumps(rows))
    _, output, _ = cli(path, "--rewards", "json_valid", "--json")
    assert [row["reward"] for row in json.loads(output)["scores"]] == [1, 0]
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\np,"{""a"": 1}"\np,x\n')
    _, output, _ = cli(path, "--rewards", "json_valid", "--json")
    assert [row["reward"] for row in json.loads(output)["scores"]] == [1, 0]


def test_list(cli):
    from llmlab.rewards import REWARDS

    code, output, _ = cli("--list")
    assert code == 0 and all(name in output for name in REWARDS)
    assert "target=200" in output and max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (ROWS, [], "--rewards or --config is missing"),
        (ROWS, ["-r", "jsn_valid"], "did you mean 'json_valid'"),
        (ROWS, ["-r", "exact_match,schema_pass"], "'schema_pass': without json_schema, column = schema: there is no"),
        (ROWS, ["-r", "[{name: length, unit: tokens}]"], "no token ids here"),
        (ROWS, ["-r", "[{name: length, trget: 1}]"], "unknown parameter 'trget'"),
        (ROWS, ["-r", ","], "rewards"),
        (ROWS, ["-c", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        ([{"completions": "x"}], ["-r", "length"], "row 0 has no 'completion' (found completions)"),
        ([{"completion": 3}], ["-r", "length"], "completion: expected text or a list of messages, found int"),
        ([{"completion": "x", "prompt": 3}], ["-r", "length"], "prompt: expected text"),
        ([], ["-r", "length"], "there is no row in it"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_exit_code_2(cli, tmp_path, rows, words, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output, errors = cli(path, *words)
    assert code == 2 and output == ""
    assert message in errors and all(line.startswith("error: ") for line in errors.splitlines())


def test_a_recipe_without_rewards(cli, file, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("stage: sft\nepochs: 3\n")
    code, _, errors = cli(file, "--config", path)
    assert code == 2 and "there are no `rewards` in it" in errors


def test_no_file(cli, tmp_path):
    code, _, errors = cli("--rewards", "length")
    assert code == 2 and "FILE is missing" in errors
    code, _, errors = cli(tmp_path / "nowhere.jsonl", "--rewards", "length")
    assert code == 2 and "there is no such file" in errors


def test_a_failing_reward_of_ones_own(cli, file, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(completions, answer, **columns):\n    return [int(text) for text in answer]\n")
    code, output, errors = cli(file, "-r", f"{path}:f", "--allow-code", "--no-normalize")
    assert code == 2 and "reward 'f' failed at row 4 of 5 (''): TypeError" in errors and output == ""


ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = [{"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": {}}]}]
FAILED = {"role": "user", "content": [{"type": "tool_result", "content": "boom", "is_error": True}]}


def test_content_parts_and_tools_as_json_text(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "[1, "}, {"type": "text", "text": "2]"}]}]
    completions = [CALLED, [*CALLED, FAILED], answer, "[add(a=1)]", "[add(a=1", "[rm()]"]
    rows = [{"completion": each, "tools": json.dumps([ADD]), "allowed_tools": '["add"]'} for each in completions]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, output, errors = cli(path, "-r", "tool_success,off_policy_penalty,json_valid", "--json")
    assert code == 0, errors
    scores = [row["components"] for row in json.loads(output)["scores"]]
    assert [row["tool_success"] for row in scores] == [1, 0, 0, 1, 0, 0]
    assert [row["off_policy_penalty"] for row in scores] == [0, 0, 0, 0, 1, 1]
    assert [row["json_valid"] for row in scores] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"completion": [{"role": "assistant", "content": [{"type": "audio"}]}]},
            "completion: .*content part 'audio'",
        ),
        ({"completion": [{"type": "text", "text": "hi"}]}, "completion: .*unknown role 'None'"),
        ({"completion": [{"role": "assistant", "content": None}]}, "completion: .*expected text, found NoneType"),
        ({"completion": "x", "prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "prompt: .*part 'video'"),
    ],
)
def test_what_is_not_understood_is_never_an_empty_answer(cli, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"completion": "x"}) + "\n" + json.dumps(row))
    code, output, errors = cli(path, "-r", "length")
    assert (code, output) == (2, "")
    assert re.search(f"rows.jsonl: row 1: {message}", " ".join(errors.split()))


@pytest.mark.parametrize("tools", ["add", "5", '[{"function": {}}]', "[5]"])
def test_tools_that_are_none(cli, tmp_path, tools):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"completion": "x", "tools": tools}))
    code, _, errors = cli(path, "-r", "tool_success")
    assert code == 2 and "reward 'tool_success': row 0: tools: " in errors
