"""From names in YAML to rewards that can be called: llmlab's own by name, a user's by `path/to/file.py:function`.

Parameters are checked here, against the function's own signature and types. Weighing them is `compose`'s business.
"""

import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmlab.rewards import RANGES, REWARDS, WEIGHTS
from llmlab.rewards.reward import Reward
from llmlab.settings.base import show
from llmlab.settings.errors import SettingsError, UserError, did_you_mean, reason_of
from llmlab.settings.paths import expand
from llmlab.settings.rewards import RewardSettings

GIVEN = ("completions", "prompts", "completion_ids", "environments", "trainer_state", "log_metric", "log_extra")
"""What a trainer passes beside the columns: none of these is a parameter."""


def load_rewards(
    rewards: Sequence[RewardSettings | str | dict[str, Any]],
    allow_code: bool = False,
    folder: str | Path = ".",
) -> list[Reward]:
    """Finds rewards by name and gives them their parameters and weights.

    Args:
        rewards: settings, or what they are read from: `"length | 0.5"`, `{"name": "length", "target": 100}`.
        allow_code: load functions from Python files, which runs these files.
        folder: where the paths of Python files start, such as the recipe's folder.

    Returns:
        One reward an entry, in order, each of which TRL's trainers take as it stands.

    Raises:
        SettingsError: all problems at once: unknown names, parameters and values, code that is not allowed.
    """
    problems: list[str] = []
    loaded: list[Reward] = []
    for entry in rewards:
        try:
            settings = RewardSettings.model_validate(entry)
            loaded.append(_load(settings, allow_code, Path(folder)))
        except ValidationError as error:
            problems += [f"reward {entry!r}: {_sentence(detail['msg'])}" for detail in error.errors()]
        except SettingsError as error:
            problems += error.problems
        except UserError as error:
            problems.append(f"reward '{settings.name}': {error}")
    if problems:
        raise SettingsError(problems)
    return loaded


def _load(settings: RewardSettings, allow_code: bool, folder: Path) -> Reward:
    name = settings.name
    own = ".py:" in name
    if own:
        target, label = _user_function(name, allow_code, folder), name.rpartition(":")[2]
    elif name in REWARDS:
        module, _, attribute = REWARDS[name].partition(":")
        target, label = getattr(import_module(module), attribute), name
    else:
        file = "; a function of your own is path/to/file.py:name" if "/" in name or name.endswith(".py") else ""
        raise UserError(
            f"there is no such reward{did_you_mean(name, REWARDS) or file} (llmlab reward-check --list shows them)"
        )
    parameters = _checked(target, settings, own)
    function = target(**parameters) if inspect.isclass(target) else partial(target, **parameters)
    low, high = _range_of(name, function, target)
    kept = frozenset() if inspect.isclass(target) else frozenset(parameters if own else _parameters_of(target, own))
    weight = WEIGHTS.get(name, 1.0) if settings.weight is None else settings.weight
    if not own and name.endswith("_penalty") and weight > 0:
        raise UserError(f"weight = {weight:g}: a penalty has a negative weight, such as {WEIGHTS[name]:g}")
    return Reward(
        function,
        name=label,
        weight=weight,
        low=low if settings.min is None else settings.min,
        high=high if settings.max is None else settings.max,
        cap=settings.cap,
        parameters=kept,
    )


def _user_function(name: str, allow_code: bool, folder: Path) -> Callable[..., Any]:
    if not allow_code:
        raise UserError("this is Python code, which runs when it is loaded; --allow-code (allow_code=True) allows it")
    file, _, attribute = name.rpartition(":")
    path = expand(file)
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"{path}: there is no such file{near}")
    module_name = f"llmlab_user_rewards_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:  # a user's code can fail in any way; its own words are the message
        raise UserError(f"{path}: cannot be loaded: {type(error).__name__}: {reason_of(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{path}: there is no function '{attribute}' in it{did_you_mean(attribute, names)}")
    return function


def _parameters_of(target: Callable[..., Any], own: bool) -> dict[str, inspect.Parameter]:
    """Returns what may stand in YAML: keyword-only arguments, or any named argument of a user's function."""
    return {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        or (own and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in GIVEN)
    }


def _checked(target: Callable[..., Any], settings: RewardSettings, own: bool) -> dict[str, Any]:
    """Returns the parameters as the signature's types have them.

    Raises:
        SettingsError: unknown, missing and wrong parameters, all at once.
    """
    known = _parameters_of(target, own)
    hints = {} if own else typing.get_type_hints(_signed(target), include_extras=True)
    problems, checked = [], dict(settings.parameters)
    for name, value in settings.parameters.items():
        if name not in known:
            takes = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
            problems.append(f"unknown parameter '{name}'{did_you_mean(name, known)} ({takes})")
        elif name in hints:
            try:
                checked[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                problems.append(f"{name} = {show(value)}: {_sentence(error.errors()[0]['msg'])}")
    if not own:
        missing = [name for name, p in known.items() if p.default is p.empty and name not in settings.parameters]
        problems += [f"parameter '{name}' is missing" for name in missing]
        column = settings.parameters.get("column")
        if column in known:
            problems.append(f"column = {column}: that is also the name of a parameter; rename the column")
    if problems:
        raise SettingsError(f"reward '{settings.name}': {problem}" for problem in problems)
    return checked


def _signed(target: Any) -> Any:
    return target.__init__ if inspect.isclass(target) else target


def _range_of(name: str, function: Any, target: Any) -> tuple[float | None, float | None]:
    """Returns the smallest and largest value that a reward gives, None where nobody knows."""
    if name not in REWARDS or inspect.isclass(target):
        return getattr(function, "bounds", None) or (None, None)
    defaults = {key: parameter.default for key, parameter in inspect.signature(target).parameters.items()}
    given = {**defaults, **function.keywords}
    low, high = (given[end] if isinstance(end, str) else end for end in RANGES.get(name, (0.0, 1.0)))
    return float(low), float(high)


def _sentence(message: str) -> str:
    return message.replace("Value error, ", "").replace("Input should be", "expected")
