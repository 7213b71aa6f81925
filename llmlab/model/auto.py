"""The one place that loads through Transformers' Auto classes, with llmlab's own architecture registered.

Python code that a model brings along runs only where the user allowed it.
"""

from pathlib import Path
from typing import Any

import transformers

from llmlab.model.configuration import LLMLabConfig
from llmlab.settings.errors import UserError
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
        raise UserError(
            f"{source}: it requires its own Python code, which runs only with --trust-remote-code "
            "(trust_remote_code=True in a call); read that code first"
        ) from None
