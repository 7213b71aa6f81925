"""What can be told of a stage's rewards before anything is loaded: names, parameters, files, and whether code may run.

Loading them is `loading.py`'s business; nothing of a user's own runs here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmlab.rewards.loading import load_rewards
from llmlab.settings.errors import SettingsError, UserError, did_you_mean
from llmlab.settings.paths import expand
from llmlab.settings.rewards import RewardSettings
from llmlab.settings.sources import Resolved, as_resolved

BY_HAND = ("arguments", "command line")


def check_rewards(resolved: Resolved[Any]) -> Resolved[Any]:
    """Returns the settings of a stage that will run later, perhaps hours from now, its rewards located and checked.

    Args:
        resolved: settings with `rewards` and `allow_code`.

    Raises:
        SettingsError: all problems at once: unknown names and parameters, files that are not there, code that nobody
            allowed by hand.
    """
    resolved = locate_rewards(resolved)
    where = resolved.sources.get("rewards", "rewards")
    problems = []
    try:
        allowed = may_run_code(resolved)
    except UserError as error:
        problems, allowed = [str(error)], True
    for reward in resolved.settings.rewards or ():
        try:
            if ".py:" in reward.name:
                _check_function(reward, allowed)
            elif reward.name != "reward_model":  # an earlier stage may still have to make the model
                load_rewards([reward])
        except SettingsError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise SettingsError(problems)
    return resolved


def _check_function(reward: RewardSettings, allowed: bool) -> None:
    path = Path(reward.name.rpartition(":")[0])
    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
        raise SettingsError([f"reward '{reward.name}': {path}: there is no such file{near}"])
    if not allowed:
        load_rewards([reward])  # which says what allows it


def may_run_code(resolved: Resolved[Any]) -> bool:
    """Returns whether reward functions from Python files may be loaded.

    Raises:
        UserError: a file says so; only a person can, who has read the code.
    """
    allowed_by = resolved.sources.get("allow_code", "arguments")
    if resolved.settings.allow_code and allowed_by not in BY_HAND:
        raise UserError(f"{allowed_by}: allow_code cannot be set in a file; give --allow-code, having read the code")
    return resolved.settings.allow_code


def locate_rewards(settings: Any | Resolved[Any]) -> Resolved[Any]:
    """Returns settings whose reward functions of the user's own have whole paths, so that a resumed run finds them.

    Paths start at the folder of the file that names them, or at the working directory.
    """
    resolved = as_resolved(settings)
    named_in = Path(resolved.sources.get("rewards", "").partition(":")[0])
    folder = named_in.parent if named_in.suffix and named_in.is_file() else Path()
    rewards = [
        reward.model_copy(update={"name": str((folder / expand(reward.name)).resolve())})
        if ".py:" in reward.name
        else reward
        for reward in resolved.settings.rewards or ()
    ]
    if not rewards:
        return resolved
    return replace(resolved, settings=resolved.settings.model_copy(update={"rewards": rewards}))
