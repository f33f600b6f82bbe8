"""Shipped files are those of a finished run, and small."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import perceiver_core as pc
from examples.akoa import ship
from examples.akoa.driver import WEIGHTS
from examples.akoa.evaluation import predictions, results
from examples.akoa.evaluation.report import markdown
from examples.akoa.model import knee_model
from examples.akoa.training.run_record import weights_digest, write_record

pytestmark = pytest.mark.no_shape_checks


def finished(run: Path, seed: int = 0) -> Path:
    """A run with its report, whose metrics are made up."""
    torch.manual_seed(seed)
    model = knee_model((16, 12))
    run.mkdir()
    pc.save(model, run / "weights")
    shipped = json.loads((WEIGHTS / "report.json").read_text(encoding="utf-8"))
    report = {**shipped, "weights_sha256": weights_digest(model)}
    results.write_look(run, report, [], {name: np.empty(0) for name in predictions.MODELS})
    (run / "report.md").write_text(markdown(report), encoding="utf-8")
    write_record(run, {"weights_sha256": weights_digest(model)})
    for name in ("curves.png", "history.csv"):
        (run / name).write_text(name)
    return run


def test_weights_report_and_images_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, target = finished(tmp_path / "run"), tmp_path / "to"
    assert ship.main(["--run", str(run), "--to", str(target)]) == 0
    written = {path.name for path in target.iterdir()}
    assert written == {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert written == {
        "config.json", "model.safetensors", "report.md", "report.json", "run.json", "predictions.csv", "curves.png",
    }  # fmt: skip
    results.check_look(target)
    assert weights_digest(pc.load(target)) == weights_digest(pc.load(run / "weights"))


@pytest.mark.parametrize("missing", ["report.json", "weights"])
def test_a_run_without_a_report_does_not_ship(tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run")
    (run / missing).rename(run / "moved")
    assert ship.main(["--run", str(run), "--to", str(tmp_path / "to")]) == 2
    error = capsys.readouterr().err
    assert missing in error and "make akoa" in error
    assert not (tmp_path / "to").exists()


def test_files_of_several_runs_do_not_ship(tmp_path: Path) -> None:
    run, other = finished(tmp_path / "run"), finished(tmp_path / "other", seed=1)
    (run / "report.md").write_text("of an earlier look")
    with pytest.raises(ValueError, match=r"report\.md is not that of its report\.json"):
        ship.ship(run, tmp_path / "to")
    (run / "weights").rename(run / "moved")
    (other / "weights").rename(run / "weights")
    with pytest.raises(ValueError, match="are not the weights that the training of this run has saved"):
        ship.ship(run, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_large_weights_do_not_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="bytes do not ship; the limit is 10,000"):
        ship.ship(finished(tmp_path / "run"), tmp_path / "to")


def test_the_shipped_weights_are_small_and_have_their_report() -> None:
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 2 * 2**20
    assert "Left or right knee" in (WEIGHTS / "report.md").read_text(encoding="utf-8")
