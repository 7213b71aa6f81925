"""What a run will take before it begins: steps, tokens, memory by part, time and disk, and changes that make it fit.
The memory is that of a rehearsed step (`rehearsal.py`), the time its FLOPs at a stated utilization of the device."""

import gc
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from timeit import repeat
from typing import Any

import torch
from rich.text import Text

from llmlab.data.chat.rows import row_lengths
from llmlab.data.tokenizer import load_tokenizer
from llmlab.hardware import Hardware, probe
from llmlab.inference import context_length
from llmlab.model import build_config, load_config, measure, read_adapter
from llmlab.model.size import BYTES, state_values
from llmlab.runs.rehearsal import Rehearsals, Scene, rehearse, rehearse_layers
from llmlab.settings.base import show
from llmlab.settings.errors import UserError, reason_of
from llmlab.settings.files import read_table
from llmlab.terminal import duration, human

PLANNED_BYTES, PLANNED_FLOPS = 2e8, 1e13  # of weights and of a run, from which a run opens with its plan
TABLES = read_table("llmlab.runs", "plan")
UTILIZATION, SHARDINGS = TABLES["utilization"], TABLES["shardings"]
BLOCK_KERNELS = 2.1e6  # bytes of oneDNN's kernels for each block of attention in bf16, measured
DECODE = 0.5  # share of memory bandwidth in sampling
STATES = {"use_lora", "use_qlora", "optimizer"}  # settings on which these parts depend
LENGTHS = ("model", "max_new_tokens", "max_length", "max_seq_len")


@dataclass(frozen=True)
class Plan:
    """What a run takes; bytes on one device, at the phase in which they are most; None is not known. `seconds` is
    without evaluation and saving; `flops` are those of the whole run on one device."""

    parameters: int
    trained: int
    steps: int | None
    tokens: float | None
    phase: str
    parts: dict[str, int]
    memory: int
    flops: float | None
    seconds: float | None
    disk: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory or not self.memory

    def summary(self) -> list[tuple[str, str]]:
        """Returns the rows about model, steps, tokens and disk."""
        share = f", {human(self.trained)} trained ({self.trained / self.parameters:.2%})"
        rows = [("model", f"{human(self.parameters)} parameters{share}")]
        rows += [("steps", f"{self.steps:,}")] if self.steps else []
        rows += [("tokens", f"{human(self.tokens)}, {human(self.flops)} FLOPs a device")] if self.tokens else []
        rows += [("disk", f"about {human(self.disk, 'B')}"), *self.rows()]
        return [*rows, ("fits", "yes")] if self.fits else rows

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows about memory and time that open a run."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {human(size, 'B')}" for name, size in parts if size > 0.005 * self.total)
        memory = f"about {human(self.total, 'B')} of {human(self.memory, 'B')} ({self.phase}): {shares}"
        return [("memory", memory), ("time", f"about {duration(self.seconds)}" if self.seconds else "not known")]

    def record(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**asdict(self), "total": self.total, "fits": self.fits}


def count_steps(rows: int, *, rows_per_batch: int, accumulation: int, epochs: float) -> int:
    """Returns the optimizer steps of so many epochs, as Trainer counts: the last, smaller batch is one of its own."""
    return math.ceil(epochs * max(math.ceil(math.ceil(rows / rows_per_batch) / accumulation), 1))


def read_scene(settings: Any, *, longest: int | None = None) -> Scene:
    """Returns what a configuration says of the model and its `longest` row (prompt, where completions are sampled)."""
    if hasattr(settings, "model"):
        shape, chosen = settings.model, settings.model.model_fields_set
        only_tokenizer = "tokenizer_name" in chosen and "vocab_size" not in chosen
        if only_tokenizer and Path(shape.tokenizer_name).expanduser().is_dir():
            shape = shape.model_copy(update={"vocab_size": len(load_tokenizer(shape.tokenizer_name))})
        config = load_config(settings.init_from) if settings.init_from else build_config(shape)
        return Scene(config, None, min(settings.model.max_seq_len, config.max_position_embeddings))
    source = settings.policy_checkpoint
    adapter = read_adapter(source, lora_only=True)
    config = load_config(source if adapter is None else adapter.base)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    new = getattr(settings, "max_new_tokens", 0)
    limits = [context - new, (longest or math.inf) - new * hasattr(settings, "samples")]  # rows of samples have both
    if new:
        limits.append(settings.prompt_limit or math.inf)
        prompt = int(max(min(limits), 1))
        return Scene(config, adapter, prompt + new, prompt)
    limits.append(settings.max_length if hasattr(settings, "max_length") else settings.max_seq_len)
    return Scene(config, adapter, int(min(limits)))


def describe_cost(run: Any, trainer: Any, steps: int) -> list[tuple[str, str | Text]]:
    """Returns the rows about memory and time that open a run, with a warning where it is not expected to fit. What
    takes seconds, on small models, is not planned: the plan would take as long."""
    hardware, model = run.hardware, trainer.model
    sizes = [parameter.nbytes for parameter in model.parameters()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    least = f"weights {human(sum(sizes), 'B')}, gradients {human(trained, 'B')} of {human(hardware.memory, 'B')}"
    if run.process.num_processes > 1:
        return [("memory", f"at least {least} on each device; llmlab plan --processes says more")]
    mean, longest = row_lengths(trainer.train_dataset) or (None, None)
    tokens = (mean or 512) * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    if sum(sizes) < PLANNED_BYTES and sum(sizes) / 4 * 6 * tokens * steps < PLANNED_FLOPS:
        return [("memory", f"at least {least}; a run of seconds is not planned further")]
    units = dict.fromkeys({"epochs", "num_episodes"} & type(run.settings).model_fields.keys())
    settings = run.settings.model_copy(update={**units, "max_steps": steps})
    try:
        plan = make_plan(run.function, settings, hardware, mean=mean, longest=longest)
    except UserError as error:
        return [("memory", f"at least {least}; {error}")]
    finally:
        gc.collect()  # tensors without memory in reference cycles, which slowed the first hundreds of steps by a sixth
    rows: list[tuple[str, str | Text]] = list(plan.rows())
    if not plan.fits:
        advice = f"more than this device has: expect it to run out; llmlab plan {run.stage} says what to change"
        rows.append(("warning", Text(advice, style="yellow")))
    return rows


def make_plan(
    function: Any,
    settings: Any,
    hardware: Hardware,
    *,
    rows: int | None = None,
    mean: float | None = None,
    longest: int | None = None,
    processes: int = 1,
    sharding: str = "none",
    utilization: float | None = None,
) -> Plan:
    """Returns the plan of a run of a stage's function, each process on such a device; `rows`, `mean` and `longest`
    (tokens of a row or prompt; None: as long as allowed) are of the data, `utilization` a share of the peak FLOP/s."""
    if hasattr(settings, "in_steps"):
        settings = settings.in_steps(processes)
        if settings.environment is not None:
            settings = settings.in_completions(context_length(read_scene(settings)))
    scene = read_scene(settings, longest=longest)
    try:
        rehearsals = rehearse_layers(function, settings, hardware, scene, processes)
        phase, parts = plan_memory(rehearsals, settings, hardware, scene.config, processes, sharding)
    except UserError:
        raise
    except Exception as error:  # an architecture or argument with operators that need values
        problem = "not planned: this model's step cannot be followed without memory"
        raise UserError(f"{problem}: {reason_of(error)}") from error
    trained = round(rehearsals.total(lambda run: sum(p.numel() for p in _trained(run))))
    states = round(rehearsals.total(lambda run: _state_bytes(run, settings.optimizer)))
    notes = []
    steps, batch_rows, passes = _count_work(settings, rows, processes)
    tokens = flops = seconds = None
    if mean is not None and mean > scene.length:
        raise UserError(f"--mean {mean:g}: expected at most the longest row, {scene.length} tokens")
    if steps is None:
        notes.append("steps, tokens and time are not known without the number of rows: --rows N")
    else:
        share = (mean or scene.length) / scene.length
        tokens = steps * batch_rows * processes * scene.length * share
        peak = (hardware.peak_flops or measured_peak(hardware)) * (utilization or UTILIZATION[hardware.device])
        step, sampling = _step_work(rehearsals, settings, hardware, passes, processes, peak)
        flops = steps * step * share
        seconds = flops / peak + sampling * steps
    total = measure(scene.config).total
    checkpoint = 4 * trained + states
    kept = settings.save_total_limit or math.ceil((steps or 1) / getattr(settings, "save_every", settings.eval_every))
    disk = 4 * trained + (kept + 1) * checkpoint  # one more while it is written
    if processes > 1:
        notes.append(f"{processes} processes, each on such a device; sharding: {sharding}")
    if "paged" in settings.optimizer:
        notes.append("a paged optimizer's states may move to the host's memory")
    whole = total + trained if trained < total else total
    return Plan(whole, trained, steps, tokens, phase, parts, hardware.memory, flops, seconds, disk, tuple(notes))


def fitting_changes(
    function: Any,
    settings: Any,
    hardware: Hardware,
    memory: int | None = None,
    at_most: int = 3,
    at_most_plans: int = 100,
    **options: Any,
) -> list[str]:
    """Returns changes of settings, the cheapest first, with each of which alone the run fits into `memory` (None: the
    device's); else the shortest list of all together, the fewest GPUs that shard it, or nothing. Each plan takes
    seconds."""
    limit, tries = memory or hardware.memory, iter(range(at_most_plans))
    chosen = {name: getattr(settings, name) for name in settings.model_fields_set}
    for first, *others in type(settings).alternatives:  # of one quantity in several units, the one a run counts in
        chosen = {name: value for name, value in chosen.items() if first not in chosen or name not in others}

    def fits(changes: dict[str, Any], **others: Any) -> bool:
        if next(tries, None) is None:
            return False
        try:
            changed = type(settings).model_validate({**chosen, **changes})
            return make_plan(function, changed, hardware, **{**options, **others}).total <= limit
        except (UserError, ValueError):
            return False

    now = make_plan(function, settings, hardware, **options)
    states = sum(size for part, size in now.parts.items() if part in SHARDINGS["zero3"])
    alone, together = [], {}
    for kind in _changes(settings):
        before, together = together, {**together, **kind[-1]}
        if states > limit and not STATES & {*together}:
            continue  # they change activations alone
        if fits(kind[-1]):
            alone.append(_words(next((change for change in kind[:-1] if fits(change)), kind[-1])))
            if len(alone) == at_most:
                return alone
        elif not alone and before and fits(together):
            return [_words(together)]
    if alone or hardware.device != "cuda" or getattr(settings, "use_qlora", False):
        return alone
    kinds = [kind[-1] for kind in _changes(settings) if not {*kind[-1]} & {*STATES, *LENGTHS}]
    for count in (2, 4, 8, 16):
        for changes in ({}, *kinds, {name: value for kind in kinds for name, value in kind.items()}):
            if count >= options.get("processes", 1) and fits(changes, processes=count, sharding="fsdp2"):
                return [" and ".join(filter(None, (f"{count} such GPUs with --accelerate fsdp2", _words(changes))))]
    return []


def _words(changes: dict[str, Any]) -> str:
    return " with ".join(f"{name} = {show(value)}" for name, value in changes.items())


def _changes(settings: Any) -> Iterator[list[dict[str, Any]]]:
    """Yields kinds of changes, each from the smallest to the largest."""
    name = "mini_batch_size" if hasattr(settings, "mini_batch_size") else "batch_size"
    batch, passes = getattr(settings, name), settings.gradient_accumulation_steps
    halves = [batch >> shift for shift in range(1, batch.bit_length()) if batch % (1 << shift) == 0]
    kinds = [
        [
            {name: half} | ({} if passes is None else {"gradient_accumulation_steps": passes * batch // half})
            for half in halves
        ],
        [] if settings.gradient_checkpointing is True else [{"gradient_checkpointing": True}],
    ]
    if hasattr(settings, "model"):
        shape, length = settings.model, settings.model.max_seq_len
        kinds.append([{"model": shape.model_copy(update={"max_seq_len": length // part})} for part in (2, 4)])
    else:
        longest = next(name for name in LENGTHS[1:] if hasattr(settings, name))
        lengths = {name: getattr(settings, name, None) or 0 for name in (longest, "max_prompt_length")}
        kinds.append([{name: size // part for name, size in lengths.items() if size >= part} for part in (2, 4)])
    kinds.append([{"use_lora": True}] if getattr(settings, "use_lora", None) is False else [])
    kinds.append([{"optimizer": "adamw_8bit"}] if settings.optimizer == "adamw" else [])
    kinds.append([{"use_lora": True, "use_qlora": True}] if getattr(settings, "use_qlora", None) is False else [])
    yield from filter(None, kinds)


def _count_work(settings: Any, rows: int | None, processes: int) -> tuple[int | None, float, float]:
    """Returns the optimizer steps, and of each, on one process, the rows and forward passes."""
    epochs = getattr(settings, "epochs", None)
    if hasattr(settings, "rollout"):
        rollout, passes = settings.rollout(processes), settings.gradient_accumulation_steps
        steps = settings.max_steps if epochs is None else rows and settings.steps_for(rows, processes)
        return steps, rollout.completions / rollout.updates / processes, passes
    is_pairs = settings.rows_per_pass == "mini_batch_size"
    size, passes = getattr(settings, settings.rows_per_pass), settings.accumulation(processes)
    steps = settings.max_steps
    if epochs is not None:
        steps = rows and count_steps(rows, rows_per_batch=size * processes, accumulation=passes, epochs=epochs)
    return steps, size * passes * (1 + is_pairs), passes


def _step_work(
    rehearsals: Rehearsals, settings: Any, hardware: Hardware, passes: float, processes: int, peak: float
) -> tuple[float, float]:
    """Returns the FLOPs of an optimizer step on one process, and its seconds of sampling at `peak` FLOP/s."""
    run, total = rehearsals.runs[0], rehearsals.total
    flops = {name: total(lambda run: run.ledger.flops[name]) for name in run.ledger.flops}  # noqa: B023
    step = (flops["forward"] + flops["backward"]) * passes / run.settings.gradient_accumulation_steps
    if not hasattr(settings, "rollout"):
        return step, 0.0
    rollout = settings.rollout(processes)
    completions = rollout.completions / processes
    scoring = flops.get("scoring", 0) * completions / run.rollout.completions
    step += (scoring + flops.get("sampling", 0)) / rollout.updates
    parameters = total(lambda run: sum(p.numel() for p in run.policy.model.parameters()))
    read = BYTES[hardware.dtype] * parameters + total(lambda run: run.ledger.most.get("KV cache", 0)) / 2
    token = max(read / (DECODE * hardware.bandwidth), 2 * parameters * completions / peak)
    return step, token * settings.max_new_tokens / rollout.updates


def plan_memory(
    rehearsals: Rehearsals, settings: Any, hardware: Hardware, config: Any, processes: int = 1, sharding: str = "none"
) -> tuple[str, dict[str, int]]:
    """Returns the phase that takes the most memory of each process's device, and the bytes of each part in it."""
    total = rehearsals.total
    shares = dict.fromkeys(SHARDINGS[sharding], 1 / processes)
    rehearsed = total(lambda run: _state_bytes(run, run.settings.optimizer))
    ratio = total(lambda run: _state_bytes(run, settings.optimizer)) / max(rehearsed, 1)
    phase, parts = rehearsals.peak({**shares, "optimizer": shares.get("optimizer", 1) * ratio})
    kernels = BLOCK_KERNELS * rehearsals.runs[0].ledger.blocks if hardware.device == "cpu" else 0
    libraries, spare = (TABLES[name][hardware.device] for name in ("libraries", "spare"))
    parts["libraries"] = round(libraries + spare * sum(parts.values()) + kernels)
    if processes > 1 and sharding == "none":  # DDP's buckets
        parts["communication"] = round(total(lambda run: 4 * sum(p.numel() for p in _trained(run))))
    elif processes > 1 and sharding in ("zero3", "fsdp2"):  # a layer's weights, and the next one's
        weights = total(lambda run: sum(p.nbytes for p in run.trainer.model.parameters()))
        parts["communication"] = round(2 * weights / (config.get_text_config().num_hidden_layers + 1))
    rewards = settings.all_rewards() if hasattr(settings, "all_rewards") else ()
    models = {str(reward.parameters["model"]) for reward in rewards if "model" in reward.parameters}
    if models:
        parts["reward model"] = sum(4 * measure(load_config(name)).total for name in models)
    return phase, parts


def _trained(run: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in run.trainer.model.parameters() if parameter.requires_grad]


def _state_bytes(run: Any, optimizer: str) -> float:
    """Returns the bytes of the states of an optimizer, which need not be the rehearsed one."""
    if run.settings.optimizer == optimizer:
        states = (value for state in run.trainer.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    shapes = [(name, tuple(p.shape)) for name, p in run.trainer.model.named_parameters() if p.requires_grad]
    kinds = ["embeddings" if "embed" in name else "mlp" for name, _ in shapes]
    return 4 * sum(state_values(optimizer, kind, shape) for kind, (_, shape) in zip(kinds, shapes, strict=True))


def measure_step(function: Any, settings: Any, hardware: Hardware, scene: Scene) -> tuple[int, float]:
    """Takes real optimizer steps with random weights on this machine; returns the highest memory of the device beyond
    what was there, in bytes, and the seconds of a step of as many passes as were rehearsed."""
    memory, before = getattr(torch, hardware.device), 0
    if hardware.device == "cpu":
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest counts from here
    elif hardware.device == "cuda":
        memory.reset_peak_memory_stats()
    run = rehearse(function, settings, hardware, scene, follow=False)
    seconds = run.trainer.state.log_history[-1]["train_runtime"] / run.trainer.state.global_step
    if hardware.device == "cpu":
        return _resident("VmHWM") - before, seconds
    peak = memory.max_memory_reserved() if hardware.device == "cuda" else memory.driver_allocated_memory()
    return peak, seconds


def measure_plan(plan: Plan, function: Any, settings: Any, hardware: Hardware) -> Plan:
    """Returns a plan with the memory and the time of real steps on this machine; the shares of its parts stay."""
    if probe(settings.device, settings.dtype).name != hardware.name:
        raise UserError("--measure: it measures this machine; leave --hardware out")
    scene = read_scene(settings)
    step = rehearse(function, settings, hardware, scene).ledger.flops.total()
    peak, seconds = measure_step(function, settings, hardware, scene)
    parts = {name: round(size * peak / plan.total) for name, size in plan.parts.items()}
    notes = (*plan.notes, f"measured: {human(peak, 'B')}, {human(step / seconds)} FLOP/s")
    return replace(plan, parts=parts, seconds=plan.flops and plan.flops * seconds / step, notes=notes)


def _resident(key: str) -> int:
    """Returns a size of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise UserError("--measure: on a CPU it needs Linux, whose /proc says what a process takes")
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])


@cache
def measured_peak(hardware: Hardware) -> float:
    """Returns the FLOP/s of a product of matrices on this machine's device, the best of a few."""
    size = 1024 if hardware.device == "cpu" else 4096
    ones = torch.ones(size, size, dtype=hardware.torch_dtype, device=hardware.device)  # draws no random numbers
    return 2 * size**3 / min(repeat(lambda: (ones @ ones)[0, 0].item(), number=1, repeat=4))


def needs_checkpointing(run: Any, rows: Any) -> bool:
    """Returns whether a run's step needs gradient checkpointing to fit; False for one that cannot be planned."""
    settings = run.settings.model_copy(update={"gradient_checkpointing": False})
    try:
        return not make_plan(run.function, settings, run.hardware, longest=(row_lengths(rows) or (None, None))[1]).fits
    except UserError:
        return False
    finally:
        gc.collect()  # tensors without memory in reference cycles
