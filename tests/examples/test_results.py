"""The stored results are complete, and the page that shows them agrees with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.common import scores

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text()
RESULTS = ROOT / "examples" / "results"
KEPT = sorted(RESULTS.glob("**/result.json"))


def name(path):
    """The folder of a result: the name of its script, and of the data if there are several."""
    return path.parent.relative_to(RESULTS).as_posix()


def rows(result):
    """The rows of all tables of a result."""
    return [(name, row) for table in result["tables"].values() for name, row in table.items()]


def test_there_is_a_result_for_each_script():
    scripts = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")} - {"digits"}  # whose figures are its own
    assert {name(path).split("/")[0] for path in KEPT} == scripts


@pytest.mark.parametrize("path", KEPT, ids=name)
def test_stored_results_are_complete_runs(path):
    result, folder = json.loads(path.read_text()), name(path)
    script, *data = folder.split("/")
    assert not result["toy"]
    options = f" --data {data[0]}.zip --seeds 5" if data else ""
    assert result["command"] == f"python -m examples.{script}{options} --out examples/results/{folder}"
    assert result["command"] in PAGE
    assert all(model["steps"] == model["of"] for model in result["trained"].values())
    assert path.with_name("figure.png").read_bytes().startswith(b"\x89PNG")
    assert f"../examples/results/{folder}/figure.png" in PAGE


@pytest.mark.parametrize("path", KEPT, ids=name)
def test_the_page_shows_the_results(path):
    shown = re.findall(r"^\| (.*?) +\| +(-?[\d.]+) \| +(-?[\d.]+) to +(-?[\d.]+) \|$", PAGE, re.MULTILINE)
    for title, row in rows(json.loads(path.read_text())):
        assert (title, *(scores.format_number(row[key]) for key in ("mean", "low", "high"))) in shown
