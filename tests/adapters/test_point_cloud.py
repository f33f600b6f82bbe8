"""Point clouds: any size, padded, with features."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc
from perceiver_core import Encoder, Perceiver, adapters, heads, positions
from perceiver_core.adapters import PointCloud, pad_point_clouds

KINDS = {
    "Fourier": positions.Fourier(num_axes=3, num_bands=5, max_resolution=1120),
    "FourierPerAxis": positions.FourierPerAxis(num_axes=3, num_bands=5),
    "NeRF": positions.NeRF(num_axes=3, num_bands=5),
    "Gaussian": positions.Gaussian(num_axes=3, num_features=5),
}


@pytest.mark.parametrize("where", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("n", [1, 450])
def test_a_token_holds_features_and_position(where, features, n):
    adapter = PointCloud(features, positions=where)
    points = torch.rand(2, n, 3 + features) * 2 - 1
    tokens = adapter(points)
    assert tokens.num_tokens == n
    dense = tokens.materialize()
    assert dense.shape == (2, n, adapter.dim)
    torch.testing.assert_close(dense[..., :features], points[..., 3:], rtol=0, atol=0)
    torch.testing.assert_close(dense[..., features:], where(points[..., :3]), rtol=1e-5, atol=1e-5)


def test_clouds_are_padded_at_the_end():
    clouds = [torch.rand(7, 4), torch.rand(3, 4), torch.rand(5, 4)]
    points, mask = pad_point_clouds(clouds)
    assert points.shape == (3, 7, 4)
    assert mask.tolist() == [[i < n for i in range(7)] for n in (7, 3, 5)]
    for cloud, padded, present in zip(clouds, points, mask, strict=True):
        torch.testing.assert_close(padded[present], cloud, rtol=0, atol=0)


def test_padded_clouds_equal_clouds_one_by_one():
    torch.manual_seed(0)
    adapter = PointCloud(2, positions=KINDS["Fourier"])
    encoder = Encoder(adapter.dim, num_latents=5, dim=14, num_reads=3, depth=1, num_heads=7)
    model = Perceiver(adapter, encoder, heads.Classification(encoder.dim, 11)).double()
    clouds = [torch.rand(n, 5, dtype=torch.float64) * 2 - 1 for n in (450, 7, 1, 77)]
    points, mask = pad_point_clouds(clouds)
    together = model(points, mask=mask)
    alone = torch.cat([model(cloud[None]) for cloud in clouds])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    padding = points.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(model(padding, mask=mask), alone, rtol=0, atol=1e-12)


@pytest.mark.refusal
def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="clouds must hold at least one cloud; got none"):
        pad_point_clouds([])
    with pytest.raises(ValueError, match="features must be at least 0; got -1"):
        PointCloud(-1, positions=KINDS["NeRF"])


@pytest.mark.refusal
@pytest.mark.parametrize("positions", [pc.positions.Fourier, pc.positions.Rotary(8), "fourier"])
def test_positions_that_take_no_points_raise(positions: object) -> None:
    with pytest.raises(TypeError, match=r"positions must .* dim and num_axes (and|that) take points"):
        adapters.PointCloud(positions=positions)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "positions", [pc.positions.LearnedGrid((5, 7, 3), dim=4), pc.positions.LearnedEmbedding(5, dim=4)]
)
def test_learned_positions_raise(positions: object) -> None:
    with pytest.raises(TypeError, match="take points"):
        adapters.PointCloud(positions=positions)
