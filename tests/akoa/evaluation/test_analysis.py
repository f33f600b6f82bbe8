"""Suspected label errors, and the mirror test of a model."""

import numpy as np
import pytest
from torch import Tensor

from examples.akoa.dataset.datamodule import Split
from examples.akoa.evaluation import analysis, metrics
from examples.akoa.evaluation.inference import predict
from tests.akoa.evaluation_cases import PATIENTS, Bright, row

pytestmark = pytest.mark.no_shape_checks


def test_suspects_are_the_confident_disagreements() -> None:
    rows = [row(1, "right", 0), row(1, "right", 1), row(2, "left", 0), row(2, "left", 1), row(3, "left", 4)]
    logits = np.array([-4.0, -3.0, 1.0, -9.0, 0.5])
    whole = analysis.suspect_volumes(rows, logits)
    assert [(v["patient"], v["disagreeing"], v["slices"]) for v in whole] == [("0000001", 2, 2), ("0000003", 1, 1)]
    assert whole[0]["image"] == rows[0].image
    assert whole[0]["probability_right"] == pytest.approx(1 / (1 + np.exp(3.5)))
    assert [s["image"] for s in analysis.suspect_slices(rows, logits)] == [rows[2].image]


def test_mirror_test_of_a_symmetric_and_of_a_constant_model(splits: dict[str, Split]) -> None:
    test, weights = splits["test"], metrics.resample(PATIENTS["test"], 0)
    fair = analysis.mirror_test(Bright(), test, predict(Bright(), test.images), weights)
    assert fair["max"] < 1e-6
    assert fair["same_verdict"]["value"] == 0

    class Always(Bright):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_full((len(x),), 2.0)

    p = 1 / (1 + np.exp(-2))
    stubborn = analysis.mirror_test(Always(), test, predict(Always(), test.images), weights)
    assert stubborn["mean"]["value"] == pytest.approx(2 * p - 1)
    assert stubborn["max"] == pytest.approx(2 * p - 1)
    assert stubborn["same_verdict"]["value"] == 1
