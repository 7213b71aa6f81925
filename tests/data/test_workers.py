"""Batches mapped over processes come in order, and a killed process is one sentence."""

import os
import signal

import pytest

from llmlab.data.workers import map_batches
from llmlab.settings.errors import UserError


def double(batch):
    return [2 * number for number in batch]


def die(batch):
    if batch == [5]:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def test_batches_come_in_order():
    batches = [[number] for number in range(20)]
    for processes in (1, 2):
        assert list(map_batches(double, iter(batches), processes)) == [[2 * number] for number in range(20)]


def test_a_killed_process_is_named():
    with pytest.raises(UserError, match="num_proc = 2: a worker process was killed, most often for its memory"):
        list(map_batches(die, iter([[number] for number in range(9)]), 2))
