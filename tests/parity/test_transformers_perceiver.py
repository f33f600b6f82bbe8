"""Our blocks are Hugging Face's `PerceiverLayer`, cross and self, by the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from perceiver_core import MLP, CrossAttend, MultiHeadAttention, SelfAttend
from perceiver_core import masks

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")

BATCH, M, N, DIM, INPUT_DIM = 2, 5, 11, 14, 13
MLP_OF = partial(MLP, widening_factor=3, activation=nn.GELU())


def their_layer(**options):
    config = transformers.PerceiverConfig(attention_probs_dropout_prob=0.0, hidden_act="gelu")
    torch.manual_seed(0)
    layer = theirs.PerceiverLayer(config, q_dim=DIM, widening_factor=3, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return layer


def renamed(layer, *, cross, value):
    """`value` of each of their parameters under our names."""
    attention = layer.attention.self
    places = {
        "query_norm" if cross else "norm": attention.layernorm1,
        "attention.query": attention.query,
        "attention.key": attention.key,
        "attention.value": attention.value,
        "attention.output": layer.attention.output.dense,
        "mlp_norm": layer.layernorm,
        "mlp.expand": layer.mlp.dense1,
        "mlp.contract": layer.mlp.dense2,
    }
    if cross:
        places["input_norm"] = attention.layernorm2
    return {f"{name}.{kind}": value(p) for name, module in places.items() for kind, p in module.named_parameters()}


def agree(our, their, wrt, *, cross, layer, block):
    """The same outputs, and the same gradients of all weights and of what went in."""
    torch.testing.assert_close(our, their, rtol=0, atol=1e-10)
    toward = torch.randn_like(our)
    given = [torch.autograd.grad((out * toward).sum(), wrt, retain_graph=True) for out in (our, their)]
    torch.testing.assert_close(*given, rtol=0, atol=1e-10)
    for out in (our, their):
        (out * toward).sum().backward()
    found = {name: p.grad for name, p in block.named_parameters()}
    wanted = renamed(layer, cross=cross, value=lambda p: p.grad)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "heads, widths", [(1, {}), (13, {}), (1, {"v_dim": 7, "qk_dim": 9}), (3, {"v_dim": 21, "qk_dim": 6})]
)
def test_cross(residual, masked, heads, widths):
    names = {"qk_channels": widths.get("qk_dim"), "v_channels": widths.get("v_dim")}
    layer = their_layer(
        is_cross_attention=True, kv_dim=INPUT_DIM, num_heads=heads, use_query_residual=residual, **names
    )
    attention = partial(MultiHeadAttention, **widths)
    block = CrossAttend(DIM, INPUT_DIM, num_heads=heads, residual=residual, attention=attention, mlp=MLP_OF).double()
    block.load_state_dict(renamed(layer, cross=True, value=lambda p: p.detach()))

    x = torch.randn(BATCH, M, DIM, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(BATCH, N, INPUT_DIM, dtype=torch.float64, requires_grad=True)
    present = torch.rand(BATCH, N, generator=torch.Generator().manual_seed(0)) < 0.6
    added = torch.zeros(BATCH, 1, 1, N, dtype=torch.float64).masked_fill(~present[:, None, None], -1e9)
    their = layer(x, inputs=tokens, inputs_mask=added if masked else None)[0]
    our = block(x, tokens, mask=masks.Padding(present) if masked else None)
    agree(our, their, [x, tokens], cross=True, layer=layer, block=block)


@pytest.mark.parametrize("heads, qk, v", [(1, None, None), (7, None, None), (2, 6, 14)])
def test_self(heads, qk, v):
    layer = their_layer(kv_dim=DIM, num_heads=heads, qk_channels=qk, v_channels=v)
    attention = partial(MultiHeadAttention, qk_dim=qk, v_dim=v)
    block = SelfAttend(DIM, num_heads=heads, attention=attention, mlp=MLP_OF).double()
    block.load_state_dict(renamed(layer, cross=False, value=lambda p: p.detach()))
    x = torch.randn(BATCH, M, DIM, dtype=torch.float64, requires_grad=True)
    agree(block(x), layer(x)[0], [x], cross=False, layer=layer, block=block)
