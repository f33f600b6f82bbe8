"""The C++ in `cpp`, compiled for the machine it runs on, once.

Compiled by the compiler that torch.compile would take (`$CXX`, else c++, g++ or clang++), in a few seconds, and kept
in the user's cache folder under a name made of the source, the compiler and the processor's features: another process
loads it in milliseconds, another machine that shares the folder makes its own. Not by torch.utils.cpp_extension, which
needs ninja and half a minute for PyTorch's headers; the source uses none of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "cpp" / "reads.cpp"
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),  # nobody asks for these, and without them there are vectors
)
BLOCK = 16  # queries that a task of the forward pass holds, as in `grid.h`
TASKS = 32  # for the threads to share; where there are fewer, the grid is cut up. Not by threads, so results repeat
LEAST = 4  # tokens of a part for each number that a query has for it, or there would be more to set up than to do
PARTS_BYTES = 2**26  # memory that what the parts give may take
# The first that works is taken: for this processor (the second is what some compilers for ARM call it), with PyTorch's
# own threads or, where the compiler has no OpenMP, with others.
TARGETS = ("-march=native", "-mcpu=native", "")
VARIANTS = [f"{target} {threads}".split() for threads in ("-fopenmp", "") for target in TARGETS]


def forward(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read, marginals, base and total: see `op`. Tensors are contiguous and on the CPU."""
    batch, queries = content.shape[0], a.shape[2]
    flat = content.ndim == 3  # what a query has for the places of a single axis is as large as the grid: not cut up
    tasks = batch * a.shape[1] * -(-queries // BLOCK)
    parts = 1 if flat else _parts(tasks, batch, [a, u], content)
    shape = (batch, parts, *a.shape[1:3])
    read, marginals, base, total = (content.new_empty(*shape, *last) for last in (a.shape[-1:], u.shape[-1:], (), ()))
    _call("forward", a, content, [u, content, scale, mask, read, marginals, base, total], parts)
    if parts == 1:
        return read[:, 0], marginals[:, 0], base[:, 0], total[:, 0]
    base = base.masked_fill(total == 0, -torch.inf)
    highest = base.amax(1).clamp_min(torch.finfo(base.dtype).min)  # also where all parts are empty
    totals = total * (base - highest[:, None]).exp2()
    whole = totals.sum(1)
    share = (totals / whole[:, None]).nan_to_num()[..., None]  # of nothing, nothing
    return (read * share).sum(1), (marginals * share).sum(1), highest.where(whole > 0, 0.0), whole


def backward(  # noqa: PLR0913 (what the forward was given, what it kept and what came back)
    a: Tensor,
    u: Tensor,
    content: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    base: Tensor,
    total: Tensor,
    d_read: Tensor,
    d_marginals: Tensor,
    offset: Tensor,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, u, content and scale."""
    batch = content.shape[0]
    flat = content.ndim == 3  # parts of a single axis have places of their own
    parts = _parts(batch, batch, [a] if flat else [a, u], content)
    d_a = a.new_empty(batch, parts, *a.shape[1:])
    d_u = u.new_empty(batch, 1 if flat else parts, *u.shape[1:])
    d_content, d_scale = (torch.empty_like(x) if tokens else x.new_empty(0) for x in (content, scale))
    gradients = [d_a, d_u, *((d_content, d_scale) if tokens else (None, None))]
    _call(
        "backward", a, content, [u, content, scale, mask, base, total, d_read, d_marginals, offset, *gradients], parts
    )
    over = (0, 1) if a.shape[0] == 1 else (1,)
    d_a, d_u = (x.sum(over).reshape(like.shape) for x, like in ((d_a, a), (d_u, u)))
    return d_a, d_u, d_content, d_scale


def _parts(tasks: int, batch: int, kept: list[Tensor], content: Tensor) -> int:
    """Into how many parts the grid is cut, so that there is work for many threads; of each part, `kept` is kept."""
    numbers = sum(x.shape[-1] for x in kept)
    bytes_a_part = batch * prod(kept[0].shape[1:3]) * numbers * content.element_size()
    most = min(PARTS_BYTES // max(bytes_a_part, 1), prod(content.shape[2:]) // (LEAST * numbers))
    return max(1, min(-(-TASKS // tasks), most))


def _call(name: str, a: Tensor, content: Tensor, tensors: list[Tensor | None], *numbers: int) -> None:
    grid = content.shape[2:]
    sizes = (content.shape[0], *a.shape, len(grid))
    function = getattr(library(), f"{name}_{str(a.dtype).removeprefix('torch.')}")
    function(
        *(ctypes.c_int64(size) for size in sizes),
        (ctypes.c_int64 * len(grid))(*grid),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (a, *tensors)),
        *(ctypes.c_int64(number) for number in (*numbers, torch.get_num_threads())),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no compiler comes while a graph is made
def available() -> bool:
    """Whether there are compiled kernels. The first call makes them."""
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, kept for the life of the process; None, after one warning, without a compiler."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"structured reads need a C++17 compiler (GCC or Clang): {error}\nReads take the "
            "ordinary path: slower, with equal results. Install one (Debian: apt install g++; macOS: xcode-select "
            "--install), or name it in the variable CXX, and start again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _load() -> ctypes.CDLL:
    compiler, folder = _compiler(), _folder()
    path = None if folder is None else folder / f"structured-{_name(compiler)}.so"
    if path is not None and path.exists():
        with suppress(OSError):  # a damaged file, another system's, or a folder from which nothing may be run
            return ctypes.CDLL(str(path))
    return _compiled(compiler, path)


def _compiled(compiler: str, path: Path | None) -> ctypes.CDLL:
    """The library, compiled and kept at `path`, where it appears all at once, so that processes may race.

    Without a path, which is for where no folder is the user's own, it is compiled anew in every process.
    """
    for flags in VARIANTS:
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=None if path is None else path.parent) as scratch:
            made = Path(scratch) / "structured.so"
            command = [compiler, *FLAGS, *flags, str(SOURCE), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
            problem = run.stderr
            if run.returncode == 0:
                try:
                    library = ctypes.CDLL(str(made))
                except OSError as error:
                    problem = str(error)
                    continue
                if path is not None:
                    made.chmod(0o700)
                    made.replace(path)
                return library
    raise OSError(f"{compiler} could not compile {SOURCE.name}:\n{problem[-2000:]}")


def _name(compiler: str) -> str:
    """A name for what this compiler makes of this source on this processor."""
    for target in TARGETS:
        asked = [compiler, *target.split(), "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=60)
        if macros.returncode == 0:
            break
    files = (path.read_text() for path in sorted(SOURCE.parent.glob("[!.]*.[hc]*")) if path.is_file())
    parts = [*files, compiler, *FLAGS, *(" ".join(flags) for flags in VARIANTS), macros.stdout]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise FileNotFoundError("no C++ compiler found (tried $CXX, c++, g++, clang++)")


def _folder() -> Path | None:
    """A folder that only this user writes to, as what lies there is run; None where there is none."""
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perceiver-core"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # the latter from `home`, for a user who has none
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None
