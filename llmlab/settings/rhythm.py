"""What `eval_steps` means: validation batches in the LLM-Lab document, a rhythm in the words of the RL guide.

No settings of its own: every training stage composes it.
"""

from collections.abc import Callable
from typing import Any

from llmlab.settings.base import Settings, spellings_of

THEIRS = (  # what stands beside Transformers' `eval_steps`
    *("save_steps", "logging_steps", "eval_strategy", "num_train_epochs", "per_device_train_batch_size"),
    "load_best_model_at_end",
)


class RhythmSettings(Settings):
    """Reads `eval_steps` by what stands beside it. Source: seed, LLM-Lab document, "Evaluation Steps"; RL guide."""

    @classmethod
    def translate(cls, values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Takes `eval_steps` for batches beside `eval_every`, for a rhythm beside Transformers' words."""
        own = spellings_of(cls)["eval_steps"].name
        batches = "eval_steps" if own == "eval_steps" else "eval_batches"
        theirs = next((name for name in THEIRS if name in values), None)
        meaning = own
        if "eval_every" in values and batches not in values.keys() - {"eval_steps"}:
            meaning = batches
        elif theirs is not None and "eval_every" not in values:
            meaning = "eval_every"
        if "eval_steps" not in values or meaning == own:
            return super().translate(values, say)
        sense, beside = "validation batches in one evaluation", "eval_every"
        if meaning == "eval_every":
            sense, beside = "steps between two evaluations", theirs
        say(f"eval_steps = {values['eval_steps']} stands beside {beside}, so it counts {sense} ({meaning})")
        return super().translate({meaning if k == "eval_steps" else k: value for k, value in values.items()}, say)
