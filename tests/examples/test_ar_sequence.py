"""The copying example runs, reports its results, and copies."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.no_shape_checks

pytest.importorskip("matplotlib")
example = pytest.importorskip("examples.ar_sequence")


def test_a_toy_run_writes_its_result_and_image(tmp_path, capsys):
    result = example.main(["--toy", "--out", str(tmp_path / "new")])
    assert result == json.loads((tmp_path / "new" / "result.json").read_text())
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows, printed = result["tables"]["right, %"], capsys.readouterr().out.split()
    assert list(rows) == ["latents alone", "Perceiver AR", "Perceiver AR less latents alone"]
    assert {f"{row['mean']:.2f}" for row in rows.values()} <= {*printed}


def test_sequences_repeat_and_differ():
    actual = example.sequences(5, 60, torch.Generator().manual_seed(0))
    assert actual.shape == (5, 60)
    assert torch.equal(actual[:, 23:], actual[:, :-23])
    assert (actual[:, 1:] != actual[:, :-1]).any(1).all()
    assert len(actual.unique(dim=0)) == 5


@pytest.mark.slow
def test_it_copies_what_its_latents_do_not_hold(tmp_path):
    rows = example.main(["--out", str(tmp_path)])["tables"]["right, %"]
    assert rows["Perceiver AR"]["mean"] > 95
    assert rows["latents alone"]["mean"] < 15
