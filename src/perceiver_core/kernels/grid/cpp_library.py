"""Shared library that is compiled from the C++ source in `cpp/` at the first use on a machine.

The compiler is `$CXX`, c++, g++ or clang++, whichever is found first. Compilation takes a few seconds. The library is
stored in the user's cache folder, so that other processes load it in milliseconds. The file name contains a hash of
source, compiler, flags and processor features, so that machines with different processors can share the folder.
torch.utils.cpp_extension is not used, because it needs ninja and takes half a minute to compile PyTorch's headers. The
source does not include these headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from perceiver_core.kernels.grid.interface import GridFallbackWarning

SOURCE = Path(__file__).parent / "cpp" / "reads.cpp"
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),  # without these two flags, loops are not vectorized
)
# The first variant that compiles and loads is used. The target flag (-mcpu in some compilers for ARM) optimizes for the
# current processor. With OpenMP, the library uses PyTorch's threads. Otherwise, it starts its own threads.
TARGETS = ("-march=native", "-mcpu=native", "")
VARIANTS = [f"{target} {threads}".split() for threads in ("-fopenmp", "") for target in TARGETS]
NUM_POINTERS = {"forward": 10, "backward": 15}  # pointer arguments of functions in `cpp/reads.cpp`


@cache
def functions() -> dict[tuple[str, torch.dtype], Callable[..., None]]:
    """Return a dictionary of the library's functions, keyed by name and dtype, such as ("forward", torch.float32).

    The first call compiles or loads the library. If this fails, it emits a warning, and the dictionary is empty.
    """
    try:
        library = _load()
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"structured reads need a C++17 compiler (GCC or Clang): {error}\nReads use other strategies or plain "
            "PyTorch: slower, with equal results. Install one (Debian: apt install g++; macOS: xcode-select "
            "--install), or name it in the variable CXX, and start again",
            GridFallbackWarning,
            stacklevel=2,
        )
        return {}
    found: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
    for name, num_pointers in NUM_POINTERS.items():
        for dtype in (torch.float32, torch.float64):
            function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
            function.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_void_p] * num_pointers + [ctypes.c_int64] * 2
            function.restype = None
            found[name, dtype] = function
    return found


def _load() -> ctypes.CDLL:
    compiler, folder = _compiler(), _cache_folder()
    path = None if folder is None else folder / f"read_grid-{_fingerprint(compiler)}.so"
    if path is not None and path.exists():
        with suppress(OSError):  # a damaged file, a file of another system, or a noexec file system
            return ctypes.CDLL(str(path))
    return _compile(compiler, path)


def _compile(compiler: str, path: Path | None) -> ctypes.CDLL:
    """Compile and load the library, and store it at `path`. If `path` is None, the library is not stored.

    The file is moved to `path` atomically, because several processes may compile the library at the same time.
    """
    for flags in VARIANTS:
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=None if path is None else path.parent) as scratch:
            output = Path(scratch) / "read_grid.so"
            command = [compiler, *FLAGS, *flags, str(SOURCE), "-o", str(output)]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
            problem = run.stderr
            if run.returncode == 0:
                try:
                    library = ctypes.CDLL(str(output))
                except OSError as error:
                    problem = str(error)
                    continue
                if path is not None:
                    output.chmod(0o700)
                    output.replace(path)
                return library
    raise OSError(f"{compiler} could not compile {SOURCE.name}:\n{problem[-2000:]}")


def _fingerprint(compiler: str) -> str:
    """Return a hash of everything that the library depends on: source, compiler, flags and processor features."""
    for target in TARGETS:
        command = [compiler, *target.split(), "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        if macros.returncode == 0:
            break
    files = (path.read_text() for path in sorted(SOURCE.parent.glob("[!.]*.[hc]*")) if path.is_file())
    parts = [*files, compiler, *FLAGS, *(" ".join(flags) for flags in VARIANTS), macros.stdout]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("no C++ compiler found (tried $CXX, c++, g++, clang++)")


def _cache_folder() -> Path | None:
    """Return the cache folder, or None if it cannot be used.

    Libraries in the folder are executed, so the folder is used only if no other user can write to it.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perceiver-core"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # `Path.home` raises RuntimeError if the user has no home folder
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None
