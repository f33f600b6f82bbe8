"""Shared library that is compiled from the C++ source in `cpp/` at the first use on a machine.

The compiler is `$CXX`, c++, g++ or clang++, whichever is found first. Compilation takes a few seconds. The library is
stored in the user's cache folder, so that other processes load it in milliseconds; see `cpp_cache`.
torch.utils.cpp_extension is not used, because it needs ninja and takes half a minute to compile PyTorch's headers. The
source does not include these headers.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from perceiver_core.kernels.grid import cpp_cache, cpp_compiler
from perceiver_core.kernels.grid.interface import GridFallbackWarning

SOURCE = Path(__file__).parent / "cpp" / "reads.cpp"
VERSION = 1  # version of the functions' arguments and results; equals `read_grid_version` in `cpp/reads.cpp`
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),  # without these two flags, loops are not vectorized
)
# The first variant that compiles and loads is used. The target flag (-mcpu in some compilers for ARM) optimizes for the
# current processor. With OpenMP, the library uses PyTorch's threads. Otherwise, it starts its own threads.
TARGETS = ("-march=native", "-mcpu=native", "")
VARIANTS = [f"{target} {threads}".split() for threads in ("-fopenmp", "") for target in TARGETS]
NUM_POINTERS = {"forward": 10, "backward": 15}  # pointer arguments of functions in `cpp/reads.cpp`

Functions = dict[tuple[str, torch.dtype], Callable[..., int]]


@cache
def functions() -> Functions:
    """Return a dictionary of the library's functions, keyed by name and dtype, such as ("forward", torch.float32).

    The first call compiles or loads the library. If this fails, it emits a warning, and the dictionary is empty.
    """
    try:
        return _load()
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread could be started
        warnings.warn(
            f"structured reads need a C++17 compiler (GCC or Clang): {error}\nReads use other strategies or plain "
            "PyTorch: slower, with equal results. Install one (Debian: apt install g++; macOS: xcode-select "
            "--install), or name it in the variable CXX, and start again",
            GridFallbackWarning,
            stacklevel=2,
        )
        return {}


def _load() -> Functions:
    """Load the library from the cache folder, or compile it and store it there."""
    compiler, folder = cpp_compiler.find_compiler(), cpp_cache.cache_folder()
    name = _name(compiler)
    for path in cpp_cache.stored(folder, name):
        with suppress(OSError):  # a damaged file, or a file of another system
            return _functions(_library(cpp_cache.read(path), path))
    content, functions = _compile(compiler, folder)
    if folder is not None:
        cpp_cache.store(folder, name, content)
    return functions


def _name(compiler: list[str]) -> str:
    """Return a name for everything that the library depends on: source, compiler, flags and processor features."""
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("[!.]*.[hc]*")) if path.is_file()]
    parts = [*sources, *FLAGS, *(" ".join(flags) for flags in VARIANTS)]
    return f"read_grid-{VERSION}-{cpp_compiler.fingerprint(compiler, TARGETS, parts)}"


def _compile(compiler: list[str], folder: Path | None) -> tuple[bytes, Functions]:
    """Compile and load the library. Return the content of its file and its functions."""
    with _scratch_folder(folder) as scratch:
        for i, flags in enumerate(VARIANTS):
            output = Path(scratch) / f"read_grid-{i}.so"
            try:
                cpp_compiler.run([*compiler, *FLAGS, *flags, str(SOURCE), "-o", str(output)], 120, folder=scratch)
                output.chmod(0o600)
                content = cpp_cache.read_private_file(output)
                return content, _functions(_library(content, output))
            except TimeoutError:
                raise
            except OSError as error:
                problem = error
    raise OSError(f"{' '.join(compiler)} could not compile {SOURCE.name}:\n{problem}")


def _scratch_folder(alternative: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Return a new temporary folder: in the system's temporary folder, or in `alternative` if that is full."""
    for parent in (None, alternative):
        with suppress(OSError):
            scratch = tempfile.TemporaryDirectory(prefix="tmp-", dir=parent)
            try:
                (Path(scratch.name) / "probe").write_bytes(bytes(2**22))
            except OSError:
                scratch.cleanup()
                continue
            (Path(scratch.name) / "probe").unlink()
            return scratch
    raise OSError("no folder for temporary files is writable and has 4 MB of free space")


def _library(content: bytes, path: Path) -> ctypes.CDLL:
    """Load a library from a file in memory, or from the file at `path` if the system has no files in memory.

    If a library is loaded from a file on disk, the process is killed when the file is truncated, and loading fails in
    folders that are mounted with `noexec`. The descriptor of the file in memory stays open: its number is part of the
    path, and a process loads no second library from the same path.
    """
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            handle = os.memfd_create("read_grid")
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(content)
            return ctypes.CDLL(f"/proc/self/fd/{handle}")
    return ctypes.CDLL(str(path))


def _functions(library: ctypes.CDLL) -> Functions:
    """Return the functions of a library. Raise OSError if one is missing, or if the library has another version."""
    functions: Functions = {}
    try:
        version_of = library.read_grid_version
        version_of.restype = ctypes.c_int64
        if (version := version_of()) != VERSION:
            raise OSError(f"the library has version {version} instead of {VERSION}")
        for name, num_pointers in NUM_POINTERS.items():
            for dtype in (torch.float32, torch.float64):
                function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
                function.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_void_p] * num_pointers + [ctypes.c_int64]
                function.restype = ctypes.c_int64
                functions[name, dtype] = function
    except AttributeError as error:
        raise OSError(f"the library is incomplete: {error}") from error
    return functions
