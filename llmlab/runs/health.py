"""What a run does about symptoms in its metrics: says and records them, ends, or rolls back to a healthy checkpoint. A
rollback ends the training with `RolledBack`, and the stage's function begins again in the same process from the
checkpoint, as a resumed run does: weights, optimizer, schedule, random states and KL controller are those of then, the
changed settings follow from the record, and so do the steps whose batches are passed over."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from llmlab.health.checks import ONLINE, Watch
from llmlab.health.symptoms import Event, changes_of, load_table
from llmlab.runs import checkpoints
from llmlab.runs.record import EVENTS, RunRecord, read_events, read_metrics
from llmlab.runs.start import on_main, rollbacks_of
from llmlab.settings.base import show, spellings_of
from llmlab.settings.errors import Unhealthy, UserError
from llmlab.settings.optimizer import OWN_RATES
from llmlab.terminal import safe

# what can change without another order of the data or other weights
IN_PROCESS = (
    *("learning_rate", "max_grad_norm", "weight_decay", "lora_dropout", "init_kl_coef", "clip_range", "ent_coef"),
    *("temperature", *OWN_RATES),
)
COLORS = {"warning": "yellow", "critical": "red"}


class RolledBack(Exception):
    """Ends a training that goes on from an earlier checkpoint."""


@dataclass(eq=False)
class Health(TrainerCallback):
    """Watches the metrics of a run; all processes do what the main one finds."""

    trainer: Any
    stage: str
    folder: Path
    record: RunRecord | None  # of the main process
    say: Callable[[str], None]
    ended: bool = False

    def __post_init__(self) -> None:
        settings = self.trainer.settings
        self.responses = {"warning": settings.on_warning, "critical": settings.on_critical}
        self.limits, self.most = settings.health.model_dump(), settings.max_rollbacks
        self.watch = Watch(self.limits, self.stage)
        leaves_out = "rollback" in self.responses.values() or settings.skip_spikes is not None
        if leaves_out and self.trainer.is_deepspeed_enabled:
            why = "not supported with DeepSpeed, which updates the weights within the backward pass; use DDP or FSDP2"
            raise UserError(f"on_warning, on_critical = rollback and skip_spikes: {why}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.record is not None and state.global_step:
            for line in read_metrics(self.folder):
                self.watch.add(line)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "train_runtime" not in logs:
            line = {**logs, "step": state.global_step}
            self.respond(*on_main(PartialState(), lambda: self.watch.add(line)))

    def respond(self, *events: Event) -> None:
        """Prints and records the events of a step, and does what the settings say about them."""
        ends: list[Exception] = []
        for event in sorted(events, key=lambda event: event.severity):  # critical ones first
            end = self._respond(event, "warn" if ends or self.ended else self.responses[event.severity])
            ends += [end] if end else []
        if ends:
            raise ends[0]

    def _respond(self, event: Event, response: str) -> Exception | None:
        """Writes an event, and returns what ends the training."""
        settings = self.trainer.settings
        changes: dict[str, tuple[Any, Any]] = {}
        fatal = event.symptom == "loss_not_finite"  # what found it ends the run where this returns
        if fatal and self.ended:  # the metrics show it too
            return None
        self.ended |= fatal
        if response == "rollback":
            names = {name: spellings_of(type(settings)).get(name) for name in IN_PROCESS}
            own = {setting.name for setting in names.values() if setting is not None}
            condition = load_table()[0][event.symptom].condition
            changes = {name: values for name, values in changes_of(condition, settings).items() if name in own}
            if event.action or not changes or condition in ("underfitting", "reward_flat"):
                response = "warn"  # going back would not help
        response = on_main(PartialState(), lambda: self._write(event, response, changes, fatal))
        if response == "rollback":
            return RolledBack()
        if response == "stop" and not fatal:
            setting = f"on_{event.severity}"
            ends = f"the run ends here, as {setting} = {self.responses[event.severity]} says"
            goes_on = f"its checkpoints remain: llmlab {self.stage} --resume {self.folder} {setting}=warn goes on"
            return Unhealthy(f"step {event.step}: {event.message}; {ends}; {goes_on}")
        return None

    def _write(self, event: Event, response: str, changes: dict[str, tuple[Any, Any]], fatal: bool) -> str:
        """Writes an event with what is done about it, which it returns, and prepares the run folder for a rollback."""
        assert self.record is not None
        if response == "rollback" and len(rollbacks_of(self.folder)) >= self.most:
            response = "stop" if event.severity == "critical" else "warn"
        actions = [event.action] if event.action else []
        if response == "rollback":
            first = event.since or event.step
            steps = [checkpoints.saved_step(path) for path in checkpoints.checkpoints(self.folder)]
            to = max((step for step in steps if step < first), default=0)
            checkpoints.supersede(self.folder, to or -1)
            self.record.roll_back(event, to, changes)
            values = (f"{name} {show(before)} -> {show(after)}" for name, (before, after) in changes.items())
            actions = [f"rolled back to {f'checkpoint-{to}' if to else 'the start'}", *values]
        elif response == "stop" or fatal:
            after = f" after {self.most} rollbacks" if self.responses[event.severity] == "rollback" else ""
            actions = [f"the run ends{after}"]
        event = replace(event, action="; ".join(actions))
        self.record.log_event(event)
        done = f"; [bold]{safe(event.action)}[/]" if event.action else ""
        self.say(f"step {event.step}  [{COLORS[event.severity]}]{event.severity}[/] {safe(event.message)}{done}")
        return response


def steps_to_pass_over(folder: Path, stage: str) -> set[int]:
    """Returns the steps on whose batches the training became unstable, each time as many more; completions are sampled
    anew instead."""
    symptoms, steps = load_table()[0], set[int]()
    for each in rollbacks_of(folder) if stage not in ONLINE else ():
        if symptoms[each["symptom"]].condition == "unstable":
            steps |= {*range(each["since"], each["step"] + len(steps) + 1)}
    return steps


def describe_events(folder: Path) -> str:
    """Returns how many health events a run had, and where they are; empty without one."""
    counts = Counter(f"{event.severity} events" for event in read_events(folder))
    counts["rollbacks"] = len(rollbacks_of(folder))
    parts = [f"{count} {what.removesuffix('s') if count == 1 else what}" for what, count in counts.items() if count]
    return f"{', '.join(parts)}: {folder / EVENTS}" if parts else ""
