"""The flow is the one that generated the frames, all methods use the same direction, and the example runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
moving = pytest.importorskip("examples.optical_flow")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = moving.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["tables"]) == {"generated textures", "photographs"}
    for rows in result["tables"].values():
        assert list(rows)[:4] == ["zero flow", "TV-L1", "iterative Lucas-Kanade", "Perceiver IO"]


def test_frame_1_is_the_texture_where_the_flow_leads():
    """For a texture that is defined at every position."""

    def texture(rows, columns):
        return 0.5 + 0.2 * torch.sin(0.5 * rows + 0.2 * columns) + 0.2 * torch.cos(0.3 * rows - 0.6 * columns)

    def places(high, wide):
        return torch.meshgrid(torch.arange(high).float(), torch.arange(wide).float(), indexing="ij")

    fine = texture(*(x / moving.TEXTURE_SCALE for x in places(*moving.TEXTURE_SIZE)))
    flow = moving.random_flows(5, generator())
    frames = moving.warp(fine.expand(5, 1, -1, -1), flow)
    rows, columns = (x + moving.MARGIN for x in places(moving.HEIGHT, moving.WIDTH))
    torch.testing.assert_close(frames[0, 1, 0], texture(rows, columns), rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[:, 0, 0], texture(rows + flow[:, 0], columns + flow[:, 1]), rtol=0, atol=8e-3)


@pytest.mark.parametrize(("kind", "less"), [("generated", 4), ("photographs", 2)])
def test_warping_frame_2_by_the_flow_gives_frame_1(kind, less):
    """Up to the interpolation error between pixels, which is larger for photographs."""
    textures = moving.photographs() if kind == "photographs" else moving.random_textures(50, generator())
    flow = moving.random_flows(len(textures), generator(1))
    first, second = moving.warp(textures, flow).unbind(1)
    pixels = torch.stack(torch.meshgrid(torch.arange(moving.HEIGHT), torch.arange(moving.WIDTH), indexing="ij"))
    at = 2 * (pixels + flow) / torch.tensor([moving.HEIGHT, moving.WIDTH])[:, None, None].sub(1) - 1
    back = F.grid_sample(second, at.flip(1).movedim(1, -1), mode="bicubic", align_corners=True)
    there = moving.visible_in_both(flow)
    away, still = ((x - first).squeeze(1).abs()[there].mean() for x in (back, second))
    assert there.float().mean() > 0.8
    assert away < 0.02
    assert away < still / less


def test_flows_are_as_long_as_they_say():
    flow = moving.random_flows(200, generator())
    longest = flow.norm(dim=1).amax((1, 2))
    assert moving.MOTION_RANGE[0] <= longest.min() <= longest.max() <= moving.MOTION_RANGE[1] + 1e-5 < moving.MARGIN
    assert (flow.diff(dim=2).abs().amax(), flow.diff(dim=3).abs().amax()) < (1.5, 1.5)


@pytest.mark.parametrize("method", ["tvl1", "ilk"])
@pytest.mark.parametrize("zoom", [1, 2])
def test_the_baselines_use_the_same_direction(method, zoom):
    textures = moving.random_textures(4, generator())
    flow = torch.tensor([1.0, -0.5])[:, None, None].expand(4, 2, moving.HEIGHT, moving.WIDTH)
    actual = moving.classical_flow(moving.normalize(moving.warp(textures, flow)), method, zoom=zoom)
    assert actual.shape == flow.shape
    torch.testing.assert_close(actual[:, :, 4:-4, 4:-4].mean((0, 2, 3)), torch.tensor([1.0, -0.5]), rtol=0, atol=0.1)
    assert (moving.mean_errors(actual, flow) < moving.mean_errors(0 * flow, flow) / 3).all()


def test_end_point_errors_cover_pixels_visible_in_both_frames():
    flow = torch.zeros(1, 2, moving.HEIGHT, moving.WIDTH)
    flow[:, 1] = 3.0
    actual = flow.clone()
    actual[:, :, :, -3:] = 1e6  # the last three columns have left
    assert moving.mean_errors(actual, flow).item() == 0
    assert moving.mean_errors(torch.zeros_like(flow), flow).item() == pytest.approx(3)


def test_no_texture_of_training_is_in_the_test():
    assert moving.TRAIN != moving.TEST
    train, test = (moving.random_textures(60, generator(seed)) for seed in (moving.TRAIN, moving.TEST))
    together = torch.cat([train, test, moving.photographs()]).flatten(1)
    together = together - together.mean(1, keepdim=True)
    alike = F.normalize(together) @ F.normalize(together).T
    assert len(together.unique(dim=0)) == len(together)
    assert alike[:60, 60:].max() < 0.95


def test_pairs_are_repeatable_and_normalized():
    first, again = (moving.make_pairs(moving.random_textures(8, generator(3)), generator(4)) for _ in range(2))
    torch.testing.assert_close(first.frames, again.frames, rtol=0, atol=0)
    torch.testing.assert_close(first.flow, again.flow, rtol=0, atol=0)
    assert first.frames.shape == (8, 2, 1, moving.HEIGHT, moving.WIDTH)
    assert first.frames.mean((3, 4)).abs().max() < 1e-5
    assert (first.frames.std((3, 4)) - 0.9).abs().max() < 0.2


def test_chunks_have_no_effect():
    torch.manual_seed(0)
    model = moving.build().eval()
    frames = moving.make_pairs(moving.random_textures(2, generator()), generator()).frames
    assert model.decoder.chunk_size < moving.HEIGHT * moving.WIDTH
    actual = moving.predict(model, frames)
    model.decoder.chunk_size = None
    torch.testing.assert_close(actual, moving.predict(model, frames))
    assert actual.shape == (2, 2, moving.HEIGHT, moving.WIDTH)


def test_featureless_photographs_are_left_out():
    crops = moving.photographs()
    assert crops.shape[1:] == (1, *moving.TEXTURE_SIZE)
    assert (crops.min(), crops.max()) >= (0, 0)
    assert crops.max() <= 1
    assert 30 < len(crops) < 84
    assert (crops.std((1, 2, 3)) > 0.05).all()
