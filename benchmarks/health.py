"""What watching over a run costs: the share of an optimizer step that its guard and its checks take.

    python benchmarks/health.py [--steps 200] [--width 256] [--layers 4] [--skip-spikes 6]

One pretraining on the demo stories, on a CPU, with a line logged at each step, which is ten times as often as by
default.  The guard (before each update) and the checks (at each logged line) are timed in place, and in every other
step left out, so that whole steps with and without them can be compared too.  On a CPU nothing runs later than it is
called: their own times are the cost, and the ratio of steps is mostly the machine's noise.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback

from llmlab import PretrainSettings, pretrain
from llmlab.data.tokenizer import learn_bpe
from llmlab.runs.health import Health
from llmlab.runs.progress import ProgressLine
from llmlab.runs.trainer import Guard
from llmlab.settings.data import DataSource

STORIES = DataSource(name="demo/stories", subset="2MB")


class Steps(TrainerCallback):
    """Times whole steps, from the beginning of one to that of the next."""

    def __init__(self):
        self.begins, self.parts = [], {"guard": [], "checks": []}

    def on_step_begin(self, *args, **kwargs):
        self.begins.append(time.perf_counter())

    def time(self, owner, name, part):
        """Times a method, in every other step alone."""
        original = getattr(owner, name)

        def method(*args, **kwargs):
            if len(self.begins) % 2:
                return None
            began = time.perf_counter()
            result = original(*args, **kwargs)
            self.parts[part].append(time.perf_counter() - began)
            return result

        setattr(owner, name, method)
        return lambda: setattr(owner, name, original)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--skip-spikes", type=float, default=6.0)
    options = parser.parse_args()
    steps = Steps()
    undo = [steps.time(Guard, "before_update", "guard"), steps.time(Health, "on_log", "checks")]
    begin, ProgressLine.on_step_begin = ProgressLine.on_step_begin, steps.on_step_begin
    try:
        with tempfile.TemporaryDirectory() as folder:
            learn_bpe([STORIES], 1024, Path(folder) / "tokenizer", show_progress=False)
            tokenizer = f"{folder}/tokenizer"
            shape = {"d_model": options.width, "n_heads": 4, "n_kv_heads": 4, "d_ff": 3 * options.width}
            settings = PretrainSettings(
                model={**shape, "n_layers": options.layers, "max_seq_len": 256, "tokenizer_name": tokenizer},
                datasets=[STORIES], output_dir=f"{folder}/run", max_steps=options.steps, log_every=1, eval_every=10**6,
                batch_size=8, gradient_accumulation_steps=1, warmup_steps=10, skip_spikes=options.skip_spikes,
                validation_fraction=0, compile=False, device="cpu", dtype="fp32",
            )  # fmt: skip
            pretrain(settings, console=Console(quiet=True))
    finally:
        ProgressLine.on_step_begin = begin
        for each in undo:
            each()
    lengths = [after - before for before, after in zip(steps.begins, steps.begins[1:], strict=False)][2:]
    step = statistics.median(lengths)
    print("| part | median | of a step |\n| --- | ---: | ---: |")
    for part, times in steps.parts.items():
        print(f"| {part} | {statistics.median(times) * 1e6:.0f} us | {statistics.median(times) / step:.2%} |")
    # the second, fourth, ... steps are watched
    ratio = statistics.median(watched / without for without, watched in zip(lengths[::2], lengths[1::2], strict=False))
    print(f"| whole steps, watched over others | {step * 1e3:.0f} ms | {ratio - 1:+.2%} |")


if __name__ == "__main__":
    main()
