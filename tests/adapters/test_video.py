"""Videos in blocks, and pairs of frames."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.adapters import FramePair, Video


def film(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 3, 5), (5, 1, 2), (1, 7, 11), (6, 8, 13)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_token_is_its_block_padded_with_zeros(patch, channels):
    frames, rows, columns = patch
    films = film(2, 5, channels, 7, 11)
    tokens = Video(channels, positions=None, patch_size=patch)(films)
    grid = tuple(-(-size // step) for size, step in zip((5, 7, 11), patch, strict=True))
    assert tokens.grid == grid and tokens.dim == channels * frames * rows * columns
    whole = torch.zeros(2, grid[0] * frames, channels, grid[1] * rows, grid[2] * columns)
    whole[:, :5, :, :7, :11] = films
    for t, i, j in ((0, 0, 0), tuple(size - 1 for size in grid)):
        block = whole[:, t * frames :, :, i * rows :, j * columns :][:, :frames, :, :rows, :columns]
        torch.testing.assert_close(tokens.content[:, t, i, j], block.movedim(2, -1).flatten(1), rtol=0, atol=0)


def test_a_video_of_one_frame_equals_an_image():
    pictures = film(2, 3, 7, 11)
    expected = pc.adapters.Image(
        3, positions=None, stem=lambda channels: pc.adapters.Patches(channels, patch_size=(2, 4))
    )
    actual = Video(positions=None, patch_size=(1, 2, 4))(pictures[:, None])
    torch.testing.assert_close(actual.materialize(), expected(pictures).materialize(), rtol=0, atol=0)


def test_each_block_has_its_position():
    where = pc.positions.Fourier(num_axes=3, num_bands=2, max_resolution=(5, 7, 11))
    video = Video(positions=where, patch_size=(2, 2, 3))
    tokens = video(film(2, 5, 3, 7, 11))
    assert tokens.dim == video.dim == 36 + where.dim
    points = pc.positions.grid_points((3, 4, 4), like=tokens.content)
    torch.testing.assert_close(tokens.positions(), where(points))


def test_masked_blocks_have_no_effect():
    video, films = Video(positions=None, patch_size=(1, 7, 11)), film(2, 5, 3, 7, 11)
    there = torch.arange(5) < torch.tensor([[5], [2]])
    films[1, 2:] = torch.nan
    tokens = video(films, mask=there[:, :, None, None])
    assert tokens.materialize().isfinite().all() and torch.equal(tokens.flat_mask(), there)
    torch.testing.assert_close(tokens.materialize()[1, :2], video(films[1:, :2]).materialize()[0])


def test_gradients_reach_every_pixel():
    films = film(1, 3, 2, 5, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Video(2, positions=None, patch_size=(2, 2, 2))(x).materialize(), films)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("films", "kind", "message"),
    [
        (torch.zeros(2, 5, 3, 7), ValueError, r"video must have 5 axes \(b t c h w\)"),
        (torch.zeros(2, 3, 5, 7, 11), ValueError, "video must have 3 channels in axis 2; got 5"),
        (torch.zeros(2, 0, 3, 7, 11), ValueError, "video must not be empty"),
        (torch.zeros(2, 5, 3, 7, 11).byte(), TypeError, "video must be floating point"),
        (torch.full((1, 5, 3, 7, 11), torch.nan), ValueError, "video holds NaN"),
    ],
)
def test_invalid_videos_raise(films, kind, message):
    with pytest.raises(kind, match=message):
        Video(positions=None)(films)


@pytest.mark.refusal
def test_invalid_settings_raise():
    with pytest.raises(ValueError, match=r"patch_size must be \(frames, rows, columns\); got \(4, 4\)"):
        Video(positions=None, patch_size=(4, 4))
    with pytest.raises(ValueError, match=r"patch_size\[1\] must be a whole number of at least 1; got 0"):
        Video(positions=None, patch_size=(1, 0, 4))
    with pytest.raises(ValueError, match="positions of Video must have 3 axes; got 2"):
        Video(positions=pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 5, 2, 3\)"):
        Video(positions=None)(film(1, 5, 3, 7, 11), mask=torch.ones(1, 5, 7, 11, dtype=torch.bool))


def frames(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("patch", "channels"), [(1, 1), (3, 3), (5, 2), (7, 1)])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (1, 11)])
def test_a_patch_is_its_pixels_row_by_row_with_channels_together(patch, channels, height, width):
    pair, both = (
        FramePair(positions=None, num_channels=channels, patch_size=patch),
        frames(2, 2, channels, height, width),
    )
    around = F.pad(both, [patch // 2] * 4)
    actual = pair.patches(both)
    assert actual.shape == (2, height, width, 2 * patch * patch * channels)
    for i, j in ((0, 0), (height // 2, width // 2), (height - 1, width - 1)):
        block = around[..., i : i + patch, j : j + patch]  # b t c p q
        torch.testing.assert_close(actual[:, i, j], block.movedim(2, -1).flatten(1), rtol=0, atol=0)


def test_tokens_are_patches_projected_and_positions():
    where = pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=(5, 7))
    pair, both = FramePair(positions=where, dim=11).double(), frames(2, 2, 3, 5, 7)
    tokens = pair(both)
    assert tokens.grid == (5, 7) and tokens.dim == pair.dim == 11 + where.dim
    torch.testing.assert_close(tokens.content, F.linear(pair.patches(both), pair.project.weight, pair.project.bias))
    mask = torch.rand(2, 5, 7) < 0.5
    mask[:, 0, 0] = True
    assert torch.equal(pair(both, mask=mask).mask, mask)


def test_the_two_frames_are_distinguished():
    pair, both = FramePair(positions=None).double(), frames(1, 2, 3, 5, 7)
    assert (pair(both).content - pair(both.flip(1)).content).abs().max() > 1e-3


def test_gradients():
    pair, both = FramePair(positions=None, num_channels=1, dim=3).double(), frames(1, 2, 1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair(x).materialize(), both)


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (torch.zeros(1, 3, 3, 5, 7), ValueError, "frames must be two, b 2 c h w"),
        (torch.zeros(1, 2, 5, 7, 3), ValueError, "frames must have 3 channels in axis 2; got 5"),
        (torch.zeros(2, 3, 5, 7), ValueError, r"frames must have 5 axes"),
        (torch.zeros(1, 2, 3, 5, 7).byte(), TypeError, "frames must be floating point"),
        (torch.full((1, 2, 3, 5, 7), torch.inf), ValueError, "frames holds NaN or infinite"),
    ],
)
def test_invalid_frames_raise(given, kind, message):
    with pytest.raises(kind, match=message):
        FramePair(positions=None)(given)


@pytest.mark.refusal
def test_invalid_settings_of_frame_pairs_raise():
    with pytest.raises(ValueError, match="patch_size must be odd, to have a pixel in its middle; got 4"):
        FramePair(positions=None, patch_size=4)
    with pytest.raises(ValueError, match="dim must be a whole number of at least 1; got 0"):
        FramePair(positions=None, dim=0)
    with pytest.raises(ValueError, match="positions of FramePair must have 2 axes; got 3"):
        FramePair(positions=pc.positions.Fourier(num_axes=3, num_bands=2, max_resolution=7))
