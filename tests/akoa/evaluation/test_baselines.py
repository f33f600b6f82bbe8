"""Baselines: the border of an image alone, linear models, the majority."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from examples.akoa.dataset.datamodule import Split
from examples.akoa.evaluation import baselines, predictions
from tests.akoa.evaluation_cases import HEIGHT, WIDTH, row

pytestmark = pytest.mark.no_shape_checks


def test_border_and_inside_sum_to_the_image() -> None:
    pictures = torch.randint(1, 256, (2, 31, 17), dtype=torch.uint8)
    inside, border = baselines.without_border(pictures), baselines.border_only(pictures)
    torch.testing.assert_close(inside + border, pictures)
    assert (inside[:, :3] == 0).all() and (inside[:, 3, 2:-2] > 0).all()
    assert (border[:, 3:-3, 2:-2] == 0).all() and (border[:, :, :2] > 0).all()


def test_linear_model_equals_scikit_learn(splits: dict[str, Split]) -> None:
    linear = baselines.fit_linear(splits["train"], splits["val"], mirrored=False)
    pictures = splits["test"].images
    train = splits["train"].images.flatten(1).double().numpy()
    seen = (pictures.flatten(1).double().numpy() - train.mean(0)) / train.std(0)
    expected = seen @ linear.classifier.coef_[0] + linear.classifier.intercept_[0]
    np.testing.assert_allclose(linear.logits(pictures), expected, rtol=1e-3, atol=1e-3)
    truth = splits["val"].labels.numpy() > 0
    loss = sk.log_loss(truth, predictions.probability(linear.logits(splits["val"].images)))
    assert linear.validation_loss == pytest.approx(loss, abs=1e-4)
    assert float(linear.classifier.C) in baselines.INVERSE_PENALTIES


def test_mirrored_linear_model_is_antisymmetric(splits: dict[str, Split]) -> None:
    """Fit on knees and their mirror images, it cannot prefer a side."""
    linear = baselines.fit_linear(splits["train"], splits["val"], mirrored=True)
    pictures = splits["test"].images
    there, back = linear.logits(pictures), linear.logits(baselines.mirror(pictures))
    np.testing.assert_allclose(there, -back, atol=0.05)
    assert np.mean((there > 0) == (splits["test"].labels.numpy() > 0)) > 0.7


def test_linear_model_shrinks_large_images(splits: dict[str, Split]) -> None:
    large = {n: replace(s, images=s.images.repeat_interleave(7, 1).repeat_interleave(3, 2)) for n, s in splits.items()}
    linear = baselines.fit_linear(large["train"], large["val"], mirrored=False)
    assert linear.classifier.coef_.shape == (1, 64 * 57)


@pytest.mark.refusal
def test_linear_model_of_one_side_raises(splits: dict[str, Split]) -> None:
    lefts = [i for i, row in enumerate(splits["train"].rows) if row.side == "left"]
    one = Split([splits["train"].rows[i] for i in lefts], splits["train"].images[lefts])
    with pytest.raises(ValueError, match="one side"):
        baselines.fit_linear(one, splits["val"], mirrored=False)


def test_majority_is_of_the_training_images() -> None:
    train = Split([row(1, "right"), row(2, "right"), row(3, "left")], torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8))
    np.testing.assert_allclose(baselines.majority(train, 4), np.full(4, np.log(3 / 2)))
