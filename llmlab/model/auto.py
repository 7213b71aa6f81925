"""The one place that loads through Transformers' Auto classes.

llmlab's own architecture is registered before anything is read, so that its folders need no code of theirs; what other
folders bring runs only where the user allowed it, and nobody is asked.
"""

from pathlib import Path
from typing import Any

import transformers

from llmlab.model.configuration import LLMLabConfig
from llmlab.settings.errors import UserError
from llmlab.settings.trust import remote_code_allowed

transformers.AutoConfig.register(LLMLabConfig.model_type, LLMLabConfig, exist_ok=True)


def load_auto(kind: str, source: str | Path, **options: Any) -> Any:
    """Returns what an Auto class loads from a folder or a hub id.

    Args:
        kind: the class: `AutoConfig`, `AutoTokenizer`, `AutoModelForCausalLM`, ...
        source: a folder or a hub id.
        options: of its `from_pretrained`.

    Raises:
        UserError: it needs code that it brings along, which was not allowed.
    """
    if kind.startswith("AutoModel"):
        import llmlab.model.modeling  # noqa: F401  registers its classes; seconds, for those who need them
    try:
        return getattr(transformers, kind).from_pretrained(source, trust_remote_code=remote_code_allowed(), **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{source}: it brings Python code along, which runs only with --trust-remote-code "
            "(trust_remote_code=True in a call); read that code first"
        ) from None
