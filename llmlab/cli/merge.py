"""`llmlab merge ADAPTER -o DIR`: adapters folded into their base model."""

import inspect
from typing import Any

from llmlab.cli.options import stage_command
from llmlab.settings.merge import MergeSettings
from llmlab.settings.sources import Resolved
from llmlab.stages import STAGES


def _merge(resolved: Resolved[MergeSettings]) -> Any:
    STAGES["merge"].check(resolved)
    return STAGES["merge"].function(resolved)


merge = stage_command("merge", MergeSettings, _merge, words="adapter")
# options have no short forms of their own, and `-o` is what the other commands that write a folder take
_output = inspect.signature(merge).parameters["setting_output_dir"].annotation.__metadata__[0]
_output.param_decls = (*_output.param_decls, "-o")
