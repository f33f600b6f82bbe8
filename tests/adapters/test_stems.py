"""Stems against independent computations: einops, Hugging Face, TensorFlow's definition of SAME."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import adapters
from perceiver_core.adapters import ConvStem, Patches, Pixels, Project, SymmetricPadConvStem


def test_pixels_are_passed_through():
    pictures = torch.rand(2, 3, 7, 5)
    assert Pixels(3)(pictures) is pictures


class TestPatches:
    @pytest.mark.parametrize("size", [1, 3, (2, 5), (5, 2), (1, 7)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_patch_is_its_pixels_in_a_row_with_channels_last(self, size, channels):
        p, q = (size, size) if isinstance(size, int) else size
        stem = Patches(channels, patch_size=size)
        pictures = torch.rand(2, channels, 7 * p, 11 * q)
        expected = rearrange(pictures, "b c (h p) (w q) -> b (p q c) h w", p=p, q=q)
        torch.testing.assert_close(stem(pictures), expected, rtol=0, atol=0)
        assert stem.dim == expected.shape[1]

    def test_the_order_is_that_of_hugging_face(self):
        perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
        pictures = torch.rand(2, 3, 12, 20)
        expected = perceiver.space_to_depth(pictures, spatial_block_size=4)
        torch.testing.assert_close(Patches(3, patch_size=4)(pictures).movedim(1, -1), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("height, width", [(5, 16), (6, 17), (1, 1), (7, 15)])
    def test_images_are_zero_padded_to_whole_patches(self, height, width):
        pictures = torch.rand(2, 3, height, width) + 1
        whole = torch.zeros(2, 3, math.ceil(height / 2) * 2, math.ceil(width / 5) * 5)
        whole[..., :height, :width] = pictures
        expected = rearrange(whole, "b c (h p) (w q) -> b (p q c) h w", p=2, q=5)
        torch.testing.assert_close(Patches(3, patch_size=(2, 5))(pictures), expected, rtol=0, atol=0)

    @pytest.mark.refusal
    def test_invalid_arguments_raise(self):
        with pytest.raises(ValueError, match=r"patch_size\[0\] must be a whole number of at least 1; got 0"):
            Patches(3, patch_size=0)
        with pytest.raises(ValueError, match=r"patch_size\[1\] must be a whole number; got 2\.0"):
            Patches(3, patch_size=(2, 2.0))
        with pytest.raises(ValueError, match=r"size must be one number, or \(height, width\); got \(2, 3, 5\)"):
            Patches(3, patch_size=(2, 3, 5))


def test_project_is_a_linear_layer_on_every_pixel():
    stem = Project(3, dim=5).double()
    pictures = torch.rand(2, 3, 7, 11, dtype=torch.float64)
    with torch.no_grad():
        stem.convolution.bias.normal_()
    expected = F.linear(pictures.movedim(1, -1), stem.convolution.weight[..., 0, 0], stem.convolution.bias)
    torch.testing.assert_close(stem(pictures), expected.movedim(-1, 1), rtol=0, atol=1e-12)


def windows(size, kernel, stride=2):
    """For each output of a convolution with TensorFlow's SAME padding: its inputs and the kernel taps on them."""
    outputs = math.ceil(size / stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    for output in range(outputs):
        start = output * stride - before
        first, last = max(start, 0), min(start + kernel, size)
        yield slice(first, last), slice(first - start, last - start)


def same_convolution(x, weight):
    rows, columns = (list(windows(size, 7)) for size in x.shape[-2:])
    out = x.new_zeros(x.shape[0], weight.shape[0], len(rows), len(columns))
    for i, (row, row_taps) in enumerate(rows):
        for j, (column, column_taps) in enumerate(columns):
            seen, taps = x[:, :, row, column], weight[:, :, row_taps, column_taps]
            out[:, :, i, j] = torch.einsum("bcpq,dcpq->bd", seen, taps)
    return out


def same_max(x):
    rows, columns = (list(windows(size, 3)) for size in x.shape[-2:])
    return torch.stack([torch.stack([x[..., r, c].amax((-2, -1)) for c, _ in columns], -1) for r, _ in rows], -2)


class TestConvStem:
    @pytest.mark.parametrize("height, width", [(16, 24), (17, 23), (18, 13), (7, 30), (1, 3), (2, 5)])
    @pytest.mark.parametrize("training", [True, False])
    def test_it_pads_as_tensorflow_does(self, height, width, training):
        torch.manual_seed(0)
        stem = ConvStem(3, dim=5).double().train(training)
        with torch.no_grad():
            stem.norm.weight.uniform_(0.5, 2)
            stem.norm.bias.normal_()
            stem.norm.running_mean.normal_()
        pictures = torch.randn(2, 3, height, width, dtype=torch.float64)
        convolved = same_convolution(pictures, stem.convolution.weight)
        if training:
            mean, variance = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3), correction=0)
        else:
            mean, variance = stem.norm.running_mean.clone(), stem.norm.running_var.clone()
        scale = (stem.norm.weight / (variance + stem.norm.eps).sqrt())[:, None, None]
        normed = (convolved - mean[:, None, None]) * scale + stem.norm.bias[:, None, None]
        out = stem(pictures)
        torch.testing.assert_close(out, same_max(normed.relu()), rtol=1e-9, atol=1e-9)
        assert out.shape[-2:] == (math.ceil(height / 4), math.ceil(width / 4))

    def test_the_image_size_of_the_paper(self):
        assert ConvStem(3)(torch.rand(1, 3, 224, 224)).shape == (1, 64, 56, 56)

    @pytest.mark.parametrize("size", range(1, 14))
    def test_both_strides_round_up(self, size):
        shape = ConvStem(1, dim=2).eval()(torch.rand(1, 1, size, 2 * size + 1)).shape
        assert shape[-2:] == (math.ceil(size / 4), math.ceil((2 * size + 1) / 4))


class TestSymmetricPadConvStem:
    @pytest.mark.parametrize("size", [(16, 21), (33, 40), (18, 19)])
    def test_masked_pixels_have_no_effect(self, size):
        image = pc.adapters.Image(3, positions=None, stem=partial(SymmetricPadConvStem, dim=5)).double().eval()
        pixels = torch.rand(2, 3, *size, dtype=torch.float64)
        rows, columns = image.stem(pixels).shape[-2:]
        mask = torch.ones(2, rows, columns, dtype=torch.bool)
        mask[1, :, columns // 2 :] = False
        spoiled = pixels.clone()
        spoiled[1, :, :, columns // 2 * 4 :] = torch.nan
        expected, actual = (image(x, mask=mask).content[mask] for x in (pixels, spoiled))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        whole = torch.ones_like(mask)
        torch.testing.assert_close(image(pixels, mask=whole).content, image(pixels).content, rtol=0, atol=0)

    @pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 23), (5, 30)])
    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_a_convolution_with_padding_of_three_and_a_pool_with_none(self, height, width, training):
        torch.manual_seed(0)
        stem = SymmetricPadConvStem(3, dim=5).double().train(training)
        with torch.no_grad():
            stem.norm.weight.uniform_(0.5, 2)
            stem.norm.running_mean.normal_()
        statistics = stem.norm.running_mean.clone(), stem.norm.running_var.clone()
        pictures = torch.randn(2, 3, height, width, dtype=torch.float64)
        convolved = F.conv2d(pictures, stem.convolution.weight, stride=2, padding=3)
        normed = F.batch_norm(convolved, *statistics, stem.norm.weight, stem.norm.bias, training)
        expected = F.max_pool2d(normed.relu(), 3, 2)
        out = stem(pictures)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        assert out.shape[-2:] == tuple((math.ceil(size / 2) - 3) // 2 + 1 for size in (height, width))

    def test_the_image_size_of_the_paper(self):
        assert SymmetricPadConvStem(3)(torch.rand(1, 3, 224, 224)).shape == (1, 64, 55, 55)
        assert SymmetricPadConvStem(3).stride == (4, 4) and SymmetricPadConvStem(3, dim=7).dim == 7

    def test_it_has_the_weights_of_conv_stem(self):
        stem, padded = SymmetricPadConvStem(3, dim=5), ConvStem(3, dim=5)
        padded.load_state_dict(stem.state_dict())


STEMS = {
    "pixels": adapters.Pixels,
    "patches": partial(adapters.Patches, patch_size=(4, 3)),
    "project": partial(adapters.Project, dim=5),
    "conv": partial(adapters.ConvStem, dim=5),
}


def image(stem: str) -> adapters.Image:
    torch.manual_seed(0)
    where = pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=16)
    return adapters.Image(num_channels=3, positions=where, stem=STEMS[stem])


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("training", [True, False])
def test_masked_pixels_have_no_effect(stem: str, training: bool) -> None:
    adapter = image(stem).train(training)
    pictures = torch.rand(2, 3, 23, 17)
    grid = adapter(pictures).grid
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(1)) < 0.6
    high, wide = adapter.stem.stride
    hidden = ~mask.repeat_interleave(high, 1).repeat_interleave(wide, 2)[:, None, :23, :17]
    first = adapter(pictures, mask=mask).materialize()
    for other in (7.0, torch.nan, torch.inf):
        torch.testing.assert_close(adapter(pictures.masked_fill(hidden, other), mask=mask).materialize(), first)


@pytest.mark.refusal
def test_nan_raises_before_batch_norm_records_it() -> None:
    adapter = image("conv").train()
    pictures = torch.rand(2, 3, 23, 17)
    pictures[1, 2, 3, 5] = torch.nan
    with pytest.raises(ValueError, match="images holds NaN"):
        adapter(pictures)
    assert adapter.stem.norm.running_mean.isfinite().all()
    assert adapter.stem.norm.num_batches_tracked == 0


@pytest.mark.refusal
@pytest.mark.parametrize("stem", ["project", "conv"])
def test_images_of_another_dtype_or_device_raise(stem: str) -> None:
    with pytest.raises(TypeError, match=r"images is torch\.float64, the model torch\.float32"):
        image(stem)(torch.rand(2, 3, 23, 17, dtype=torch.float64))
    with pytest.raises(ValueError, match="images is on meta, the model on cpu"):
        image(stem)(torch.rand(2, 3, 23, 17, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"torch\.float64"):
        image(stem)(torch.rand(2, 3, 23, 17, dtype=torch.float64))


def test_a_user_defined_stem_needs_no_stride() -> None:
    class Halved(torch.nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.dim = channels

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., ::2, ::2]

    adapter = adapters.Image(num_channels=3, positions=None, stem=Halved)
    mask = torch.ones(2, 12, 9, dtype=torch.bool)
    mask[0, 3] = False
    assert adapter(torch.rand(2, 3, 23, 17), mask=mask).materialize().shape == (2, 108, 3)


@pytest.mark.parametrize("size", [(2, 3, 5), [], (4,)])
def test_a_patch_has_one_size_or_two(size: object) -> None:
    with pytest.raises(ValueError, match=r"size must be one number, or \(height, width\)"):
        adapters.Patches(3, patch_size=size)
