"""The encodings' numbers, from their papers' formulas."""

import math

import pytest
import torch

from llmlab.model.positions import alibi_bias, alibi_slopes, positions_from_mask, sinusoidal_encoding


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_encoding(width):
    encoding = sinusoidal_encoding(torch.tensor([[0, 3, 900]]), width)
    for row, position in enumerate((0, 3, 900)):
        for dimension in range(width):
            angle = position / 10000 ** (2 * (dimension // 2) / width)
            expected = math.cos(angle) if dimension % 2 else math.sin(angle)
            assert encoding[0, row, dimension].item() == pytest.approx(expected, abs=1e-4)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    # 12 heads: those of 8, and the first four odd ones of 16
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)]
    )
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_alibi_bias_is_minus_slope_times_distance():
    bias = alibi_bias(2, 3, None, 0, torch.device("cpu"))
    assert bias.shape == (1, 2, 3, 3)
    for head, slope in enumerate((2**-4, 2**-8)):
        for query in range(3):
            for key in range(query + 1):
                assert bias[0, head, query, key] == -slope * (query - key)


def test_positions_do_not_count_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert positions_from_mask(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    assert positions_from_mask(mask, 2).tolist() == [[1, 2], [3, 3]]
