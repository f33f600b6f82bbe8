"""Runs of the short examples: atomic writes, interruptible training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from examples.common import run as runs

pytestmark = pytest.mark.no_shape_checks


def test_files_are_written_atomically(tmp_path):
    path = tmp_path / "result"
    runs.write_atomic(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_atomic(path, fail)
    assert [x.name for x in tmp_path.iterdir()] == ["result"]
    assert path.read_text() == "old"


def test_stopping_ends_training_and_not_the_run(tmp_path, capsys):
    run, model = runs.Run("some_name", "about", ["--out", str(tmp_path), "--seed", "3"]), nn.Linear(5, 3)
    calls = 0

    def loss(model):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return model(torch.ones(2, 5)).square().mean()

    before = model.weight.detach().clone()
    averaged = run.train("linear", model, loss, steps=7)
    assert "stopped after step 3 of 7" in capsys.readouterr().out
    assert not averaged.training
    assert (averaged.weight != before).any()
    result = run.finish(_Figure(), tables={}, found=2)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["trained"]["linear"]["steps"], result["trained"]["linear"]["of"]) == (3, 7)
    assert result["command"] == f"python -m examples.some_name --seed 3 --out {tmp_path.as_posix()}"
    assert result["machine"]["torch"] == torch.__version__


class _Figure:
    def savefig(self, path, **options):
        path.write_bytes(b"picture")
