"""Decides `gradient_checkpointing: auto`: where the planned step does not fit into the device's memory without."""

import gc
from typing import Any

from llmlab.data.chat.rows import row_lengths
from llmlab.runs.plan import make_plan
from llmlab.settings.errors import UserError


def needs_checkpointing(run: Any, rows: Any) -> bool:
    """Returns whether a run's step needs gradient checkpointing to fit; False for one that cannot be planned."""
    settings = run.settings.model_copy(update={"gradient_checkpointing": False})
    try:
        return not make_plan(run.function, settings, run.hardware, longest=(row_lengths(rows) or (None, None))[1]).fits
    except UserError:
        return False
    finally:
        gc.collect()  # tensors without memory in reference cycles
