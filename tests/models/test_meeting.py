"""Where parts meet: widths, masks given in several ways, devices without numbers."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc


def encoder(**options: object) -> pc.Encoder:
    torch.manual_seed(0)
    return pc.Encoder(6, num_latents=5, dim=14, depth=1, num_heads=2, **options)


def test_parts_whose_widths_do_not_meet_are_refused_when_built() -> None:
    grid = pc.adapters.Grid(num_channels=7, positions=None)
    with pytest.raises(ValueError, match="encoder must accept the output width of adapter, 7; got 6"):
        pc.Perceiver(grid, encoder(), pc.heads.Identity())
    with pytest.raises(ValueError, match="head must accept the output width of encoder, 14; got 13"):
        pc.Perceiver(nn.Identity(), encoder(), pc.heads.Regression(13))
    with pytest.raises(TypeError, match="head must be a module; got type"):
        pc.Perceiver(nn.Identity(), encoder(), pc.heads.Identity)


@pytest.mark.parametrize("reads", [1, 3])
def test_a_mask_of_tokens_is_the_same_however_it_is_given(reads: int) -> None:
    model, x = encoder(num_reads=reads), torch.rand(5, 11, 6)  # as many samples as latents: no shape tells them apart
    mask = torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0] = True
    wanted = model(pc.Tokens(x, mask=mask))
    for given in (mask, pc.kernels.masks.Padding(mask), mask[:, None, None, :]):
        torch.testing.assert_close(model(x, mask=given), wanted)
        torch.testing.assert_close(model.attention_map(x, mask=given), model.attention_map(pc.Tokens(x, mask=mask)))


def test_an_input_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="inputs must be Tokens, a tensor b n c, or a list of these; got ndarray"):
        encoder()(np.zeros((2, 11, 6)))


def test_a_forward_on_the_meta_device_gives_shapes() -> None:
    image = pc.adapters.Image(
        num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=16)
    )
    with torch.device("meta"):
        model = pc.Perceiver(
            image, pc.Encoder(image.dim, num_latents=5, dim=14, num_heads=2), pc.heads.Classification(14, 3)
        )
        assert model(torch.rand(2, 3, 7, 5)).shape == (2, 3)


def test_blocks_do_not_share_the_weights_of_an_activation() -> None:
    block = partial(pc.SelfAttend, mlp=partial(pc.MLP, activation=nn.PReLU()))
    model = encoder(latent_transformer=partial(pc.LatentTransformer, block=block), num_reads=2, share=False)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.PReLU)]
    assert len({id(weight) for weight in weights}) == 2


def test_a_kernel_without_a_signature_says_to_wrap_it() -> None:
    with pytest.raises(ValueError, match=r"kernel must be a function \(q, k, v, \*, mask\); wrap"):
        pc.MultiHeadAttention(14, num_heads=2, kernel=nn.functional.scaled_dot_product_attention)


def test_one_query_by_its_number() -> None:
    model, x = encoder(), torch.rand(2, 11, 6)
    torch.testing.assert_close(model.attention_map(x, queries=3), model.attention_map(x)[:, :, [3]])


def long_tensors_after(model: pc.Encoder, tokens: pc.Tokens) -> tuple[int, torch.Tensor]:
    """How many tensors as long as the input are alive after a forward whose graph is kept."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    out = model(tokens)
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
    return sum(x.numel() >= tokens.content.numel() for x in alive), out


@pytest.mark.parametrize(("share", "kept"), [(pc.sharing.none, 0), (pc.sharing.all_, 2), (pc.sharing.paper, 2)])
def test_recomputing_keeps_nothing_that_is_made_of_the_input(share: pc.sharing.Scheme, kept: int) -> None:
    """Only the keys and values that reads share are kept; without recomputing, every read keeps three or more."""
    tokens = pc.Tokens(torch.rand(1, 6007, 6))
    model = encoder(num_reads=3, share=share)
    plain, wanted = long_tensors_after(model, tokens)
    found, out = long_tensors_after(pc.checkpoint_activations(pc.checkpoint_activations(model)), tokens)
    assert plain >= 3
    assert found == kept
    torch.testing.assert_close(out, wanted)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), parameters), torch.autograd.grad(wanted.square().sum(), parameters)
    )
