"""Environments by name: what loads, what is refused without permission, and what is no environment."""

from importlib.util import find_spec

import pytest

from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.rewards import RewardConfig
from llmlab.simulator.environment import load_environment

OWN = '''
class Door:
    """Shaped like an environment, without being llmlab's."""

    def reset(self, **row):
        return "closed"

    def open(self, wide: bool) -> str:
        """Opens the door.

        Args:
            wide: all the way.
        """
        return "open"

class Untyped(Door):
    def open(self, wide):
        """Opens the door."""

class Empty:
    def reset(self, **row): ...

class Endless:
    def open(self) -> str:
        """Opens."""

class Needy(Door):
    def __init__(self, key): ...
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_class_of_ones_own_makes_a_new_environment_each_time(file):
    make = load_environment(f"{file}:Door", allow_code=True)
    first, second = make(), make()
    assert first is not second and first.reset(any="row") == "closed" and first.open(wide=True) == "open"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Dor", "there is no class 'Dor' in it; did you mean 'Door'?"),
        ("Untyped", "the tool open: cannot be read as a method with typed arguments and a Google-style docstring: "),
        ("Empty", "expected a tool: a public method with typed arguments and a Google-style docstring"),
        ("Endless", "expected a method reset(self, **row), which begins an episode"),
        ("Needy", "cannot be read as a class that is made without arguments: "),
    ],
)
def test_what_is_no_environment_is_one_sentence(file, name, words):
    with pytest.raises(UserError) as error:
        load_environment(f"{file}:{name}", allow_code=True)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("simulatr", "environment 'simulatr': there is no such environment; did you mean 'simulator'? (expected simu"),
        ("gymnasum:Taxi-v4", "did you mean 'gymnasium'?"),
        ("gymnasium:", "(expected simulator, gymnasium:ID, openenv:URL, path/to/file.py:Class)"),
        ("own.py:Door", "own.py: there is no such file"),
    ],
)
def test_unknown_names(spec, words):
    with pytest.raises(UserError) as error:
        load_environment(spec)
    assert words in str(error.value)


@pytest.mark.parametrize("spec", ["{file}:Door", "gymnasium:antigravity:Fly-v0", "openenv:antigravity:Fly"])
def test_code_runs_only_where_it_is_allowed(file, spec, monkeypatch):
    file.write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="this is Python code, which runs when loaded; --allow-code"):
        load_environment(spec.format(file=file))


@pytest.mark.parametrize("address", ["https://example.org", "example.org:8000", "ws://10.0.0.1:80/x"])
def test_servers_on_other_machines_are_asked_only_where_it_is_allowed(address):
    with pytest.raises(UserError, match="actions would leave this machine; --allow-code"):
        load_environment(f"openenv:{address}")


@pytest.mark.skipif(find_spec("gymnasium") is None, reason="gymnasium is not installed")
def test_gymnasiums_by_id():
    assert load_environment("gymnasium:FrozenLake-v1")().reset(seed=1).endswith("\n0")


def test_the_simulator_gets_its_rewards():
    from llmlab.simulator import world

    make = load_environment("simulator", reward_config=RewardConfig(task_failed=-7.0))
    assert isinstance(make(), world.Simulator) and make().reward_config.task_failed == -7.0


def test_a_later_stages_environment_is_checked_before(tmp_path):
    from llmlab.rewards.loading import check_rewards
    from llmlab.settings.rl import GRPOSettings

    for spec, message in (
        ("simulater", "there is no such environment; did you mean 'simulator'"),
        (f"{tmp_path}/x.py:World", "there is no such file"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_rewards(GRPOSettings(environment=spec, allow_code=True))
    assert check_rewards(GRPOSettings(environment="gymnasium:Taxi-v3")).settings.environment == "gymnasium:Taxi-v3"
