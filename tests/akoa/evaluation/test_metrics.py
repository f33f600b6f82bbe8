"""Metrics against values by hand, scikit-learn and scipy; bootstrap intervals over patients."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk

from examples.akoa.evaluation import metrics, predictions, report
from tests.akoa.evaluation_cases import row, sample

pytestmark = pytest.mark.no_shape_checks


def test_metrics_by_hand() -> None:
    rows = [row(1, "right", 0), row(1, "right", 1), row(1, "left", 0), row(2, "left", 0), row(2, "left", 1)]
    logits = np.array([2.0, -1.0, -3.0, 1.0, 0.5])
    weights = metrics.resample(2, 0)
    actual = metrics.score(rows, logits, weights)
    assert actual["slice"]["accuracy"]["value"] == pytest.approx(2 / 5)
    assert actual["slice"]["sensitivity_right"]["value"] == pytest.approx(1 / 2)
    assert actual["slice"]["sensitivity_left"]["value"] == pytest.approx(1 / 3)
    assert actual["slice"]["balanced_accuracy"]["value"] == pytest.approx(5 / 12)
    assert actual["slice"]["auc"]["value"] == pytest.approx(4 / 6)
    # Volumes: patient 1 right (mean 0.5, good), left (-3, good); patient 2 left (0.75, wrong).
    assert actual["volume"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert actual["patient"]["accuracy"]["value"] == pytest.approx(1 / 2)
    losses = [np.log1p(np.exp(x)) for x in (-2.0, 1.0, -3.0, 1.0, 0.5)]
    assert actual["slice"]["log_loss"]["value"] == pytest.approx(np.mean(losses))


def test_patient_is_right_only_if_every_volume_is() -> None:
    rows = [row(1, "right", visit=3), row(1, "right", visit=4), row(2, "left"), row(2, "right")]
    right = metrics.score(rows, np.array([1.0, -1.0, -1.0, 1.0]), metrics.resample(2, 0))
    assert right["patient"]["accuracy"]["value"] == 0.5
    assert right["volume"]["accuracy"]["value"] == 0.75


def test_volume_logit_is_the_mean_whatever_the_order() -> None:
    rows = [row(1, "left", 0), row(2, "right", 0), row(1, "left", 1), row(2, "right", 1)]
    actual = predictions.by_volume(rows, np.array([-1.0, 5.0, 3.0, -1.0]))
    np.testing.assert_allclose(actual.logits, [1.0, 2.0])
    assert actual.right.tolist() == [False, True]
    assert actual.correct.tolist() == [False, True]


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_of_each_patient_once_equals_the_values(seed: int) -> None:
    """The vectorized statistics are those of scikit-learn and torchmetrics."""
    given = sample(seed)
    drawn = metrics.draw_values(given, np.ones((1, given.num_patients), np.int64))
    for name, value in metrics.values(given).items():
        assert drawn[name][0] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(3))
def test_draws_equal_scikit_learn_on_the_drawn_patients(seed: int) -> None:
    """One draw equals scikit-learn on a sample that repeats patients as often as they are drawn."""
    given = sample(seed)
    weights = metrics.resample(given.num_patients, seed, draws=1)
    drawn_patients = np.repeat(range(given.num_patients), weights[0])
    index = np.concatenate([np.flatnonzero(given.patients == p) for p in drawn_patients])
    right, logits = given.right[index], given.logits[index]
    drawn = metrics.draw_values(given, weights)
    assert drawn["auc"][0] == pytest.approx(sk.roc_auc_score(right, logits))
    assert drawn["accuracy"][0] == pytest.approx(sk.accuracy_score(right, logits > 0))
    assert drawn["balanced_accuracy"][0] == pytest.approx(sk.balanced_accuracy_score(right, logits > 0))
    assert drawn["log_loss"][0] == pytest.approx(sk.log_loss(right, given.probabilities[index]))
    assert drawn["brier"][0] == pytest.approx(sk.brier_score_loss(right, given.probabilities[index]))


def test_calibration_error_by_hand() -> None:
    p = np.array([0.01, 0.02, 0.5, 0.99])
    given = predictions.Sample(np.array([False, True, True, True]), np.log(p / (1 - p)), np.arange(4))
    expected = (2 * abs(0.015 - 0.5) + 0.5 + 0.01) / 4
    assert metrics.values(given)["ece"] == pytest.approx(expected, abs=1e-6)
    bins = metrics.calibration(given, metrics.resample(4, 0))
    assert [line["n"] for line in bins] == [2] + 6 * [0] + [1] + 6 * [0] + [1]
    assert bins[1]["mean_probability"] is None


def test_the_loss_of_a_confident_mistake_is_finite() -> None:
    given = predictions.Sample(np.array([False, True]), np.array([800.0, 800.0]), np.array([0, 1]))
    assert metrics.values(given)["log_loss"] == pytest.approx(400)


def test_metrics_of_one_side_alone_are_undefined() -> None:
    rows = [row(1), row(2)]
    actual = metrics.score(rows, np.array([1.0, -1.0]), metrics.resample(2, 0))
    for name in ("auc", "balanced_accuracy", "sensitivity_left"):
        assert actual["slice"][name] == {"value": None, "low": None, "high": None}
    assert report.format_estimate(actual["slice"]["auc"]) == "not defined"


@pytest.mark.parametrize(("hits", "n"), [(29, 29), (0, 7), (17, 20), (1, 1)])
def test_wilson_equals_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    actual = metrics.wilson(hits, n)
    assert (actual["low"], actual["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.refusal
def test_wilson_of_more_hits_than_trials_raises() -> None:
    with pytest.raises(ValueError, match="hits=3, count=2"):
        metrics.wilson(3, 2)


def test_interval_is_wider_for_patients_than_for_slices() -> None:
    """30 slices each of patients that are all right or all wrong are no 300 observations."""
    rows = [row(p, "right", k) for p in range(10) for k in range(30)]
    logits = np.repeat(np.where(np.arange(10) < 8, 1.0, -1.0), 30)
    actual = metrics.score(rows, logits, metrics.resample(10, 0))["slice"]["accuracy"]
    assert actual["value"] == pytest.approx(0.8)
    assert (actual["low"], actual["high"]) == pytest.approx((0.5, 1.0), abs=0.06)


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(150):
        good = rng.random(60) < 0.7
        given = predictions.Sample(np.ones(60, bool), np.where(good, 1.0, -1.0), np.arange(60))
        actual = metrics.estimate(*metrics.draw_accuracy(given, metrics.resample(60, trial, draws=400)))
        inside += actual["low"] <= 0.7 <= actual["high"]
    assert 0.88 <= inside / 150 <= 0.99


def test_draws_are_seeded() -> None:
    assert np.array_equal(metrics.resample(5, 3), metrics.resample(5, 3))
    assert not np.array_equal(metrics.resample(5, 3), metrics.resample(5, 4))
    assert metrics.resample(5, 3).shape == (metrics.DRAWS, 5)
    assert (metrics.resample(5, 3).sum(1) == 5).all()


def test_difference_is_paired() -> None:
    """Two models differ on one patient only: without pairing, the interval would be wide."""
    rows = [row(p) for p in range(20)]
    theirs = np.where(np.arange(20) < 10, 1.0, -1.0)
    ours = np.where(np.arange(20) < 11, 1.0, -1.0)
    weights = metrics.resample(20, 0)
    gap = metrics.difference(rows, ours, theirs, weights)["slice"]
    assert gap["value"] == pytest.approx(0.05)
    assert gap["low"] == 0
    assert gap["high"] <= 0.2
    same = metrics.difference(rows, ours, ours, weights)
    assert all(each == {"value": 0, "low": 0, "high": 0} for each in same.values())


def test_abstention_by_hand() -> None:
    p = np.array([0.55, 0.35, 0.85, 0.995])
    given = predictions.Sample(np.array([True, True, True, False]), np.log(p / (1 - p)), np.arange(4))
    lines = metrics.abstention(given, metrics.resample(4, 0))
    assert [line["threshold"] for line in lines] == [0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    assert [line["coverage"]["value"] for line in lines] == [0.75, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert [line["accuracy"]["value"] for line in lines] == pytest.approx([1 / 3, 0.5, 0.5, 0, 0, 0])


def test_coverage_curve_by_hand() -> None:
    given = predictions.Sample(np.array([True, False, True, True]), np.array([3.0, 2.0, -2.0, 1.0]), np.arange(4))
    coverage, accuracy = metrics.coverage_curve(given)
    np.testing.assert_allclose(coverage, [0.25, 0.75, 1.0])  # the two of confidence 2 enter together
    np.testing.assert_allclose(accuracy, [1.0, 1 / 3, 0.5])


def test_errors_by_slice() -> None:
    rows = [row(p, "right", k) for p in (1, 2) for k in (0, 5)]
    lines = metrics.error_by_slice(rows, np.array([1.0, -1.0, 1.0, 1.0]), metrics.resample(2, 0))
    assert [(line["slice"], line["n"], line["error"]["value"]) for line in lines] == [(0, 2, 0.0), (5, 2, 0.5)]
