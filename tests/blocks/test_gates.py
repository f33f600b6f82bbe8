"""Gates in place of the residual sum: their formulas, in blocks and in models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import perceiver_core as pc
from perceiver_core import CrossAttend, GRUGate, SelfAttend, TanhGate

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.double().parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return module


def test_the_gru_gate_equals_a_gru_cell():
    gate, x, read = shaken(GRUGate(13)), drawn(2, 5, 13), drawn(2, 5, 13, seed=1)
    weights = [layer.chunk(3) for layer in (gate.cell.weight_ih, gate.cell.weight_hh)]
    biases = [layer.chunk(3) for layer in (gate.cell.bias_ih, gate.cell.bias_hh)]
    (r_in, z_in, n_in), (r_state, z_state, n_state) = (
        [x @ weight.mT + bias for weight, bias in zip(w, b, strict=True)]
        for x, w, b in zip((read, x), weights, biases, strict=True)
    )
    z = (z_in + z_state).sigmoid()
    expected = (1 - z) * (n_in + (r_in + r_state).sigmoid() * n_state).tanh() + z * x
    torch.testing.assert_close(gate(x, read), expected, **EXACT)
    along = drawn(2, 5, 13, seed=2).detach()
    gradients = [torch.autograd.grad(out, [x, read, *gate.parameters()], along) for out in (gate(x, read), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_a_tanh_gate_starts_closed():
    gate, x, read = TanhGate(13).double(), drawn(2, 5, 13), drawn(2, 5, 13, seed=1)
    assert torch.equal(gate(x, read), x)
    torch.testing.assert_close(torch.autograd.grad(gate(x, read).sum(), gate.gate)[0], read.sum().detach()[None])
    with torch.no_grad():
        gate.gate.fill_(0.7)
    torch.testing.assert_close(gate(x, read), x + torch.tensor(0.7).double().tanh() * read)


@pytest.mark.parametrize("gate", [GRUGate, TanhGate])
def test_blocks_accept_a_gate_as_residual(gate):
    x, tokens = drawn(2, 5, 13), drawn(2, 11, 10, seed=1)
    read, own = shaken(CrossAttend(13, 10, residual=gate)), shaken(SelfAttend(13, num_heads=1, residual=gate))
    after = read.residual(x, read.attention(read.query_norm(x), read.input_norm(tokens)))
    torch.testing.assert_close(read(x, tokens), after + read.mlp(read.mlp_norm(after)), **EXACT)
    normed = own.norm(x)
    after = own.residual(x, own.attention(normed))
    torch.testing.assert_close(own(x), after + own.mlp(own.mlp_norm(after)), **EXACT)


@pytest.mark.parametrize("gate", [GRUGate, TanhGate])
@pytest.mark.parametrize("share", [True, False])
def test_a_gated_encoder(gate, share, tmp_path):
    made = pc.Encoder(
        10, num_latents=7, dim=14, depth=1, num_heads=2, num_reads=3, share=share,
        cross_attention=partial(CrossAttend, residual=gate),
        latent_transformer=partial(pc.LatentTransformer, block=partial(SelfAttend, residual=gate)),
    )  # fmt: skip
    x = torch.randn(2, 11, 10)
    again = pc.load(pc.save(made, tmp_path))
    torch.testing.assert_close(again(x), made(x))
    shaken(made)(x.double()).square().sum().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    gates = [module for module in made.modules() if isinstance(module, gate)]
    assert len(gates) == (3 if share else 6)


def test_it_equals_perceiver_pytorch():
    theirs = pytest.importorskip("perceiver_pytorch.gated")
    plain = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
    torch.manual_seed(0)
    attention = plain.Attention(13, 10, heads=1, dim_head=5)
    other = theirs.GRUGating(13, plain.PreNorm(13, attention, context_dim=10)).double()
    ours = partial(pc.MultiHeadAttention, qk_dim=5, bias=False)
    read = CrossAttend(13, 10, attention=ours, mlp=None, residual=GRUGate).double()
    with torch.no_grad():
        read.residual.cell.load_state_dict(other.gru.state_dict())
        read.query_norm.load_state_dict(other.fn.norm.state_dict())
        read.input_norm.load_state_dict(other.fn.norm_context.state_dict())
        read.attention.query.weight.copy_(attention.to_q.weight)
        read.attention.key.weight.copy_(attention.to_kv.weight[:5])
        read.attention.value.weight.copy_(attention.to_kv.weight[5:])
        read.attention.output.load_state_dict(attention.to_out.state_dict())
    x, tokens = drawn(2, 7, 13), drawn(2, 11, 10, seed=1)
    torch.testing.assert_close(read(x, tokens), other(x, context=tokens), **EXACT)


@pytest.mark.refusal
@pytest.mark.parametrize("gate", [GRUGate, TanhGate])
def test_invalid_widths_raise(gate):
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        gate(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", [GRUGate, TanhGate])
def test_under_autocast(gate, dtype):
    read = CrossAttend(13, 10, residual=gate)
    with torch.autocast("cpu", dtype=dtype):
        out = read(torch.randn(1, 5, 13), torch.randn(2, 11, 10))
    assert out.shape == (2, 5, 13) and out.isfinite().all()
    out.float().sum().backward()


@pytest.mark.parametrize("gate", [GRUGate, TanhGate])
def test_the_mlp_is_gated_as_well(gate):
    x, tokens = drawn(2, 5, 13), drawn(2, 11, 10, seed=1)
    read, own = shaken(CrossAttend(13, 10, mlp_residual=gate)), shaken(SelfAttend(13, num_heads=1, mlp_residual=gate))
    after = x + read.attention(read.query_norm(x), read.input_norm(tokens))
    expected = read.mlp_residual(after, read.mlp(read.mlp_norm(after)))
    torch.testing.assert_close(read(x, tokens), expected, **EXACT)
    after = x + own.attention(own.norm(x))
    torch.testing.assert_close(own(x), own.mlp_residual(after, own.mlp(own.mlp_norm(after))), **EXACT)


def test_without_a_residual_the_mlp_replaces_its_input():
    x, read = drawn(2, 5, 13), shaken(CrossAttend(13, 10, mlp_residual=False))
    tokens = drawn(2, 11, 10, seed=1)
    after = x + read.attention(read.query_norm(x), read.input_norm(tokens))
    torch.testing.assert_close(read(x, tokens), read.mlp(read.mlp_norm(after)), **EXACT)


def test_a_block_with_both_gates_closed_is_the_identity():
    x, tokens = torch.randn(2, 5, 13), torch.randn(2, 11, 10)
    block = CrossAttend(13, 10, residual=TanhGate, mlp_residual=TanhGate)
    assert torch.equal(block(x, tokens), x)


@pytest.mark.refusal
@pytest.mark.parametrize("residual", ["gate", GRUGate(13)])
def test_invalid_residuals_raise(residual):
    with pytest.raises(TypeError, match="residual must be True, False or a factory of modules"):
        CrossAttend(13, 10, residual=residual)
