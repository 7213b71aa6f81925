"""Lengths of rows in tokens, as plans need them."""

from datasets import Dataset

from llmlab.data.chat.rows import row_lengths


def test_lengths_are_those_of_the_chosen_rows():
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in (9, 2, 4, 7)]})
    assert row_lengths(rows) == (5.5, 9)
    assert row_lengths(rows.select([1, 2])) == (3, 4)
    pairs = {"prompt_ids": [[0] * 3], "chosen_ids": [[0] * 5], "rejected_ids": [[0]]}
    assert row_lengths(Dataset.from_dict(pairs)) == (3 + (5 + 1) / 2, 3 + 5)
    assert row_lengths(Dataset.from_dict({"prompt": ["a"]})) is None
