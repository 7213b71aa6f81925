"""What each process of a distributed run does in `test_several_processes.py`; no test itself.

    python -m torch.distributed.run --nproc_per_node 2 ranks.py FOLDER

`FOLDER/jobs.json` is a list of `{"do": a function below, ...}`, done one after the other by processes that are started
once.  What the functions return goes to `FOLDER/said-RANK.json`.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
TOKENS = list(range(5, 21))  # whose logits a run returns
WRITTEN = set()  # what this process opens for writing


def note_writing(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and set(arguments[1] or "") & set("wax+"):
        WRITTEN.add(os.path.realpath(arguments[0]))


@contextmanager
def sampling_by_prompt(scripts=()):
    """Lets every token that is sampled depend on its prompt, its place among equal prompts and its position alone.

    So one process and two sample the same completions, whichever prompts each of them has.  Of `scripts`, lists of
    tokens, each completion is one, where there are any.  `generate` samples in place of llmlab's loop.
    """
    import torch
    from transformers import GenerationMixin

    from llmlab import decoding

    generate, multinomial, why_not = GenerationMixin.generate, torch.multinomial, decoding.why_not

    def by_prompt(self, *args, **kwargs):
        if "custom_generate" in kwargs:  # which only prepares
            return generate(self, *args, **kwargs)
        rows = zip(kwargs["input_ids"] if "input_ids" in kwargs else args[0], kwargs["attention_mask"], strict=True)
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in rows]
        before, keys = Counter(), []
        for prompt in prompts:
            keys.append((prompt, before[prompt]))
            before[prompt] += 1
        position = count()

        def draw(probabilities, num_samples):
            step = next(position)
            if scripts:
                chosen = [random.Random(f"{key}").choice(scripts) for key in keys]
                return torch.tensor([[script[min(step, len(script) - 1)]] for script in chosen])
            uniform = torch.tensor([random.Random(f"{key} {step}").random() for key in keys]).unsqueeze(1)
            below = probabilities.cumsum(-1)
            return torch.searchsorted(below, uniform * below[:, -1:]).clamp(max=probabilities.shape[-1] - 1)

        torch.multinomial = draw
        try:
            return generate(self, *args, **kwargs)
        finally:
            torch.multinomial = multinomial

    GenerationMixin.generate, decoding.why_not = by_prompt, lambda model: "sampled by prompt"
    try:
        yield
    finally:
        GenerationMixin.generate, decoding.why_not = generate, why_not


def train(stage, settings, resume=None, free=False, sharded=False):
    """Runs a stage, sampling by prompt unless it is free to use its random states.

    Returns what Accelerate made of the processes, for each step the rows of each forward pass of this one, and the
    logits of some tokens at the end.
    """
    import torch

    from llmlab.stages import STAGES

    sampling = nullcontext() if free else sampling_by_prompt(calls_of(settings) if "environment" in settings else ())
    with sampling, sharding() if sharded else nullcontext(), watched() as seen:
        STAGES[stage].function(STAGES[stage].settings_class(**settings), resume=resume)
        if "trainer" not in seen:  # only its final save was left
            return None
        trainer = seen.pop("trainer")
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=torch.tensor([TOKENS])).logits
        state = trainer.accelerator.state
        return {
            "type": state.distributed_type.value,
            "processes": state.num_processes,
            **seen,
            "logits": logits.tolist(),
        }


def calls_of(settings):
    """Returns the tokens of two turns that pull a lever, and of one that pulls none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["policy_checkpoint"])
    calls = [{"name": "pull", "arguments": {"name": name}} for name in ("cat", "dog")]
    turns = [*(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls), "No."]
    return [tokenizer.encode(f"{turn}<|im_end|>", add_special_tokens=False) for turn in turns]


@contextmanager
def watched():
    """Keeps the last trainer, and for each step the rows of each forward pass but for padding and repeated ones."""
    from transformers import Trainer

    original, seen = Trainer.training_step, {"rows": {}}

    def step(self, model, inputs, *args, **kwargs):
        seen["trainer"] = self
        if "labels" in inputs:
            rows, scored = inputs["input_ids"], inputs["labels"] != -100
            rows = [
                row[: last.nonzero().max() + 1].tolist() for row, last in zip(rows, scored, strict=True) if last.any()
            ]
            seen["rows"].setdefault(str(self.state.global_step + 1), []).append(rows)
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = step
    try:
        yield seen
    finally:
        Trainer.training_step = original


def resume(stage, settings, whole, step, free=False, sharded=False):
    """Runs a stage again from a checkpoint of a whole run, in a copy of its folder."""
    from accelerate import PartialState

    copy = Path(settings["output_dir"])
    with PartialState().main_process_first():
        if not copy.exists():
            shutil.copytree(whole, copy)
    return train(stage, settings, resume=copy / f"checkpoint-{step}", free=free, sharded=sharded)


def refuse(stage, settings, resume=None):
    """Starts a run that cannot be, and returns what it says."""
    from llmlab.settings.errors import UserError

    try:
        train(stage, settings, resume)
    except UserError as error:
        return str(error)


def interrupt(stage, settings, rank, step, number):
    """Runs a stage whose process of that rank alone hears a signal at the beginning of a step; returns how it ends."""
    try:
        with acting_at(rank, step, lambda: signal.raise_signal(number)):
            train(stage, settings)
    except SystemExit as left:
        return left.code


def command(words, rank, step, sharded=False):
    """Runs a command whose process of that rank is killed at the beginning of a step."""
    from llmlab.cli.app import main

    with sharding() if sharded else nullcontext(), acting_at(rank, step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        main(words)


@contextmanager
def acting_at(rank, step, act):
    """Lets the process of one rank do something at the beginning of a step of every trainer made here."""
    from transformers import TrainerCallback

    class Act(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.process_index == rank and state.global_step == step - 1:
                act()

    with every_trainer(Act):
        yield


@contextmanager
def every_trainer(callback):
    """Adds a callback of this class to every trainer that is made here."""
    from transformers import Trainer

    original = Trainer.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(callback())

    Trainer.__init__ = init
    try:
        yield
    finally:
        Trainer.__init__ = original


@contextmanager
def sharding():
    """Lets runs be sharded by FSDP2, in this and no other context."""
    from accelerate import state
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original, before = AcceleratorState.__init__, PartialState().distributed_type

    def with_cpu(self, *args, fsdp_plugin=None, **kwargs):  # Accelerate leaves CPUs out of FSDP, which torch does not
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    environment = dict(os.environ)
    os.environ |= FSDP2
    state.AcceleratorState.__init__ = with_cpu
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        state.AcceleratorState.__init__ = original
        os.environ.clear()
        os.environ |= environment
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = before


def mark(stage, settings):
    """Runs a stage under FSDP2, and fills each process' half of every trained tensor with its rank and 1."""
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    class Mark(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            trained = [p for p in model.parameters() if p.requires_grad]
            assert trained and all(isinstance(p, DTensor) and len(p.to_local()) == len(p) / 2 for p in trained)
            for p in trained:
                p.detach().to_local().fill_(args.process_index + 1.0)

    with sharding(), every_trainer(Mark):
        train(stage, settings)


def attempt(job):
    """Does a job, and returns how it failed."""
    import traceback

    try:
        return globals()[job.pop("do")](**job)
    except BaseException:
        return traceback.format_exc()


def main(folder):
    from accelerate import PartialState

    process = PartialState(cpu=True)
    assert process.num_processes == int(os.environ["WORLD_SIZE"]) == 2, process
    said = []
    for job in json.loads((folder / "jobs.json").read_text()):
        said.append(globals()[job.pop("do")](**job))
        process.wait_for_everyone()
    results = {"said": said, "written": sorted(WRITTEN)}
    (folder / f"said-{process.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.addaudithook(note_writing)
    main(Path(sys.argv[1]))
