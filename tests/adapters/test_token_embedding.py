"""Embedding of token ids: supported positions, and the position of each token under a mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perceiver_core import positions
from perceiver_core.adapters import Bytes, TokenEmbedding

IDS = torch.tensor([[3, 1, 4, 1, 5]])
MASKS = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "gap": [1, 0, 1, 0, 1]}


@pytest.mark.refusal
@pytest.mark.parametrize(
    "where",
    [
        positions.LearnedGrid((7,), 6),
        positions.Projected(positions.LearnedEmbedding(7, 5), 6),
        positions.Fourier(num_axes=1, num_bands=2, max_resolution=7),
        positions.LearnedEmbedding,
        lambda indices: indices,
    ],
)
def test_positions_without_indices_raise(where):
    with pytest.raises(
        TypeError, match=r"positions must be a module from indices to vectors, as positions\.LearnedEmbedding"
    ):
        TokenEmbedding(11, 6, positions=where)


@pytest.mark.parametrize("where", [positions.LearnedEmbedding(7, 6), nn.Embedding(7, 6)])
def test_positions_with_indices_are_accepted(where):
    assert TokenEmbedding(11, 6, positions=where).positions is where


def places(text, mask):
    """Returns the positions of the unmasked tokens."""
    mask = torch.tensor([mask], dtype=torch.bool)
    added = text(IDS, mask=mask).content - text.vectors[IDS]
    return torch.cdist(added, text.positions.vectors).argmin(-1)[mask].tolist()


@pytest.mark.parametrize("name", MASKS)
def test_masked_tokens_are_counted_on_request(name):
    where, all_places = positions.LearnedEmbedding(5, 6), [i for i, there in enumerate(MASKS[name]) if there]
    assert places(TokenEmbedding(7, 6, positions=where), MASKS[name]) == [0, 1, 2]
    assert places(TokenEmbedding(7, 6, positions=where, positions_include_padding=True), MASKS[name]) == all_places
    assert places(Bytes(6, positions=where, positions_include_padding=True), MASKS[name]) == all_places
