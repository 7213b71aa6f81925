"""`llmlab episodes run`: the two ends of the scale, a model in an environment of one's own, replays, bad input."""

import json

import pytest

from llmlab.cli.app import main
from llmlab.data.chat.rendering import add_chat_template
from llmlab.data.tokenizer import load_tokenizer

BUTTON = '''
class Button:
    """Solved by pressing three times; each press is worth a point."""

    done = success = False
    rewards = {}

    def reset(self, **row):
        self.presses, self.done = 0, False
        return row["hint"]

    def press(self, times: int) -> str:
        """Presses the button.

        Args:
            times: how often.
        """
        self.presses += times
        self.done = self.success = self.presses >= 3
        self.rewards = {"presses": float(self.presses), "cost": -0.5}
        return f"[bold]pressed[/] {self.presses} times"

    def get_reward(self):
        return self.presses - 0.5
'''


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["episodes", "run", *(str(word) for word in words)])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def button(tmp_path):
    (tmp_path / "button.py").write_text(BUTTON)
    rows = [{"prompt": "Press. ", "hint": f"Hint {number}"} for number in range(4)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--tasks", tmp_path / "tasks.jsonl", "--environment", f"{tmp_path / 'button.py'}:Button", "--allow-code"]


@pytest.fixture
def model(base_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(base_folder)
    add_chat_template(tokenizer, "chatml")
    tokenizer.save_pretrained(tmp_path / "tiny")
    AutoModelForCausalLM.from_pretrained(base_folder, max_position_embeddings=2048).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_expert_solves_all_and_chance_next_to_nothing(cli):
    code, out, _ = cli("expert", "--tasks", "demo/tasks", "-n", 30, "--json")
    found = json.loads(out)
    expert, chance = found["figures"]["expert"], found["figures"]["random"]
    assert code == 0 and len(found["replays"]) == 30
    assert expert["success"] == 1.0 and chance["success"] <= 0.1
    assert expert["reward"] > 10 > 0 > chance["reward"]
    for each in (expert, chance):
        parts = [value for name, value in each.items() if name.startswith("reward, ")]
        assert sum(parts) == pytest.approx(each["reward"])
    assert cli("expert", "--tasks", "demo/tasks", "-n", 30, "--json")[1] == out


def test_replays_show_calls_results_and_the_reward(cli):
    code, out, _ = cli("expert", "--tasks", "demo/tasks", "-n", 2, "--show", 1)
    assert code == 0 and "episode 1  success, reward 1" in out and "episode 2" not in out
    for word in ("prompt ", "model ", "result ", "100.0 %"):
        assert word in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_model_plays_in_an_environment_of_ones_own(cli, model, button, monkeypatch):
    """The first and third episode press twice and thrice, the others answer at once."""
    tokenizer = load_tokenizer(model)

    def write(text):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def generate(_, __, rows, ___, **options):
        texts = map(tokenizer.decode, rows)
        press = '<tool_call>\n{"name": "press", "arguments": {"times": %d}}\n</tool_call>'
        return [
            write(press % (2 + ("Hint 2" in text)) if "Hint 0" in text or "Hint 2" in text else "No.")
            for text in texts
        ]

    monkeypatch.setattr("llmlab.inference.generate_tokens", generate)
    code, out, _ = cli(model, *button, "-n", 4, "--json")
    found = json.loads(out)
    figures = found["figures"][str(model)]
    assert code == 0 and figures["success"] == 0.5
    assert figures["calls"] == (2 + 0 + 1 + 0) / 4
    assert figures["reward"] == (3.5 - 0.5 + 2.5 - 0.5) / 4
    assert figures["reward, presses"] == (4 + 3) / 4
    first = found["replays"][0]
    assert (first["reward"], first["end"]) == (3.5, "done")
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "tool", "assistant", "tool"]
    assert first["messages"][0]["content"] == "Press. Hint 0"
    out = cli(model, *button, "-n", 1)[1]
    assert "[bold]pressed[/] 4 times" in out and 'press {"times": 2}' in out


def test_tasks_that_name_no_expected_calls(cli, tmp_path):
    task = {"goal": "Make a.txt.", "success": {"file_equals": {"a.txt": "x"}}}
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Do: ", "task": json.dumps(task)}))
    code, out, err = cli("expert", "--tasks", tmp_path / "own.jsonl", "--json")
    assert code == 0 and json.loads(out)["figures"]["expert"]["calls"] == 0
    assert "expert: 1 of 1 tasks name no expected calls" in err


def test_an_untrained_model_ends_without_success(cli, model, button):
    code, out, _ = cli(model, *button, "-n", 2, "--max-new-tokens", 8, "--temperature", 0, "--json")
    assert code == 0 and next(iter(json.loads(out)["figures"].values()))["success"] == 0.0


def test_columns_of_other_types(cli, tmp_path):
    row = {"prompt": "Do it. ", "task": "tool_use/1/train/3", "category": ["a", "b"]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row))
    code, out, _ = cli("expert", "--tasks", tmp_path / "tasks.jsonl", "--json")
    assert code == 0 and json.loads(out)["figures"]["expert"]["success"] == 1.0
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**row, "difficulty": "2"}))
    code, _, err = cli("expert", "--tasks", tmp_path / "tasks.jsonl")
    assert code == 2 and "'2': expected one of 1, 2, 3, 4" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["expert", "--tasks", "demo/taks"], "did you mean 'tasks'"),
        (
            ["expert", "--tasks", "demo/tasks", "--environment", "gymnasium:X-v1"],
            "expert: only the simulator has scripted",
        ),
        (["x", "--tasks", "demo/tasks", "--environment", "simulater"], "did you mean 'simulator'"),
        (["no/such/run", "--tasks", "demo/tasks", "-n", "1"], "no/such/run"),
        (["expert", "--tasks", "demo/chat"], "--tasks demo/chat: a row has no column task"),
        (["x", "--tasks", "demo/tasks", "--temperature", "-1"], "temperature"),
        (["expert", "--tasks", "demo/tasks", "--temperature", "0.7"], "have no effect on a scripted policy"),
        (["random", "--tasks", "demo/tasks", "--max-new-tokens", "8"], "have no effect on a scripted policy"),
    ],
)
def test_bad_input_is_one_sentence(cli, words, expected):
    code, _, err = cli(*words)
    assert code == 2 and expected in err and len(err.splitlines()) == 1
