"""Summaries of cross-validation folds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.akoa.evaluation import metrics, predictions, report
from examples.akoa.evaluation.cross_validation import count_data, summarize_folds
from tests.akoa.evaluation_cases import row

pytestmark = pytest.mark.no_shape_checks


def fold(path: Path, first: int, logits: list[float]) -> tuple[dict[str, Any], Path]:
    rows = [row(first + i, "right" if i % 2 else "left") for i in range(len(logits))]
    ours = np.array(logits)
    all_logits = {name: ours if name == "perceiver" else np.ones(len(rows)) for name in predictions.MODELS}
    weights = metrics.resample(len(rows), 0)
    models = {name: metrics.score(rows, all_logits[name], weights) for name in predictions.MODELS}
    # The file also has validation rows, which must not be pooled.
    known = [replace(row(first + 500), split="val")]
    both = {name: np.append(5.0, each) for name, each in all_logits.items()}
    path.write_text(predictions.to_csv(known + rows, both), encoding="utf-8")
    return {"data": {"kind": "phantom", **count_data(rows)}, "models": models}, path


def test_folds_are_pooled_by_patient(tmp_path: Path) -> None:
    made = [
        fold(tmp_path / "a.csv", 100, [-1.0, 1.0, -1.0, 1.0]),
        fold(tmp_path / "b.csv", 200, [-1.0, -1.0]),
    ]
    actual = summarize_folds([m[0] for m in made], [m[1] for m in made])
    assert actual["data"]["patients"] == 6
    assert actual["models"]["perceiver"]["slice"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert actual["models"]["majority"]["slice"]["accuracy"]["value"] == pytest.approx(1 / 2)
    assert actual["difference"]["majority"]["patient"]["value"] == pytest.approx(1 / 3)
    assert [each["slice"] for each in actual["each"]] == [1.0, 0.5]
    assert actual["spread"]["slice"]["mean"] == 0.75
    assert actual["spread"]["slice"]["sd"] == pytest.approx(np.std([1, 0.5], ddof=1))
    assert "2 folds, pooled" in report.folds_markdown(actual)
    json.dumps(actual, allow_nan=False)


@pytest.mark.refusal
def test_invalid_folds_raise(tmp_path: Path) -> None:
    one, other = fold(tmp_path / "a.csv", 100, [1.0, 1.0]), fold(tmp_path / "b.csv", 101, [1.0, 1.0])
    with pytest.raises(ValueError, match="tested in two folds, first 0000101"):
        summarize_folds([one[0], other[0]], [one[1], other[1]])
    with pytest.raises(ValueError, match="got 1 and 2"):
        summarize_folds([one[0]], [one[1], other[1]])
    with pytest.raises(ValueError, match="several kinds"):
        summarize_folds([one[0], {"data": {"kind": "AKOA"}}], [one[1], other[1]])
