"""Learned vectors by name."""

from __future__ import annotations

import torch
from torch import nn

from perceiver_core.layers.named_vectors import NamedVectors


def test_vectors_by_name():
    vectors = NamedVectors({"image": 5, "label": 7})
    assert {name: tuple(vector.shape) for name, vector in vectors.named_parameters()} == {"image": (5,), "label": (7,)}
    torch.testing.assert_close(vectors("label"), vectors["label"].detach(), rtol=0, atol=0, check_stride=False)
    assert isinstance(vectors["label"], nn.Parameter)


def test_gradients_pass_through_the_copy():
    vectors = NamedVectors({"image": 5})
    vectors("image").sum().backward()
    assert vectors["image"].grad.tolist() == [1.0] * 5


def test_the_state_dict_is_that_of_a_parameter_dict():
    vectors = NamedVectors({"image": 5, "label": 7})
    other = nn.ParameterDict({name: torch.zeros(size) for name, size in (("image", 5), ("label", 7))})
    vectors.load_state_dict(other.state_dict())
    assert not vectors("image").any()
