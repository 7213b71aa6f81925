"""The contract of an environment (TRL's `environment_factory` shape, plus `done` and what llmlab's loop can use), and
how one is loaded by its name in settings: the simulator, one of gymnasium or OpenEnv, or a user's own class. Code that
a file alone names does not run, and no other machine is reached, unless the command line allows it. One object plays
one episode at a time; `llmlab.episodes` plays a model in any of them."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any, ClassVar
from urllib.parse import urlsplit

from llmlab.settings.environment import SIMULATOR, RewardConfig
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.trust import NOT_ALLOWED, load_code

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


def schemas_of(environment: Any) -> list[dict[str, Any]]:
    """Returns the JSON schemas of an environment's tools, from their types and docstrings."""
    return list(_schemas(type(environment)))


@cache
def _schemas(kind: type) -> tuple[dict[str, Any], ...]:
    from transformers.utils import get_json_schema  # seconds, for those who need it

    schemas = []
    for name in tools_of(kind):
        with reading(f"environment {kind.__name__}: the tool {name}", f"a method with {TOOL}"):
            schemas.append(get_json_schema(getattr(kind, name)))
    return tuple(schemas)


KINDS = {SIMULATOR: SIMULATOR, "gymnasium": "gymnasium:ID", "openenv": "openenv:URL", "": "path/to/file.py:Class"}
HERE = ("localhost", "127.0.0.1", "::1")
LEAVES_MACHINE = "actions would leave this machine; --allow-code (allow_code=True) allows it"


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
    from llmlab.simulator.wrappers import from_gymnasium, from_openenv

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
        schemas = schemas_of(environment)
    except UserError as error:
        raise UserError(f"{where}: {str(error).partition(': ')[2]}") from error
    if not schemas:
        raise UserError(f"{where}: expected a tool: a public method with {TOOL}")
