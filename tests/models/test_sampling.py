"""Samplers: greedy, temperature, top-k and top-p."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perceiver_core.models import sampling
from tests.models.perceiver_ar_cases import (
    EXACT,
    few_examples,
    seeds,
)


class TestSampling:
    LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)

    def test_temperature(self):
        for temperature in (0.3, 1.0, 4.0):
            actual = sampling.Sample(temperature).probabilities(self.LOGITS)
            torch.testing.assert_close(actual, (self.LOGITS / temperature).softmax(-1), **EXACT)
        assert (sampling.Sample(1e-4).probabilities(self.LOGITS)[0] == torch.tensor([0, 1, 0, 0, 0])).all()

    @pytest.mark.parametrize("temperature", [1e-4, 1e-39, 1e-60, 5e-324])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_the_most_likely_ids_win_near_temperature_zero(self, temperature, dtype):
        logits = torch.cat([self.LOGITS, -1e4 * self.LOGITS, self.LOGITS.log()]).to(dtype)  # also with -inf
        logits = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        expected = (logits == logits.amax(-1, keepdim=True)).to(dtype if dtype == torch.float64 else torch.float32)
        expected = expected / expected.sum(-1, keepdim=True)
        for options in ({}, {"top_p": 0.999}, {"top_k": 5}):
            choose = sampling.Sample(temperature, **options)
            torch.testing.assert_close(choose.probabilities(logits), expected)
            drawn = choose(logits, torch.Generator().manual_seed(0))
            assert (expected.gather(1, drawn[:, None]) > 0).all()

    def test_top_k(self):
        actual = sampling.Sample(top_k=2).probabilities(self.LOGITS)
        assert (actual > 0).sum(-1).tolist() == [2, 2]  # of equals too
        torch.testing.assert_close(
            actual[0, [1, 3]], torch.tensor([3.0, 2.0], dtype=torch.float64).softmax(-1), **EXACT
        )
        everything = sampling.Sample(top_k=99).probabilities(self.LOGITS)
        torch.testing.assert_close(everything, self.LOGITS.softmax(-1), **EXACT)

    @few_examples
    @given(seed=seeds, top_p=st.floats(0.01, 1.0), temperature=st.floats(0.2, 3.0))
    def test_top_p_keeps_the_smallest_sufficient_set(self, seed, top_p, temperature):
        logits = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        actual = sampling.Sample(temperature, top_p=top_p).probabilities(logits)
        for row, shares in zip(actual, (logits / temperature).softmax(-1), strict=True):
            ranked, kept = shares.sort(descending=True).values, int((row > 0).sum())
            assert ranked[:kept].sum() >= top_p - 1e-9
            assert kept == 1 or ranked[: kept - 1].sum() < top_p + 1e-9
            torch.testing.assert_close(row[row > 0], shares[row > 0] / shares[row > 0].sum(), **EXACT)

    def test_draws_have_these_probabilities(self):
        choose, generator = sampling.Sample(1.5, top_k=4, top_p=0.9), torch.Generator().manual_seed(0)
        drawn = choose(self.LOGITS[:1].expand(20_000, -1), generator)
        actual = torch.bincount(drawn, minlength=5) / 20_000
        torch.testing.assert_close(actual.double(), choose.probabilities(self.LOGITS)[0], rtol=0, atol=0.015)

    def test_half_precision_is_sampled_in_float32(self):
        assert sampling.Sample(top_p=0.5).probabilities(self.LOGITS.bfloat16()).dtype == torch.float32

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"temperature": 0.0},
                r"temperature must be above 0; got 0\.0\. For the most likely id use greedy",
            ),
            ({"temperature": -1.0}, r"temperature must be above 0; got -1\.0"),
            ({"temperature": float("nan")}, r"temperature must be a finite number; got nan"),
            ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0\.0"),
            ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1\.1"),
            ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ],
    )
    def test_invalid_settings_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            sampling.Sample(**options)

    @pytest.mark.refusal
    def test_settings_that_are_not_numbers_raise(self):
        for name in ("temperature", "top_p"):
            for wrong in ("1", None):
                with pytest.raises(TypeError, match=f"{name} must be a number; got {wrong!r}"):
                    sampling.Sample(**{name: wrong})
