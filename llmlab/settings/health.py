"""What a run does about symptoms in its metrics, and from which values on something is one. The checks are
`llmlab.health.checks`; the defaults of the limits are the RL guide's, section 7."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from llmlab.settings.base import Resume, Settings

Limit = Annotated[float | None, Gt(0)]
Response = Literal["warn", "stop", "rollback"]


class HealthLimits(Settings):
    """Limits of the checks, each with the name of its symptom; none turns a check off. Source: seed, RL guide,
    section 7."""

    panel: ClassVar[str] = "Health"
    resume: ClassVar[Resume] = Resume.FREE

    loss_rising: Limit = 0.2
    """Rise of the training loss above its lowest level, as a share of it, beyond what it varies by."""
    loss_spike: Limit = 6.0
    """Standard deviations of the last 128 logged losses by which a loss exceeds their mean."""
    gradient_norm_high: Limit = 5.0
    """Median gradient norm before clipping, after warmup, where it is also twice that of the run's start."""
    gradient_norm_exploding: Limit = 10.0
    """Gradient norm before clipping, where it is also ten times the median before it."""
    value_loss_exploding: Limit = 10.0
    """Value loss over the square of the largest rewards and returns so far."""
    kl_high: Limit = 0.2
    """KL divergence to the reference model, in nats per token."""
    kl_too_high: Limit = 0.3
    """KL divergence to the reference model that is critical."""
    perplexity_high: Limit = 20.0
    """Validation perplexity, once an earlier one was below."""
    perplexity_low: Limit = 2.0
    """Training perplexity, where the validation perplexity is more than twice as high."""
    entropy_collapse: Limit = 1.0
    """Policy entropy in nats per token; of a policy that started below 2 nats, half of its start."""
    gate_regression: Limit = 0.05
    """Fall of a gate below its best score, as a share of it, in two measurements, beyond what it varies by."""
    diversity_falling: Limit = 0.3
    """Fall of distinct_n below its best, as a share of it."""
    repetition: Limit = 0.3
    """Fall of the reward repetition_penalty below its best, as a share of it, or rise of self_similarity."""
    length_out_of_range: Limit = 3.0
    """Times by which completions are longer or shorter than at the start."""
    overfitting: Limit = 0.05
    """Rise of the validation loss above its best, as a share of it, in two evaluations, while the training loss
    falls."""
    underfitting: Limit = 0.02
    """Share of its start by which the loss has to fall within 50 logged lines after warmup."""
    reward_flat: Limit = 50.0
    """Logged lines within which the reward has to rise beyond what it varies by."""
    groups_alike: Limit = 0.9
    """Share of groups with equal rewards, below the highest reward, in ten logged lines."""
    win_rate_flat: Limit = 0.1
    """Fall of the loss, as a share of its start, with which the validation win rate has to rise."""
    source_dead: Limit = 0.01
    """Loss of a source, from its first line on, that teaches nothing."""
    source_hard: Limit = 0.02
    """Share of its start by which the loss of a source has to fall while the whole loss falls by 10 %."""


class HealthSettings(Settings):
    """What a run does about symptoms. Source: seed, RL guide, sections 6 and 7."""

    panel: ClassVar[str] = "Health"
    resume: ClassVar[Resume] = Resume.FREE

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
    health: HealthLimits = HealthLimits()
