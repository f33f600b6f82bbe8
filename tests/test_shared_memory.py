"""Keys and values that reads share: right gradients in every checkpoint, freed after use, with modules of the user."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perceiver_core as pc
from perceiver_core import positions, reads


def encoder(**options):
    torch.manual_seed(0)
    return pc.Encoder(10, num_latents=5, dim=14, num_reads=3, depth=1, num_heads=2, **options).double()


def tokens(requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 11, 10, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


class Reentrant(nn.Module):
    """A read in a reentrant checkpoint, which runs without a graph at first."""

    accepts_cache = True

    def __init__(self, read: nn.Module) -> None:
        super().__init__()
        self.read = read

    def forward(self, x, tokens, **options):
        return checkpoint(lambda x: self.read(x, tokens, **options), x, use_reentrant=True)


def gradients(model: nn.Module) -> list[Tensor]:
    model(tokens(requires_grad=True)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_reentrant_checkpoints_give_the_same_gradients():
    expected = gradients(encoder())
    model = encoder()
    model.reads = nn.ModuleList(map(Reentrant, model.reads))
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-12)


class Watched(nn.Linear):
    """A projection that keeps weak references to what it made."""

    def forward(self, x):
        out = super().forward(x)
        self.made = getattr(self, "made", [])
        self.made.append(weakref.ref(out))
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_checkpointed_memories_are_freed_without_a_backward_pass(fails):
    model = pc.checkpoint_activations(encoder(share=pc.sharing.all_))
    value = Watched(10, 10).double()
    model.reads[0].attention.value = value
    if fails:
        model.transformers[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens())
    else:
        model(tokens())
    gc.collect()
    assert value.made and all(made() is None for made in value.made)


@pytest.mark.compile
def test_checkpointed_models_compile_in_one_graph():
    model, x = pc.checkpoint_activations(encoder()), tokens()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


class OwnAttention(pc.MultiHeadAttention):
    """Overrides forward without a cache."""

    def forward(self, x, inputs=None, *, mask=None):
        return super().forward(x, inputs, mask=mask)


class OwnRead(pc.CrossAttend):
    """Overrides forward without a cache."""

    def forward(self, x, tokens, *, mask=None):
        return super().forward(x, tokens, mask=mask)


@pytest.mark.parametrize("read", [OwnRead, partial(pc.CrossAttend, attention=OwnAttention)], ids=["read", "attention"])
def test_subclasses_without_a_cache_share_weights(read):
    torch.testing.assert_close(encoder(cross_attention=read)(tokens()), encoder()(tokens()), rtol=0, atol=1e-12)


@pytest.mark.refusal
def test_an_attention_without_a_cache_refuses_a_growing_one():
    read = pc.CrossAttend(14, 10, attention=OwnAttention).double()
    with pytest.raises(TypeError, match="cache of keys and values needs MultiHeadAttention; got OwnAttention"):
        read(torch.randn(2, 5, 14).double(), tokens(), cache=reads.KeysValuesCache())


@pytest.mark.refusal
def test_tokens_of_another_type_raise():
    with pytest.raises(TypeError, match="tokens must be Tokens, a tensor b n c or a memory; got ndarray"):
        pc.CrossAttend(14, 10)(torch.randn(2, 5, 14), tokens().numpy())


def test_edited_position_tables_are_made_again():
    where, like = positions.Fourier(num_axes=2, num_bands=3, max_resolution=7), torch.zeros(())
    expected = [table.clone() for table in where.tables((5, 7), like)]
    where.tables((5, 7), like)[0].zero_()
    torch.testing.assert_close(list(where.tables((5, 7), like)), expected, rtol=0, atol=0)
    where.tables((5, 7), like)[1].requires_grad_()
    assert not any(table.requires_grad for table in where.tables((5, 7), like))


def test_tables_made_in_inference_mode_serve_training():
    where, like = positions.Fourier(num_axes=1, num_bands=3, max_resolution=13), torch.zeros(())
    with torch.inference_mode():
        where.tables((13,), like)
    weight = torch.ones(where.dim, requires_grad=True)
    (where.tables((13,), like)[0] * weight).sum().backward()
    assert weight.grad.isfinite().all()
