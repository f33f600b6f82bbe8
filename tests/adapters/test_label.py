"""Labels as tokens: class numbers one-hot, probabilities as they are."""

from __future__ import annotations

import pytest
import torch

from perceiver_core.adapters import Label


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_class_number_is_its_row_of_the_identity(dtype):
    tokens = Label(7)(torch.tensor([3, 0, 6], dtype=dtype))
    assert torch.equal(tokens.content[:, 0], torch.eye(7)[[3, 0, 6]]) and tokens.mask is None
    assert Label(7).dim == tokens.dim == 7 and Label(1)(torch.tensor([0])).content.tolist() == [[[1.0]]]


def test_probabilities_stay():
    given = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    content = Label(7)(given).content
    assert content.shape == (2, 1, 7) and torch.equal(content[:, 0], given)
    content.sum().backward()
    assert torch.equal(given.grad, torch.ones_like(given))


def test_class_numbers_under_vmap_and_on_no_device():
    numbers = torch.tensor([[3], [6]])
    found = torch.vmap(lambda number: Label(7)(number).content)(numbers)
    assert torch.equal(found[:, 0, 0], torch.eye(7)[[3, 6]])
    assert Label(7)(torch.zeros(2, dtype=torch.long, device="meta")).content.shape == (2, 1, 7)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([7]), r"labels must lie in 0 \.\.\. 6; got 7"),
        (torch.tensor([3, -1]), "got -1"),
        (torch.tensor([[3, 1]]), r"labels must have 1 axes \(b\)"),
        (torch.zeros(2, 6), "labels must have 7 features"),
        (torch.zeros(0).long(), "labels must not be empty"),
    ],
)
def test_refused_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        Label(7)(labels)
