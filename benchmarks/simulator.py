"""How many episodes of the simulator one core plays, guardrails on: the scripted expert's, and random ones.

Seconds of CPU time, generation of the tasks included, over all categories and difficulties; and how often each solves
its task, which is the scale for a model.

    python benchmarks/simulator.py --episodes 2000
"""

import argparse
import statistics
import time
from random import Random

from rich.console import Console
from rich.table import Table

from llmlab.simulator.tasks import grammar
from llmlab.simulator.world import Simulator, play_scripted, random_calls

ROUNDS = 3


def play(simulator: Simulator, policy: str, task: str, seed: int) -> None:
    simulator.reset(task)
    calls = simulator.task.expected if policy == "expert" else random_calls(simulator, Random(seed))
    play_scripted(simulator, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=2000)
    arguments = parser.parse_args()
    levels = [(category, level) for category, each in grammar()["categories"].items() for level in each]
    simulator = Simulator()
    table = Table("policy", "difficulty", "episodes/s", "solved", "mean reward", "mean calls")
    for policy in ("expert", "random"):
        for difficulty in (1, 2, 3, 4, "all"):
            chosen = [f"{category}/{level}" for category, level in levels if difficulty in (level, "all")]
            tasks = [f"{chosen[seed % len(chosen)]}/train/{seed}" for seed in range(arguments.episodes)]
            speeds, ends = [], []
            for _ in range(ROUNDS):
                ends, begin = [], time.process_time()
                for seed, task in enumerate(tasks):
                    play(simulator, policy, task, seed)
                    ends.append((simulator.success, simulator.get_reward(), simulator.calls))
                speeds.append(len(tasks) / (time.process_time() - begin))
            solved, reward, calls = (statistics.fmean(values) for values in zip(*ends, strict=True))
            speed = f"{statistics.median(speeds):,.0f}"
            table.add_row(policy, str(difficulty), speed, f"{solved:.1%}", f"{reward:.1f}", f"{calls:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
