"""Functions that find, identify and run the machine's C++ compiler, with limits on its time and output."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from threading import Thread
from typing import IO

MAX_OUTPUT = 2**20  # bytes of the compiler's output that are kept


def find_compiler() -> list[str]:
    """Return the command of the compiler: `$CXX`, which may have arguments ("ccache g++"), c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        for words in _possible_commands(name or ""):
            if words and (path := shutil.which(words[0])):
                return [path, *words[1:]]
    raise FileNotFoundError("no C++ compiler found (tried $CXX, c++, g++, clang++)")


def _possible_commands(name: str) -> Iterable[list[str]]:
    yield [name] if name else []  # a path may contain spaces
    with suppress(ValueError):  # unbalanced quotes
        yield shlex.split(name, posix=os.name == "posix")


def fingerprint(compiler: Sequence[str], targets: Iterable[str], parts: Iterable[str]) -> str:
    """Return a hash of `parts`, the compiler and its version, and the features of the processor.

    Args:
        compiler: Command of the compiler.
        targets: Flags that select the current processor. The first one that the compiler accepts is used.
        parts: Further texts that the library depends on.
    """
    macros = ""
    for target in targets:
        with suppress(ChildProcessError):
            macros = run(
                [*compiler, *target.split(), "-dM", "-E", "-x", "c++", os.devnull], 60, stderr=subprocess.DEVNULL
            )
            break
    return hashlib.sha256("\0".join([*parts, *compiler, macros]).encode()).hexdigest()[:32]


def run(command: Sequence[str], timeout: float, stderr: int = subprocess.STDOUT, folder: str | None = None) -> str:
    """Run a compiler, and return its output up to `MAX_OUTPUT` bytes.

    Args:
        command: Program and arguments.
        timeout: Seconds after which the program and all processes that it started are killed.
        stderr: Destination of its error messages, as in `subprocess`. By default, they are part of the result.
        folder: Folder for its temporary files.

    Raises:
        ChildProcessError: If the program fails. The message contains what it printed.
        TimeoutError: If it takes longer than `timeout`.
        OSError: If it cannot be started.
    """
    environment = os.environ if folder is None else {**os.environ, "TMPDIR": folder}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,  # so that its children can be killed
    )
    assert process.stdout is not None
    printed = bytearray()
    reader = Thread(target=_read, args=(process.stdout, printed), daemon=True)
    try:
        reader.start()
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} did not finish in {timeout:.0f} seconds") from None
    finally:
        if process.poll() is None:
            _kill(process)
    reader.join(1.0)  # a server that the compiler has started may keep the pipe open
    text = bytes(printed).decode(errors="replace")
    if code:
        raise ChildProcessError(_printable(text[-2000:]).strip() or f"it ended with exit code {code} and no message")
    return text


def _read(pipe: IO[bytes], printed: bytearray) -> None:
    """Read until the end, and keep the first `MAX_OUTPUT` bytes."""
    with pipe:
        while chunk := os.read(pipe.fileno(), 2**16):
            printed += chunk[: MAX_OUTPUT - len(printed)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
