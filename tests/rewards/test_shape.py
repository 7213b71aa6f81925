"""`length` and `repetition_penalty`."""

import pytest

from llmlab.rewards import length, repetition_penalty
from llmlab.settings.errors import UserError


def test_length():
    texts = ["one two three four", "one two", "", "w " * 8, "w " * 9, "é漢 🎨"]
    # |n - 4| / 4 from 1, never below 0
    assert length(texts, target=4) == [1, 0.5, 0, 0, 0, 0.5]
    assert length(["abcd", "é漢"], target=4, unit="characters") == [1, 0.5]
    assert length(["x", "x"], completion_ids=[[7, 7, 7], [7]], target=3, unit="tokens") == [1, pytest.approx(1 / 3)]
    assert length([[{"role": "assistant", "content": "a b"}, {"role": "tool", "content": "c d"}]], target=2) == [1]
    with pytest.raises(UserError, match="no token ids"):
        length(["x"], unit="tokens")


def test_repetition_penalty():
    # "a b a b a": (a b), (b a), (a b), (b a): 2 different of 4
    assert repetition_penalty(["a b a b a", "a b c d", "a", "", "x " * 11], n=2) == [0.5, 0, 0, 0, 0.9]
    # three words, one trigram; four equal words, two trigrams, one different
    assert repetition_penalty(["a a a", "a a a a"]) == [0, 0.5]
    assert repetition_penalty(["漢漢漢漢"], n=2, unit="characters") == [pytest.approx(2 / 3)]


def test_repetition_of_tokens_is_trls():
    from trl.rewards import get_repetition_penalty_reward

    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1, 2], [1]]
    theirs = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)(ids)
    ours = repetition_penalty(["x"] * 4, completion_ids=ids, n=2, unit="tokens")
    assert [-value for value in ours] == pytest.approx(theirs)
