"""Runs of the short examples: training, results, and their folder."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from examples.common import run as runs

pytestmark = pytest.mark.no_shape_checks


def test_a_run_trains_and_writes_its_result(tmp_path, capsys):
    run, model = runs.Run("some_name", "about", ["--out", str(tmp_path), "--seed", "3"]), nn.Linear(5, 3)
    before = model.weight.detach().clone()
    averaged = run.train("linear", model, lambda model: model(torch.ones(2, 5)).square().mean(), steps=7)
    assert "linear: step 7 of 7" in capsys.readouterr().out
    assert not averaged.training
    assert (averaged.weight != before).any()
    result = run.finish(_Figure(), tables={}, found=2)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["trained"]["linear"]["steps"], result["trained"]["linear"]["of"]) == (7, 7)
    assert result["command"] == f"python -m examples.some_name --seed 3 --out {tmp_path.as_posix()}"
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.refusal
def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    first = runs.Run("some_name", "about", ["--out", str(tmp_path)])
    with pytest.raises(ValueError, match="another command works in this folder"):
        runs.Run("some_name", "about", ["--out", str(tmp_path)])
    first.finish(_Figure(), tables={})
    runs.Run("some_name", "about", ["--out", str(tmp_path)])


@pytest.mark.refusal
@pytest.mark.parametrize("seed", ["-1", "x", "99999999999999999999"])
def test_a_seed_out_of_range_is_refused(tmp_path, seed, capsys):
    with pytest.raises(SystemExit, match="2"):
        runs.Run("some_name", "about", ["--out", str(tmp_path), "--seed", seed])
    assert "must be a whole number from 0 to 4,294,967,295" in capsys.readouterr().err


class _Figure:
    def savefig(self, path, **options):
        path.write_bytes(b"picture")
