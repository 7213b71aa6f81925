"""Constraints of the architecture, with the nearest valid choice in the message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmlab.settings.model import ModelSettings, nearest_divisor


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 896, "n_heads": 15}, "nearest number of heads that divides it is 16"),
        ({"n_heads": 14, "n_kv_heads": 4}, "nearest number of key/value heads that divides it is 2"),
        ({"d_model": 42, "n_heads": 14, "n_kv_heads": 2}, "rotates pairs"),
        (
            {"positional_encoding": "yarn", "max_seq_len": 64, "yarn_original_max_seq_len": 64},
            "must be shorter than max_seq_len",
        ),
        ({"dropout": 1.0}, "less than 1"),
        ({"yarn_factor": 1.0}, "greater than 1"),
    ],
)
def test_impossible_shapes(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelSettings(**values)


def test_odd_heads_are_fine_where_nothing_rotates():
    assert ModelSettings(d_model=42, n_heads=14, n_kv_heads=2, positional_encoding="alibi").d_model == 42


def test_key_value_heads_matter_for_gqa_only():
    assert ModelSettings(attention_type="mha", n_heads=14, n_kv_heads=2).n_heads == 14
    assert ModelSettings(attention_type="mqa", d_model=60, n_heads=15, positional_encoding="alibi").n_heads == 15


@given(st.integers(1, 500), st.integers(1, 500))
def test_nearest_divisor_is_a_divisor_and_none_is_nearer(number, wanted):
    found = nearest_divisor(number, wanted)
    assert number % found == 0
    assert all(abs(found - wanted) <= abs(d - wanted) for d in range(1, number + 1) if number % d == 0)
