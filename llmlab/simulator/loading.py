"""Loads an environment by its name in settings: the simulator, one of gymnasium or OpenEnv, or a user's own class.
Code that only a file names does not run, and no other machine is reached, unless the command line allows it."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from llmlab.settings.environment import SIMULATOR, RewardConfig
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.trust import NOT_ALLOWED, load_code
from llmlab.simulator.environment import TOOL, Environment, schemas_of

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
