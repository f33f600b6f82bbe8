"""Laws of every Perceiver: order, masks, batches, kernels, gradients, constructor arguments."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perceiver_core import (
    GEGLU,
    MLP,
    AttentionResidual,
    CrossAttend,
    DropLatents,
    Encoder,
    LatentTransformer,
    MultiHeadAttention,
    Perceiver,
    SelfAttend,
    Tokens,
    adapters,
    heads,
    masks,
    positions,
    reads,
    sharing,
)
from perceiver_core.kernels import chunked, reference, sdpa

EXACT = {"rtol": 0, "atol": 1e-11}  # float64
LATENTS, DIM = 5, 14
SCHEMES = {"none": sharing.none, "all": sharing.all_, "all but first": sharing.all_but_first, "paper": sharing.paper}

few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
schemes = st.sampled_from(list(SCHEMES.values()))


def encoder(input_dim, *, share=sharing.paper, kernel=sdpa, reads=3, depth=1):
    attention = partial(MultiHeadAttention, kernel=kernel)
    return Encoder(
        input_dim,
        num_latents=LATENTS,
        dim=DIM,
        num_reads=reads,
        depth=depth,
        num_heads=7,
        share=share,
        cross_attention=partial(CrossAttend, attention=attention),
        latent_transformer=partial(LatentTransformer, block=partial(SelfAttend, attention=attention)),
    )


def shaken(module, seed=0):
    """Returns the module in float64, all parameters perturbed: biases start at zero, where tests could not see them."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return module


def cloud_model(seed=0, *, features=2, head=None, **options):
    torch.manual_seed(seed)
    adapter = adapters.PointCloud(features, positions=positions.Fourier(num_axes=3, num_bands=3, max_resolution=7))
    whole = Perceiver(adapter, encoder(adapter.dim, **options), head or heads.Classification(DIM, 11))
    return shaken(whole, seed)


def cloud(batch, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, n, 5, generator=generator, dtype=torch.float64) * 2 - 1


def some(batch, n, seed=0):
    """Random mask that leaves each sample at least one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(n, (batch,), generator=generator)] = True
    return mask


class TestOrder:
    @few
    @given(seed=seeds, n=st.integers(1, 23), share=schemes)
    def test_the_order_of_a_cloud_has_no_effect(self, seed, n, share):
        model, points, mask = cloud_model(share=share), cloud(2, n, seed), some(2, n, seed)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(model(points[:, order], mask=mask[:, order]), model(points, mask=mask), **EXACT)

    @few
    @given(seed=seeds, grid=st.tuples(st.integers(1, 5), st.integers(1, 7)), share=schemes)
    def test_permuting_tokens_with_their_positions_has_no_effect(self, seed, grid, share):
        where = positions.Fourier(num_axes=2, num_bands=3, max_resolution=7)
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.rand(2, *grid, 3, generator=generator, dtype=torch.float64)
        tokens = Tokens(pictures, where.tables(grid, like=pictures)).materialize()
        order = torch.randperm(tokens.shape[1], generator=generator)
        model = shaken(encoder(tokens.shape[-1], share=share))
        torch.testing.assert_close(model(tokens[:, order]), model(tokens), **EXACT)

    def test_permuting_pixels_without_positions_has_an_effect(self):
        adapter = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=7))
        model = shaken(Perceiver(adapter, encoder(adapter.dim), heads.Classification(DIM, 11)))
        pictures = torch.rand(2, 3, 7, 5, dtype=torch.float64)
        assert (model(pictures.flip(-1)) - model(pictures)).abs().max() > 1e-3


class TestMasks:
    @few
    @given(
        seed=seeds, n=st.integers(1, 23), value=st.sampled_from([float("nan"), float("inf"), 1e30, 0.0]), share=schemes
    )
    def test_masked_tokens_have_no_effect(self, seed, n, value, share):
        model, points, mask = cloud_model(share=share), cloud(3, n, seed), some(3, n, seed)
        out = model(points, mask=mask)
        other = model(points.masked_fill(~mask[..., None], value), mask=mask)
        torch.testing.assert_close(other, out, **EXACT)
        alone = torch.cat([model(p[m][None]) for p, m in zip(points, mask, strict=True)])
        torch.testing.assert_close(out, alone, **EXACT)

    @few
    @given(seed=seeds, value=st.sampled_from([float("nan"), float("inf")]))
    def test_masked_tokens_have_no_effect_on_gradients(self, seed, value):
        points, mask = cloud(2, 13, seed), some(2, 13, seed)
        gradients = []
        for held in (points, points.masked_fill(~mask[..., None], value)):
            model = cloud_model()
            model(held, mask=mask).square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    @few
    @given(seed=seeds)
    def test_a_mask_of_all_true_has_no_effect(self, seed):
        model, points = cloud_model(), cloud(2, 11, seed)
        torch.testing.assert_close(model(points, mask=torch.ones(2, 11, dtype=torch.bool)), model(points), **EXACT)

    def test_unmasked_tokens_have_an_effect(self):
        model, points = cloud_model(), cloud(2, 11)
        mask = torch.ones(2, 11, dtype=torch.bool)
        mask[:, 4] = False
        assert (model(points, mask=mask) - model(points)).abs().min() > 1e-8


@few
@given(seed=seeds, batch=st.integers(2, 5), share=schemes)
def test_samples_of_a_batch_are_independent(seed, batch, share):
    model, points, mask = cloud_model(share=share), cloud(batch, 11, seed), some(batch, 11, seed)
    together = model(points, mask=mask)
    alone = [model(points[i : i + 1], mask=mask[i : i + 1]) for i in range(batch)]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


@few
@given(seed=seeds, n=st.integers(1, 23), chunk=st.integers(1, 29), masked=st.booleans(), share=schemes)
def test_pieces_equal_the_whole(seed, n, chunk, masked, share):
    kernels = (reference, sdpa, partial(chunked, chunk_size=chunk))
    mask = some(2, n, seed) if masked else None
    actual = []
    for kernel in kernels:
        model, points = cloud_model(seed, kernel=kernel, share=share), cloud(2, n, seed).requires_grad_()
        out = model(points, mask=mask)
        actual.append([out, *torch.autograd.grad(out.square().sum(), [points, *model.parameters()])])
    for other in actual[1:]:
        torch.testing.assert_close(other, actual[0], rtol=1e-8, atol=1e-9)


FOURIER = partial(positions.Fourier, num_bands=2, max_resolution=7)
INPUTS = {
    "pixels": (adapters.Image(3, positions=FOURIER(2)), (2, 3, 7, 5)),
    "grey": (adapters.Image(1, positions=positions.LearnedGrid((3, 5), dim=4)), (2, 1, 7, 5)),
    "projected": (adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.Project, dim=4)), (2, 3, 7, 5)),
    "patches": (
        adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.Patches, patch_size=(2, 3))),
        (2, 3, 7, 5),
    ),
    "convolved": (adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.ConvStem, dim=4)), (2, 3, 17, 13)),
    "audio": (adapters.Audio(5, positions=FOURIER(1)), (2, 37)),
    "learned audio": (adapters.Audio(5, positions=positions.LearnedGrid((7,), dim=3)), (2, 37)),
    "spectrogram": (adapters.Spectrogram(positions=FOURIER(2)), (2, 3, 7)),
    "points": (adapters.PointCloud(2, positions=FOURIER(3)), (2, 13, 5)),
    "video": (adapters.Grid(3, positions=FOURIER(3)), (2, 2, 3, 5, 3)),
}
HEADS = {"classify": heads.Classification(DIM, 3), "regress": heads.Regression(DIM), "latents": heads.Identity()}


@pytest.mark.parametrize("share", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("adapter, shape", INPUTS.values(), ids=INPUTS.keys())
def test_every_parameter_gets_a_gradient(adapter, shape, head, share):
    torch.manual_seed(0)
    model = shaken(Perceiver(adapter, encoder(adapter.dim, share=share), head))
    model.zero_grad()
    out = model(torch.rand(shape, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # q . b is the same for every key, and softmax is invariant to a shift of all scores.
        invisible = name.endswith("key.bias")
        assert (parameter.grad.abs().max() < 1e-10) == invisible, name


# Every constructor argument, with two values that must give different results.

X = torch.randn(2, 13, DIM, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 17, 12, generator=torch.Generator().manual_seed(1))
CLOUD = cloud(2, 13).float()


def self_attention(part, **arguments):
    attention = part(**arguments)
    return attention, lambda: attention(X, X if attention.input_dim == DIM else TOKENS)


def on(x):
    def make(part, **arguments):
        module = part(**arguments)
        return module, lambda: module(x)

    return make


def reading(part, **arguments):
    block = part(**arguments)
    return block, lambda: block(X, TOKENS if block.input_dim == 12 else X)


def encoding(part, **arguments):
    made = part(**arguments)
    return made, lambda: made(TOKENS if made.reads[0].input_dim == 12 else X)


def adapting(x):
    def make(part, **arguments):
        adapter = part(**arguments)
        given = x[:, : arguments.get("num_channels", 3)] if part is adapters.Image else x
        given = given[..., : 3 + arguments["num_features"]] if part is adapters.PointCloud else given
        return adapter, lambda: adapter(given).materialize()

    return make


def at(x):
    def make(part, **arguments):
        where = part(**arguments)
        return where, lambda: where(x[..., : arguments["num_axes"]])

    return make


class Twice(reads.Dense):
    """A strategy that returns twice the output."""

    def prepare(self, context):
        memory = super().prepare(context)
        return memory._replace(values=2 * memory.values)


ARGUMENTS = [
    (
        MultiHeadAttention,
        self_attention,
        {"dim": DIM, "num_heads": 2},
        {
            "dim": 8,
            "input_dim": 12,
            "num_heads": 7,
            "qk_dim": 6,
            "v_dim": 6,
            "num_kv_heads": 1,
            "qk_norm": nn.LayerNorm,
            "out_dim": 5,
            "bias": False,
            "out_bias": False,
            "dropout": 0.5,
            "rotary": positions.Rotary(2),
            "kernel": lambda q, k, v, *, mask: reference(2 * q, k, v, mask=mask),
        },
    ),
    (
        MLP,
        on(X),
        {"dim": DIM},
        {
            "dim": 13,
            "out_dim": 5,
            "hidden_dim": 11,
            "widening_factor": 2,
            "activation": nn.Tanh(),
            "bias": False,
            "dropout": 0.5,
        },
    ),
    (
        SelfAttend,
        on(X),
        {"dim": DIM, "num_heads": 2},
        {
            "dim": 8,
            "num_heads": 7,
            "attention": partial(MultiHeadAttention, bias=False),
            "mlp": partial(MLP, widening_factor=2),
            "norm": nn.Identity,
            "residual": False,
            "mlp_residual": False,
            "dropout": 0.5,
        },
    ),
    (
        CrossAttend,
        reading,
        {"dim": DIM, "input_dim": 12},
        {
            "dim": 13,
            "input_dim": DIM,
            "num_heads": 3,
            "attention": partial(MultiHeadAttention, bias=False),
            "mlp": partial(MLP, activation=GEGLU()),
            "norm": nn.Identity,
            "residual": False,
            "mlp_residual": False,
            "dropout": 0.5,
            "strategy": Twice(),
        },
    ),
    (
        LatentTransformer,
        on(X),
        {"dim": DIM, "depth": 1, "num_heads": 2},
        {
            "dim": 8,
            "depth": 2,
            "num_heads": 7,
            "block": partial(SelfAttend, norm=nn.RMSNorm),
            "num_repeats": 2,
            "aggregate": AttentionResidual,
        },
    ),
    (
        Encoder,
        encoding,
        {"input_dim": 12, "num_latents": 5, "dim": DIM, "num_reads": 3, "depth": 1, "num_heads": 2},
        {
            "input_dim": DIM,
            "num_latents": 7,
            "dim": 22,
            "num_reads": 2,
            "depth": 2,
            "num_heads": 7,
            "share": False,
            "cross_attention": partial(CrossAttend, num_heads=3),
            "latent_transformer": partial(LatentTransformer, block=partial(SelfAttend, dropout=0.5)),
            "latent_dropout": DropLatents(0.5),
            "aggregate": AttentionResidual,
        },
    ),
    (
        heads.Classification,
        on(X),
        {"dim": DIM, "num_classes": 3},
        {"dim": 13, "num_classes": 5, "norm": nn.Identity, "dropout": 0.5},
    ),
    (heads.Regression, on(X), {"dim": DIM}, {"dim": 13, "num_outputs": 5, "norm": nn.Identity, "dropout": 0.5}),
    (
        adapters.Image,
        adapting(torch.rand(2, 3, 7, 5)),
        {"positions": FOURIER(2)},
        {"num_channels": 1, "positions": None, "stem": partial(adapters.Patches, patch_size=2)},
    ),
    (
        adapters.Patches,
        on(torch.rand(2, 3, 7, 5)),
        {"num_channels": 3, "patch_size": 2},
        {"num_channels": 1, "patch_size": (1, 4)},
    ),
    (adapters.Project, on(torch.rand(2, 3, 7, 5)), {"num_channels": 3, "dim": 2}, {"num_channels": 1, "dim": 4}),
    (adapters.ConvStem, on(torch.rand(2, 3, 7, 5)), {"num_channels": 3}, {"num_channels": 1, "dim": 4}),
    (
        adapters.Audio,
        adapting(torch.rand(2, 37)),
        {"positions": FOURIER(1)},
        {"patch_size": 5, "positions": None, "num_channels": 2},
    ),
    (adapters.Spectrogram, adapting(torch.rand(2, 3, 7)), {"positions": None}, {"positions": FOURIER(2)}),
    (
        adapters.PointCloud,
        adapting(CLOUD),
        {"num_features": 2, "positions": FOURIER(3)},
        {"num_features": 0, "positions": positions.NeRF(num_axes=3, num_bands=2)},
    ),
    (
        adapters.Grid,
        adapting(torch.rand(2, 3, 5, 7)),
        {"num_channels": 7, "positions": FOURIER(2)},
        {"num_channels": 3, "positions": None},
    ),
    (
        positions.Fourier,
        at(CLOUD),
        {"num_axes": 2, "num_bands": 3, "max_resolution": 7},
        {"num_axes": 3, "num_bands": 4, "max_resolution": (7, 11), "concat_positions": False, "sine_only": True},
    ),
    (
        positions.FourierPerAxis,
        at(CLOUD),
        {"num_axes": 2, "num_bands": 3, "max_frequency": 7.0},
        {"num_axes": 3, "num_bands": 4, "max_frequency": 11.0},
    ),
    (positions.NeRF, at(CLOUD), {"num_axes": 2, "num_bands": 3}, {"num_axes": 3, "num_bands": 4}),
    (
        positions.Gaussian,
        at(CLOUD),
        {"num_axes": 2, "num_features": 3},
        {"num_axes": 3, "num_features": 4, "scale": 5.0},
    ),
]


def observed(part, make, arguments):
    """Observable behavior of a part: its width, the shapes of its weights, and its outputs in training."""
    torch.manual_seed(0)
    module, run = make(part, **arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes["dim"] = getattr(module, "dim", None)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
        torch.manual_seed(0)
        try:
            out = run()
        except (RuntimeError, ValueError):  # built for an input of another size
            out = torch.empty(0)
    return shapes, out


CASES = [
    pytest.param(part, make, base, {name: value}, id=f"{part.__name__}-{name}")
    for part, make, base, changes in ARGUMENTS
    for name, value in changes.items()
]


@pytest.mark.parametrize("part, make, base, change", CASES)
def test_every_argument_changes_something(part, make, base, change):
    shapes, out = observed(part, make, base)
    other_shapes, other = observed(part, make, base | change)
    assert out.numel() > 0
    same = other.numel() == 0 or (out.shape == other.shape and torch.allclose(out, other, atol=1e-6))
    assert shapes != other_shapes or not same


@pytest.mark.parametrize("part, changes", [pytest.param(c[0], c[3], id=c[0].__name__) for c in ARGUMENTS])
def test_every_constructor_argument_is_covered(part, changes):
    assert set(inspect.signature(part).parameters) == set(changes)


def test_the_mask_of_a_call_reaches_every_read():
    model = shaken(encoder(12, share=False))
    allowed = masks.Padding(some(2, 17))
    for step in range(3):
        weights = model.attention_map(TOKENS.double(), read=step, mask=allowed)
        assert ((weights > 0) == allowed.keys[:, None, None]).all()
