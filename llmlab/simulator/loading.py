"""Loads an environment by its name in settings: the simulator, one of gymnasium or OpenEnv, or a user's own class.

Code that only a file names does not run, and no server elsewhere is reached, unless the command line allows it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmlab.settings.code import NOT_ALLOWED, find_code, run_file
from llmlab.settings.environment import RewardConfig
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.simulator.environment import tools_of

KINDS = {"simulator": "simulator", "gymnasium": "gymnasium:ID", "openenv": "openenv:URL", "": "path/to/file.py:Class"}
HERE = ("", "localhost", "127.0.0.1", "::1")
TOOL = "typed arguments and a Google-style docstring"
LEAVES_MACHINE = "actions would leave this machine; --allow-code (allow_code=True) allows it"


def load_environment(
    spec: str | Mapping[str, str],
    *,
    allow_code: bool = False,
    reward_config: RewardConfig | None = None,
    folder: str | Path = ".",
) -> Any:
    """Returns a function that makes environments; for a mapping of names to specs, one by name.

    Args:
        spec: `simulator`, `gymnasium:ID`, `openenv:URL`, `openenv:module:Class` or `path/to/file.py:Class`.
        allow_code: lets code that a spec names run, and servers on other machines be used.
        reward_config: what the simulator rewards.
        folder: where relative paths start.
    """
    if not isinstance(spec, str):
        options = {"allow_code": allow_code, "reward_config": reward_config, "folder": folder}
        return {name: load_environment(each, **options) for name, each in spec.items()}
    where, (kind, _, name) = f"environment '{spec}'", spec.partition(":")
    if spec == "simulator":
        from llmlab.simulator.world import Simulator

        return partial(Simulator, reward_config=reward_config or RewardConfig())
    if ".py:" in spec:
        factory = run_file(*find_code(spec, allow_code, folder), "class")
        check_environment(factory, where)
        return factory
    if kind not in KINDS or not name:
        near = did_you_mean(spec, KINDS) or did_you_mean(kind, KINDS)
        raise UserError(f"{where}: there is no such environment{near} (expected {', '.join(KINDS.values())})")
    from llmlab.simulator.wrappers import from_gymnasium, from_openenv

    module, _, attribute = name.rpartition(":")
    is_code = bool(module) and (kind == "gymnasium" or attribute.isidentifier())
    host = "" if kind == "gymnasium" or is_code else urlsplit(name if "://" in name else f"//{name}").hostname
    if not allow_code and (is_code or host not in HERE):
        raise UserError(f"{where}: {NOT_ALLOWED if is_code else LEAVES_MACHINE}")
    if kind == "gymnasium":
        return from_gymnasium(name)  # which imports the module of `module:ID`
    if not is_code:
        return from_openenv(name)
    with reading(where, "a class of a Python module"):
        source = getattr(import_module(module), attribute)
    return from_openenv(source)


def check_environment(factory: Callable[[], Any], where: str) -> None:
    """Raises UserError for a user's class without `reset` or without tools that are typed and documented."""
    with reading(where, "a class that is made without arguments"):
        environment = factory()
    if not callable(getattr(environment, "reset", None)):
        raise UserError(f"{where}: expected a method reset(self, **row), which begins an episode")
    tools = tools_of(environment)
    if not tools:
        raise UserError(f"{where}: expected a tool: a public method with {TOOL}")
    from transformers.utils import get_json_schema

    for name, tool in tools.items():
        with reading(f"{where}: the tool {name}", f"a method with {TOOL}"):
            get_json_schema(tool)
