"""Error messages for invalid inputs and settings of models."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch

from perceiver_core import (
    MLP,
    CrossAttend,
    Encoder,
    MultiHeadAttention,
    Perceiver,
    SelfAttend,
    Tokens,
    adapters,
    heads,
    positions,
)

pytestmark = pytest.mark.refusal


def fourier(axes):
    return positions.Fourier(num_axes=axes, num_bands=2, max_resolution=7)


def model(adapter):
    encoder = Encoder(adapter.dim, num_latents=5, dim=14, num_reads=2, depth=1, num_heads=7)
    return Perceiver(adapter, encoder, heads.Classification(encoder.dim, 11))


IMAGE = adapters.Image(3, positions=fourier(2))
AUDIO = adapters.Audio(patch_size=7, positions=fourier(1))
SPECTROGRAM = adapters.Spectrogram(positions=fourier(2))
POINTS = adapters.PointCloud(2, positions=fourier(3))
VIDEO = adapters.Grid(3, positions=fourier(3))
GOOD = {
    "image": (IMAGE, torch.rand(2, 3, 7, 5), (2, 7, 5), "images"),
    "audio": (AUDIO, torch.rand(2, 23), (2, 4), "waveform"),
    "spectrogram": (SPECTROGRAM, torch.rand(2, 3, 7), (2, 3, 7), "spectrogram"),
    "points": (POINTS, torch.rand(2, 11, 5), (2, 11), "points"),
    "video": (VIDEO, torch.rand(2, 2, 3, 5, 3), (2, 2, 3, 5), "x"),
}
each_adapter = pytest.mark.parametrize("adapter, good, grid, name", GOOD.values(), ids=GOOD.keys())


def fails(error, *parts):
    """Expects a message with all of these parts, in order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


@pytest.mark.parametrize(
    "adapter, x, message",
    [
        (IMAGE, torch.rand(3, 7, 5), "images must have 4 axes (b c h w); got shape (3, 7, 5)"),
        (AUDIO, torch.rand(23), "waveform must have 2 axes (b s); got shape (23,)"),
        (SPECTROGRAM, torch.rand(3, 7), "spectrogram must have 3 axes (b bins frames); got shape (3, 7)"),
        (POINTS, torch.rand(11, 5), "points must have 3 axes (b n f); got shape (11, 5)"),
    ],
)
def test_missing_batch_axis(adapter, x, message):
    with fails(ValueError, f"{message}; add a batch axis: {message.split()[0]}.unsqueeze(0)"):
        model(adapter)(x)


@pytest.mark.parametrize(
    "adapter, x, message",
    [
        (VIDEO, torch.rand(2, 3, 5, 3), "x must be b *grid c with 3 grid axes; got shape (2, 3, 5, 3)"),
        (IMAGE, torch.rand(1, 2, 3, 7, 5), "images must have 4 axes (b c h w); got shape (1, 2, 3, 7, 5)"),
    ],
)
def test_wrong_rank(adapter, x, message):
    with fails(ValueError, message):
        model(adapter)(x)


def test_a_rank_off_by_two_gets_no_hint_about_the_batch_axis():
    with pytest.raises(ValueError, match=r"got shape \(7, 5\)$"):
        IMAGE(torch.rand(7, 5))


@pytest.mark.parametrize(
    "adapter, x, message",
    [
        (IMAGE, torch.rand(2, 1, 7, 5), "images must have 3 channels in axis 1; got 1 (shape (2, 1, 7, 5))"),
        (IMAGE, torch.rand(2, 1, 7, 5), "Build the adapter with num_channels=1, or move the channel axis"),
        (IMAGE, torch.rand(2, 7, 5, 3), "images must have 3 channels in axis 1; got 7"),
        (VIDEO, torch.rand(2, 3, 2, 5, 7), "x must have 3 channels in axis 4; got 7"),
        (POINTS, torch.rand(2, 11, 3), "points must have 5 features in its last axis (b n f); got shape (2, 11, 3)"),
    ],
)
def test_wrong_channels(adapter, x, message):
    with fails(ValueError, message):
        model(adapter)(x)


@each_adapter
def test_empty(adapter, good, grid, name):
    for axis in range(1, good.ndim if name != "points" else 2):  # a batch may be empty
        with pytest.raises(ValueError, match=f"{name} must not be empty; got shape"):
            model(adapter)(good.narrow(axis, 0, 0))


@each_adapter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(adapter, good, grid, name, value):
    bad = good.clone()
    bad[(-1,) * bad.ndim] = value
    with fails(ValueError, f"{name} holds NaN or infinite values; clean it, or mask those tokens"):
        model(adapter)(bad)
    with fails(ValueError, f"{name} holds NaN or infinite values"):
        model(adapter)(bad, mask=torch.ones(grid, dtype=torch.bool))


def test_infinities_that_cancel_are_detected():
    bad = torch.rand(2, 23)
    bad[0, 0], bad[0, 1] = torch.inf, -torch.inf
    with fails(ValueError, "waveform holds NaN or infinite values"):
        AUDIO(bad)


@each_adapter
def test_all_masked(adapter, good, grid, name):
    mask = torch.ones(grid, dtype=torch.bool)
    mask[1] = False
    with fails(ValueError, "mask leaves no token to attend to in samples [1]; drop them or unmask a token"):
        model(adapter)(good, mask=mask)


@each_adapter
def test_masks_of_another_shape(adapter, good, grid, name):
    other = (grid[0], *grid[1:-1], grid[-1] + 1)
    with fails(ValueError, f"mask must have shape {grid}, one value a token; got {other}"):
        model(adapter)(good, mask=torch.ones(other, dtype=torch.bool))


@each_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_masks_that_are_not_boolean(adapter, good, grid, name, dtype):
    with fails(TypeError, f"mask must be a boolean tensor, True = attend; got {dtype}. Convert it: mask.bool()"):
        model(adapter)(good, mask=torch.ones(grid, dtype=dtype))
    with fails(TypeError, "mask must be a boolean tensor, True = attend; got list"):
        model(adapter)(good, mask=torch.ones(grid).tolist())


@each_adapter
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers(adapter, good, grid, name, dtype):
    with fails(TypeError, f"{name} must be floating point; got {dtype}. Convert and scale it", f"{name}.float() / 255"):
        model(adapter)(good.to(dtype))


@each_adapter
def test_inputs_other_than_tensors(adapter, good, grid, name):
    with fails(TypeError, f"{name} must be a torch.Tensor; got ndarray. Convert it: torch.as_tensor(...)"):
        model(adapter)(good.numpy())


@each_adapter
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_other_than_the_model(adapter, good, grid, name, dtype):
    with fails(TypeError, f"tokens is {dtype}, the model torch.float32; convert one (tokens.to(torch.float32))"):
        model(adapter)(good.to(dtype))


@each_adapter
def test_device_other_than_the_model(adapter, good, grid, name):
    with fails(ValueError, "tokens is on meta, the model on cpu; move one: tokens.to('cpu')"):
        model(adapter)(good.to("meta"))


def test_masks_of_a_call():
    encoder = Encoder(3, num_latents=5, dim=14, depth=1, num_heads=7)
    x = torch.rand(2, 11, 3)
    with fails(TypeError, "mask must be a boolean tensor"):
        encoder(x, mask=torch.ones(2, 1, 1, 11))
    with fails(ValueError, "mask must be b n (valid tokens) or b h q k; got shape (2, 5, 11)"):
        encoder(x, mask=torch.ones(2, 5, 11, dtype=torch.bool))
    with fails(ValueError, "mask must broadcast to (2, 11); got shape (2, 7)"):
        encoder(x, mask=torch.ones(2, 7, dtype=torch.bool))


def test_tokens_of_another_width():
    encoder = Encoder(3, num_latents=5, dim=14, depth=1, num_heads=7)
    with fails(ValueError, "tokens must have 3 features in its last axis (b n c); got shape (2, 11, 7)"):
        encoder(torch.rand(2, 11, 7))
    with fails(ValueError, "tokens must have 3 axes (b n c); got shape (11, 3); add a batch axis"):
        encoder(torch.rand(11, 3))
    with fails(TypeError, "tokens must be floating point; got torch.int64"):
        encoder(torch.ones(2, 11, 3, dtype=torch.int64))
    with fails(ValueError, "tokens must be 3 wide, content and positions together; got 5 (5 of content)"):
        encoder(Tokens(torch.rand(2, 5, 7, 5)))


@pytest.mark.parametrize("width", ["qk_dim", "v_dim"])
def test_heads_that_do_not_divide(width):
    widths = {"qk_dim": 12, "v_dim": 12, width: 14}
    with fails(
        ValueError,
        f"num_heads must divide {width}; got num_heads=4, {width}=14.",
        f"partial(MultiHeadAttention, {width}=16)",
    ):
        MultiHeadAttention(13, num_heads=4, **widths)
    with fails(ValueError, "num_heads must divide qk_dim; got num_heads=3, qk_dim=13"):
        CrossAttend(14, 13, num_heads=3)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize(
    "make",
    [
        partial(MultiHeadAttention, 14, num_heads=7),
        partial(CrossAttend, 14, 13),
        partial(SelfAttend, 14, num_heads=7),
        partial(heads.Classification, 14, 3),
        partial(heads.Regression, 14),
    ],
)
def test_dropout_out_of_range(make, rate):
    expected = "be a finite number" if math.isnan(rate) else "lie in [0, 1)"
    with fails(ValueError, f"dropout must {expected}; got {rate}"):
        make(dropout=rate)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "7"])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda size: MultiHeadAttention(size), "dim"),
        (lambda size: MultiHeadAttention(14, num_heads=size), "num_heads"),
        (lambda size: CrossAttend(14, size), "input_dim"),
        (lambda size: SelfAttend(size), "dim"),
        (lambda size: MLP(14, widening_factor=size), "widening_factor"),
        (lambda size: Encoder(3, num_latents=size, dim=14), "num_latents"),
        (lambda size: Encoder(3, num_latents=5, dim=14, num_reads=size), "num_reads"),
        (lambda size: heads.Regression(14, size), "num_outputs"),
        (lambda size: adapters.Image(size, positions=None), "num_channels"),
        (lambda size: adapters.Audio(size, positions=None), "patch_size"),
        (lambda size: adapters.Grid(size, positions=None), "num_channels"),
        (lambda size: adapters.Project(3, dim=size), "dim"),
        (lambda size: adapters.ConvStem(3, dim=size), "dim"),
    ],
)
def test_sizes(make, name, size):
    with fails(ValueError, f"{name} must be a whole number", f"; got {size!r}"):
        make(size)


@pytest.mark.parametrize(
    "make, name, axes",
    [(adapters.Image, "Image", 2), (adapters.Audio, "Audio", 1), (adapters.Spectrogram, "Spectrogram", 2)],
)
def test_positions_with_another_number_of_axes(make, name, axes):
    with fails(ValueError, f"positions of {name} must have {axes} axes; got 3"):
        make(positions=fourier(3))


def test_number_of_inputs():
    both = adapters.PerRead([IMAGE, AUDIO])
    with fails(ValueError, "inputs must be 2, one per adapter; got 3"):
        both([torch.rand(2, 3, 7, 5)] * 3)
    encoder = Encoder(both.dim, num_latents=5, dim=14, num_reads=2, depth=1, num_heads=7, share=False)
    with fails(ValueError, "inputs must be one for each of 2 reads; got 1"):
        encoder(IMAGE(torch.rand(2, 3, 7, 5)))
