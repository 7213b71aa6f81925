"""The effective batch of a run, and how a resumed run splits it again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.runs.start import Batch, batch_of, split_again
from llmlab.settings.errors import UserError
from llmlab.settings.preference import DPOSettings
from llmlab.settings.rl import GRPOSettings
from llmlab.settings.training import PretrainSettings, SFTSettings

SPLIT = {"batch_size": 2, "gradient_accumulation_steps": 6, "eval_steps": 10}


def recorded(settings, processes):
    return {"hardware": {"processes": processes}, "batch": vars(batch_of(settings, processes))}


def test_the_batch_of_each_stage():
    assert batch_of(SFTSettings(**SPLIT), 2) == Batch(24, 40, SPLIT)
    assert batch_of(DPOSettings(batch_size=64, mini_batch_size=4, eval_batches=5), 2).rows == 64
    assert batch_of(DPOSettings(mini_batch_size=4, gradient_accumulation_steps=3), 2).rows == 24
    assert batch_of(GRPOSettings(batch_size=16, mini_batch_size=8, gradient_accumulation_steps=2), 2).rows == 32


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, {}),
        ({}, 2, {"gradient_accumulation_steps": 3, "eval_steps": 5}),
        ({}, 4, {"batch_size": 1, "gradient_accumulation_steps": 3, "eval_steps": 5}),  # 3 rows each, in ones
        ({}, 12, {"batch_size": 1, "gradient_accumulation_steps": 1, "eval_steps": 2}),  # 20 rows in 12s: two rounds
        ({"batch_size": 4}, 1, {"gradient_accumulation_steps": 3, "eval_steps": 5}),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 1, {"eval_steps": 5}),
        ({"eval_steps": 7}, 2, {"gradient_accumulation_steps": 3}),
    ],
)
def test_what_follows_where_the_split_changes(changes, processes, expected):
    before = SFTSettings(**SPLIT)
    batch, follows = split_again(before.model_copy(update=changes), before, recorded(before, 1), processes)
    assert follows == expected
    assert batch.rows == 12 and batch.settings == SPLIT | changes
    assert batch.validation_rows == (7 * 2 * processes if "eval_steps" in changes else 20)


def test_pairs_keep_their_batch_size():
    before = DPOSettings(batch_size=64, mini_batch_size=32, eval_batches=2)
    batch, follows = split_again(before, before, recorded(before, 1), 4)
    assert follows == {"mini_batch_size": 16, "eval_batches": 1} and batch.rows == 64
    assert before.model_copy(update=follows).accumulation(4) == 1


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 5, "5 processes: an optimizer step .* 12 rows, .* the nearest number that can is 4$"),
        ({}, 100, "the nearest number that can is 12$"),
        ({"batch_size": 5}, 1, "batch_size = 5: .* 12 rows on each process, .* the nearest that divides them is 4$"),
        ({"gradient_accumulation_steps": 5}, 1, "gradient_accumulation_steps = 5: with batch_size = 2 it is 6, "),
        ({"batch_size": 4, "gradient_accumulation_steps": 4}, 1, "gradient_accumulation_steps = 4: .* it is 3, "),
    ],
)
def test_what_cannot_keep_the_batch_is_refused(changes, processes, message):
    before = SFTSettings(**SPLIT)
    with pytest.raises(UserError, match=message):
        split_again(before.model_copy(update=changes), before, recorded(before, 1), processes)


def test_streams_go_on_with_as_many_processes():
    before = PretrainSettings(streaming=True)
    assert split_again(before, before, recorded(before, 2), 2)[1] == {}
    with pytest.raises(UserError, match="streaming = true: .* goes on with as many, 2, and not with 1"):
        split_again(before, before, recorded(before, 2), 1)


@given(st.integers(1, 8), st.integers(1, 32), st.lists(st.integers(1, 16), min_size=1, max_size=4), st.booleans())
def test_the_same_configuration_comes_back_to_itself(rows, passes, path, again_from_file):
    """Whatever processes a run goes through: each divides the batch, or is refused and changes nothing."""
    settings = SFTSettings(batch_size=rows, gradient_accumulation_steps=passes)
    before, record = settings, recorded(settings, 1)
    for processes in [*path, 1]:
        given_settings = settings if again_from_file else before
        if rows * passes % processes:
            with pytest.raises(UserError, match="nearest"):
                split_again(given_settings, before, record, processes)
            continue
        batch, follows = split_again(given_settings, before, record, processes)
        before = given_settings.model_copy(update=follows)
        record = {"hardware": {"processes": processes}, "batch": vars(batch)}
        assert before.effective_batch(processes) == rows * passes and before.batch_size <= rows
        assert batch == batch_of(settings, 1)
    assert before == settings or not again_from_file
