"""The images are split as documented, the baselines are correct, and the example runs."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
completion = pytest.importorskip("examples.image_completion")


def ramp(channels=3):
    """Colors that are linear in position: linear and spline interpolation are exact."""
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([(row * (c + 1) + column * 2) / 200 for c in range(channels)])[None]


def places(count=1, among=307):
    torch.manual_seed(0)
    return completion.random_pixels(count, among, completion.SIDE**2)


def test_a_toy_run_writes_its_result_and_image(tmp_path):
    result = completion.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = {"nearest", "linear", "cubic", "spline", "normal distribution", "Perceiver IO"}
    for kind in ("digits", "photographs"):
        assert set(result["tables"][kind]) >= rows


def test_no_pixel_of_a_test_crop_is_in_a_training_crop():
    begins = [x for x in range(640 - 31) if not completion.overlaps_test(x)]
    seen = {column for x in begins for column in range(x, x + 32)}
    unseen = {column for strip in completion.STRIPS for column in range(strip, strip + 64)}
    assert seen & unseen == set()
    assert seen | unseen == set(range(640))


def test_positions_are_sampled_without_repetition():
    at = places(5, 41)
    assert at.shape == (5, 41)
    assert all(len(set(row.tolist())) == 41 for row in at)


def test_visible_pixels_have_the_colors_of_their_positions():
    picture, at = torch.rand(1, 3, 32, 32), places(1, 11)
    points, mean, deviation = completion.visible_points(picture, at, 0.02)
    row, column = ((points[0, 5, :2] + 1) * 15.5).round().int().tolist()
    torch.testing.assert_close((points * 1)[0, 5, 2:] * deviation[0, 0] + mean[0, 0], picture[0, :, row, column])


@pytest.mark.parametrize("method", ["linear", "cubic", "spline"])
def test_interpolations_of_a_ramp_are_exact_within_the_hull(method):
    actual = completion.interpolate(ramp(), places(), method)
    torch.testing.assert_close(actual[..., 8:24, 8:24], ramp()[..., 8:24, 8:24], rtol=0, atol=1e-4)


def test_the_normal_distribution_is_exact_for_few_degrees_of_freedom():
    torch.manual_seed(0)
    basis = ramp(1) * 0.5, ramp(1).mT.flip(2) * 0.5
    seen = sum(torch.rand(200, 1, 1, 1) * part for part in basis)
    data = completion.ImageSet(seen[:190], seen[190:], num_visible=41, min_deviation=1.0)
    actual = completion.gaussian(data, data.test, places(10, 41), noise=1e-9)
    # Digits are moved by some pixels before the fit, which wraps edges around: the middle remains.
    assert (actual - data.test)[..., 8:24, 8:24].abs().max() < 0.03


def test_visible_pixels_are_kept():
    picture, at = torch.rand(2, 3, 32, 32), places(2, 41)
    actual = completion.keep_visible(torch.full_like(picture, 7.0), picture, at)
    same = (actual == picture).all(1).flatten(1)
    assert same.sum(1).tolist() == [41, 41]
    assert same.gather(1, at).all()
    assert actual[~(actual == picture)].eq(1).all()  # and the rest is clipped


def test_psnr_is_that_of_the_formula():
    picture = torch.zeros(1, 3, 32, 32)
    torch.testing.assert_close(completion.psnr(picture + 0.1, picture), torch.tensor([20.0]))
    torch.testing.assert_close(completion.psnr(picture + 0.01, picture), torch.tensor([40.0]))


def test_the_loss_queries_only_some_positions(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(3, 1, 32, 32), torch.rand(1, 1, 32, 32)
    data, model, calls = completion.ImageSet(*images, num_visible=41, min_deviation=1.0), completion.build(1), []
    forward = model.forward

    def recorded(points, query_inputs):
        calls.append((points, query_inputs))
        return forward(points, query_inputs=query_inputs)

    monkeypatch.setattr(model, "forward", recorded)
    completion.loss(model, data, batch=5).backward()
    ((points, query_inputs),) = calls
    assert points.shape == (5, 41, 3)
    assert query_inputs.shape == (5, completion.NUM_QUERIES)
    assert all(p.grad is not None for p in model.parameters())
