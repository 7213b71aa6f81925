"""The contract of an environment (TRL's `environment_factory` shape, plus `done` and what llmlab's loop can use), how
one is loaded by its name in settings, and those of gymnasium (discrete or text actions) and OpenEnv with one tool,
`act`, whose arguments come from the action space or the fields of the action. Both packages are optional extras;
continuous actions and OpenEnv's listing of MCP tools are not supported. Code that a file alone names does not run, and
no other machine is reached, unless the command line allows it. One object plays one episode at a time;
`llmlab.episodes` plays a model in any of them."""

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Union, get_type_hints
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from llmlab.settings.errors import UserError, did_you_mean, reading, shorten
from llmlab.settings.rewards import SIMULATOR, RewardConfig
from llmlab.settings.trust import NOT_ALLOWED, load_code

KINDS = {SIMULATOR: SIMULATOR, "gymnasium": "gymnasium:ID", "openenv": "openenv:URL", "": "path/to/file.py:Class"}
HERE = ("localhost", "127.0.0.1", "::1")
LEAVES_MACHINE = "actions would leave this machine; --allow-code (allow_code=True) allows it"
LONGEST_OBSERVATION = 8_000  # characters
COLORED = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", re.DOTALL)
JSON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "object": dict, "null": type(None)}
ANSWER_TIME = 10  # seconds for a server's schema
NOT_TOOLS = ("reset", "get_reward")
TOOL = "typed arguments and a Google-style docstring"


class Environment:
    """What a policy acts in; a class of this shape need not inherit from it.

    `reset(**row)` begins an episode with the columns of a row of the data and returns text for the end of the last
    user message, or None. Every other public method is a tool: typed arguments, a Google-style docstring, the result
    as text or JSON; it may be async. An exception that a tool raises is an observation, never the end of a run.

    Attributes:
        done: the episode is over; it ends after the call in which this becomes true.
        success: whether the task was solved; None where the environment does not know.
        rewards: the components of the reward so far, by name, which are logged; empty where there is only one number.
        reward_range: the lowest and highest reward of this episode, to normalize it; None where they are unknown.
        stop_tools: names of tools whose call ends the episode.
        time_limits: seconds a call of a tool may take, by its name, instead of `tool_timeout`.
        seed: set before `reset`, for whatever is random: equal for the episodes of a group.
    """

    done: bool = False
    seed: int = 0
    success: bool | None = None
    rewards: Mapping[str, float] = {}
    reward_range: tuple[float, float] | None = None
    stop_tools: ClassVar[Collection[str]] = ()
    time_limits: ClassVar[Mapping[str, float]] = {}

    def reset(self, **row: Any) -> str | None:
        """Begins an episode with the columns of a row, and returns text that is added to its prompt, or None."""
        raise NotImplementedError

    def get_reward(self) -> float:
        """Returns the reward of the episode so far, undiscounted: of all its calls together."""
        raise NotImplementedError

    def _reject(self, name: str | None, arguments: Any, problem: str) -> str:
        """Returns the observation of a call that cannot be made: unknown tool, broken JSON, missing arguments. A
        leading underscore keeps it from being a tool, for TRL's own loop too."""
        return f"error: {problem}"


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """Returns the tools of an environment, or of a class of them, by name: its public methods, as TRL finds them."""
    kind = environment if isinstance(environment, type) else type(environment)
    names = (name for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction))
    return {name: getattr(environment, name) for name in names if name not in NOT_TOOLS and name[0] != "_"}


@cache
def schemas_of(kind: type) -> list[dict[str, Any]]:
    """Returns the JSON schemas of the tools of a class of environments, from their types and docstrings."""
    from transformers.utils import get_json_schema  # seconds, for those who need it

    schemas = []
    for name in tools_of(kind):
        with reading(f"environment {kind.__name__}: the tool {name}", f"a method with {TOOL}"):
            schemas.append(get_json_schema(getattr(kind, name)))
    return schemas


def load_environment(
    spec: str, *, allow_code: bool = False, reward_config: RewardConfig | None = None, check_only: bool = False
) -> Callable[[], Any]:
    """Returns what makes environments of a name in settings. `allow_code` lets code run that it names, and a server on
    another machine be used; with `check_only` neither happens, and nothing is returned."""
    where, (kind, _, name) = f"environment '{spec}'", spec.partition(":")
    if spec == SIMULATOR:
        from llmlab.simulator.world import Simulator

        return partial(Simulator, reward_config=reward_config)
    if ".py:" in spec:
        factory = load_code(spec, "class", allowed=allow_code, check_only=check_only)
        if not check_only:
            check_environment(factory, where)
        return factory
    if kind not in KINDS or not name:
        near = did_you_mean(kind, KINDS)
        raise UserError(f"{where}: there is no such environment{near} (expected {', '.join(KINDS.values())})")
    module, _, attribute = name.rpartition(":")
    is_code = bool(module) and (kind == "gymnasium" or attribute.isidentifier())
    if is_code and not allow_code:
        raise UserError(f"{where}: {NOT_ALLOWED}")
    if check_only:
        return Environment
    if kind == "gymnasium":
        return from_gymnasium(name)  # which imports the module of `module:ID`
    if is_code:
        with reading(where, "a class of a Python module"):
            return from_openenv(getattr(import_module(module), attribute))
    if urlsplit(name if "://" in name else f"//{name}").hostname not in HERE and not allow_code:
        raise UserError(f"{where}: {LEAVES_MACHINE}")
    return from_openenv(name)


def check_environment(factory: Callable[[], Any], where: str) -> None:
    """Raises UserError for a user's class without `reset`, or without tools that are typed and documented."""
    with reading(where, "a class that is made without arguments"):
        environment = factory()
    if not callable(getattr(environment, "reset", None)):
        raise UserError(f"{where}: expected a method reset(self, **row), which begins an episode")
    try:
        schemas = schemas_of(type(environment))
    except UserError as error:
        raise UserError(f"{where}: {str(error).partition(': ')[2]}") from error
    if not schemas:
        raise UserError(f"{where}: expected a tool: a public method with {TOOL}")


Step = tuple[str, float, bool, bool]  # observation, reward, whether it was the last, and if so whether it succeeded


def from_gymnasium(source: Any, **options: Any) -> type[Environment]:
    """Returns a class of environments that play one of gymnasium's, with a tool `act(action)`.

    An episode ends when terminated or truncated; it was a success where the `info` says `is_success`, or where it was
    terminated with a positive reward. Rewards are summed. `reset` takes `seed` and `options` from the row. Those that
    draw in characters show the drawing too, what is colored in it in brackets.

    Args:
        source: an id such as `FrozenLake-v1`, a function that makes an environment, or one that `gymnasium.make` made.
        options: for `gymnasium.make`, with an id.
    """
    _require("gymnasium", "gymnasium")
    import gymnasium

    where = f"environment 'gymnasium:{getattr(source, '__name__', source)}'"
    source = source.spec if isinstance(source, gymnasium.Env) else source
    with reading(where, "an environment"):
        make = source if callable(source) else partial(gymnasium.make, source, **options)
        inner = make()
        if make is not source and "ansi" in inner.metadata.get("render_modes", ()) and inner.render_mode is None:
            make = partial(make, render_mode="ansi")
    space = inner.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        values = range(int(space.start), int(space.start + space.n))
        action = {"type": "integer", "description": _name_actions(inner.unwrapped, values)}
    elif isinstance(space, gymnasium.spaces.Text):
        action = {"type": "string", "description": f"a text of {space.min_length} to {space.max_length} characters"}
    else:
        raise UserError(f"{where}: not supported: its actions are {space}; expected Discrete or Text")
    name = inner.spec.id if inner.spec else type(inner.unwrapped).__name__
    schema = {"properties": {"action": action}, "required": ["action"]}
    return _wrap(name, schema, make, _begin_gymnasium, _step_gymnasium)


def _begin_gymnasium(inner: Any, row: dict[str, Any]) -> str:
    observation, _ = inner.reset(seed=row["seed"], options=row.get("options"))
    return _draw(inner, observation)


def _step_gymnasium(inner: Any, arguments: dict[str, Any]) -> Step:
    action = arguments["action"]
    if not inner.action_space.contains(action):
        raise ValueError(f"action = {action!r:.40}: expected one of {shorten(str(inner.action_space))}")
    observation, reward, terminated, truncated, info = inner.step(action)
    success = bool(info.get("is_success", terminated and reward > 0))
    return _draw(inner, observation), float(reward), bool(terminated or truncated), success


def _draw(inner: Any, observation: Any) -> str:
    drawing = COLORED.sub(r"[\1]", inner.render()) if inner.render_mode == "ansi" else ""
    return drawing + _as_text(observation)


def _name_actions(inner: Any, values: range) -> str:
    """Returns the meanings of discrete actions from the list under "Action Space" in gymnasium's docstrings."""
    _, _, section = (type(inner).__doc__ or "").partition("## Action Space")
    names = re.findall(r"^\s*- (\d+): (.+?)\s*$", section.partition("##")[0], re.MULTILINE)
    if [number for number, _ in names] != [str(value) for value in values]:
        return f"a number from {values[0]} to {values[-1]}"
    return "; ".join(": ".join(pair) for pair in names)


def from_openenv(source: Any, *, action: type | None = None) -> type[Environment]:
    """Returns a class of environments that play one of OpenEnv's, with a tool `act` that takes the action's fields.

    Rewards are summed, and an episode that is done was a success where its last reward is positive. `reset` passes on
    the columns of the row that the environment's own `reset` takes.

    Args:
        source: the address of a server; an environment class; or a function that makes an environment or a client.
        action: the class of actions; by default what a server's schema says, or the type of `action` in `step`.
    """
    _require("openenv", "openenv-core")
    name, to_action = getattr(source, "__name__", "OpenEnv"), dict
    where = f"environment 'openenv:{source if isinstance(source, str) else name}'"
    if isinstance(source, str):
        from urllib.request import urlopen

        from openenv.core import GenericEnvClient

        address = re.sub(r"^ws", "http", source if "://" in source else f"http://{source}").rstrip("/")
        with reading(where, "an OpenEnv server"), urlopen(f"{address}/schema", timeout=ANSWER_TIME) as answer:
            schema = json.load(answer)["action"]
        source = partial(GenericEnvClient, base_url=address)
    else:
        if action is None and inspect.isclass(source):
            action = get_type_hints(source.step).get("action")
        if not inspect.isclass(action):
            raise UserError(f"{where}: expected a class as the type of `action` in its `step`, or as action=")
        schema, to_action = TypeAdapter(action).json_schema(), TypeAdapter(action).validate_python
    schema.get("properties", {}).pop("metadata", None)
    if not schema.get("properties"):
        raise UserError(f"{where}: not supported: its actions have no fields that could be arguments of a tool")
    return _wrap(name, schema, source, _begin_openenv, partial(_step_openenv, to_action))


def _begin_openenv(inner: Any, row: dict[str, Any]) -> str:
    accepted = inspect.signature(inner.reset).parameters
    names = row if any(each.kind is each.VAR_KEYWORD for each in accepted.values()) else accepted
    return _show_fields(inner.reset(**{name: row[name] for name in row if name in names and row[name] is not None}))


def _step_openenv(to_action: Callable[[dict[str, Any]], Any], inner: Any, arguments: dict[str, Any]) -> Step:
    result = inner.step(to_action(arguments))
    reward = float(result.reward or 0.0)
    return _show_fields(result), reward, bool(result.done), reward > 0


def _show_fields(result: Any) -> str:
    """Returns as text what there is to see in a client's result, or in an observation with reward and end in it."""
    seen = result.observation if type(result).__name__ == "StepResult" else result
    fields = seen if isinstance(seen, Mapping) else TypeAdapter(type(seen)).dump_python(seen)
    fields = {key: value for key, value in fields.items() if key not in ("done", "reward", "metadata")}
    return _as_text(next(iter(fields.values())) if len(fields) == 1 else fields or "")


def _wrap(name: str, schema: Mapping[str, Any], make: Any, begin: Any, step: Any) -> type[Environment]:
    """Returns a class of environments whose tool `act` has the properties of a JSON schema as its arguments; the
    rewards of its steps are summed."""

    class Wrapper(Environment):
        def __init__(self) -> None:
            self._inner, self._total = make(), 0.0

        def __del__(self) -> None:
            with suppress(Exception):  # Python may be shutting down
                self._inner.close()

        def reset(self, **row: Any) -> str:
            self._total, self.done, self.success = 0.0, False, None
            return begin(self._inner, {"seed": self.seed, **row})

        def get_reward(self) -> float:
            return self._total

        def act(self, **values: Any) -> str:
            if self.done:
                raise ValueError("the episode is over")
            observation, reward, self.done, success = step(self._inner, values)
            self._total += reward
            self.success = success if self.done else None
            return observation

    Wrapper.__name__ = Wrapper.__qualname__ = name
    lines = [" ".join(schema.get("description", "Act in the environment.").split()), "", "Args:"]
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for key, field in schema["properties"].items():
        default = inspect.Parameter.empty if key in schema.get("required", ()) else None
        options = {"default": default, "annotation": _python_type(field, schema.get("$defs", {}))}
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, **options))
        lines.append(f"    {key}: {' '.join(field.get('description', key).split())}")
    Wrapper.act.__doc__ = "\n".join(lines)
    Wrapper.act.__annotations__ = {each.name: each.annotation for each in parameters[1:]}
    Wrapper.act.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Wrapper


def _python_type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    """Returns the type whose JSON schema this is, as far as types of a tool's arguments can say it."""
    schema = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    if "enum" in schema or "const" in schema:
        return Literal[tuple(schema.get("enum", [schema.get("const")]))]
    if "anyOf" in schema:
        return Union[tuple(_python_type(each, definitions) for each in schema["anyOf"])]  # noqa: UP007
    if schema.get("type") == "array":
        return list[_python_type(schema.get("items", {}), definitions)]  # type: ignore[misc]
    return JSON_TYPES.get(schema.get("type", ""), Any)


def _as_text(value: Any) -> str:
    """Returns an observation as a text, or in one line of JSON with arrays as lists; a longer one is cut."""
    as_json = lambda part: part.tolist() if hasattr(part, "tolist") else str(part)  # noqa: E731
    text = value if isinstance(value, str) else json.dumps(value, default=as_json, ensure_ascii=False)
    return shorten(text, LONGEST_OBSERVATION)


def _require(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"{package} is not installed: pip install 'llmlab[environments]' or pip install {package}")
