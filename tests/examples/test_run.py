"""Shared code of the short examples: intervals, tables, atomic writes, interruptible training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from examples.common import run as runs
from examples.common import scores

pytestmark = pytest.mark.no_shape_checks


def test_an_interval_is_that_of_the_formula():
    torch.manual_seed(0)
    values = (torch.rand(997) < 0.7).float()
    found = scores.interval(values)
    share = values.mean().item()
    assert found["mean"] == pytest.approx(share)
    half = 1.96 * (share * (1 - share) / 997) ** 0.5  # of a binomial
    assert found["low"] == pytest.approx(share - half, abs=0.004)
    assert found["high"] == pytest.approx(share + half, abs=0.004)


def test_models_are_compared_sample_by_sample_with_the_best_of_the_others():
    best = torch.rand(53, generator=torch.Generator().manual_seed(0))
    rows = scores.compare({"poor": best - 1, "best": best, "Perceiver": best + 0.5}, ours="Perceiver")
    assert list(rows) == ["poor", "best", "Perceiver", "Perceiver less best"]
    for value in rows["Perceiver less best"].values():
        assert value == pytest.approx(0.5)  # though the scores themselves vary


def test_the_minimum_is_best_where_less_is_better():
    rows = scores.compare(
        {"poor": torch.full((5,), 3.0), "best": torch.ones(5), "Perceiver": torch.zeros(5)}, ours="Perceiver", best=min
    )
    assert rows["Perceiver less best"]["mean"] == -1


def test_a_table_is_aligned():
    lines = scores.markdown_table(
        {"a": {"mean": 1, "low": 0.5, "high": 100}, "longer": {"mean": 3, "low": 2, "high": 4}}, "dB"
    )
    assert len({len(line) for line in lines.splitlines()}) == 1
    assert lines.splitlines()[2] == "| a      | 1.00 | 0.50 to 100.00 |"


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
