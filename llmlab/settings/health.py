"""What a run does about symptoms in its metrics, and from which values on something is one. The checks are
`llmlab.health.checks`; the defaults of the limits are in `limits.yaml`."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from llmlab.settings.base import Resume, Settings, settings_of_table

Response = Literal["warn", "stop", "rollback"]

LIMITS = (
    "Limits of the checks, each with the name of its symptom; none turns a check off. Source: RL guide, section 7."
)
FACTS = {"panel": "Health", "resume": Resume.FREE}
HealthLimits = settings_of_table("HealthLimits", __name__, LIMITS, "limits", Annotated[float | None, Gt(0)], **FACTS)


class HealthSettings(Settings, panel="Health", resume=Resume.FREE):
    """What a run does about symptoms. Source: seed, RL guide, sections 6 and 7."""

    on_warning: Response = "warn"
    """What a run does about a warning: print and record it, end with exit code 4, or go back to the last healthy
    checkpoint with changed settings (symptoms of too little training, and of data, are printed all the same)."""
    on_critical: Response = "warn"
    """The same for critical symptoms. A loss, gradient or weight that is not finite ends a run in any case, unless it
    is rolled back; other limits depend on model and data, so that by default no run is lost to them."""
    max_rollbacks: Annotated[int, Gt(0)] = 3
    """Rollbacks of a run; after them a warning is printed, and a critical symptom ends the run."""
    skip_spikes: Annotated[float | None, Ge(3)] = None
    """Leave out updates whose loss or gradient norm exceeds the mean of the last 128 steps by so many standard
    deviations (6 is usual); none takes all updates that are finite."""
    health: HealthLimits = HealthLimits.model_construct()
