"""Contracts with the real gymnasium and OpenEnv: what their environments say, reward and end is what episodes get."""

import socket
import sys
import threading
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.utils import get_json_schema

from llmlab.settings.errors import UserError
from llmlab.simulator.environment import from_gymnasium, from_openenv, tools_of

needs_gymnasium = pytest.mark.skipif(find_spec("gymnasium") is None, reason="gymnasium is not installed")
needs_openenv = pytest.mark.skipif(find_spec("openenv") is None, reason="openenv-core is not installed")


def action_schema(kind):
    (tool,) = tools_of(kind()).values()
    function = get_json_schema(tool)["function"]
    assert function["name"] == "act"
    return function["parameters"]


@needs_gymnasium
def test_frozen_lake_is_played_to_its_goal_and_into_a_hole():
    kind = from_gymnasium("FrozenLake-v1", is_slippery=False)
    action = action_schema(kind)["properties"]["action"]
    names = "0: Move left; 1: Move down; 2: Move right; 3: Move up"
    assert action == {"type": "integer", "description": names}
    lake = kind()
    assert lake.reset(seed=1, prompt="not for gymnasium") == "\n[S]FFF\nFHFH\nFFFH\nHFFG\n0"
    for step in (1, 1, 2, 1, 2):
        text = lake.act(action=step)
        assert not lake.done and lake.success is None
    assert text.startswith("  (Right)\n") and text.endswith("14")
    assert lake.act(action=2).endswith("HFF[G]\n15")
    assert (lake.done, lake.success, lake.get_reward()) == (True, True, 1.0)
    with pytest.raises(ValueError, match="the episode is over"):
        lake.act(action=2)
    lake.reset()
    assert (lake.done, lake.success, lake.get_reward()) == (False, None, 0.0)
    lake.act(action=1)
    lake.act(action=2)  # a hole
    assert (lake.done, lake.success, lake.get_reward()) == (True, False, 0.0)


@needs_gymnasium
def test_seeds_sums_of_rewards_and_the_time_limit_are_gymnasiums():
    import gymnasium

    taxi, own = from_gymnasium("Taxi-v4", max_episode_steps=3)(), gymnasium.make("Taxi-v4", max_episode_steps=3)
    state, _ = own.reset(seed=7)
    assert taxi.reset(seed=7).endswith(f"\n{state}")
    rewards = []
    for action in (4, 5, 0):
        state, reward, *_ = own.step(action)
        assert taxi.act(action=action).endswith(f"\n{state}")
        rewards.append(reward)
    assert taxi.get_reward() == sum(rewards) < 0
    assert (taxi.done, taxi.success) == (True, False)  # truncated


@needs_gymnasium
def test_observations_of_any_space_are_text_and_bad_actions_are_errors():
    import gymnasium
    import numpy as np

    class Words(gymnasium.Env):
        action_space = gymnasium.spaces.Text(4, charset="abc")
        observation_space = gymnasium.spaces.Dict()

        def reset(self, *, seed=None, options=None):
            return {"grid": np.eye(2, dtype=int), "left": np.float64(0.5)}, {}

        def step(self, action):
            return "x" * 100_000, -1.0, False, action == "abc", {"is_success": action == "abc"}

    kind = from_gymnasium(Words)
    assert action_schema(kind)["properties"]["action"]["description"] == "a text of 1 to 4 characters"
    words = kind()
    assert words.reset(seed=0) == '{"grid": [[1, 0], [0, 1]], "left": 0.5}'
    for wrong in ("d", "aaaaa", 3, None, {"a": 1}):
        with pytest.raises(ValueError, match="expected one of Text"):
            words.act(action=wrong)
    assert len(words.act(action="a")) < 10_000
    words.act(action="abc")
    assert (words.done, words.success, words.get_reward()) == (True, True, -2.0)


@needs_gymnasium
def test_an_environment_is_made_anew_for_each_episode():
    import gymnasium

    made = gymnasium.make("Blackjack-v1", natural=True)
    kind = from_gymnasium(made)
    assert action_schema(kind)["properties"]["action"]["description"] == "0: Stick; 1: Hit"
    first, second = kind(), kind()
    assert first._inner is not second._inner and first._inner.unwrapped.natural
    assert first.reset(seed=3) == second.reset(seed=3) != second.reset(seed=4)


@needs_gymnasium
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FrozenLak-v1", "doesn't exist. Did you mean: `FrozenLake`"),
        ("CartPole-v1", ""),
        ("Pendulum-v1", "not supported"),
    ],
)
def test_what_cannot_be_played_is_one_sentence(name, words):
    if not words:
        assert from_gymnasium(name)().reset(seed=0).startswith("[0.0")
        return
    with pytest.raises(UserError, match="gymnasium:" + name) as error:
        from_gymnasium(name)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """OpenEnv's own echo environment, made of the package's template."""
    template = Path(import_module("openenv.cli").__file__).parent / "templates" / "openenv_env"
    folder = tmp_path_factory.mktemp("echo")
    words = {"__ENV_CLASS_NAME__": "Echo", "__ENV_TITLE_NAME__": "Echo", "__ENV_NAME__": "echo"}
    for file in ("models.py", "client.py", "server/__ENV_NAME___environment.py"):
        text = (template / file).read_text(encoding="utf-8").replace("from .models", "from models")
        for mark, word in words.items():
            text = text.replace(mark, word)
        (folder / Path(file).name.replace("__ENV_NAME__", "echo")).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield import_module("echo_environment")
    finally:
        sys.path.remove(str(folder))
        for name in ("models", "client", "echo_environment"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def address(echo):
    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app

    models = import_module("models")
    app = create_fastapi_app(echo.EchoEnvironment, models.EchoAction, models.EchoObservation, max_concurrent_envs=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def play_echo(environment):
    assert (
        environment.reset(seed=5, prompt="p") == '{"echoed_message": "Echo environment ready!", "message_length": 0}'
    )
    assert environment.act(message="hello") == '{"echoed_message": "hello", "message_length": 5}'
    environment.act(message="you")
    assert environment.get_reward() == pytest.approx(0.1 * (5 + 3))
    assert (environment.done, environment.success) == (False, None)


@needs_openenv
def test_openenvs_echo_environment_in_process(echo):
    kind = from_openenv(echo.EchoEnvironment)
    parameters = action_schema(kind)
    assert parameters["properties"] == {"message": {"type": "string", "description": "Message to echo back"}}
    assert parameters["required"] == ["message"]
    environment = kind()
    play_echo(environment)
    assert environment._inner.state.step_count == 2
    with pytest.raises(ValueError, match="valid string"):
        environment.act(message=3)


@needs_openenv
def test_openenvs_echo_environment_over_its_server(address):
    kind = from_openenv(address)
    assert action_schema(kind)["properties"]["message"]["description"] == "Message to echo back"
    for _ in range(5):  # the server has room for two
        first, second = kind(), kind()
        play_echo(first)
        play_echo(second)
        with pytest.raises(RuntimeError, match="Server error"):
            first.act(message=3)
        del first, second


@needs_openenv
def test_a_client_class_and_its_end(echo, address):
    from openenv.core import EnvClient, GenericEnvClient
    from openenv.core.client_types import StepResult

    Action = import_module("models").EchoAction

    class Client(EnvClient[Action, dict, dict]):
        _parse_state = GenericEnvClient._parse_state

        def _parse_result(self, payload):
            message = payload["observation"]["echoed_message"]
            return StepResult(observation={"said": message}, reward=payload["reward"], done=message == "bye")

        def _step_payload(self, action):
            return {"message": action.message}

    environment = from_openenv(partial(Client, base_url=address), action=Action)()
    assert environment.reset() == "Echo environment ready!"
    assert environment.act(message="bye") == "bye"
    assert (environment.done, environment.success) == (True, True)


@needs_openenv
def test_fields_of_actions_keep_their_types(echo):
    from enum import Enum

    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Side(Enum):
        LEFT, RIGHT = "left", "right"

    class Move(Action):
        """Moves a piece."""

        side: Side
        steps: list[int]
        note: str | None = None

    class Board(Environment):
        state = State()

        def reset(self, seed=None, **row):
            return Observation(metadata={"row": row})

        def step(self, action: Move, timeout_s=None, **kwargs):
            return Observation(reward=len(action.steps), done=action.side is Side.LEFT)

    kind = from_openenv(Board)
    parameters = action_schema(kind)
    assert parameters["required"] == ["side", "steps"]
    assert {name: {**field, "description": ""} for name, field in parameters["properties"].items()} == {
        "side": {"type": "string", "enum": ["left", "right"], "description": ""},
        "steps": {"type": "array", "items": {"type": "integer"}, "description": ""},
        "note": {"type": "string", "nullable": True, "description": ""},
    }
    board = kind()
    assert board.reset(level=2, prompt="p") == ""
    board.act(side="left", steps=[1, 2])
    assert (board.done, board.success, board.get_reward()) == (True, True, 2.0)


@needs_openenv
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("http://127.0.0.1:9", "cannot be read as an OpenEnv server"),
        (lambda: None, "expected a class as the type of `action`"),
    ],
)
def test_sources_that_are_no_environment_are_one_sentence(source, words):
    with pytest.raises(UserError, match=words):
        from_openenv(source)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("llmlab.simulator.environment.find_spec", lambda name: None)
    for wrap, package in ((from_gymnasium, "gymnasium"), (from_openenv, "openenv-core")):
        with pytest.raises(UserError, match=f"^{package} is not installed: pip install"):
            wrap("x")
