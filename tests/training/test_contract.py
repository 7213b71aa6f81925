"""The names of Transformers' trainer that are not public and that we hang on: this fails loudly when they change."""

import inspect

import pytest
from transformers import Trainer

from llmlab.training._trl import PRIVATE_NAMES, SwitchableOptimizer


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_private_names_are_still_there(name):
    method = getattr(Trainer, name)
    assert tuple(inspect.signature(method).parameters) == PRIVATE_NAMES[name]


def test_every_override_is_listed():
    private = {name for name in vars(SwitchableOptimizer) if name.startswith("_") and not name.startswith("__")}
    assert private == set(PRIVATE_NAMES)


def test_resuming_calls_it_with_the_checkpoint():
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in inspect.getsource(Trainer)
