"""What no file may decide: running a model's own Python code, and sending data off this machine. Only the command line
or a call can allow these; files, pipelines and run records cannot."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmlab.settings.errors import UserError, did_you_mean, reason_of

if TYPE_CHECKING:  # `llmlab --help` reads no files
    from llmlab.settings.files import Layer

F = TypeVar("F", bound=Callable[..., Any])

REMOTE_CODE = "trust_remote_code"
TRAINER_ARGS = "trainer_args"
REPORT_TO = "report_to"
PUBLISHES = ("push_to_hub", "log_completions_hub_repo")
SENDS = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "vllm_server_base_url")
NOT_ALLOWED = "this is Python code, which runs when loaded; --allow-code (allow_code=True) allows it"
LOCAL_REPORTS = ("none", "tensorboard", "trackio")
TRACKIO_SENDS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")  # the user's environment

_allowed: ContextVar[bool] = ContextVar(REMOTE_CODE, default=False)


def remote_code_allowed() -> bool:
    """Whether Python code that a model or tokenizer brings along may run."""
    return _allowed.get()


def allow_remote_code(allowed: bool) -> bool:
    """Sets it for the rest of the process: the command line's `--trust-remote-code`."""
    _allowed.set(allowed)
    return allowed


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Sets it for a block."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def takes_trust(function: F) -> F:
    """Adds the keyword `trust_remote_code` to a function; None, its default, keeps the command line's choice."""
    signature = inspect.signature(function)
    keyword = inspect.Parameter(REMOTE_CODE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None)

    @wraps(function)
    def trusting(*args: Any, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
        with remote_code(_allowed.get() if trust_remote_code is None else trust_remote_code):
            return function(*args, **kwargs)

    trusting.__signature__ = signature.replace(parameters=[*signature.parameters.values(), keyword])  # type: ignore[attr-defined]
    return trusting  # type: ignore[return-value]


def load_code(spec: str, kind: str, *, allowed: bool, folder: str | Path = ".", check_only: bool = False) -> Any:
    """Runs a user's Python file and returns what `path/to/file.py:name` names; None with `check_only`. Relative paths
    start at `folder`; `kind` is the word for it in errors, such as `function`."""
    file, _, name = spec.rpartition(":")
    path = Path(folder) / Path(file).expanduser()
    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"{path}: there is no such file{near}")
    if not allowed:
        raise UserError(NOT_ALLOWED)
    if check_only:
        return None
    module_name = f"llmlab_user_code_{abs(hash(str(path.resolve())))}"
    found = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(found)  # type: ignore[arg-type]
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:  # a user's code can fail in any way
        raise UserError(f"{path}: cannot be loaded: {type(error).__name__}: {reason_of(error)}") from error
    target = getattr(module, name, None)
    if not callable(target):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{path}: there is no {kind} '{name}' in it{did_you_mean(name, names)}")
    return target


def refusals(layer: "Layer") -> list[str]:
    """Returns a sentence for each key of a layer that it may not set."""
    problems = []
    for key, value in _flatten(layer.values):
        head, _, name = key.rpartition(".")
        if name == REMOTE_CODE:
            only = f"only --{REMOTE_CODE.replace('_', '-')} on the command line ({REMOTE_CODE}=True in a call)"
            problems.append(f"{layer.where(key)}: {key} is no setting: {only} allows a model's own Python code to run")
        elif layer.path is not None and (head == TRAINER_ARGS or key == REPORT_TO) and leaves_machine(name, value):
            sends = f"{key} sends data off this machine, which no file decides"
            problems.append(f"{layer.where(key)}: {sends}; give {key}=... on the command line")
    return problems


def leaves_machine(name: str, value: Any) -> bool:
    """Whether a trainer argument of this value sends something off this machine."""
    if name == REPORT_TO:
        return bool(remote_services(value))
    return bool(value) and (name in (*PUBLISHES, *SENDS, "vllm_server_host") or name.startswith("hub_"))


def destinations(
    trainer_args: dict[str, Any], output_dir: str, report_to: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Returns the row of a run's plan that names what is sent where; empty where nothing is."""
    places = []
    if trainer_args.get("push_to_hub"):
        name = trainer_args.get("hub_model_id") or f"<your account>/{Path(output_dir).absolute().name}"
        kind = "private" if trainer_args.get("hub_private_repo") else "public unless your organization says otherwise"
        places.append(f"the run folder to the Hugging Face hub, as {name} ({kind})")
    if trainer_args.get("log_completions_hub_repo"):
        places.append(f"completions to the Hugging Face hub, as {trainer_args['log_completions_hub_repo']}")
    places += [f"metrics to {service}" for service in remote_services(report_to)]
    sent = [name for name in TRACKIO_SENDS if "trackio" in report_to and os.environ.get(name)]
    places += [f"metrics or alerts by trackio, since {name} is set" for name in sent]
    places += [f"{name} {trainer_args[name]}" for name in SENDS if trainer_args.get(name)]
    return [("publishes", "; ".join(places))] if places else []


def remote_services(value: Any) -> list[str]:
    """Returns the trackers among these that may send metrics off this machine."""
    named = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return [str(name) for name in named if name not in LOCAL_REPORTS]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key of nested mappings and lists, as in `Layer.lines`, with its value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield f"{prefix}{key}", inner
        yield from _flatten(inner, f"{prefix}{key}.")
