"""Ids: positions that take no indices are refused when the adapter is built."""

from __future__ import annotations

import pytest
from torch import nn

from perceiver_core import positions
from perceiver_core.adapters import Ids


@pytest.mark.parametrize(
    "where",
    [
        positions.Learned((7,), 6),
        positions.Projected(positions.Indexed(7, 5), 6),
        positions.Fourier(axes=1, bands=2, max_resolution=7),
        positions.Indexed,
        lambda indices: indices,
    ],
)
def test_positions_that_take_no_indices_are_refused(where):
    with pytest.raises(TypeError, match=r"positions must be a module from indices to vectors, as positions\.Indexed"):
        Ids(11, 6, positions=where)


@pytest.mark.parametrize("where", [positions.Indexed(7, 6), nn.Embedding(7, 6)])
def test_positions_that_take_indices_serve(where):
    assert Ids(11, 6, positions=where).positions is where
