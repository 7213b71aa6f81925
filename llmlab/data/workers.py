"""Batches mapped over processes, in order: for tokenizing and rendering, which touch neither torch nor CUDA."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from llmlab.settings.errors import UserError

SERIAL_BATCHES = 2  # mapped before other processes are worth starting


def cores() -> int:
    """Returns the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def map_batches(function: Callable[[Any], Any], batches: Iterator[Any], num_proc: int | None = None) -> Iterator[Any]:
    """Yields the function of each batch, in order; all but the first are mapped by so many processes (None: cores)."""
    processes = num_proc or cores()
    yield from map(function, islice(batches, None if processes == 1 else SERIAL_BATCHES))
    first = list(islice(batches, 2 * processes))
    if not first:
        return
    # forked, as in `datasets`: scripts and notebooks need no main guard
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (function,))
    try:
        waiting = deque(pool.submit(_call, batch) for batch in first)
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_call, batch) for batch in islice(batches, 1))
    except BrokenProcessPool:
        why = "a worker process was killed, most often for its memory; expected fewer"
        raise UserError(f"num_proc = {processes}: {why}") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]  # of a worker process, set when it starts


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _function = function


def _call(batch: Any) -> Any:
    return _function(batch)
