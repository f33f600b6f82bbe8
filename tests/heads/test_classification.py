"""Heads of latents against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from perceiver_core.heads import Classification, Identity, Regression

DIM, M = 13, 5
EXACT = {"rtol": 0, "atol": 1e-12}


def latents():
    return torch.randn(2, M, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", [Classification(DIM, 7), Regression(DIM, 3)], ids=["Classify", "Regress"])
def test_heads_are_mean_norm_linear(head):
    head = head.double()
    layer = head.logits if isinstance(head, Classification) else head.values
    normed = F.layer_norm(latents().mean(1), (DIM,))
    torch.testing.assert_close(head(latents()), normed @ layer.weight.T + layer.bias, **EXACT)


@pytest.mark.parametrize("head", [Classification(DIM, 7, norm=nn.Identity), Regression(DIM, 3, norm=nn.Identity)])
def test_without_norm_a_head_is_linear_in_the_latents(head):
    head = head.double()
    half = head(latents()[:, :3]) * 3 / M + head(latents()[:, 3:]) * 2 / M
    torch.testing.assert_close(head(latents()), half, **EXACT)


@pytest.mark.parametrize("make", [Classification, Regression])
def test_dropout_is_for_training_only(make):
    head = make(DIM, 3, dropout=0.5).double()
    torch.testing.assert_close(head.eval()(latents()), head(latents()), **EXACT)
    torch.manual_seed(0)
    assert not torch.allclose(head.train()(latents()), head(latents()))


def test_regression_has_one_output_by_default():
    assert Regression(DIM)(torch.randn(2, M, DIM)).shape == (2, 1)


def test_latents_are_passed_through():
    x = latents()
    assert Identity()(x) is x


@pytest.mark.refusal
def test_invalid_sizes_and_rates_raise():
    with pytest.raises(ValueError, match="classes must be a whole number of at least 1; got 0"):
        Classification(DIM, 0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\); got 1\.0"):
        Regression(DIM, dropout=1.0)
