"""Evaluation of a run: no leakage, complete reports, repeated evaluations."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from torch import nn

import perceiver_core as pc
from examples.akoa import evaluate
from examples.akoa.dataset.datamodule import Split
from examples.akoa.dataset.labels import write_labels
from examples.akoa.evaluate import evaluate_run
from examples.akoa.evaluation import analysis, figures, metrics, plots, predictions, report, results
from examples.akoa.evaluation.inference import predict
from examples.akoa.training import run_record
from tests.akoa.evaluation_cases import HEIGHT, PATIENTS, WIDTH, Bright, row

pytestmark = pytest.mark.no_shape_checks


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
def saved_report(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.refusal
@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("val", "test"), ("train", "val")])
def test_a_patient_in_two_splits_raises(one: str, other: str, splits: dict[str, Split], tmp_path: Path) -> None:
    """Earlier projects split by picture, or let validation and test share patients."""
    guest = replace(splits[one].rows[0], slice=77, image="elsewhere.png")
    crowded = Split([*splits[other].rows, guest], torch.cat([splits[other].images, splits[one].images[:1]]))
    with pytest.raises(ValueError, match=f"1 patients are in two splits .*{guest.patient}"):
        evaluate_run(Bright(), {**splits, other: crowded}, tmp_path / "out", history=None)
    assert not (tmp_path / "out").exists()


def test_loss_is_a_mean_over_test_images(splits: dict[str, Split], saved_report: Mapping[str, Any], run: Path) -> None:
    """The seed project divided the test loss by the number of training pictures."""
    rows, logits = predictions.read_predictions(run / "predictions.csv")
    test = [i for i, row in enumerate(rows) if row.split == "test"]
    expected = nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits["perceiver"][test]), splits["test"].labels.double()
    )
    assert len(splits["train"].rows) != len(splits["test"].rows)
    assert saved_report["models"]["perceiver"]["slice"]["log_loss"]["value"] == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_does_not_depend_on_the_training_mode(
    splits: dict[str, Split], model: pc.Perceiver, run: Path
) -> None:
    """Dropout stood after the logits of the seed project, and batch norm must not learn from the test set."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = predict(model.train(), splits["test"].images)
    model.eval()
    rows, actual = predictions.read_predictions(run / "predictions.csv")
    kept = actual["perceiver"][[row.split == "test" for row in rows]]
    np.testing.assert_allclose(logits, kept, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"train": s["train"], "test": s["test"]}, "need images in each"),
        (lambda s: {**s, "test": Split([], s["test"].images[:0])}, "need images in each"),
        (lambda s: {**s, "other": s["test"]}, "need images in each"),
        (lambda s: {**s, "val": Split(s["val"].rows[1:], s["val"].images)}, "rows for"),
    ],
)
def test_incomplete_splits_raise(change: Any, message: str, splits: dict[str, Split]) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.check_splits(change(splits))


def test_report_holds_everything(saved_report: Mapping[str, Any], run: Path) -> None:
    assert {
        "data", "command", "test_looked_at", "seed", "draws", "parameters", "models", "difference", "confusion",
        "calibration", "abstention", "slices", "suspects", "validation", "mirror", "border", "linear", "plots",
        "weights_sha256", "predictions_sha256",
    } == set(saved_report)  # fmt: skip
    assert list(saved_report["models"]) == ["perceiver", "linear", "linear_mirrored", "majority"]
    assert saved_report["data"]["kind"] == "phantom"
    assert saved_report["data"]["splits"]["test"]["patients"] == PATIENTS["test"]
    assert sum(map(sum, saved_report["confusion"]["slice"])) == saved_report["data"]["splits"]["test"]["slices"]
    assert set(saved_report["plots"]) == {
        "curves", "confusion", "calibration", "abstention", "slices", "attention", "errors",
    }  # fmt: skip
    for name in saved_report["plots"].values():
        assert imread(run / name).std() > 0.01, f"{name} is empty"


def test_the_markdown_report_is_complete(run: Path, saved_report: Mapping[str, Any]) -> None:
    text = (run / "report.md").read_text(encoding="utf-8")
    for words in (
        "generated phantom",
        "Patients are the sample",
        "looked at **once**",
        saved_report["command"],
        "Wilson",
    ):
        assert words in text
    for name in saved_report["plots"].values():
        assert f"]({name})" in text
    assert "None" not in text and "nan" not in text


def test_predictions_are_written_and_read(run: Path, splits: dict[str, Split], saved_report: Mapping[str, Any]) -> None:
    rows, logits = predictions.read_predictions(run / "predictions.csv")
    assert rows == splits["val"].rows + splits["test"].rows
    test = np.array([row.split == "test" for row in rows])
    actual = metrics.score(splits["test"].rows, logits["linear"][test], metrics.resample(PATIENTS["test"], 0))
    assert actual["slice"]["accuracy"] == saved_report["models"]["linear"]["slice"]["accuracy"]
    header = (run / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("image,patient,visit,side,slice,split,logit,probability")
    (run / "other.csv").write_text("image\nx.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.csv, line 1: column 'patient' is missing"):
        predictions.read_predictions(run / "other.csv")
    numbers = (run / "predictions.csv").read_text(encoding="utf-8").replace(",0,", ",zero,")
    (run / "other.csv").write_text(numbers, encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by"):
        predictions.read_predictions(run / "other.csv")


def test_history_is_gathered_by_epoch(run: Path) -> None:
    actual = figures.read_history(run / "history.csv")
    assert [line["epoch"] for line in actual] == [0, 1]
    assert (actual[0]["train_loss"], actual[0]["val_accuracy"]) == (0.7, 0.7)
    assert "train_loss" not in actual[1]


def test_the_kind_of_data_is_detected(splits: dict[str, Split]) -> None:
    real = {n: replace(s, rows=[replace(r, patient="9" + r.patient[1:]) for r in s.rows]) for n, s in splits.items()}
    assert evaluate.describe_data(real)["kind"] == "AKOA"
    assert evaluate.describe_data({**splits, "test": real["test"]})["kind"] == "mixed"


def test_plots_of_a_perfect_model() -> None:
    """A perfect model has no errors to plot, and its report must not fail."""
    rows = [row(p, side) for p in range(3) for side in ("left", "right")]
    given = predictions.by_slice(rows, np.array([-9.0, 9.0] * 3))
    weights = metrics.resample(3, 0)
    actual = metrics.score(rows, given.logits, weights)
    assert report.format_estimate(actual["slice"]["accuracy"]) == "100.0 % (100.0 to 100.0) †"
    assert actual["patient"]["accuracy_wilson"]["low"] == pytest.approx(0.4385, abs=1e-4)
    plots.errors_by_slice(metrics.error_by_slice(rows, given.logits, weights))
    plots.gallery(np.empty((0, HEIGHT, WIDTH), np.uint8), [], [])
    plots.abstention({"slice": metrics.coverage_curve(given)}, metrics.abstention(given, weights))
    assert analysis.suspect_volumes(rows, given.logits) == []


def write_data(folder: Path, splits: Mapping[str, Split], labels: Path) -> None:
    for split in splits.values():
        for each, picture in zip(split.rows, split.images, strict=True):
            (folder / each.image).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(folder / each.image)
    write_labels(labels, [row for split in splits.values() for row in split.rows])


def test_repeated_evaluations_are_counted(
    run: Path,
    splits: dict[str, Split],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "draw_figures", lambda *_: {})  # plotting takes seconds and is tested above
    write_data(tmp_path, splits, tmp_path / "labels.csv")
    command = ["--run", str(run), "--data", str(tmp_path), "--labels", str(tmp_path / "labels.csv")]
    texts = {name: (run / name).read_text(encoding="utf-8") for name in ("report.json", "report.md")}
    before = texts["report.json"]
    assert evaluate.main(command) == 2
    assert "was looked at before (1 so far)" in capsys.readouterr().err
    assert (run / "report.json").read_text(encoding="utf-8") == before
    try:
        assert evaluate.main([*command, "--again"]) == 0
        actual = json.loads((run / "report.json").read_text(encoding="utf-8"))
        assert actual["test_looked_at"] == 2
        assert actual["models"]["perceiver"] == json.loads(before)["models"]["perceiver"]
        assert actual["command"] == evaluate.evaluation_command(run, tmp_path, tmp_path / "labels.csv")
        assert "looked at **2 times**" in (run / "report.md").read_text(encoding="utf-8")
    finally:
        for name, text in texts.items():
            (run / name).write_text(text, encoding="utf-8")


@pytest.mark.refusal
def test_labels_of_another_split_raise(run: Path, splits: dict[str, Split], tmp_path: Path) -> None:
    """With other labels, patients of the test set may have been trained on."""
    rows = [row for split in splits.values() for row in split.rows]
    run_record.check_rows(run, rows)
    with pytest.raises(ValueError, match="are not those that"):
        run_record.check_rows(run, [replace(rows[0], split="val"), *rows[1:]])
    with pytest.raises(ValueError, match="does not say which rows"):
        run_record.check_rows(tmp_path, rows)


@pytest.mark.refusal
def test_an_unreadable_report_raises(tmp_path: Path) -> None:
    assert results.count_looks(tmp_path) == 0
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="looks cannot be counted"):
        results.count_looks(tmp_path)
    (tmp_path / "report.json").write_text('{"test_looked_at": "once"}', encoding="utf-8")
    with pytest.raises(ValueError, match="need a whole number"):
        results.count_looks(tmp_path)


def test_an_interrupted_report_is_finished_without_another_look(
    run: Path,
    splits: dict[str, Split],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    before = files()
    (run / "report.md").unlink()
    (run / "slices.png").unlink()
    write_data(tmp_path, splits, tmp_path / "labels.csv")
    monkeypatch.setattr(evaluate, "all_logits", None)  # nothing is predicted again
    command = ["--run", str(run), "--data", str(tmp_path), "--labels", str(tmp_path / "labels.csv"), "--again"]
    assert evaluate.main(command) == 0
    assert "without another look" in capsys.readouterr().out
    assert files() == before


@pytest.mark.refusal
def test_files_of_several_evaluations_are_refused(run: Path, model: pc.Perceiver, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    results.check_look(copy, model)
    with pytest.raises(ValueError, match="is of other weights than those in"):
        results.check_look(copy, Bright())
    (copy / "predictions.csv").write_text((copy / "predictions.csv").read_text() + "\n")
    with pytest.raises(ValueError, match=r"is of other predictions than those in .* evaluate again"):
        results.check_look(copy, model)
    old = json.loads((copy / "report.json").read_text())
    del old["predictions_sha256"]
    (copy / "report.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="contains no digest of predictions"):
        results.check_look(copy)


@pytest.mark.refusal
def test_weights_of_another_run_are_refused(run: Path, model: pc.Perceiver, tmp_path: Path) -> None:
    """Patients of the test set may have been trained on."""
    run_record.write_record(tmp_path, {"weights_sha256": run_record.weights_digest(model)})
    run_record.check_weights(tmp_path, model)
    with pytest.raises(ValueError, match="are not the weights that the training of this run has saved"):
        run_record.check_weights(tmp_path, Bright())
    run_record.check_weights(run, Bright())  # an older run.json has no digest
