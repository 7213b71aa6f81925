"""The names of Transformers' and TRL's trainers that we hang on: this fails loudly when they change."""

import inspect
from importlib import import_module

import pytest
import trl
from transformers import Trainer
from trl.experimental.orpo import ORPOTrainer

from llmlab.training import _trl
from llmlab.training._trl import PRIVATE_NAMES


@pytest.mark.parametrize("place", PRIVATE_NAMES)
def test_private_names_are_still_there(place):
    library, owner, name = place.rsplit(".", 2)
    method = getattr(getattr(import_module(library), owner), name)
    assert tuple(inspect.signature(method).parameters) == PRIVATE_NAMES[place]


def test_every_override_is_listed():
    mixins = [thing for thing in vars(_trl).values() if inspect.isclass(thing) and thing.__module__ == _trl.__name__]
    private = {name for mixin in mixins for name in vars(mixin) if name.startswith("_") and not name.startswith("__")}
    assert private <= {place.rpartition(".")[2] for place in PRIVATE_NAMES}


def test_resuming_calls_it_with_the_checkpoint():
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in inspect.getsource(Trainer)


def test_preference_trainers_take_pairs_as_tokens():
    """The columns that our rows have are those that TRL's loss reads."""
    source = inspect.getsource(trl.DPOTrainer)
    assert all(f'"{name}"' in source for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert 'is_processed = "chosen_ids" in column_names' in inspect.getsource(trl.RewardTrainer)
    orpo = inspect.getsource(ORPOTrainer)
    assert "train_dataset.map(self.tokenize_row" in orpo
    assert all(f'{side}_tokens["labels"]' in orpo for side in ("chosen_sequence", "rejected_sequence"))


def test_fine_tuning_leaves_labels_alone():
    source = inspect.getsource(trl.SFTTrainer)
    assert 'is_processed = "input_ids" in column_names' in source and 'if "labels" not in column_names' in source
