"""Schemes of weight sharing and their validation."""

from __future__ import annotations

import pytest

from perceiver_core import sharing
from perceiver_core.sharing import Sharing


@pytest.mark.parametrize(
    "scheme, reads, transformers",
    [
        (sharing.none, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
        (sharing.all_, (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
        (sharing.all_but_first, (0, 1, 1, 1, 1), (0, 1, 1, 1, 1)),
        (sharing.paper, (0, 1, 1, 1, 1), (0, 0, 0, 0, 0)),
    ],
)
def test_schemes(scheme, reads, transformers):
    assert scheme(5) == Sharing(reads, transformers)
    assert scheme(5).steps == 5


@pytest.mark.parametrize("scheme", [sharing.none, sharing.all_, sharing.all_but_first, sharing.paper])
def test_one_step_is_the_same_in_every_scheme(scheme):
    assert scheme(1) == Sharing((0,), (0,))


@pytest.mark.refusal
def test_invalid_plans_raise():
    with pytest.raises(ValueError, match=r"must be of one length; got \(0, 1\) and \(0,\)"):
        Sharing((0, 1), (0,))
    with pytest.raises(ValueError, match=r"reads must count up from 0 without gaps; got \(1, 0\)"):
        Sharing((1, 0), (0, 0))
    with pytest.raises(ValueError, match=r"transformers must count up from 0 without gaps; got \(0, 2, 1\)"):
        Sharing((0, 1, 2), (0, 2, 1))
    with pytest.raises(ValueError, match=r"reads must count up from 0 without gaps; got \(0, -1\)"):
        Sharing((0, -1), (0, 0))


@pytest.mark.refusal
@pytest.mark.parametrize("scheme", [sharing.none, sharing.all_, sharing.all_but_first, sharing.paper])
def test_invalid_schemes_raise(scheme):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1; got 0"):
        scheme(0)
    with pytest.raises(ValueError, match="steps must be at most 10000; got 10001"):
        scheme(10_001)
