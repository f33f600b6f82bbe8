"""Augmentation: its effect on labels, its geometry, and its random draws."""

import pytest
import torch

from examples.akoa.dataset import augmentation
from examples.akoa.dataset.augmentation import (
    augment,
    flip_vertical,
    mirror,
    random_affine,
    rotate_180,
    seeded_generator,
)
from examples.akoa.dataset.datamodule import to_model_input
from examples.akoa.phantom import anatomy, rendering

pytestmark = pytest.mark.no_shape_checks

H, W = 31, 37


@pytest.fixture
def batch():
    generator = seeded_generator(torch.device("cpu"), 3)
    return torch.rand(7, 1, H, W, generator=generator) * 2 - 1, torch.tensor([0.0, 1, 0, 1, 1, 0, 1])


@pytest.mark.parametrize(("flip", "axis"), [(mirror, -1), (flip_vertical, -2)])
def test_a_flip_swaps_the_label(batch, flip, axis):
    pictures, labels = batch
    flipped, swapped = flip(pictures, labels)
    assert torch.equal(flipped, pictures.flip(axis))
    assert torch.equal(swapped, 1 - labels)


def test_a_half_turn_keeps_the_label(batch):
    pictures, labels = batch
    turned, kept = rotate_180(pictures, labels)
    assert torch.equal(turned, torch.rot90(pictures, 2, (-2, -1)))
    assert torch.equal(kept, labels)


def test_the_mirror_of_a_phantom_knee_is_a_knee_of_the_other_side():
    shown = [torch.from_numpy(rendering.render(anatomy.Knee(side=side))) for side in ("left", "right")]
    pictures, labels = to_model_input(torch.stack(shown)), torch.tensor([0.0, 1.0])
    flipped, swapped = mirror(pictures, labels)
    assert torch.equal(flipped, pictures.flip(0))
    assert torch.equal(swapped, labels.flip(0))


def test_motions_never_reflect():
    motion = random_affine(torch.zeros(5000), (H, W), seeded_generator(torch.device("cpu"), 0))
    assert (torch.linalg.det(motion[:, :, :2]) > 0.5).all()


def test_motions_turn_images_that_are_not_square_without_shear():
    """In pixels, the matrix of each motion is a rotation times a scale."""
    motion = random_affine(torch.zeros(50), (H, W), seeded_generator(torch.device("cpu"), 0))[:, :, :2]
    pixels = torch.tensor([W, H]) / 2
    matrix = pixels[:, None] * motion / pixels
    scale = torch.linalg.det(matrix).sqrt()
    torch.testing.assert_close(matrix @ matrix.mT, scale[:, None, None] ** 2 * torch.eye(2).expand(50, 2, 2))
    assert 0.8 < scale.min() < scale.max() < 1.2
    degrees = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert 10 < degrees.abs().max() <= 20


def test_augmentation_swaps_a_label_exactly_when_it_mirrors(monkeypatch):
    """A picture that is bright on the left stays so exactly where its label does."""
    monkeypatch.setattr(augmentation, "_random_tones", lambda x, generator: x)  # which may make bright dark
    pictures, labels = -torch.ones(2000, 1, H, W), torch.zeros(2000)
    pictures[..., : W // 3] = 1
    seen, marked = augment(pictures, labels, seeded_generator(torch.device("cpu"), 1))
    left, right = seen[..., : W // 2].mean((1, 2, 3)), seen[..., -(W // 2) :].mean((1, 2, 3))
    clear = (left - right).abs() > 0.1  # a wedge or a box hides some
    assert clear.float().mean() > 0.95
    assert torch.equal(right[clear] > left[clear], marked[clear] > 0.5)
    assert 0.45 < marked.mean() < 0.55


def test_augmentation_is_a_function_of_its_generator(batch):
    pictures, labels = batch
    before = pictures.clone(), labels.clone(), torch.get_rng_state()
    one, two, other = (augment(pictures, labels, seeded_generator(torch.device("cpu"), 5, key)) for key in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(pictures, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_augmentation_keeps_shape_type_and_range(batch):
    pictures, labels = augment(*batch, seeded_generator(torch.device("cpu"), 2))
    assert pictures.shape == (7, 1, H, W)
    assert pictures.dtype == labels.dtype == torch.float32
    assert -1 <= pictures.min() < pictures.max() <= 1
    assert set(labels.tolist()) <= {0.0, 1.0}


def test_generators_differ_by_key():
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1), (10,), (1, 0)]
    drawn = [torch.rand(1, generator=seeded_generator(torch.device("cpu"), *key)).item() for key in keys]
    assert len(set(drawn)) == len(keys)


def test_retoning_is_a_curve_of_the_gray_alone_and_leaves_every_other_image():
    ramp = torch.linspace(0, 1, W).expand(400, 1, H, W)
    retoned = augmentation._random_tones(ramp, seeded_generator(torch.device("cpu"), 3))
    assert torch.equal(retoned, retoned[:, :, :1].expand_as(retoned))  # the same gray gives the same gray
    assert retoned.min() >= 0
    assert retoned.max() <= 1
    assert retoned[..., 0].max() <= 0.1  # black stays near black
    kept = (retoned == ramp).flatten(1).all(1).float().mean()
    assert 0.4 < kept < 0.6
    falls = (retoned[..., -1] < retoned[..., W // 2]).float().mean()
    assert falls > 0.1  # some curves fall: what was brighter is darker
