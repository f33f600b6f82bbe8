"""Predictions, attention maps and the image size of a model."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

import perceiver_core as pc
from examples.akoa.dataset.datamodule import Split
from examples.akoa.evaluation.inference import attention_maps, image_size, predict
from examples.akoa.model import knee_model
from examples.akoa.training import run_record
from tests.akoa.evaluation_cases import HEIGHT, WIDTH, Bright

pytestmark = pytest.mark.no_shape_checks


def test_predict_is_the_model_in_evaluation_mode(splits: dict[str, Split]) -> None:
    model, pictures = Bright().train(), splits["test"].images
    model.drop.eval()
    logits = predict(model, pictures, batch=7)
    assert (model.training, model.drop.training) == (True, False)
    assert logits.dtype == np.float64
    expected = model.eval()(pictures[:, None].float() / 127.5 - 1)[:, 0]
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-5)
    assert len(predict(model, pictures[:0])) == 0


@pytest.mark.refusal
def test_invalid_predictions_raise(splits: dict[str, Split]) -> None:
    two = nn.Sequential(nn.Flatten(), nn.Linear(HEIGHT * WIDTH, 2))
    with pytest.raises(ValueError, match="one logit each"):
        predict(two, splits["test"].images)
    with pytest.raises(ValueError, match="not finite"):
        predict(Bright(float("nan")), splits["test"].images)


def test_attention_sums_to_one_over_the_grid(splits: dict[str, Split], model: pc.Perceiver) -> None:
    maps = attention_maps(nn.Sequential(model), splits["test"].images[:5], batch=2)
    assert maps.shape == (5, 6, 5)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="contains no Perceiver"):
        attention_maps(Bright(), splits["test"].images)


def test_the_image_size_follows_from_the_weights(tmp_path: Path, model: pc.Perceiver) -> None:
    assert image_size(knee_model((64, 52))) == (64, 52)
    assert run_record.trained_size(tmp_path / "weights", model) == (24, 20)  # up to the next token
    (tmp_path / "run.json").write_text('{"size": [23, 19]}', encoding="utf-8")
    assert run_record.trained_size(tmp_path / "weights", model) == (HEIGHT, WIDTH)
