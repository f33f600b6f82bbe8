"""Shipped files are those of a finished run, and small."""

from pathlib import Path

import pytest

from examples.akoa import ship
from examples.akoa.driver import WEIGHTS

pytestmark = pytest.mark.no_shape_checks


def finished(run: Path, weights: int = 1000) -> Path:
    (run / "weights").mkdir(parents=True)
    (run / "weights" / "config.json").write_text("{}")
    (run / "weights" / "model.safetensors").write_bytes(bytes(weights))
    for name in ("report.md", "report.json", "run.json", "predictions.csv", "curves.png"):
        (run / name).write_text(name)
    (run / "history.csv").write_text("stays")
    return run


def test_weights_report_and_images_are_copied(tmp_path: Path) -> None:
    written = ship.ship(finished(tmp_path / "run"), tmp_path / "to")
    assert {path.name for path in written} == {
        "config.json", "model.safetensors", "report.md", "report.json", "run.json", "predictions.csv", "curves.png",
    }  # fmt: skip
    assert (tmp_path / "to" / "report.md").read_text() == "report.md"


def test_a_run_without_a_report_does_not_ship(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path / "run")
    (run / "report.json").unlink()
    assert ship.main(["--run", str(run), "--to", str(tmp_path / "to")]) == 2
    assert "make akoa" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
    with pytest.raises(FileNotFoundError, match="weights"):
        (tmp_path / "empty").mkdir()
        ship.ship(tmp_path / "empty", tmp_path / "to")


def test_large_weights_do_not_ship(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2,097,153 bytes do not ship"):
        ship.ship(finished(tmp_path / "run", weights=2 * 2**20 + 1), tmp_path / "to")


def test_the_shipped_weights_are_small_and_have_their_report() -> None:
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 2 * 2**20
    assert "Left or right knee" in (WEIGHTS / "report.md").read_text(encoding="utf-8")
