"""Models and tensors that other machinery has wrapped: what is inside is saved, or the reason is named."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core.registry import to_config
from tests.checkpoints.folders import Blend, contents, small, trained

pytestmark = pytest.mark.no_shape_checks


class Halved(torch.Tensor):
    """A tensor that holds another in half precision, as libraries of quantization have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=False)

    def __init__(self, inner):
        self.inner = inner.half()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [arg.inner.float() if isinstance(arg, cls) else arg for arg in args]
        found = function(*inner, **(kwargs or {}))
        return cls(found) if function is torch.ops.aten.detach.default else found


class Named(torch.Tensor):
    """A tensor of its own class, with values."""


def halve(linear):
    linear.weight = nn.Parameter(Halved(linear.weight.detach()), requires_grad=False)


def test_a_wrapped_weight_is_named_as_the_reason(tmp_path):
    model = Blend(5)
    halve(model.a)
    halve(model.b)
    assert model(torch.rand(2, 5)).shape == (2, 5)
    with pytest.raises(
        ValueError, match=r"^a\.weight is a Halved, a tensor that has no values itself .* Save the model"
    ):
        pc.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tensor_of_another_class_with_values_is_saved(tmp_path):
    model = Blend(5)
    model.a.weight = nn.Parameter(torch.rand(5, 5).as_subclass(Named))
    again = pc.load(pc.save(model, tmp_path))
    assert torch.equal(again.a.weight, model.a.weight.detach().as_subclass(torch.Tensor))


def assert_same_files(wrapped, model, path):
    pc.checkpoints.save_pretrained(wrapped, path / "wrapped" / "it")
    pc.checkpoints.save_pretrained(model, path / "model" / "it")
    assert contents(path / "wrapped" / "it") == contents(path / "model" / "it")


@pytest.mark.compile
def test_of_a_compiled_model_what_is_inside_is_saved(tmp_path):
    model = trained(small())
    assert_same_files(torch.compile(model), model, tmp_path)


def test_of_a_parallel_model_what_is_inside_is_saved(tmp_path):
    model = trained(small())
    assert_same_files(nn.DataParallel(model), model, tmp_path)


@pytest.mark.compile
def test_a_compiled_part_is_refused_and_one_compiled_in_place_is_not(tmp_path):
    model = trained(small())
    config = to_config(model)
    model.encoder.compile()
    pc.save(model, tmp_path)
    model.encoder.transformers[0] = torch.compile(model.encoder.transformers[0])
    message = "encoder.transformers.0 is wrapped by torch.compile, which changes the names of its weights. Compile it"
    with pytest.raises(ValueError, match=re.escape(message)):
        pc.save(model, tmp_path / "new")
    model.encoder.transformers[0] = model.encoder.transformers[0]._orig_mod
    assert to_config(pc.load(pc.save(model, tmp_path))) == config
