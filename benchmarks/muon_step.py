"""What Muon's update of a decoder's matrices costs: one by one, batched by shape, and by torch's own Muon.

The models' matrices alone, no forward pass; optimizers take turns, and the least time of each counts.
"""

import argparse
import time

import torch
from pytorch_optimizer import Muon

MODELS = {"7.7 M": (256, 128, 688, 8), "134 M": (576, 192, 1536, 30)}  # hidden, keys, intermediate, layers
TURNS = 4


def matrices(hidden: int, keys: int, inner: int, layers: int) -> list[torch.nn.Parameter]:
    """Returns a decoder's 2-D weights, with random values."""
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes = (attention + [(inner, hidden), (inner, hidden), (hidden, inner)]) * layers
    return [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    print("| matrices of | one by one, ms | batched by shape, ms | torch.optim.Muon, ms |\n| --- | --- | --- | --- |")
    for name in parser.parse_args().models:
        weights = matrices(*MODELS[name])
        contenders = [
            *(
                Muon([{"params": weights, "use_muon": True, "use_adjusted_lr": True}], foreach=f)
                for f in (False, True)
            ),
            torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw"),
        ]
        times: list[list[float]] = [[] for _ in contenders]
        for _ in range(TURNS):
            for optimizer, seconds in zip(contenders, times, strict=True):
                for weight in weights:
                    weight.grad = torch.randn_like(weight)
                start = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
        print(f"| {name} | {' | '.join(f'{min(each) * 1000:.0f}' for each in times)} |", flush=True)


if __name__ == "__main__":
    main()
