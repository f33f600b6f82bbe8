"""The command line writes what it has, however a benchmark ends; tables and figures are of the rows."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import attention, comparison, compilation, report, scaling
from benchmarks.__main__ import Benchmark

ROW = {"candidate": "a", "median ms": 1.0, "peak MB": 2.0}


def test_a_table_is_markdown_with_aligned_columns():
    rows = [{"name": "a", "ms": 0.123456, "n": 7}, {"name": "long", "ms": 1234.5, "n": 11}]
    assert report.table(rows).splitlines() == [
        "| name |    ms |  n |",
        "|-----:|------:|---:|",
        "|    a | 0.123 |  7 |",
        "| long | 1,234 | 11 |",
    ]


def test_a_table_leaves_cells_without_a_value_empty():
    rows = [{"name": "a", "note": "refused"}, {"name": "b", "ms": 1, "MB": 2}]
    assert report.table(rows).splitlines()[2:] == ["|    a |    |    | refused |", "|    b |  1 |  2 |         |"]


def test_a_line_names_sizes_candidate_and_result():
    assert report.line({"n": 1000, "task": "training", **ROW}) == "n 1,000, training: a: 1 ms"
    assert report.line({"n": 3, "candidate": "a", "note": "refused: x"}) == "n 3: a: refused: x"
    assert report.line({"candidate": "a", "note": "refused: x"}) == ": a: refused: x"


def test_curves_are_drawn(tmp_path):
    rows = [
        {"along": along, "size": size, "candidate": name, "median ms": 0.1 * size, "peak MB": float(size)}
        for along, size, name in itertools.product(("tokens", "latents"), (10, 100, 1000), "ab")
    ]
    scaling.plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bars_are_drawn_of_measured_rows_only(tmp_path):
    notes = [{"n": 3, "candidate": "b", "note": "refused"}]
    report.bars(notes, tmp_path / "bars.png", title="")
    assert not (tmp_path / "bars.png").exists()
    report.bars([{"n": 3, **ROW}, *notes], tmp_path / "bars.png", title="")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "attention", "--toy", "--out", str(tmp_path)])
    command_line.main()
    assert "| num_latents |" in capsys.readouterr().out
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert [row["candidate"] for row in written["rows"]] == list(attention.METHODS["cpu"]) * 2
    assert all(row["GFLOP/s"] > 0 and row["% of exp"] > 0 and "peak MB" in row for row in written["rows"])
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def ended(tmp_path, run, *, seconds=9.0):
    """Content that is written of a benchmark that ends somehow."""
    content = {"rows": [], "notes": []}
    options = argparse.Namespace(toy=True, device="cpu", only="", seconds=seconds)
    benchmark = Benchmark(SimpleNamespace(run=run), cpu=1.0, cuda=1.0)
    try:
        command_line.measure(benchmark, tmp_path / "new" / "rows.json", content, options)
    finally:
        assert json.loads((tmp_path / "new" / "rows.json").read_text()) == content
    return content


def test_rows_are_written_at_once(tmp_path):
    def run(setting):
        yield ROW
        assert json.loads((tmp_path / "new" / "rows.json").read_text())["rows"] == [ROW]
        yield "a note"

    assert ended(tmp_path, run) == {"rows": [ROW], "notes": ["a note"]}


def test_rows_before_a_failure_are_written(tmp_path):
    def run(setting):
        yield ROW
        raise ValueError("no such thing")

    rows = ended(tmp_path, run)["rows"]
    assert rows == [ROW, {"candidate": "all", "note": "failed: ValueError: no such thing"}]


def test_rows_before_an_interruption_are_written(tmp_path):
    def run(setting):
        yield ROW
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended(tmp_path, run)
    written = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert written["rows"] == [ROW] and written["notes"][0].startswith("interrupted")


def test_rows_before_the_time_limit_are_written(tmp_path):
    def run(setting):
        assert setting.remaining <= 0.3
        yield ROW
        while True:
            time.sleep(0.01)

    content = ended(tmp_path, run, seconds=0.3)
    assert content["rows"] == [ROW] and content["notes"][0].startswith("did not end within 0 s")


def test_all_benchmarks_together_end_within_forty_minutes():
    others = 30  # seconds outside of the limits: the first ceilings, the figures
    assert sum(benchmark.cpu for benchmark in command_line.BENCHMARKS.values()) + others <= 40 * 60
    assert all(benchmark.cuda <= 240 for benchmark in command_line.BENCHMARKS.values())


def test_the_command_goes_on_after_a_failure_and_reports_it(monkeypatch, tmp_path):
    def broken(setting):
        raise ValueError("no such thing")

    refused = [{"candidate": "a", "note": "failed: KeyError: x"}, {"candidate": "b", "note": "refused: y"}]
    monkeypatch.setattr(command_line.BENCHMARKS["read"].module, "run", broken)
    monkeypatch.setattr(command_line.BENCHMARKS["models"].module, "run", lambda setting: iter(refused))
    monkeypatch.setattr("sys.argv", ["benchmarks", "read", "models", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    lines = ["read: all: failed: ValueError: no such thing", "models: a: failed: KeyError: x"]
    assert stopped.value.code.splitlines()[1:] == lines
    assert json.loads((tmp_path / "models.json").read_text())["rows"] == refused


def test_starts_that_fail_or_take_too_long_are_noted(monkeypatch):
    def in_process(function, name, direction, folder, setting, *, seconds):
        if name == "structured reads":
            raise TimeoutError("did not end within 90 s")
        offset = 1.0 if "compile" in name else 0.0
        return compilation.Start(2.0, compilation.measurement.Timing(1.0, 0.0), [1.0 + offset])

    monkeypatch.setattr(compilation.measurement, "in_process", in_process)
    rows = list(compilation.run(comparison.Setting(toy=True, device="cpu")))
    assert [row["candidate"].split(", ")[-1] for row in rows] == ["keys and values", *["cold", "warm"] * 2]
    assert rows[0]["ratio"] == 1.0 and rows[0]["first ms"] == 2000.0
    assert [row["note"] for row in rows[1:3]] == ["left out: did not end within 90 s"] * 2
    assert all("must agree with the first" in row["note"] for row in rows[3:])


def test_errors_of_the_command_name_the_benchmarks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "no benchmark nothing; there are read, models, attention" in capsys.readouterr().err


def test_help_lists_the_benchmarks_and_their_limits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        command_line.main()
    shown = capsys.readouterr().out
    assert all(
        f"  {name} " in shown and f" {each.cpu:.0f} s" in shown for name, each in command_line.BENCHMARKS.items()
    )
