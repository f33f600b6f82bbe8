"""Random cases of damaged files: each raises an error that names a file, or gives bit-identical content.

Not all damage can be detected in formats without checksums (safetensors files and configurations of other libraries,
pickles). For these, other values are an accepted outcome, counted as "not noticeable".
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.robustness import damaged_changes, damaged_sources
from tests.robustness.damaged_sources import SOURCES, base

BOUND = ("own", "deployment", "library")  # formats in which a digest distinguishes the files of two models
LARGEST_MEMORY = 256 * 2**20  # bytes that reading a small damaged file may take
LONGEST_TIME = 20  # seconds
LONGEST_MESSAGE = 4000  # characters
OTHERS = ("tests.robustness.damaged_pictures", "tests.robustness.damaged_labels")  # fuzzers of other files
SHARE_OF_OTHERS = 0.25
# What messages contain instead of the name of a file: errors of a configuration name the part, and those of the library
# are not shown, since it is compiled again.
PARTS = {"own": ("the model", "adapter", "encoder", "head", "must hold"), "library": ("",)}
# Words in messages of errors that would be due to the limit of memory rather than to the content of a file.
OUT_OF_MEMORY = ("allocate", "out of memory", "bad_alloc", "MemoryError")


class Late(BaseException):
    """Raised if a case exceeds the time limit. Not an Exception, so that no reader reports it as damage."""


def run_case(seed: int, folder: Path) -> str:
    """Damage a file in a copy of valid files, and read them.

    Args:
        seed: Seed of the case.
        folder: Empty folder.

    Returns:
        Format and outcome: "refused: <type of the error>", "same", or "not noticeable".
    """
    rng = random.Random(seed)
    if rng.random() < SHARE_OF_OTHERS and (others := [name for name in OTHERS if importlib.util.find_spec(name)]):
        name = rng.choice(others)
        return f"{name.rpartition('.')[2]}: {importlib.import_module(name).run_case(seed, folder)}"
    name = rng.choices(list(SOURCES), [source.weight for source in SOURCES.values()])[0]
    damaged_sources.copy(name, folder)
    change, path, noticeable = damage(name, folder, rng)
    try:
        return f"{name}: {outcome(name, folder, path, noticeable=noticeable)}"
    except Exception as error:
        error.add_note(f"{name}: {path.name} was damaged by {change}") if hasattr(error, "add_note") else None
        raise


def damage(name: str, folder: Path, rng: random.Random) -> tuple[str, Path, bool]:
    """Damage a random file of a format. Return the kind of damage, the file, and whether it must be noticed."""
    files = sorted(folder.iterdir())
    path = rng.choice(files)
    checked = path.name.endswith(SOURCES[name].checked)
    other = sorted(base(name).other.iterdir())[files.index(path)]
    kind = rng.random()
    if kind < 0.06:
        return damaged_changes.replaced(path, rng), path, checked
    if kind < 0.12:
        if rng.random() < 0.5 and len(files) > 1:  # by another file of the same model
            other, checked = rng.choice([file for file in files if file != path]), checked or name == "own"
        else:  # a whole file of another model with the same shapes, which fits if nothing binds the files
            checked = name in BOUND and checked
        path.write_bytes(other.read_bytes())
        return f"the content of {other}", path, checked
    changed = path.read_bytes()
    names = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        change = rng.choice(damaged_changes.CHANGES.get(path.suffix, damaged_changes.BYTES))
        with contextlib.suppress(ValueError, RecursionError):  # of a JSON text that is damaged already
            changed = change(changed, other.read_bytes(), rng)
        names.append(change.__name__)
    path.write_bytes(changed)
    if changed == other.read_bytes() and name not in BOUND:
        checked = False
    return " and ".join(names), path, checked


def outcome(name: str, folder: Path, path: Path, *, noticeable: bool) -> str:
    """Read the files in a folder.

    Raises:
        AssertionError: If different values are read although `noticeable` is true, or if the message of an error does
            not name a file or is not printable.
    """
    expected, read = base(name).content, SOURCES[name].read  # before the limits, since libraries are imported here
    start = time.perf_counter()
    try:
        with limited_time(), limited_memory():
            content = read(folder)
    except (OSError, ValueError) as error:
        check_message(str(error), [path.name, *PARTS.get(name, ()), *(p.name for p in base(name).folder.iterdir())])
        return f"refused: {type(error).__name__}"
    finally:
        took = time.perf_counter() - start
        assert took < LONGEST_TIME, f"it took {took:.1f} s"
    if damaged_sources.is_equal(content, expected):
        return "same"
    assert not noticeable, f"another content was read from {path}"
    return "not noticeable"


def check_message(text: str, names: list[str]) -> None:
    """Check that the message of an error is short, printable, names a file, and is not about memory."""
    assert any(name in text for name in names), f"the message names no file: {text[:500]!r}"
    assert text.isprintable(), f"the message is not printable: {text[:500]!r}"
    assert len(text) < LONGEST_MESSAGE, f"the message has {len(text)} characters: {text[:500]!r}"
    assert not any(words in text for words in OUT_OF_MEMORY), f"too much memory was requested: {text[:500]!r}"


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Context manager that limits further memory of this process to `LARGEST_MEMORY` bytes, on Linux."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    size = int(status.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + LARGEST_MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Context manager that raises `Late` after `LONGEST_TIME` seconds in the main thread, even while it waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Late

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_TIME)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
