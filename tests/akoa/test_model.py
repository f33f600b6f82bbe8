"""The model of the knee example."""

import pytest
import torch
from torch.nn import functional as F

from examples.akoa.model import knee_model

pytestmark = pytest.mark.no_shape_checks


def test_the_model_gives_one_logit_in_two_megabytes():
    model = knee_model((37, 29))
    assert model(torch.rand(3, 1, 37, 29)).shape == (3, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 < 2e6


def test_every_weight_of_the_model_learns():
    model = knee_model((16, 12))
    F.binary_cross_entropy_with_logits(model(torch.rand(5, 1, 16, 12))[:, 0], torch.rand(5)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
