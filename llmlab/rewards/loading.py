"""Loads rewards from settings: llmlab's by name, custom functions by `path/to/file.py:function`. Parameters are
checked against the function's own signature and types. A user's file runs only where that is allowed."""

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmlab.rewards import REWARDS
from llmlab.rewards.function import TRL_INPUTS, Reward
from llmlab.settings.base import show
from llmlab.settings.errors import SettingsError, UserError, did_you_mean
from llmlab.settings.paths import expand
from llmlab.settings.rewards import EnvironmentSettings, RewardSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.trust import load_code
from llmlab.simulator.environment import load_environment


def load_rewards(
    rewards: Sequence[RewardSettings | str | dict[str, Any] | Reward | Callable[..., Any]],
    allow_code: bool = False,
    folder: str | Path = ".",
    *,
    check_only: bool = False,
) -> list[Reward]:
    """Finds rewards by name and gives them parameters and weights; reports all problems at once. A function has weight
    1 and an unknown range. Paths of Python files start at `folder`. With `check_only` no file runs, and no reward
    model is loaded."""
    problems: list[str] = []
    loaded: list[Reward] = []
    for entry in rewards:
        if callable(entry):
            loaded.append(entry if isinstance(entry, Reward) else Reward(entry))
            continue
        try:
            settings = RewardSettings.model_validate(entry)
            reward = _load(settings, allow_code, Path(folder), check_only)
            loaded += [reward] if reward is not None else []
        except ValidationError as error:
            problems += [f"reward {entry!r}: {_sentence(detail['msg'])}" for detail in error.errors()]
        except SettingsError as error:
            problems += [f"reward '{settings.name}': {problem}" for problem in error.problems]
        except UserError as error:
            problems.append(f"reward '{settings.name}': {error}")
    if problems:
        raise SettingsError(problems)
    return loaded


def _load(settings: RewardSettings, allow_code: bool, folder: Path, check_only: bool) -> Reward | None:
    name = settings.name
    from_file = ".py:" in name
    if from_file:
        target = load_code(name, "function", allowed=allow_code, folder=folder, check_only=check_only)
        if target is None:
            return None
    elif name in REWARDS:
        target = REWARDS[name]
    else:
        file = "; a function of your own is path/to/file.py:name" if "/" in name or name.endswith(".py") else ""
        near = did_you_mean(name, REWARDS) or file
        raise UserError(f"there is no such reward{near} (llmlab reward-check --list shows them)")
    custom = from_file and not hasattr(target, "bounds")  # not made with `reward_function`: its types are unknown
    parameters = check_parameters(target, settings.parameters, custom)
    weight = getattr(target, "weight", 1.0) if settings.weight is None else settings.weight
    if name in REWARDS and name.endswith("_penalty") and weight > 0:
        raise UserError(f"weight = {weight:g}: a penalty has a negative weight, such as {target.weight:g}")
    if check_only and inspect.isclass(target):
        return None
    function = target(**parameters) if inspect.isclass(target) else partial(target, **parameters)
    bounds = getattr(function if inspect.isclass(target) else target, "bounds", None) or (None, None)
    values = inspect.signature(function).parameters  # whose defaults are the parameters' values
    low, high = (values[end].default if isinstance(end, str) else end for end in bounds)
    low, high = low if settings.min is None else settings.min, high if settings.max is None else settings.max
    return Reward(function, name=name.rpartition(":")[2], weight=weight, low=low, high=high, cap=settings.cap)


def check_parameters(target: Callable[..., Any], values: dict[str, Any], custom: bool) -> dict[str, Any]:
    """Returns the values of a reward's keyword-only arguments as their types have them, or of a user's, as given."""
    known = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        or (custom and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in TRL_INPUTS)
    }
    function = target.__init__ if inspect.isclass(target) else target
    types = {} if custom else typing.get_type_hints(function, include_extras=True)
    defaults = {} if custom else {name: each.default for name, each in known.items()}
    checked = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    problems = [f"parameter '{name}' is missing" for name in sorted(defaults.keys() - checked.keys() - values.keys())]
    for name, value in values.items():
        if name not in known:
            takes = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            problems.append(f"unknown parameter '{name}'{did_you_mean(name, known)} ({takes})")
            continue
        try:
            checked[name] = value if custom else TypeAdapter(types.get(name, Any)).validate_python(value)
        except ValidationError as error:
            problems.append(f"{name} = {show(value)}: {_sentence(error.errors()[0]['msg'])}")
    if values.get("column") in defaults:
        problems.append(f"column = {values['column']}: that is also the name of a parameter; rename the column")
    if problems:
        raise SettingsError(problems)
    return checked


def _sentence(message: str) -> str:
    return message.replace("Value error, ", "").replace("Input should be", "expected")


def check_rewards(resolved: Resolved[Any]) -> Resolved[Any]:
    """Returns the settings of a stage that will run later, its rewards located and checked; nothing is loaded."""
    resolved = locate_rewards(resolved)
    problems = []
    try:
        allowed = may_run_code(resolved)
    except UserError as error:
        problems, allowed = [str(error)], True
    try:
        load_rewards(resolved.settings.rewards or (), allowed, check_only=True)
    except SettingsError as error:
        problems += [f"{resolved.sources.get('rewards', 'rewards')}: {problem}" for problem in error.problems]
    for spec in getattr(resolved.settings, "environments", {}).values():
        try:
            load_environment(spec, allow_code=allowed, check_only=True)
        except UserError as error:
            problems.append(f"{resolved.sources.get('environment', 'environment')}: {error}")
    if problems:
        raise SettingsError(problems)
    return resolved


def may_run_code(resolved: Resolved[Any]) -> bool:
    """Returns whether reward functions from Python files may be loaded, which no settings file may decide."""
    source = resolved.sources.get("allow_code", "arguments")
    if resolved.settings.allow_code and source not in ("arguments", "command line"):
        raise UserError(f"{source}: allow_code cannot be set in a file; give --allow-code, having read the code")
    return resolved.settings.allow_code


def locate_rewards(settings: Any | Resolved[Any]) -> Resolved[Any]:
    """Returns settings whose Python files have absolute paths, so that a resumed run finds them. Relative paths start
    at the folder of the settings file that names them, or at the working directory."""
    resolved = as_resolved(settings)
    values = resolved.settings

    def locate(name: str, key: str) -> str:
        file = Path(resolved.sources.get(key, "").partition(":")[0])
        folder = file.parent if file.suffix and file.is_file() else Path()
        return str((folder / expand(name)).resolve()) if ".py:" in name else name

    changes: dict[str, Any] = {
        "rewards": values.rewards
        and [each.model_copy(update={"name": locate(each.name, "rewards")}) for each in values.rewards]
    }
    if isinstance(values, EnvironmentSettings):
        names = values.environments.items()
        located = {name: locate(spec, "environment") for name, spec in names}
        changes["environment"] = located.get(None, located or None)
    return replace(resolved, settings=values.model_copy(update=changes))
