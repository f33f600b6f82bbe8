"""Exit codes and messages of commands: signals at any moment, refused input, closed output, locked folders."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from examples.common.command import ArgumentParser, describe, run_command
from examples.common.output_folder import LOCK, output_folder

pytestmark = pytest.mark.no_shape_checks

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

# Each prints "ready" and then waits for signals.
WAITING = {
    "while modules are imported": """
        exit_on_signals()
        wait()
    """,
    "in the command": """
        sys.exit(run_command(wait, "go on"))
    """,
    "in a command that another one runs": """
        sys.exit(run_command(lambda: run_command(wait, "inner"), "go on"))
    """,
    "and the command ends with code 1, as Lightning does": """
        def command():
            try:
                wait()
            except KeyboardInterrupt:
                sys.exit(1)
        sys.exit(run_command(command, "go on"))
    """,
    "and the command ends without error": """
        def command():
            try:
                wait()
            except KeyboardInterrupt:
                return 0
        sys.exit(run_command(command, "go on"))
    """,
    "and another error follows": """
        def command():
            try:
                wait()
            finally:
                raise RuntimeError("connection closed by peer")
        sys.exit(run_command(command, "go on"))
    """,
    "and the handlers of a library are replaced": """
        def command():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: os._exit(0))
            command_module.handle_signals()
            wait()
        sys.exit(run_command(command, "go on"))
    """,
}
PRELUDE = """
import os, signal, subprocess, sys, time
from examples.common import command as command_module
from examples.common.command import exit_on_signals, run_command

def wait():
    print("ready", flush=True)
    time.sleep(60)
"""


def start(script: str) -> subprocess.Popen[str]:
    code = PRELUDE + textwrap.dedent(script)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)


def signaled(script: str, *signals: signal.Signals) -> tuple[int, str]:
    """Return exit code and stderr of a script that gets a signal each time it prints "ready"."""
    process = start(script)
    assert process.stdout is not None
    for number in signals:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@posix
@pytest.mark.parametrize("moment", WAITING)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_code_and_one_line(number: signal.Signals, code: int, moment: str) -> None:
    go_on = "run the same command again" if "imported" in moment else "go on"
    assert signaled(WAITING[moment], number) == (code, f"interrupted: {go_on}\n")


@posix
def test_a_second_signal_ends_at_once() -> None:
    script = """
        def command():
            try:
                wait()
            finally:
                wait()
        sys.exit(run_command(command, "go on"))
    """
    assert signaled(script, signal.SIGTERM, signal.SIGINT) == (143, "interrupted: go on\n")


@posix
def test_a_command_that_does_not_end_after_a_signal_is_ended() -> None:
    script = """
        def command():
            try:
                wait()
            except KeyboardInterrupt:
                time.sleep(60)
        command_module._GRACE = 0.1
        sys.exit(run_command(command, "go on"))
    """
    assert signaled(script, signal.SIGINT) == (130, "interrupted: go on\n")


@posix
def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, or for background processes of a shell."""
    script = """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        exit_on_signals()
        def command():
            os.kill(os.getpid(), signal.SIGINT)
            return 5
        sys.exit(run_command(command))
    """
    assert signaled(script) == (5, "")


@posix
def test_a_forked_process_dies_of_its_signal() -> None:
    script = """
        def command():
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, b"1")  # Python drops signals that arrive while it forks
                time.sleep(60)
                os._exit(0)
            os.read(reader, 1)
            os.kill(child, signal.SIGTERM)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        sys.exit(run_command(command))
    """
    assert signaled(script) == (1, "")


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(lambda: None) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("size: got 3\nexpected 5"), "size: got 3 expected 5"),
        (ValueError("\x1b[2Jfile"), "\\x1b[2Jfile"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "No such file: x. Check the path"),
        (
            FileExistsError(errno.EEXIST, "File exists", "x"),
            "File exists: x. A file is there already, where a folder is expected. Choose another path, or move the "
            "file",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "x"),
            "Read-only file system: x. Choose a path on a file system that is writable; then go on",
        ),
        (OSError(errno.ENOSPC, "Explained"), "Explained; then go on"),
    ],
)
def test_refused_input_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raises(error), "go on") == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.refusal
def test_unknown_arguments_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--f\x1b[2J\noo"], ["\u202e"]):
        with pytest.raises(SystemExit, match="2"):
            ArgumentParser(prog="x").parse_args(arguments)
    shown = capsys.readouterr().err
    assert set(shown) <= {"\n", *map(chr, range(32, 127))}
    assert len(shown.splitlines()) == 4
    assert r"x: error: unrecognized arguments: --f\x1b[2J\noo" in shown


def test_all_commands_use_this_parser() -> None:
    """Except the one that is copied without this repository."""
    files = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    own = {
        path.relative_to(ROOT).as_posix() for path in files if " argparse.ArgumentParser(" in path.read_text("utf-8")
    }
    assert own == {"examples/deploy/run_program.py"}


@pytest.mark.refusal
def test_errors_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raises(ZeroDivisionError()))
    assert describe(ZeroDivisionError()) == "ZeroDivisionError"


def test_codes_of_commands_are_kept() -> None:
    assert run_command(lambda: 1) == 1
    assert run_command(lambda: {"accuracy": 1.0}) == 0
    with pytest.raises(SystemExit, match="could not be measured"):
        run_command(raises(SystemExit("could not be measured")))


LONG = "sys.exit(run_command(lambda: [print('x' * 99) for _ in range(9999)], 'go on'))"
SHORT = "sys.exit(run_command(lambda: print('short')))"
HELP = "import argparse; sys.argv[1:] = ['--help']; sys.exit(run_command(argparse.ArgumentParser().parse_args))"


def printed_to(output: int, script: str, unbuffered: str) -> tuple[int, str]:
    """Return exit code and stderr of a script with this stdout."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", PRELUDE + script]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60
    )
    return done.returncode, done.stderr


@posix
@pytest.mark.parametrize(
    ("script", "unbuffered", "code", "line"),
    [
        (LONG, "", 141, "interrupted: the output was closed; go on\n"),
        (LONG, "1", 141, "interrupted: the output was closed; go on\n"),
        (SHORT, "", 141, ""),
        (HELP, "", 141, ""),
    ],
)
def test_a_closed_pipe_is_no_traceback(script: str, unbuffered: str, code: int, line: str) -> None:
    """As in `command | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    assert printed_to(writer, script, unbuffered) == (code, line)
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full of Linux")
def test_output_to_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        code, line = printed_to(full.fileno(), SHORT, "")
    assert (code, line) == (2, "error: the output cannot be written: No space left on device\n")


# Folders


@pytest.mark.refusal
def test_a_folder_is_locked_while_a_command_works_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with output_folder(folder):
        message = r"new.run: another command works in this folder at the moment"
        with pytest.raises(ValueError, match=message), output_folder(folder):
            pass
    with output_folder(folder):
        pass


@posix
def test_a_lock_of_a_killed_command_does_not_last(tmp_path: Path) -> None:
    script = f"""
        from filelock import FileLock
        with FileLock({str(tmp_path / LOCK)!r}):
            wait()
    """
    status, _ = signaled(script, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with output_folder(tmp_path):
        assert not FileLock(tmp_path / LOCK).is_locked


def test_temporary_files_of_killed_commands_are_removed(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    names = [f"report.json.{'0f' * 8}.partial", f"weights/model.safetensors.{'12' * 8}.partial"]
    kept = ["report.json", "download.partial", f"other/x.{'0f' * 8}.partial"]
    (tmp_path / "other").mkdir()
    for name in [*names, *kept]:
        (tmp_path / name).touch()
    with output_folder(tmp_path, "weights", "not there"):
        assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == (
            sorted([LOCK, *kept])
        )


@pytest.mark.refusal
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_a_folder_is_expected_is_reported(
    tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")

    def command() -> None:
        with output_folder(tmp_path / "file" / below):
            pass

    assert run_command(command) == 2
    assert "a file, where a folder is expected" in capsys.readouterr().err.replace("A file is there already", "a file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.refusal
def test_a_folder_that_cannot_be_written_to_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)

    def command() -> None:
        with output_folder(tmp_path / "run"):
            pass

    assert run_command(command, "the same command with --resume continues") == 2
    assert capsys.readouterr().err == (
        f"error: Permission denied: {tmp_path / 'run'}. Choose a path that you have access to; then the same command "
        "with --resume continues\n"
    )


# The library's commands


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_commands_of_the_library_have_the_same_codes(number: signal.Signals, code: int) -> None:
    script = """
        from perceiver_core import __main__ as commands
        commands.main = wait
        sys.exit(commands._exit_code())
    """
    line = "interrupted: nothing was written; run the same command again\n"
    assert signaled(script, number) == (code, line)
