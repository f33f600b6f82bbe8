"""A conversion that is killed leaves the destination as it was, or complete."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

import perceiver_core as pc
from perceiver_core.interop import convert, load_transformers
from tests.robustness import damaged_sources

pytestmark = [
    pytest.mark.no_shape_checks,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # of processes with threads, since Python 3.12
]
WRITES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree")
KILLED = 9


def killed_at(event: int, source: Path, destination: Path) -> bool:
    """Convert in a child process that exits without clean-up at an access to the file system, counted from 1.

    Return whether there were as many accesses.
    """
    if (child := os.fork()) == 0:
        count = 0

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            writes = name in WRITES or (name == "open" and str(destination.parent) in str(arguments[0]))
            count += writes
            if count == event:
                os._exit(KILLED)

        sys.addaudithook(hook)
        convert(source, destination)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == KILLED


def test_a_killed_conversion_leaves_nothing_or_everything(tmp_path: Path) -> None:
    """In a folder that is new or empty."""
    source = damaged_sources.base("transformers").folder
    expected = damaged_sources.described(load_transformers(source))
    convert(source, tmp_path / "whole")  # imports all modules
    event, rng = 0, random.Random(0)
    while True:
        event, is_there = event + rng.randint(2, 6), rng.random() < 0.5
        (folder := tmp_path / str(event)).mkdir()
        destination = folder / "ours"
        if is_there:
            destination.mkdir()
        killed = killed_at(event, source, destination)
        names = sorted(path.name for path in destination.iterdir()) if destination.exists() else []
        assert destination.exists() or not is_there
        if names:
            assert names == ["README.md", "config.json", "model.safetensors"]
            assert damaged_sources.is_equal(damaged_sources.described(pc.load(destination)), expected)
        if not killed:
            assert names and [path.name for path in folder.iterdir()] == ["ours"]
            break
    assert event > 10
