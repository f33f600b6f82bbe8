"""The copying example runs, says what it found, and writes it down."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("matplotlib")
example = pytest.importorskip("examples.ar_sequence")


def test_a_toy_run_prints_and_writes(tmp_path, capsys):
    found = example.main(["--toy", "--out", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    for name, percent in found.items():
        assert f"{name:<14} {percent:5.1f} % of 46 generated notes" in printed
    written = json.loads((tmp_path / "new" / "ar_sequence.json").read_text())
    assert written["right_percent"] == found
    assert (tmp_path / "new" / "ar_sequence.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 2  # and nothing half-written


def test_sequences_repeat_and_differ():
    found = example.sequences(5, 60, torch.Generator().manual_seed(0))
    assert found.shape == (5, 60)
    assert torch.equal(found[:, 23:], found[:, :-23])
    assert (found[:, 1:] != found[:, :-1]).any(1).all()
    assert len(found.unique(dim=0)) == 5


def test_a_file_is_whole_or_not_there(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        example.replace(tmp_path / "result", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_copies_what_its_latents_do_not_hold(tmp_path):
    found = example.main(["--out", str(tmp_path)])
    assert found["Perceiver AR"] > 95
    assert found["latents alone"] < 15
