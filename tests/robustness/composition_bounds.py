"""Runs of a composition, and bounds on rounding errors, estimated by perturbing weights and inputs in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from perceiver_core import Tokens
from tests.robustness.composition_models import Case, converted

# A result may be as many times farther off than under a perturbation by the rounding error. Rounding inside a model
# can matter more than that of its weights, for example in the gradient of a norm of few channels.
FACTORS = {torch.float64: 1024.0, torch.float32: 512.0, torch.bfloat16: 32.0}


# It may also be as many times farther off than the result of the same computation in the same dtype, since a
# perturbation does not find all rounding errors, for example those of a norm of one or two channels.
PLAIN_FACTOR = 4.0


class Reference(NamedTuple):
    """Results in float64, and a bound on the error of each."""

    expected: list[Tensor]
    bounds: list[float]


def run(case: Case, model: nn.Module, inputs: Any, options: dict[str, Any], *, gradients: bool = False) -> list[Tensor]:
    """Return the outputs of a model, and with `gradients` those of its parameters and floating-point inputs.

    Random numbers are the same in each run.
    """
    torch.default_generator.manual_seed(0)
    model.train(case.training)
    if not gradients:
        with torch.no_grad():
            return [x for x in tree_flatten(model(inputs, **options))[0] if isinstance(x, Tensor)]
    leaves: list[Tensor] = []

    def tracked(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().requires_grad_()
            leaves.append(x)
        return x

    model.zero_grad()
    outputs = [x for x in tree_flatten(model(tree_map(tracked, inputs), **options))[0] if isinstance(x, Tensor)]
    loss = sum(((x * weights(x)).sum() for x in outputs), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    parts = [*model.parameters(), *leaves]
    return [x.detach() for x in outputs] + [torch.zeros_like(x) if x.grad is None else x.grad for x in parts]


def weights(x: Tensor) -> Tensor:
    """Return fixed loss weights of an output, so that gradients do not cancel. They are exact in all dtypes."""
    return (torch.arange(x.numel()) % 7 - 2.5).reshape(x.shape).to(x.dtype)


@contextmanager
def in_float64(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context manager that converts a model to float64, and back without loss."""
    model.double()
    try:
        yield
    finally:
        model.to(dtype)


@contextmanager
def perturbed(model: nn.Module, epsilon: float) -> Iterator[None]:
    """Context manager that changes all parameters and buffers by up to a relative error."""
    values = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    before = [x.detach().clone() for x in values]
    with torch.no_grad():
        for x in values:
            x.copy_(noisy(x, epsilon))
    try:
        yield
    finally:
        with torch.no_grad():
            for x, old in zip(values, before, strict=True):
                x.copy_(old)


def noisy(x: Any, epsilon: float) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach() * (1 + epsilon * (torch.rand_like(x) * 2 - 1))


def reference(case: Case, dtype: torch.dtype, *, gradients: bool = False, autocast: bool = False) -> Reference:
    """Return outputs and gradients in float64, and a bound on the error of each if it is computed in a dtype.

    The bound is a factor times the change under a perturbation of weights and inputs by the rounding error, plus the
    rounding error of the result itself. It is at least a multiple of the error of the model as it is, in that dtype.
    """
    model, epsilon = case.model, epsilon_of(dtype, autocast=autocast)
    factor = FACTORS[torch.bfloat16 if autocast else dtype]
    given = converted((case.inputs, case.options), torch.float64)
    with in_float64(model, dtype):
        expected = run(case, model, *given, gradients=gradients)
        torch.default_generator.manual_seed(1)
        with perturbed(model, epsilon):
            moved = run(case, model, *tree_map(partial(noisy, epsilon=epsilon), given), gradients=gradients)
    with autocasting(autocast):
        plain = run(case, model, case.inputs, case.options, gradients=gradients)
    changes = [largest(x - y) for x, y in zip(moved, expected, strict=True)]
    highest = max((largest(x) for x in expected), default=0.0)
    bounds = [
        max(factor * (change + epsilon * (largest(x) + highest)), PLAIN_FACTOR * largest(own.double() - x))
        for change, own, x in zip(changes, plain, expected, strict=True)
    ]
    return Reference(expected, bounds)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_within(actual: list[Tensor], expected: list[Tensor], bounds: list[float], what: str) -> None:
    """Check that all results are finite and differ from the expected ones by no more than the bounds."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} results, {len(expected)} expected"
    for i, (a, e, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        assert a.shape == e.shape, f"{what}: result {i} has shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        assert a.isfinite().all(), f"{what}: result {i} is not finite"
        off = largest(a.double() - e.double())
        assert off <= bound, f"{what}: result {i} is off by {off:.2e}, bound {bound:.2e}, largest {largest(e):.2e}"


def assert_same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Check that all results are equal, bit by bit."""
    assert_within(actual, expected, [0.0] * len(expected), what)


def epsilon_of(dtype: torch.dtype, *, autocast: bool = False) -> float:
    """Return the rounding error of a dtype, or of bfloat16 under autocast."""
    return torch.finfo(torch.bfloat16 if autocast else dtype).eps


def autocasting(enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def each_tensor(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to the tensors in a tree of arguments. In `Tokens`, apply it to the content and the mask."""
    if isinstance(tree, Tokens):
        mask = None if tree.mask is None else function(tree.mask)
        return Tokens(function(tree.content), tree.position_tables, mask)
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: each_tensor(function, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [each_tensor(function, item) for item in tree]
    return tree
