"""What a stem with weights may see: no masked pixel, no NaN, nothing of another dtype."""

from functools import partial

import pytest
import torch

import perceiver_core as pc
from perceiver_core import adapters

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
def test_what_lies_under_masked_tokens_changes_nothing(stem: str, training: bool) -> None:
    adapter = image(stem).train(training)
    pictures = torch.rand(2, 3, 23, 17)
    grid = adapter(pictures).grid
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(1)) < 0.6
    high, wide = adapter.stem.stride
    hidden = ~mask.repeat_interleave(high, 1).repeat_interleave(wide, 2)[:, None, :23, :17]
    first = adapter(pictures, mask=mask).materialize()
    for other in (7.0, torch.nan, torch.inf):
        torch.testing.assert_close(adapter(pictures.masked_fill(hidden, other), mask=mask).materialize(), first)


def test_a_nan_is_refused_before_batch_norm_keeps_it() -> None:
    adapter = image("conv").train()
    pictures = torch.rand(2, 3, 23, 17)
    pictures[1, 2, 3, 5] = torch.nan
    with pytest.raises(ValueError, match="images holds NaN"):
        adapter(pictures)
    assert adapter.stem.norm.running_mean.isfinite().all()
    assert adapter.stem.norm.num_batches_tracked == 0


@pytest.mark.parametrize("stem", ["project", "conv"])
def test_pictures_of_another_dtype_or_device_are_refused_in_words(stem: str) -> None:
    with pytest.raises(TypeError, match=r"images is torch\.float64, the model torch\.float32"):
        image(stem)(torch.rand(2, 3, 23, 17, dtype=torch.float64))
    with pytest.raises(ValueError, match="images is on meta, the model on cpu"):
        image(stem)(torch.rand(2, 3, 23, 17, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"torch\.float64"):
        image(stem)(torch.rand(2, 3, 23, 17, dtype=torch.float64))


def test_a_stem_of_the_users_needs_no_stride() -> None:
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


@pytest.mark.parametrize("positions", [pc.positions.Fourier, pc.positions.Rotary(8), "fourier"])
def test_positions_of_another_kind_are_refused(positions: object) -> None:
    with pytest.raises(TypeError, match=r"must have dim, num_axes and tables, as positions.Fourier\(num_axes=2\) has"):
        adapters.Image(num_channels=3, positions=positions)
    with pytest.raises(TypeError, match="positions of PointCloud must give features of any point"):
        adapters.PointCloud(positions=positions)


@pytest.mark.parametrize(
    "positions", [pc.positions.LearnedGrid((5, 7, 3), dim=4), pc.positions.LearnedEmbedding(5, dim=4)]
)
def test_learned_positions_of_points_are_refused(positions: object) -> None:
    with pytest.raises(TypeError, match="features of any point"):
        adapters.PointCloud(positions=positions)


@pytest.mark.parametrize("size", [(2, 3, 5), [], (4,)])
def test_a_patch_has_one_size_or_two(size: object) -> None:
    with pytest.raises(ValueError, match=r"size must be one number, or \(height, width\)"):
        adapters.Patches(3, patch_size=size)


def test_stereo_is_two_channels_side_by_side() -> None:
    stereo = adapters.Audio(patch_size=5, positions=None, num_channels=2)
    samples = torch.rand(3, 2, 23)
    content = stereo(samples).content
    assert content.shape == (3, 5, stereo.dim) == (3, 5, 10)
    torch.testing.assert_close(content[1, 2].view(5, 2), samples[1, :, 10:15].T)
    assert content[:, -1, 6:].abs().max() == 0  # what is left over is padded
    mono = adapters.Audio(patch_size=5, positions=None)
    torch.testing.assert_close(mono(samples[:, 0]).content, mono(samples[:, :1]).content)
    with pytest.raises(ValueError, match="waveform must have 2 channels in axis 1; got 1"):
        stereo(samples[:, :1])
