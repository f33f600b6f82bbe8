"""Labels as tokens: class indices one-hot, probabilities unchanged."""

from __future__ import annotations

import copy

import pytest
import torch

import perceiver_core as pc
from perceiver_core.adapters import OneHotLabel


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_indices_become_one_hot(dtype):
    tokens = OneHotLabel(7)(torch.tensor([3, 0, 6], dtype=dtype))
    assert torch.equal(tokens.content[:, 0], torch.eye(7)[[3, 0, 6]]) and tokens.mask is None
    assert OneHotLabel(7).dim == tokens.dim == 7 and OneHotLabel(1)(torch.tensor([0])).content.tolist() == [[[1.0]]]


def test_probabilities_are_passed_through():
    given = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    content = OneHotLabel(7)(given).content
    assert content.shape == (2, 1, 7) and torch.equal(content[:, 0], given)
    content.sum().backward()
    assert torch.equal(given.grad, torch.ones_like(given))


def test_class_indices_under_vmap_and_on_the_meta_device():
    numbers = torch.tensor([[3], [6]])
    actual = torch.vmap(lambda number: OneHotLabel(7)(number).content)(numbers)
    assert torch.equal(actual[:, 0, 0], torch.eye(7)[[3, 6]])
    assert OneHotLabel(7)(torch.zeros(2, dtype=torch.long, device="meta")).content.shape == (2, 1, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_class_indices_take_the_dtype_of_the_model(dtype, tmp_path):
    encoder = pc.Encoder(7, num_latents=3, dim=8, depth=1, num_heads=1)
    model = pc.Perceiver(OneHotLabel(7), encoder, pc.heads.Classification(8, 2)).to(dtype)
    assert model(torch.tensor([3, 0])).dtype == model.adapter(torch.tensor([3])).content.dtype == dtype
    assert copy.deepcopy(model)(torch.tensor([3, 0])).dtype == dtype and not model.adapter.state_dict()
    again = pc.load(pc.save(model, tmp_path)).to(dtype)
    torch.testing.assert_close(again(torch.tensor([3, 0])), model(torch.tensor([3, 0])))


@pytest.mark.refusal
def test_a_list_of_labels_raises():
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor; got list"):
        OneHotLabel(7)([1, 2])


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([7]), r"labels must lie in 0 \.\.\. 6; got 7"),
        (torch.tensor([3, -1]), "got -1"),
        (torch.tensor([[3, 1]]), r"labels must have 1 axes \(b\)"),
        (torch.zeros(2, 6), "labels must have 7 features"),
    ],
)
def test_invalid_labels_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        OneHotLabel(7)(labels)
