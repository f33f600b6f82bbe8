"""Recomputation of activations in the backward pass."""

import gc

import pytest
import torch

import perceiver_core as pc


def long_tensors_after(model: pc.Encoder, tokens: pc.Tokens) -> tuple[int, torch.Tensor]:
    """Returns the number of tensors as long as the input that a forward pass keeps alive, and the output."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    out = model(tokens)
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    return sum(x.numel() >= tokens.content.numel() for x in alive), out


@pytest.mark.parametrize(("share", "kept"), [(pc.sharing.none, 0), (pc.sharing.all_, 2), (pc.sharing.paper, 2)])
def test_nothing_computed_from_the_input_is_kept(share: pc.sharing.Scheme, kept: int) -> None:
    """Only keys and values shared by reads are kept; without checkpointing, every read keeps three tensors or more."""
    tokens = pc.Tokens(torch.rand(1, 6007, 6))
    torch.manual_seed(0)
    model = pc.Encoder(6, num_latents=5, dim=14, num_reads=3, depth=1, num_heads=2, share=share)
    plain, expected = long_tensors_after(model, tokens)
    actual, out = long_tensors_after(pc.checkpoint_activations(pc.checkpoint_activations(model)), tokens)
    assert plain >= 3
    assert actual == kept
    torch.testing.assert_close(out, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters)
    )
