"""Derivatives of `read_grid` and transforms of them: which gradients are computed, torch.func, forward mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from perceiver_core.kernels.grid import read_grid
from tests.kernels.grid.backends import all_backends
from tests.kernels.grid.cases import formula, normal, outputs_and_gradients, random_inputs, random_mask


@all_backends
@pytest.mark.interpreted(needed=[(True, False, False, False), (True, False, True, False)])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_of_some_inputs_alone(needed: tuple[bool, ...]) -> None:
    """Gradients of the tokens are computed only if they are needed, without an effect on the others."""
    inputs = random_inputs(5, 7)
    all_gradients = outputs_and_gradients(read_grid, inputs)[3:]
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    outputs = read_grid(*leaves)
    assert all(x.requires_grad == any(needed) for x in outputs)
    if any(needed):
        torch.autograd.backward(outputs, [normal(*x.shape, seed=11 + i) for i, x in enumerate(outputs)])
    for leaf, need, gradient in zip(leaves, needed, all_gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if need else None, rtol=0.0, atol=1e-14)


@all_backends
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(masked: bool) -> None:
    inputs = [x.requires_grad_() for x in random_inputs(2, 3, queries=2, channels=2, query_batch=1)]
    mask = torch.tensor([[[True, False, True], [False, True, True]]] * 2) if masked else None
    assert torch.autograd.gradcheck(lambda *xs: tuple(read_grid(*xs, mask)), inputs)


@all_backends
def test_forward_mode_is_refused_or_right() -> None:
    """A tangent of zero would be wrong."""
    content_queries, *others = random_inputs(5, 7)
    direction = normal(*content_queries.shape, seed=9)

    def tangent(read) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.func.jvp(lambda x: read(x, *others)[0], (content_queries,), (direction,))[1]

    try:
        actual = tangent(read_grid)
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(actual, tangent(formula))


@all_backends
def test_forward_mode_outside_of_torch_func_is_refused_or_right() -> None:
    content_queries, *others = random_inputs(5, 7)
    direction = normal(*content_queries.shape, seed=9)

    def tangent(read) -> Tensor:  # type: ignore[no-untyped-def]
        with torch.autograd.forward_ad.dual_level():
            out = read(torch.autograd.forward_ad.make_dual(content_queries, direction), *others)[0]
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    try:
        actual = tangent(read_grid)
    except (NotImplementedError, RuntimeError):
        return
    torch.testing.assert_close(actual, tangent(formula))


@all_backends
@pytest.mark.interpreted
def test_a_second_derivative_raises() -> None:
    inputs = [x.requires_grad_() for x in random_inputs(5, 7)]
    loss = read_grid(*inputs).content.square().sum()
    (d_content_queries,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    for second_loss in (d_content_queries.sum(), d_content_queries.square().sum()):
        with pytest.raises(RuntimeError, match=r"read_grid|once"):
            torch.autograd.grad(second_loss, inputs[1], retain_graph=True)


MAPPED = [(0, 0, 0, 0), (None, 0, 0, 0), (0, None, None, None), (None, None, 0, 0), (0, 0, None, 0)]


@all_backends
@pytest.mark.interpreted(mapped=[(None, 0, 0, 0)], query_batch=[2], masked=[True])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("query_batch", [1, 2], ids=["shared", "separate"])
@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_vmap_of_gradients_equals_a_loop(mapped: tuple[int | None, ...], query_batch: int, masked: bool) -> None:
    """Whichever inputs are mapped."""
    inputs = random_inputs(5, 7, query_batch=query_batch)
    stacked = [
        normal(3, *x.shape, seed=i) if dim == 0 else x for i, (x, dim) in enumerate(zip(inputs, mapped, strict=True))
    ]
    mask = random_mask(2, 5, 7) if masked else None

    def loss(*xs: Tensor) -> Tensor:
        return torch.stack([x.square().sum() for x in read_grid(*xs, mask)]).sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), mapped)(*stacked)
    for i in range(3):
        leaves = [(x[i] if dim == 0 else x).detach().requires_grad_() for x, dim in zip(stacked, mapped, strict=True)]
        torch.testing.assert_close([x[i] for x in gradients], list(torch.autograd.grad(loss(*leaves), leaves)))


@all_backends
def test_vmap_over_masks() -> None:
    inputs, masks = random_inputs(5, 7), random_mask(3, 2, 5, 7)
    actual = torch.vmap(lambda mask: tuple(read_grid(*inputs, mask)))(masks)
    reads = [read_grid(*inputs, mask) for mask in masks]
    expected = tuple(torch.stack(x) for x in zip(*reads, strict=True))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-14)


@all_backends
def test_jacobians() -> None:
    content_queries, *others = random_inputs(2, 3, queries=2)
    actual, expected = (
        torch.func.jacrev(lambda x, read=read: read(x, *others)[0])(content_queries) for read in (read_grid, formula)
    )
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-12)
