"""Writes constraints.txt: one exact version of all that perceiver-core and its extras need.

Pins what is installed beside the Python that runs this, for that Python's range of versions, and keeps
the lines of the other range: run it once under Python 3.10 and once under a newer one to renew all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from examples.common.command import run_command
from perceiver_core.atomic_files import write_atomically

UNPINNED = {"triton"}  # each build of PyTorch for CUDA asks for the one that it was made with
FILE = Path(__file__).resolve().parents[1] / "constraints.txt"
EXTRAS = {"images", "hub", "plots", "akoa", "dev", "docs", "ecosystem"}
RANGES = {"older": 'python_version < "3.11"', "newer": 'python_version >= "3.11"'}
HEADER = """\
# The exact versions that CI tests with. Made by `make constraints`; run it under Python 3.10 as well
# (make constraints PYTHON=python3.10, with no .venv) to renew the lines marked for it.
"""
LINE = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.*))?$")


def installed(name: str, extras: set[str]) -> dict[str, str]:
    """The versions of all that `name[extras]` needs here, by name."""
    pins: dict[str, str] = {}
    todo, seen = [(name, frozenset(extras))], set()
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        found = distribution(item[0])
        if item[0] not in {name, *UNPINNED}:
            pins[canonicalize_name(item[0])] = Version(found.version).public
        for text in found.requires or []:
            need = Requirement(text)
            environments = [{**default_environment(), "extra": extra} for extra in (item[1] or {""})]
            if need.marker is None or any(need.marker.evaluate(e) for e in environments):
                todo.append((need.name, frozenset(need.extras)))
    return pins


def read(path: Path) -> dict[str, dict[str, str]]:
    """The pins of both ranges in a constraints file, by range and name."""
    pins: dict[str, dict[str, str]] = {name: {} for name in RANGES}
    for line in path.read_text().splitlines() if path.exists() else []:
        if match := LINE.match(line):
            for side, marker in RANGES.items():
                if match["marker"] in (None, marker):
                    pins[side][match["name"]] = match["version"]
    return pins


def write(pins: dict[str, dict[str, str]]) -> str:
    """A constraints file; a line holds for every Python unless it is marked."""
    lines = []
    for name in sorted(pins["older"] | pins["newer"]):
        versions = {side: pins[side].get(name) for side in RANGES}
        if versions["older"] == versions["newer"]:
            lines.append(f"{name}=={versions['newer']}")
        else:
            lines += [f"{name}=={versions[side]} ; {RANGES[side]}" for side in RANGES if versions[side]]
    return HEADER + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, help="file to renew (default: constraints.txt)")
    options = parser.parse_args(arguments)
    all_pins = read(options.out)
    all_pins["older" if sys.version_info < (3, 11) else "newer"] = installed("perceiver-core", EXTRAS)
    write_atomically({options.out: write(all_pins)})
    print(f"{options.out.name}: {len(all_pins['newer'])} packages")


if __name__ == "__main__":
    sys.exit(run_command(main))
