"""Intervals, comparisons and tables of the short examples."""

from __future__ import annotations

import pytest
import torch

from examples.common import scores

pytestmark = pytest.mark.no_shape_checks


def test_an_interval_is_that_of_the_formula():
    torch.manual_seed(0)
    values = (torch.rand(997) < 0.7).float()
    found = scores.interval(values)
    share = values.mean().item()
    assert found["mean"] == pytest.approx(share)
    half = 1.96 * (share * (1 - share) / 997) ** 0.5  # of a binomial
    assert found["low"] == pytest.approx(share - half, abs=0.004)
    assert found["high"] == pytest.approx(share + half, abs=0.004)


def test_models_are_compared_sample_by_sample_with_the_best_of_the_others():
    best = torch.rand(53, generator=torch.Generator().manual_seed(0))
    rows = scores.compare({"poor": best - 1, "best": best, "Perceiver": best + 0.5}, ours="Perceiver")
    assert list(rows) == ["poor", "best", "Perceiver", "Perceiver less best"]
    for value in rows["Perceiver less best"].values():
        assert value == pytest.approx(0.5)  # though the scores themselves vary


def test_the_minimum_is_best_where_less_is_better():
    rows = scores.compare(
        {"poor": torch.full((5,), 3.0), "best": torch.ones(5), "Perceiver": torch.zeros(5)}, ours="Perceiver", best=min
    )
    assert rows["Perceiver less best"]["mean"] == -1


def test_a_table_is_aligned():
    lines = scores.markdown_table(
        {"a": {"mean": 1, "low": 0.5, "high": 100}, "longer": {"mean": 3, "low": 2, "high": 4}}, "dB"
    )
    assert len({len(line) for line in lines.splitlines()}) == 1
    assert lines.splitlines()[2] == "| a      | 1.00 | 0.50 to 100.00 |"
