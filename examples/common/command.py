"""Exit codes, messages and signals of the commands in `examples` and `benchmarks`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | done in part (for example, files were skipped), or an error of the program itself, with its traceback |
| 2 | refused: invalid arguments or input, or files that cannot be read or written |
| 130, 143 | interrupted by Ctrl-C, or by SIGTERM |
| 141 | stdout was closed by its reader, as in `command | head -1` |

A refusal is one line on stderr that begins with `error: `, and an interruption one that begins with `interrupted: ` and
states how to continue. This module imports only the standard library, so that a command can handle signals before it
imports anything that takes time:

    if __name__ == "__main__":
        from examples.common import command

        command.exit_on_signals()

    import torch
    ...
    if __name__ == "__main__":
        sys.exit(command.run_command(main))
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from examples.common.terminal import printable

REFUSED = 2
RUN_AGAIN = "run the same command again"

_HANDLED = (signal.SIGINT, signal.SIGTERM)
_PIPE = 13  # number of SIGPIPE, which Windows does not have
_GRACE = 20.0  # seconds for cleaning up after a signal
_REMEDIES = {
    errno.ENOSPC: "Free space on the disk",
    errno.EDQUOT: "Free space in your quota",
    errno.EFBIG: "Raise the limit of the file size (ulimit -f)",
    errno.EROFS: "Choose a path on a file system that is writable",
    errno.EACCES: "Choose a path that you have access to",
    errno.EPERM: "Choose a path that you have access to",
    errno.EEXIST: "A file is there already, where a folder is expected. Choose another path, or move the file",
    errno.ENOTDIR: "A part of the path is a file, where a folder is expected. Choose another path",
    errno.EISDIR: "This is a folder, where a file is expected. Choose another path",
    errno.ENOENT: "Check the path",
}
# Errors after which the same command can continue, once the user has removed their cause.
_MENDED_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors contain no control characters, such as those of an unknown argument."""

    def error(self, message: str) -> NoReturn:
        """Print an error and exit with code 2."""
        super().error(printable(message))


class _Signals:
    """Signal handlers of a running command.

    The first signal raises KeyboardInterrupt, so that the command closes its files and ends its processes. If a second
    signal arrives, or the process still runs after 20 seconds, it exits at once. No file is damaged, since all files
    are written atomically.

    Args:
        go_on: Text that states how to continue after an interruption.
    """

    def __init__(self, go_on: str) -> None:
        self.go_on, self.received = go_on, 0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, object] = {}
        self._deadline: threading.Timer | None = None

    def install(self) -> None:
        """Install handlers of all signals that are not ignored. Has no effect outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous = signal.signal(number, self._handle)
                    self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Restore the previous handlers."""
        if self._deadline is not None:
            self._deadline.cancel()
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process, which inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received:
            self._exit()
        self.received = number
        self._deadline = threading.Timer(_GRACE, self._exit)
        self._deadline.daemon = True
        self._deadline.start()
        raise KeyboardInterrupt

    def _exit(self) -> None:
        _exit(self.received, self.go_on)


_running: _Signals | None = None


def exit_on_signals() -> None:
    """Install handlers that print one line and end the process. They are used while a command imports its modules."""
    for number in _HANDLED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: _exit(received, RUN_AGAIN))


def handle_signals() -> None:
    """Reinstall the handlers of the running command after a library has replaced them."""
    if _running is not None:
        _running.install()


def run_command(command: Callable[[], object], go_on: str = RUN_AGAIN) -> int:
    """Run a command and return its exit code.

    Within another command, only the outer one handles signals and errors.

    Args:
        command: Function that does the work. An integer that it returns is the exit code.
        go_on: Text that states how to continue after an interruption: "the same command with --resume continues".

    Raises:
        SystemExit: Raised by the command, such as by argparse after `--help` or for an unknown option.
    """
    global _running
    if _running is not None:
        return _code(command())
    signals = _running = _Signals(go_on)
    try:
        signals.install()
        return _flushed(_guarded(command, signals))
    except KeyboardInterrupt:  # a signal while a message was printed
        return _interrupted(signals.received or signal.SIGINT, go_on)
    finally:
        signals.restore()
        _running = None


def describe(error: BaseException) -> str:
    """Return a description of an error in one line. For errors of the system, it includes a remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename is not None:
            text = ". ".join(filter(None, (f"{text}: {error.filename}", _REMEDIES.get(error.errno or 0))))
    return printable(" ".join(text.split())) or type(error).__name__


def say(text: str) -> None:
    """Print a line on stderr, which may be closed."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _guarded(command: Callable[[], object], signals: _Signals) -> int:
    """Run a command, print errors and interruptions on stderr, and return the exit code."""
    try:
        code = _code(command())
    except KeyboardInterrupt:
        return _interrupted(signals.received or signal.SIGINT, signals.go_on)
    except SystemExit as end:
        # Lightning ends with code 1 after KeyboardInterrupt.
        if signals.received or isinstance(end.__context__, KeyboardInterrupt):
            return _interrupted(signals.received or signal.SIGINT, signals.go_on)
        if code := _flushed(0):
            return code
        raise
    except Exception as error:
        if signals.received:  # an error that the signal has caused, for example in another process
            return _interrupted(signals.received, signals.go_on)
        if isinstance(error, BrokenPipeError):
            _flushed(0)
            say(f"interrupted: the output was closed; {signals.go_on}")
            return 128 + _PIPE
        if not isinstance(error, (OSError, ValueError)):
            raise
        continued = isinstance(error, OSError) and error.errno in _MENDED_OUTSIDE
        say(f"error: {describe(error)}{f'; then {signals.go_on}' if continued else ''}")
        return REFUSED
    return _interrupted(signals.received, signals.go_on) if signals.received else code


def _code(result: object) -> int:
    return result if isinstance(result, int) else 0


def _interrupted(number: int, go_on: str) -> int:
    say(f"interrupted: {go_on}")
    return 128 + number


def _exit(number: int, go_on: str) -> None:
    with suppress(OSError):
        os.write(2, f"interrupted: {go_on}\n".encode())
    os._exit(128 + number)


def _flushed(code: int) -> int:
    """Flush stdout and return the exit code. If stdout is closed or full, Python would print a traceback at exit."""
    if sys.stdout is None:  # closed before the command started, as by `>&-`
        return code
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + _PIPE
        say(f"error: the output cannot be written: {describe(error)}")
        return REFUSED
    return code
