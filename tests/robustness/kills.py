"""Trainings that are killed at any moment and resumed must end with the files of an uninterrupted training.

    python -m tests.robustness.kills --kills 20                # random moments, several in each training
    python -m tests.robustness.fuzzing kills                   # first every access to a file with every fault

Trainings run in forked children of one process that has imported everything, which takes seconds. A fault happens after
some time, or at the n-th access to a file: when a child creates, opens for writing, flushes, renames or removes one.
The child is killed (also with half of the file cut off before it is flushed, as after a loss of power), gets SIGINT or
SIGTERM, or the disk is full or read-only from then on. Exit code and message must be those of the fault.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.backends.backend_agg  # noqa: F401 (imported before the children are forked)
import numpy as np
import sklearn.linear_model  # noqa: F401
import torch
from PIL import Image

from examples.akoa import evaluate, train
from examples.akoa.dataset.labels import Row, write_labels
from examples.akoa.evaluation import baselines, metrics

FAULTS_PER_RUN = 10
LOGS = ("tensorboard", "checkpoints")  # contain times and numbers of sessions
_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.chmod"}


# Expected exit status of each fault, and the end of the last line of the output.
FAULTS = {
    "kill": (-signal.SIGKILL, ""),
    "torn": (-signal.SIGKILL, ""),
    "SIGINT": (130, "interrupted: the same command with --resume continues"),
    "SIGTERM": (143, "interrupted: the same command with --resume continues"),
    "ENOSPC": (2, "then the same command with --resume continues"),
    "EROFS": (2, "then the same command with --resume continues"),
}


class Fault(NamedTuple):
    """Fault in a child process, at its access number `access` to a file or after `seconds`."""

    name: str = ""
    access: int | None = None
    seconds: float | None = None


NO_FAULT = Fault()


class Outcome(NamedTuple):
    """Exit status of a child, negative for signals, its output, and the number of its accesses to files."""

    status: int
    output: str
    accesses: int


class Reference(NamedTuple):
    """A training without interruption: its files, the number of its accesses to files, and the seconds it took."""

    files: dict[str, bytes]
    accesses: int
    seconds: float


def run_case(seed: int, folder: Path) -> str:
    """Kill a training, resume it and compare its files with those of the reference.

    The first seeds cover every fault at every access to a file, one per seed. Later seeds have several random faults.
    """
    del folder  # the folder is part of the report, and therefore the same for all trainings
    names = list(FAULTS)
    if (access := seed // len(names) + 1) <= reference().accesses:
        faults = [Fault(names[seed % len(names)], access)]
    else:
        faults = random_faults(random.Random(seed), FAULTS_PER_RUN, names)
    return f"equal after {run_with_faults(faults)} faults"


def random_faults(rng: random.Random, count: int, names: Sequence[str]) -> list[Fault]:
    """Draw one fault per child, early in its work, since a resumed training has less left to do."""
    expected = reference()
    return [
        Fault(rng.choice(names), access=rng.randint(1, expected.accesses // 3))
        if rng.random() < 0.7
        else Fault("kill", seconds=rng.uniform(0.0, 0.5 * expected.seconds))
        for _ in range(count)
    ]


def run_with_faults(faults: Sequence[Fault]) -> int:
    """Run a training with one fault in each of its processes, then finish it. Returns the number of faults.

    Raises:
        AssertionError: A process ended with another exit code or message, or the final files differ from the reference.
    """
    expected, run, number = reference(), data_folder() / "run", 0
    shutil.rmtree(run, ignore_errors=True)
    for fault in [*faults, NO_FAULT]:
        outcome = training(fault)
        if outcome.status == 0:  # complete before the fault
            break
        status, message = FAULTS.get(fault.name, (0, ""))
        details = f"{fault} after {number} faults: exit code {outcome.status}\n{outcome.output}"
        assert outcome.status == status, details
        assert "Traceback" not in outcome.output and outcome.output.rstrip().endswith(message), details
        number += 1
    assert training(NO_FAULT).status == 0, "a complete run cannot be resumed"
    actual = contents(run)
    assert actual.keys() == expected.files.keys(), f"files differ: {sorted(actual.keys() ^ expected.files.keys())}"
    different = [name for name, content in actual.items() if content != expected.files[name]]
    assert not different, f"{', '.join(different)}: not those of the reference; {faults}"
    return number


@cache
def reference() -> Reference:
    """Train without interruption."""
    start = time.perf_counter()
    outcome = training(NO_FAULT)
    assert outcome.status == 0, outcome.output
    return Reference(contents(data_folder() / "run"), outcome.accesses, time.perf_counter() - start)


@cache
def data_folder() -> Path:
    """Folder with images and labels, which is removed when the process ends."""
    folder = Path(_FOLDER.name)
    rng, rows = np.random.default_rng(0), []
    for patient, split in enumerate(("train", "val", "test", "train")):
        for side in ("left", "right"):
            for index in range(2):
                gray = rng.integers(0, 60, (17, 13), np.uint8)
                gray[:, slice(0, 4) if side == "left" else slice(9, 13)] += 150
                name = f"OAI{9000000 + patient}_BaseLine_3_de3d1_SAG_3D_DESS_WE_{side.upper()}.nii.gz_{index}.png"
                Image.fromarray(gray).save(folder / name)
                rows.append(Row(name, str(9000000 + patient), 3, side, index, split))
    write_labels(folder / "labels.csv", rows)
    # Less work of each kind.
    metrics.DRAWS, baselines.INVERSE_PENALTIES = 20, (1.0,)
    evaluate.figure_names = lambda *_: ["slices", "curves"]
    return folder


_FOLDER = tempfile.TemporaryDirectory()


def training(fault: Fault) -> Outcome:
    """Train in a child, continuing if there is something to continue."""
    folder = data_folder()
    arguments = f"--data {folder} --labels {folder / 'labels.csv'} --out {folder / 'run'} --resume --accelerator cpu"
    command = [*arguments.split(), "--size", "16", "12", "--batch", "4", "--epochs", "2"]
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _train(command, fault, sender)
    os.close(sender)
    if fault.seconds is not None:
        time.sleep(fault.seconds)
        os.kill(child, signal.SIGKILL)
    with open(receiver, "rb") as pipe:
        accesses, _, output = pipe.read().decode().partition("\n")
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output, int(accesses or 0))


def _train(command: list[str], fault: Fault, sender: int) -> None:
    """Run the command in this child, send the number of accesses and the output to the parent, and end the process."""
    output, code = io.StringIO(), 70
    accesses = Accesses(data_folder() / "run", fault)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            accesses.watch()
            code = train.main(command)
    except BaseException:
        output.write(traceback.format_exc())
    with contextlib.suppress(OSError):
        os.write(sender, f"{accesses.number}\n{output.getvalue()[-50_000:]}".encode())
    os._exit(code)


class Accesses:
    """Counts the accesses to files below a folder in this process, and causes a fault at one of them."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.prefix, self.fault, self.number = str(folder), fault, 0
        self.flush = os.fsync

    def watch(self) -> None:
        """Watch from now on, until the process ends."""
        sys.addaudithook(self._audit)
        os.fsync = self._flush  # not an audited call

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            path = arguments[0]
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.prefix):
                self._access(event)

    def _flush(self, handle: int) -> None:
        if self.number + 1 == self.fault.access and self.fault.name == "torn" and not os.path.isdir(handle):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        self._access("fsync")
        self.flush(handle)

    def _access(self, event: str) -> None:
        self.number += 1
        if self.fault.access is None or self.number < self.fault.access:
            return
        if self.fault.name.startswith("E"):  # on a full disk, files can be removed
            if event != "os.remove":
                number = getattr(errno, self.fault.name)
                raise OSError(number, os.strerror(number), self.prefix)
        elif self.number == self.fault.access:
            os.kill(os.getpid(), getattr(signal, self.fault.name, signal.SIGKILL))


def contents(run: Path) -> dict[str, bytes]:
    """Return the content of every file of a run, without logs."""
    paths = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] not in LOGS]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths if path.name != ".lock"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.kills", description="Kill and resume trainings.")
    parser.add_argument("--kills", type=int, default=20, help="number of random kills (%(default)s)")
    parser.add_argument("--others", type=int, default=0, help="number of other random faults (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    expected = reference()
    print(f"{expected.accesses} accesses to files, {expected.seconds:.1f} s, {', '.join(sorted(expected.files))}")
    rng = random.Random(options.seed)
    for kind, total in (("kill", options.kills), ("other", options.others)):
        names = [name for name, (status, _) in FAULTS.items() if (status == -signal.SIGKILL) == (kind == "kill")]
        number = 0
        while number < total:
            number += run_with_faults(random_faults(rng, min(FAULTS_PER_RUN, total - number), names))
            print(f"{kind}: equal after {number} faults", flush=True)


if __name__ == "__main__":
    main()
