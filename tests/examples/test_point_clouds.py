"""The point clouds have their documented properties, and the example runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
clouds = pytest.importorskip("examples.point_clouds")


def drawn(name, n=997):
    return dict(zip(clouds.NAMES, clouds.SHAPES, strict=True))[name](np.random.default_rng(0), n)


def test_a_toy_run_writes_its_result_and_image(tmp_path, capsys):
    result = clouds.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["tables"]["correct, %"]) >= {"chance", "Perceiver", "random forest, distances to the centroid"}
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in result["tables"]["correct, %"])


def test_labels_are_balanced_and_clouds_are_repeatable():
    seen = clouds.generate(clouds.TRAIN, 70)
    assert torch.equal(seen.labels.bincount(), torch.full((10,), 7))
    for one, again in zip(seen.points, clouds.generate(clouds.TRAIN, 70).points, strict=True):
        torch.testing.assert_close(one, again, rtol=0, atol=0)


def test_no_cloud_of_the_test_is_one_of_training():
    assert clouds.TRAIN != clouds.TEST
    seen, unseen = clouds.generate(clouds.TRAIN, 50), clouds.generate(clouds.TEST, 50)
    first = {tuple(points[0].tolist()) for points in [*seen.points, *unseen.points]}
    assert len(first) == 100


def test_clouds_have_the_sizes_that_are_promised_and_lie_in_the_unit_ball():
    points = clouds.generate(clouds.TRAIN, 200).points
    sizes = [len(x) for x in points]
    assert clouds.MIN_POINTS <= min(sizes) < 310
    assert 440 < max(sizes) <= clouds.MAX_POINTS
    for x in points:
        torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
        assert x.norm(dim=1).max() == pytest.approx(1, abs=1e-5)


def test_shapes_solve_their_equations():
    x, y, z = drawn("sphere").T
    np.testing.assert_allclose(x**2 + y**2 + z**2, 1)
    x, y, z = drawn("cylinder").T
    np.testing.assert_allclose(x**2 + y**2, 1)
    x, y, z = drawn("cone").T
    np.testing.assert_allclose(z / np.hypot(x, y), (z / np.hypot(x, y))[0])
    x, y, z = drawn("torus").T
    thick = np.hypot(np.hypot(x, y) - 1, z)
    np.testing.assert_allclose(thick, thick[0])
    x, y, z = drawn("helix").T
    turn = np.unwrap(np.arctan2(y, x)[z.argsort()])
    assert np.abs(np.corrcoef(np.sort(z), turn)[0, 1]) > 0.9999
    x, y, z = drawn("planes").T
    assert (np.abs(y) < 1e-9).mean() == pytest.approx(0.5, abs=0.05)


def test_a_cube_has_points_on_all_faces():
    x = drawn("cube")
    faces = [(np.isclose(x[:, axis], end)).mean() for axis in range(3) for end in (x[:, axis].min(), x[:, axis].max())]
    np.testing.assert_allclose(faces, 1 / 6, atol=0.04)


@pytest.mark.parametrize("features", [clouds.centroid_histogram, clouds.pair_histogram])
def test_the_baselines_are_invariant_to_rotation(features):
    points = clouds.generate(clouds.TEST, 1).points[0]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    np.testing.assert_allclose(features(points @ turn), features(points), atol=0.01)


def test_padding_has_no_effect():
    torch.manual_seed(0)
    model, some = clouds.build().eval(), clouds.generate(clouds.TEST, 5)
    together = clouds.predict(model, some)
    alone = torch.cat([model(points[None]).argmax(-1) for points in some.points])
    assert torch.equal(together, alone)
