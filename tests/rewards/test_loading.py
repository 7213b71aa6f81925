"""Names, parameters and a user's own functions."""

import inspect
import pickle
import subprocess
import sys

import pytest

from llmlab.rewards import REWARDS
from llmlab.rewards.compose import compose
from llmlab.rewards.loading import load_rewards
from llmlab.settings.errors import SettingsError, UserError

NEEDED = {"reward_model": {"model": "x"}}


def test_every_reward_loads_by_name_and_from_the_package():
    import llmlab.rewards

    for name in REWARDS.keys() - NEEDED:
        (reward,) = load_rewards([name])
        assert reward.__name__ == name and reward.weight == REWARDS[name].weight
        assert (reward.low, reward.high) != (None, None)
        assert getattr(llmlab.rewards, name) is REWARDS[name] is reward.function.func
        assert pickle.loads(pickle.dumps(reward)).name == name  # TRL's asynchronous rollouts send them to a child
    assert llmlab.rewards.RewardModel is REWARDS["reward_model"]


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_and_parameter_is_documented(name):
    text = inspect.getdoc(REWARDS[name])
    assert "Source:" in text or name in ("exact_match", "regex_match", "length")
    parameters = inspect.signature(REWARDS[name]).parameters.values()
    for parameter in (each.name for each in parameters if each.kind is each.KEYWORD_ONLY):
        assert f"\n    {parameter}: " in text, parameter


def test_rewards_do_not_import_torch():
    names = sorted(REWARDS.keys() - NEEDED)
    code = (
        "import sys; from llmlab.rewards.compose import compose;"
        f"compose({names!r})(['x'], answer=[1], schema=[True], regex=['x'], allowed_tools=[[]]);"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("lenght", "'lenght': there is no such reward; did you mean 'length'"),
        ("my_rewards.py", "path/to/file.py:name"),
        ({"name": "length", "targt": 3}, "'length': unknown parameter 'targt'; did you mean 'target'"),
        ({"name": "json_valid", "strict": True}, "it has no parameters"),
        ({"name": "length", "target": "far"}, "target = far: expected a valid integer"),
        ({"name": "length", "target": 0}, "target = 0: expected greater than or equal to 1"),
        ({"name": "length", "unit": "lines"}, "unit = lines: expected 'words', 'characters' or 'tokens'"),
        ({"name": "length", "completion_ids": []}, "unknown parameter 'completion_ids'"),
        ({"name": "regex_match", "column": "pattern"}, "also the name of a parameter"),
        ("reward_model", "parameter 'model' is missing"),
        ("verbosity_penalty | 0.1", "a penalty has a negative weight, such as -0.1"),
        ("length | much", "expected a valid number"),
        ({"name": "length", "min": 1, "max": 0}, "min = 1 must be below max = 0"),
    ],
)
def test_errors(reward, words):
    with pytest.raises(SettingsError, match=words):
        load_rewards([reward])


def test_all_problems_at_once():
    with pytest.raises(SettingsError) as caught:
        load_rewards(["one", {"name": "length", "a": 1, "b": 2}, "json_valid", "two"])
    assert len(caught.value.problems) == 4


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from llmlab.rewards import length\n"
        "def bonus(completions, answer, amount=1.0, **columns):\n"
        "    return [amount * (text == right) for text, right in zip(completions, answer)]\n"
        "class Counter:\n"
        "    bounds = (0.0, 9.0)\n"
        "    def __init__(self, *, start=0): self.count = start\n"
        "    def __call__(self, completions, **columns):\n"
        "        self.count += 1\n"
        "        return [self.count] * len(completions)\n"
    )
    return path


def test_a_function_of_ones_own(own, tmp_path):
    with pytest.raises(SettingsError, match="--allow-code"):
        load_rewards([f"{own}:bonus"])
    (reward,) = load_rewards([{"name": "mine.py:bonus", "amount": 2, "max": 1.5, "min": 0}], True, tmp_path)
    assert reward.name == "bonus"
    assert reward(["a", "b"], answer=["a", "c"], amount=["a column"] * 2) == [1.5, 0]
    composed = compose([{"name": f"{own}:Counter", "start": 2, "weight": 2}], allow_code=True)
    assert composed.bounds == (0, 18)
    assert composed(["x"]) == [pytest.approx(3 / 9)]


@pytest.mark.parametrize("name", ["bound", "instance", "annotated"])
def test_callables_of_any_kind_serve_as_rewards(name, tmp_path):
    """Their annotations are not looked at: they may name what is imported for type checkers alone."""
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from functools import partial\n"
        "def plain(completions, *, amount=1, **columns):\n    return [amount for _ in completions]\n"
        "bound = partial(plain, amount=2)\n"
        "class Kind:\n    def __call__(self, completions, **columns):\n        return [2 for _ in completions]\n"
        "instance = Kind()\n"
        "def annotated(completions: Nowhere, **columns) -> Nowhere:\n    return [2 for _ in completions]\n"
    )
    (reward,) = load_rewards([f"mine.py:{name}"], True, tmp_path)
    assert reward(["a", "b"]) == [2, 2]


def test_a_function_of_ones_own_for_one_completion(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llmlab.rewards.function import reward_function\n"
        "@reward_function(weight=3.0, high='most')\n"
        "def shouts(completion, row, *, most=2):\n"
        "    return None if row['answer'] is None else min(completion.count('!'), most)\n"
    )
    (reward,) = load_rewards(["mine.py:shouts"], True, tmp_path)
    assert (reward.weight, reward.low, reward.high) == (3, 0, 2)
    (reward,) = load_rewards([{"name": "mine.py:shouts", "most": 5}], True, tmp_path)
    assert reward.high == 5
    assert reward(["a!", "!!!!!!", "!"], answer=["x", "y", None], most=[0] * 3) == [1, 5, None]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.py:bonsu", "there is no function 'bonsu' in it; did you mean 'bonus'"),
        ("mien.py:bonus", "there is no such file; did you mean 'mine.py'"),
        ("broken.py:f", "cannot be loaded: ZeroDivisionError"),
        ("syntax.py:f", "cannot be loaded: SyntaxError"),
    ],
)
def test_errors_of_ones_own(own, name, words):
    (own.parent / "broken.py").write_text("1 / 0")
    (own.parent / "syntax.py").write_text("def f(")
    with pytest.raises(SettingsError, match=words):
        load_rewards([name], True, own.parent)


def test_code_of_a_recipe_does_not_run_unasked(tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(completions): return [1]")
    with pytest.raises(UserError):
        compose([f"{tmp_path}/mine.py:f"])
    assert not (tmp_path / "ran").exists()
    compose([f"{tmp_path}/mine.py:f"], allow_code=True, normalize=False)
    assert (tmp_path / "ran").exists()
