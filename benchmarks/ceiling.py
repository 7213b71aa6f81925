"""What share of a pretraining step are the matrix products it cannot do without, at the machine's best speed for them?

    python benchmarks/ceiling.py [--steps 6] [--batch 4] [--sequence 512] [--layers 30] [--eager] [--fresh-memory]

Each step of `llmlab pretrain` at SmolLM2-135M's shape is followed, in the same thread, by its matrix products alone,
of the same number, shapes and dtype: of every linear layer and the head forward, by input and by weight, and those of
causal attention in blocks of 64 queries.  Operands are reused, outputs are allocated before: no copy, no cast, nothing
else.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

from train_step import SHAPE, make_rows, make_trainer

BLOCK = 64  # queries that attention takes at once


def list_products(options, dtype):
    """Returns the products of a step as (times, batch, rows, inner, columns)."""
    from llmlab.model.loss import chunk_tokens

    tokens, width, inner = options.batch * options.sequence, SHAPE["hidden"], SHAPE["inner"]
    dim = width // SHAPE["heads"]
    small = SHAPE["kv_heads"] * dim
    layers = [(width, width)] * 2 + [(width, small)] * 2 + [(width, inner)] * 2 + [(inner, width)]
    products = []
    scored = options.batch * (options.sequence - 1)
    chunk = chunk_tokens(scored, SHAPE["vocab"], dtype, on_cpu=True)
    for times, rows, (n_in, n_out) in [
        *((options.layers, tokens, shape) for shape in layers),
        (scored // chunk, chunk, (width, SHAPE["vocab"])),
        (int(scored % chunk > 0), scored % chunk, (width, SHAPE["vocab"])),
    ]:
        products += [(times, 1, rows, n_in, n_out), (times, 1, rows, n_out, n_in), (times, 1, n_out, rows, n_in)]
    batch, queries = options.batch * SHAPE["kv_heads"], BLOCK * SHAPE["heads"] // SHAPE["kv_heads"]
    for keys in range(BLOCK, options.sequence + 1, BLOCK):
        shapes = [(queries, dim, keys)] * 2 + [(queries, keys, dim)] * 2 + [(keys, queries, dim)] * 2
        products += [(options.layers, batch, *shape) for shape in shapes]
    return products


def count_flops(products):
    return sum(2 * times * batch * rows * inner * columns for times, batch, rows, inner, columns in products)


def time_turns(options, name):
    """Returns the seconds of each step, and of the bare products run right after it in the same thread, and the FLOP
    of these."""
    import torch
    from transformers import TrainerCallback

    from llmlab.hardware import probe, reuse_freed_memory

    machine, work, seconds = probe(), [], {"step": [], "products": []}
    products = list_products(options, machine.torch_dtype)
    for times, batch, rows, inner, columns in products:
        left, right = (torch.randn(batch, *size).to(machine.torch_dtype) for size in ((rows, inner), (inner, columns)))
        work.append((times, left, right, torch.bmm(left, right)))

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            middle = time.perf_counter()
            for times, left, right, out in work:
                for _ in range(times):
                    if len(left) == 1:
                        torch.mm(left[0], right[0], out=out[0])
                    else:
                        torch.bmm(left, right, out=out)
            seconds["step"].append(middle - self.began)
            seconds["products"].append(time.perf_counter() - middle)

    memory = nullcontext() if options.fresh_memory else reuse_freed_memory(machine.device)
    with tempfile.TemporaryDirectory() as folder, memory:
        make_trainer(name, make_rows(options), options, [Turns()], folder).train()
    return seconds, count_flops(products)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="turns of each; the first two are warm-up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--fresh-memory", action="store_true", help="return freed memory to the system, as glibc does")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    name = "llmlab-eager" if options.eager else "llmlab"
    seconds, flops = time_turns(options, name)
    pairs = list(zip(seconds["step"][2:], seconds["products"][2:], strict=True))
    share = statistics.median(products / step for step, products in pairs)
    step, products = (statistics.median(column) for column in zip(*pairs, strict=True))
    peak = flops / products / 1e9
    table = (
        f"## Ceiling of a pretraining step, {date.today()}\n\nSmolLM2-135M's shape, {options.layers} layers, "
        f"{options.batch} x {options.sequence} tokens{', eager' * options.eager}"
        f"{', fresh memory' * options.fresh_memory}: a step takes {step:.2f} s, "
        f"its products alone {products:.2f} s ({peak:.0f} GFLOP/s): {share:.0%} of the ceiling; median of "
        f"{options.steps - 2} turns. `python benchmarks/ceiling.py --record`\n"
    )
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()
