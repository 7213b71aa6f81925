"""The contract of an environment: TRL's `environment_factory` shape, plus `done` and what llmlab's loop can use. One
object plays one episode at a time; `llmlab.episodes` plays a model in any of them."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, ClassVar

from llmlab.settings.errors import reading

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
