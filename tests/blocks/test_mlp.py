"""The MLP and its activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from perceiver_core import GEGLU, MLP, SquaredReLU, SwiGLU

DIM = 7
EXACT = {"rtol": 0, "atol": 1e-12}


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def gated(x):
    values, gates = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return values * erf_gelu(gates)


def silu_gated(x):
    values, gates = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return values * gates / (1 + torch.exp(-gates))


def squared_relu(x):
    return torch.where(x > 0, x * x, 0.0)


@pytest.mark.parametrize("widening", [1, 3])
@pytest.mark.parametrize(
    "activation, formula, inputs_per_output",
    [
        (None, tanh_gelu, 1),
        (nn.GELU(), erf_gelu, 1),
        (GEGLU(), gated, 2),
        (SwiGLU(), silu_gated, 2),
        (SquaredReLU(), squared_relu, 1),
    ],
    ids=["default", "erf", "GEGLU", "SwiGLU", "SquaredReLU"],
)
def test_it_equals_linear_activation_linear(widening, activation, formula, inputs_per_output):
    mlp = MLP(DIM, widening_factor=widening, activation=activation).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    hidden = formula(x @ mlp.expand.weight.T + mlp.expand.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.contract.weight.T + mlp.contract.bias, **EXACT)
    assert hidden.shape[-1] == DIM * widening
    assert mlp.expand.out_features == DIM * widening * inputs_per_output


def test_custom_widths_without_biases():
    mlp = MLP(DIM, 3, hidden_dim=11, activation=SwiGLU(), bias=False).double()
    assert {name: tuple(weight.shape) for name, weight in mlp.named_parameters()} == {
        "expand.weight": (22, DIM),
        "contract.weight": (3, 11),
    }
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), silu_gated(x @ mlp.expand.weight.T) @ mlp.contract.weight.T, **EXACT)


@pytest.mark.refusal
@pytest.mark.parametrize("sizes", [{"hidden_dim": 0}, {"out_dim": 0}, {"widening_factor": 0}])
def test_sizes_that_are_not_positive_raise(sizes):
    with pytest.raises(ValueError, match=rf"{next(iter(sizes))} must be a whole number of at least 1; got 0"):
        MLP(DIM, **sizes)


def test_the_two_gelus_differ():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    assert (tanh_gelu(x) - erf_gelu(x)).abs().max() > 1e-4


def test_it_takes_any_number_of_axes():
    mlp = MLP(DIM)
    x = torch.randn(2, 3, 5, DIM)
    torch.testing.assert_close(mlp(x)[1, 2, 4], mlp(x[1, 2, 4]), rtol=1e-5, atol=1e-6)


def test_initialization_has_unit_gain_and_no_bias():
    torch.manual_seed(0)
    mlp = MLP(211, widening_factor=3)
    for layer in (mlp.expand, mlp.contract):
        assert layer.weight.std().item() * math.sqrt(layer.in_features) == pytest.approx(1, abs=0.02)
        assert layer.bias.eq(0).all()


def test_dropout_of_the_output_is_for_training_only():
    mlp, x = MLP(DIM, dropout=0.5), torch.ones(2, 5, DIM)
    without = mlp.eval()(x)
    torch.manual_seed(0)
    some = mlp.train()(x)
    dropped = some == 0
    assert dropped.any() and not dropped.all()
    torch.testing.assert_close(some[~dropped], 2 * without[~dropped])
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        MLP(DIM, dropout=1.0)
