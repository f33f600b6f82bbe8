"""Figures against numbers by hand and scikit-learn's; and what an evaluation must not do."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from scipy.stats import binomtest
from sklearn import metrics as sk
from torch import Tensor, nn

import perceiver_core as pc
from examples.akoa import evaluate
from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import Row, write_labels
from examples.akoa.evaluate import evaluate_run
from examples.akoa.evaluation import analysis, baselines, figures, metrics, plots, predictions, report
from examples.akoa.evaluation.cross_validation import count_data, summarize_folds
from examples.akoa.evaluation.inference import attention_maps, image_size, predict
from examples.akoa.model import knee_model
from examples.akoa.training import run_record

HEIGHT, WIDTH, SLICES = 23, 19, 3
PATIENTS = {"train": 11, "val": 4, "test": 5}


class Bright(nn.Module):
    """Right where the right half is brighter; in training mode, wrong on purpose."""

    def __init__(self, gain: float = 3.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        margin = x[..., -half:].mean((1, 2, 3)) - x[..., :half].mean((1, 2, 3))
        return (-1 if self.training else 1) * self.gain * margin[:, None]


def row(patient: int, side: str = "right", slice_: int = 0, split: str = "test", visit: int = 3) -> Row:
    name = f"OAI{patient:07}_BaseLine_{visit}_de3d1_SAG_3D_DESS_WE_{side.upper()}.nii.gz_{slice_}.png"
    return Row(f"AKOA_Analysis/{name}", f"{patient:07}", visit, side, slice_, split)


def split_of(part: str, first: int, patients: int, seed: int) -> Split:
    """Noise with a brighter half; one knee of every other patient is hard."""
    rng = np.random.default_rng(seed)
    rows = [
        row(first + i, side, k, part)
        for i in range(patients)
        for side in (("left", "right") if i % 2 else ("right",) if i % 4 else ("left",))
        for k in range(SLICES)
    ]
    ramp = np.linspace(-1, 1, WIDTH)
    signs = np.array([1 if row.side == "right" else -1 for row in rows])[:, None, None]
    noise = rng.normal(120, 25, (len(rows), HEIGHT, WIDTH)) + 18 * rng.normal(size=(len(rows), 1, 1)) * ramp
    pictures = np.clip(noise + 20 * signs * ramp, 0, 255).astype(np.uint8)
    return Split(rows, torch.from_numpy(pictures))


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    first = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
    return {part: split_of(part, first[part], n, i) for i, (part, n) in enumerate(PATIENTS.items())}


@pytest.fixture(scope="module")
def model() -> pc.Perceiver:
    torch.manual_seed(0)
    return knee_model((HEIGHT, WIDTH)).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, splits: dict[str, Split], model: pc.Perceiver) -> Path:
    """A run's folder with weights, run.json and history.csv, evaluated once."""
    out = tmp_path_factory.mktemp("run")
    pc.save(model, out / "weights")
    rows = [row for split in splits.values() for row in split.rows]
    record = {"size": [HEIGHT, WIDTH], "fold": None, "rows": run_record.rows_digest(rows)}
    (out / "run.json").write_text(json.dumps(record), encoding="utf-8")
    header = "epoch,step,train_loss,val_loss,train_accuracy,val_accuracy\n"
    (out / "history.csv").write_text(header + "0,5,,0.6,,0.7\n0,5,0.7,,0.5,\n1,9,,0.5,,0.8\n", encoding="utf-8")
    evaluate_run(model, splits, out, history=out / "history.csv")
    return out


@pytest.fixture
def told(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return loaded


def sample(seed: int = 0, patients: int = 7, size: int = 61, spread: float = 2.0) -> predictions.Sample:
    rng = np.random.default_rng(seed)
    right = rng.random(size) < 0.6
    logits = np.round(spread * rng.normal(size=size) + np.where(right, 1, -1), 1)  # rounded, so that some tie
    return predictions.Sample(right, logits, np.append(np.arange(patients), rng.integers(0, patients, size - patients)))


# ---- figures


def test_figures_by_hand() -> None:
    rows = [row(1, "right", 0), row(1, "right", 1), row(1, "left", 0), row(2, "left", 0), row(2, "left", 1)]
    logits = np.array([2.0, -1.0, -3.0, 1.0, 0.5])
    weights = metrics.resample(2, 0)
    found = metrics.score(rows, logits, weights)
    assert found["slice"]["accuracy"]["value"] == pytest.approx(2 / 5)
    assert found["slice"]["sensitivity_right"]["value"] == pytest.approx(1 / 2)
    assert found["slice"]["sensitivity_left"]["value"] == pytest.approx(1 / 3)
    assert found["slice"]["balanced_accuracy"]["value"] == pytest.approx(5 / 12)
    assert found["slice"]["auc"]["value"] == pytest.approx(4 / 6)
    # Volumes: patient 1 right (mean 0.5, good), left (-3, good); patient 2 left (0.75, wrong).
    assert found["volume"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["patient"]["accuracy"]["value"] == pytest.approx(1 / 2)
    losses = [np.log1p(np.exp(x)) for x in (-2.0, 1.0, -3.0, 1.0, 0.5)]
    assert found["slice"]["log_loss"]["value"] == pytest.approx(np.mean(losses))


def test_patient_is_right_only_if_every_volume_is() -> None:
    rows = [row(1, "right", visit=3), row(1, "right", visit=4), row(2, "left"), row(2, "right")]
    right = metrics.score(rows, np.array([1.0, -1.0, -1.0, 1.0]), metrics.resample(2, 0))
    assert right["patient"]["accuracy"]["value"] == 0.5
    assert right["volume"]["accuracy"]["value"] == 0.75


def test_volume_logit_is_the_mean_whatever_the_order() -> None:
    rows = [row(1, "left", 0), row(2, "right", 0), row(1, "left", 1), row(2, "right", 1)]
    found = predictions.by_volume(rows, np.array([-1.0, 5.0, 3.0, -1.0]))
    np.testing.assert_allclose(found.logits, [1.0, 2.0])
    assert found.right.tolist() == [False, True]
    assert found.correct.tolist() == [False, True]


@pytest.mark.parametrize("seed", range(3))
def test_draws_of_everybody_once_are_the_values(seed: int) -> None:
    """The vectorized statistics are those of scikit-learn and torchmetrics."""
    given = sample(seed)
    drawn = metrics.draw_values(given, np.ones((1, given.num_patients), np.int64))
    for name, value in metrics.values(given).items():
        assert drawn[name][0] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_figures_of_the_drawn_patients(seed: int) -> None:
    """One draw equals scikit-learn on a sample in which patients stand as often as they were drawn."""
    given = sample(seed)
    weights = metrics.resample(given.num_patients, seed, draws=1)
    index = np.concatenate(
        [np.flatnonzero(given.patients == p) for p in np.repeat(range(given.num_patients), weights[0])]
    )
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
    wanted = (2 * abs(0.015 - 0.5) + 0.5 + 0.01) / 4
    assert metrics.values(given)["ece"] == pytest.approx(wanted, abs=1e-6)
    bins = metrics.calibration(given, metrics.resample(4, 0))
    assert [line["n"] for line in bins] == [2] + 6 * [0] + [1] + 6 * [0] + [1]
    assert bins[1]["mean_probability"] is None


def test_loss_of_a_sure_mistake_is_finite() -> None:
    given = predictions.Sample(np.array([False, True]), np.array([800.0, 800.0]), np.array([0, 1]))
    assert metrics.values(given)["log_loss"] == pytest.approx(400)


def test_one_side_alone_leaves_figures_undefined() -> None:
    rows = [row(1), row(2)]
    found = metrics.score(rows, np.array([1.0, -1.0]), metrics.resample(2, 0))
    for name in ("auc", "balanced_accuracy", "sensitivity_left"):
        assert found["slice"][name] == {"value": None, "low": None, "high": None}
    assert report.format_estimate(found["slice"]["auc"]) == "not defined"


@pytest.mark.parametrize(("hits", "n"), [(29, 29), (0, 7), (17, 20), (1, 1)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    wanted = binomtest(hits, n).proportion_ci(method="wilson")
    found = metrics.wilson(hits, n)
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))


def test_wilson_errors() -> None:
    with pytest.raises(ValueError, match="hits=3, count=2"):
        metrics.wilson(3, 2)


def test_interval_is_wider_for_patients_than_for_slices() -> None:
    """30 slices each of patients that are all right or all wrong are no 300 observations."""
    rows = [row(p, "right", k) for p in range(10) for k in range(30)]
    logits = np.repeat(np.where(np.arange(10) < 8, 1.0, -1.0), 30)
    found = metrics.score(rows, logits, metrics.resample(10, 0))["slice"]["accuracy"]
    assert found["value"] == pytest.approx(0.8)
    assert (found["low"], found["high"]) == pytest.approx((0.5, 1.0), abs=0.06)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(150):
        good = rng.random(60) < 0.7
        given = predictions.Sample(np.ones(60, bool), np.where(good, 1.0, -1.0), np.arange(60))
        found = metrics.estimate(*metrics.draw_accuracy(given, metrics.resample(60, trial, draws=400)))
        inside += found["low"] <= 0.7 <= found["high"]
    assert 0.88 <= inside / 150 <= 0.99


def test_draws_are_seeded() -> None:
    assert np.array_equal(metrics.resample(5, 3), metrics.resample(5, 3))
    assert not np.array_equal(metrics.resample(5, 3), metrics.resample(5, 4))
    assert metrics.resample(5, 3).shape == (metrics.DRAWS, 5)
    assert (metrics.resample(5, 3).sum(1) == 5).all()


def test_difference_is_paired() -> None:
    """Two models that differ on one patient only: where pairing is lost, the interval is wide."""
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
    np.testing.assert_allclose(coverage, [0.25, 0.75, 1.0])  # the two of size 2 enter together
    np.testing.assert_allclose(accuracy, [1.0, 1 / 3, 0.5])


def test_errors_by_slice() -> None:
    rows = [row(p, "right", k) for p in (1, 2) for k in (0, 5)]
    lines = metrics.error_by_slice(rows, np.array([1.0, -1.0, 1.0, 1.0]), metrics.resample(2, 0))
    assert [(line["slice"], line["n"], line["error"]["value"]) for line in lines] == [(0, 2, 0.0), (5, 2, 0.5)]


# ---- the model's side


def test_predict_is_the_model_in_evaluation_mode(splits: dict[str, Split]) -> None:
    model, pictures = Bright().train(), splits["test"].images
    model.drop.eval()
    logits = predict(model, pictures, batch=7)
    assert (model.training, model.drop.training) == (True, False)
    assert logits.dtype == np.float64
    wanted = model.eval()(pictures[:, None].float() / 127.5 - 1)[:, 0]
    np.testing.assert_allclose(logits, wanted.detach().numpy(), rtol=1e-5)
    assert len(predict(model, pictures[:0])) == 0


def test_predict_errors(splits: dict[str, Split]) -> None:
    two = nn.Sequential(nn.Flatten(), nn.Linear(HEIGHT * WIDTH, 2))
    with pytest.raises(ValueError, match="one logit each"):
        predict(two, splits["test"].images)
    with pytest.raises(ValueError, match="not finite"):
        predict(Bright(float("nan")), splits["test"].images)


def test_attention_adds_to_one_on_the_grid(splits: dict[str, Split], model: pc.Perceiver) -> None:
    maps = attention_maps(nn.Sequential(model), splits["test"].images[:5], batch=2)
    assert maps.shape == (5, 6, 5)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="contains no Perceiver"):
        attention_maps(Bright(), splits["test"].images)


def test_size_of_pictures_is_known_from_weights(tmp_path: Path, model: pc.Perceiver) -> None:
    assert image_size(knee_model((64, 52))) == (64, 52)
    assert run_record.trained_size(tmp_path / "weights", model) == (24, 20)  # up to the next token
    (tmp_path / "run.json").write_text('{"size": [23, 19]}', encoding="utf-8")
    assert run_record.trained_size(tmp_path / "weights", model) == (HEIGHT, WIDTH)


def test_mirror_test_of_a_symmetric_and_of_a_stubborn_model(splits: dict[str, Split]) -> None:
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


# ---- baselines


def test_border_and_inside_make_the_picture() -> None:
    pictures = torch.randint(1, 256, (2, 31, 17), dtype=torch.uint8)
    inside, border = baselines.without_border(pictures), baselines.border_only(pictures)
    torch.testing.assert_close(inside + border, pictures)
    assert (inside[:, :3] == 0).all() and (inside[:, 3, 2:-2] > 0).all()
    assert (border[:, 3:-3, 2:-2] == 0).all() and (border[:, :, :2] > 0).all()


def test_linear_model_is_scikit_learns(splits: dict[str, Split]) -> None:
    linear = baselines.fit_linear(splits["train"], splits["val"], mirrored=False)
    pictures = splits["test"].images
    train = splits["train"].images.flatten(1).double().numpy()
    seen = (pictures.flatten(1).double().numpy() - train.mean(0)) / train.std(0)
    wanted = seen @ linear.classifier.coef_[0] + linear.classifier.intercept_[0]
    np.testing.assert_allclose(linear.logits(pictures), wanted, rtol=1e-3, atol=1e-3)
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


def test_linear_model_shrinks_large_pictures(splits: dict[str, Split]) -> None:
    large = {n: replace(s, images=s.images.repeat_interleave(7, 1).repeat_interleave(3, 2)) for n, s in splits.items()}
    linear = baselines.fit_linear(large["train"], large["val"], mirrored=False)
    assert linear.classifier.coef_.shape == (1, 64 * 57)


def test_linear_model_errors(splits: dict[str, Split]) -> None:
    lefts = [i for i, row in enumerate(splits["train"].rows) if row.side == "left"]
    one = Split([splits["train"].rows[i] for i in lefts], splits["train"].images[lefts])
    with pytest.raises(ValueError, match="one side"):
        baselines.fit_linear(one, splits["val"], mirrored=False)


def test_majority_is_of_the_training_pictures() -> None:
    train = Split([row(1, "right"), row(2, "right"), row(3, "left")], torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8))
    np.testing.assert_allclose(baselines.majority(train, 4), np.full(4, np.log(3 / 2)))


# ---- what earlier projects got wrong


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("val", "test"), ("train", "val")])
def test_patient_in_two_splits_errors(one: str, other: str, splits: dict[str, Split], tmp_path: Path) -> None:
    """Earlier projects split by picture, or let validation and test share patients."""
    guest = replace(splits[one].rows[0], slice=77, image="elsewhere.png")
    crowded = Split([*splits[other].rows, guest], torch.cat([splits[other].images, splits[one].images[:1]]))
    with pytest.raises(ValueError, match=f"1 patients are in two splits .*{guest.patient}"):
        evaluate_run(Bright(), {**splits, other: crowded}, tmp_path / "out", history=None)
    assert not (tmp_path / "out").exists()


def test_loss_is_a_mean_over_test_pictures(splits: dict[str, Split], told: Mapping[str, Any], run: Path) -> None:
    """The seed project divided the test loss by the number of training pictures."""
    rows, logits = predictions.read_predictions(run / "predictions.csv")
    test = [i for i, row in enumerate(rows) if row.split == "test"]
    wanted = nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits["perceiver"][test]), splits["test"].labels.double()
    )
    assert len(splits["train"].rows) != len(splits["test"].rows)
    assert told["models"]["perceiver"]["slice"]["log_loss"]["value"] == pytest.approx(wanted.item(), rel=1e-6)


def test_evaluation_does_not_depend_on_the_training_mode(
    splits: dict[str, Split], model: pc.Perceiver, run: Path
) -> None:
    """Dropout stood after the logits of the seed project, and batch norm must not learn from the test set."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = predict(model.train(), splits["test"].images)
    model.eval()
    rows, found = predictions.read_predictions(run / "predictions.csv")
    kept = found["perceiver"][[row.split == "test" for row in rows]]
    np.testing.assert_allclose(logits, kept, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- the run's folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"train": s["train"], "test": s["test"]}, "need images in each"),
        (lambda s: {**s, "test": Split([], s["test"].images[:0])}, "need images in each"),
        (lambda s: {**s, "other": s["test"]}, "need images in each"),
        (lambda s: {**s, "val": Split(s["val"].rows[1:], s["val"].images)}, "rows for"),
    ],
)
def test_incomplete_splits_errors(change: Any, message: str, splits: dict[str, Split]) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.check_splits(change(splits))


def test_report_holds_everything(told: Mapping[str, Any], run: Path) -> None:
    assert {
        "data", "command", "test_looked_at", "seed", "draws", "parameters", "models", "difference", "confusion",
        "calibration", "abstention", "slices", "suspects", "validation", "mirror", "border", "linear", "plots",
    } == set(told)  # fmt: skip
    assert list(told["models"]) == ["perceiver", "linear", "linear_mirrored", "majority"]
    assert told["data"]["kind"] == "phantom"
    assert told["data"]["splits"]["test"]["patients"] == PATIENTS["test"]
    assert sum(map(sum, told["confusion"]["slice"])) == told["data"]["splits"]["test"]["slices"]
    assert set(told["plots"]) == {
        "curves", "confusion", "calibration", "abstention", "slices", "attention", "errors",
    }  # fmt: skip
    for name in told["plots"].values():
        assert imread(run / name).std() > 0.01, f"{name} is empty"


def test_markdown_says_what_must_be_said(run: Path, told: Mapping[str, Any]) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    for words in ("generated phantom", "Patients are the sample", "looked at **once**", told["command"], "Wilson"):
        assert words in text
    for name in told["plots"].values():
        assert f"]({name})" in text
    assert "None" not in text and "nan" not in text


def test_predictions_come_back(run: Path, splits: dict[str, Split], told: Mapping[str, Any]) -> None:
    rows, logits = predictions.read_predictions(run / "predictions.csv")
    assert rows == splits["val"].rows + splits["test"].rows
    test = np.array([row.split == "test" for row in rows])
    found = metrics.score(splits["test"].rows, logits["linear"][test], metrics.resample(PATIENTS["test"], 0))
    assert found["slice"]["accuracy"] == told["models"]["linear"]["slice"]["accuracy"]
    header = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("image,patient,visit,side,slice,split,logit,probability")
    (run / "other.csv").write_text("image\nx.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by"):
        predictions.read_predictions(run / "other.csv")


def test_suspects_are_the_confident_disagreements() -> None:
    rows = [row(1, "right", 0), row(1, "right", 1), row(2, "left", 0), row(2, "left", 1), row(3, "left", 4)]
    logits = np.array([-4.0, -3.0, 1.0, -9.0, 0.5])
    whole = analysis.suspect_volumes(rows, logits)
    assert [(v["patient"], v["disagreeing"], v["slices"]) for v in whole] == [("0000001", 2, 2), ("0000003", 1, 1)]
    assert whole[0]["image"] == rows[0].image
    assert whole[0]["probability_right"] == pytest.approx(1 / (1 + np.exp(3.5)))
    assert [s["image"] for s in analysis.suspect_slices(rows, logits)] == [rows[2].image]


def test_history_is_gathered_by_epoch(run: Path) -> None:
    found = figures.read_history(run / "history.csv")
    assert [line["epoch"] for line in found] == [0, 1]
    assert (found[0]["train_loss"], found[0]["val_accuracy"]) == (0.7, 0.7)
    assert "train_loss" not in found[1]


def test_kind_of_data(splits: dict[str, Split]) -> None:
    real = {n: replace(s, rows=[replace(r, patient="9" + r.patient[1:]) for r in s.rows]) for n, s in splits.items()}
    assert evaluate.describe_data(real)["kind"] == "AKOA"
    assert evaluate.describe_data({**splits, "test": real["test"]})["kind"] == "mixed"


def test_plots_of_nothing_wrong() -> None:
    """A perfect model has no errors to show, and its report must not fail for that."""
    rows = [row(p, side) for p in range(3) for side in ("left", "right")]
    given = predictions.by_slice(rows, np.array([-9.0, 9.0] * 3))
    weights = metrics.resample(3, 0)
    found = metrics.score(rows, given.logits, weights)
    assert report.format_estimate(found["slice"]["accuracy"]) == "100.0 % (100.0 to 100.0) †"
    assert found["patient"]["accuracy_wilson"]["low"] == pytest.approx(0.4385, abs=1e-4)
    plots.errors_by_slice(metrics.error_by_slice(rows, given.logits, weights))
    plots.gallery(np.empty((0, HEIGHT, WIDTH), np.uint8), [], [])
    plots.abstention({"slice": metrics.coverage_curve(given)}, metrics.abstention(given, weights))
    assert analysis.suspect_volumes(rows, given.logits) == []


# ---- again, and folds


def write_data(folder: Path, splits: Mapping[str, Split], labels: Path) -> None:
    for split in splits.values():
        for each, picture in zip(split.rows, split.images, strict=True):
            (folder / each.image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(folder / each.image)
    write_labels(labels, [row for split in splits.values() for row in split.rows])


def test_again_is_counted(
    run: Path,
    splits: dict[str, Split],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: {})  # it was drawn once, which takes seconds
    write_data(tmp_path, splits, tmp_path / "labels.csv")
    command = ["--run", str(run), "--data", str(tmp_path), "--labels", str(tmp_path / "labels.csv")]
    before = (run / "report.json").read_text(encoding="utf-8")
    assert evaluate.main(command) == 2
    assert "was looked at before (1 so far)" in capsys.readouterr().err
    assert (run / "report.json").read_text(encoding="utf-8") == before
    try:
        assert evaluate.main([*command, "--again"]) == 0
        found = json.loads((run / "report.json").read_text(encoding="utf-8"))
        assert found["test_looked_at"] == 2
        assert found["models"]["perceiver"] == json.loads(before)["models"]["perceiver"]
        assert found["command"] == evaluate.evaluation_command(run, tmp_path, tmp_path / "labels.csv")
        assert "looked at **2 times**" in (run / "report.md").read_text(encoding="utf-8")
    finally:
        (run / "report.json").write_text(before, encoding="utf-8")


def test_labels_of_another_split_errors(run: Path, splits: dict[str, Split], tmp_path: Path) -> None:
    """With other labels, patients of the test set may have been trained on."""
    rows = [row for split in splits.values() for row in split.rows]
    run_record.check_rows(run, rows)
    with pytest.raises(ValueError, match="are not those that"):
        run_record.check_rows(run, [replace(rows[0], split="val"), *rows[1:]])
    with pytest.raises(ValueError, match="does not say which rows"):
        run_record.check_rows(tmp_path, rows)


def test_unreadable_report_errors(tmp_path: Path) -> None:
    assert evaluate.count_looks(tmp_path) == 0
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="looks cannot be counted"):
        evaluate.count_looks(tmp_path)
    (tmp_path / "report.json").write_text('{"test_looked_at": "once"}', encoding="utf-8")
    with pytest.raises(ValueError, match="need a whole number"):
        evaluate.count_looks(tmp_path)


def fold(path: Path, first: int, logits: list[float]) -> tuple[dict[str, Any], Path]:
    rows = [row(first + i, "right" if i % 2 else "left") for i in range(len(logits))]
    ours = np.array(logits)
    all_logits = {name: ours if name == "perceiver" else np.ones(len(rows)) for name in predictions.MODELS}
    weights = metrics.resample(len(rows), 0)
    models = {name: metrics.score(rows, all_logits[name], weights) for name in predictions.MODELS}
    # Validation rows lie in the file too, and must not be pooled.
    known = [replace(row(first + 500), split="val")]
    both = {name: np.append(5.0, each) for name, each in all_logits.items()}
    predictions.write_predictions(path, known + rows, both)
    return {"data": {"kind": "phantom", **count_data(rows)}, "models": models}, path


def test_folds_are_pooled_by_patient(tmp_path: Path) -> None:
    made = [
        fold(tmp_path / "a.csv", 100, [-1.0, 1.0, -1.0, 1.0]),
        fold(tmp_path / "b.csv", 200, [-1.0, -1.0]),
    ]
    found = summarize_folds([m[0] for m in made], [m[1] for m in made])
    assert found["data"]["patients"] == 6
    assert found["models"]["perceiver"]["slice"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["models"]["majority"]["slice"]["accuracy"]["value"] == pytest.approx(1 / 2)
    assert found["difference"]["majority"]["patient"]["value"] == pytest.approx(1 / 3)
    assert [each["slice"] for each in found["each"]] == [1.0, 0.5]
    assert found["spread"]["slice"]["mean"] == 0.75
    assert found["spread"]["slice"]["sd"] == pytest.approx(np.std([1, 0.5], ddof=1))
    assert "2 folds, pooled" in report.folds_markdown(found)
    json.dumps(found, allow_nan=False)


def test_folds_errors(tmp_path: Path) -> None:
    one, other = fold(tmp_path / "a.csv", 100, [1.0, 1.0]), fold(tmp_path / "b.csv", 101, [1.0, 1.0])
    with pytest.raises(ValueError, match="tested in two folds, first 0000101"):
        summarize_folds([one[0], other[0]], [one[1], other[1]])
    with pytest.raises(ValueError, match="got 1 and 2"):
        summarize_folds([one[0]], [one[1], other[1]])
    with pytest.raises(ValueError, match="several kinds"):
        summarize_folds([one[0], {"data": {"kind": "AKOA"}}], [one[1], other[1]])
