"""The one place that loads through Transformers' Auto classes, with llmlab's own architecture registered.

Python code that a model brings along runs only where the user allowed it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError

from llmlab.model.configuration import LLMLabConfig
from llmlab.settings.errors import UserError, reading, reason_of
from llmlab.settings.paths import missing
from llmlab.settings.trust import remote_code_allowed

transformers.AutoConfig.register(LLMLabConfig.model_type, LLMLabConfig, exist_ok=True)


def load_auto(kind: str, source: str | Path, **options: Any) -> Any:
    """Returns what an Auto class, such as `AutoConfig`, loads from a folder or a hub id."""
    if kind.startswith("AutoModel"):
        import llmlab.model.modeling  # noqa: F401  registers its classes; takes seconds
    try:
        return getattr(transformers, kind).from_pretrained(source, trust_remote_code=remote_code_allowed(), **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        way = "--trust-remote-code (trust_remote_code=True in a call)"
        problem = f"it requires its own Python code, which runs only with {way}"
        raise UserError(f"{source}: {problem}; read that code first") from None


@contextmanager
def opening(source: str | Path, expected: str = "a model") -> Iterator[None]:
    """Turns whatever Transformers raises while it loads a folder or hub id into a UserError that names it."""
    try:
        with reading(source, expected):
            try:
                yield
            except OSError as error:
                if Path(source).exists():
                    raise
                offline = "HF_HUB_OFFLINE is set, and it was not downloaded before"
                reason = offline if is_offline_mode() else reason_of(error)
                raise UserError(f"{missing(str(source), 'folder')}, and the hub gave none: {reason}") from None
            except SafetensorError as error:
                raise UserError(f"{source}: the weights are damaged or incomplete: {reason_of(error)}") from None
    except UserError as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        raise UserError(f"{source}: the weights have other shapes than its config.json says") from None
