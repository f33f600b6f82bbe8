"""Vectors of ids, and which position each token has where a mask hides some."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc

IDS = torch.tensor([[3, 1, 4, 1, 5]])
MASKS = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "gap": [1, 0, 1, 0, 1]}


def places(mask, **options):
    """The positions at which tokens that are there stand."""
    text = pc.adapters.Ids(7, 6, positions=pc.positions.Indexed(5, 6), **options)
    mask = torch.tensor([mask], dtype=torch.bool)
    added = text(IDS, mask=mask).content - text.vectors[IDS]
    return torch.cdist(added, text.positions.vectors).argmin(-1)[mask].tolist()


@pytest.mark.parametrize("name", MASKS)
def test_tokens_that_are_hidden_count_where_it_is_asked_for(name):
    assert places(MASKS[name]) == [0, 1, 2]
    assert places(MASKS[name], count_hidden=True) == [i for i, there in enumerate(MASKS[name]) if there]
