"""Deployment folders: an exported program, and everything that a process without this library needs to run it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from perceiver_core import registry
from perceiver_core.atomic_files import make_folder
from perceiver_core.checkpoints.bound_files import write_pair
from perceiver_core.checkpoints.save_load import path_of, unwrapped

PROGRAM, DEPLOYMENT = "model", "deployment.json"


def save_program(
    program: Any, folder: str | os.PathLike[str], *, model: nn.Module, preprocessing: Mapping[str, Any]
) -> Path:
    """Save an exported program, the configuration of its model and the preprocessing of its inputs to a folder.

    `deployment.json` contains the configuration, the preprocessing and the SHA-256 digest of the program. The digest
    shows whether both files belong to the same export. The guide "Export and deploy" contains code that checks it and
    runs an ONNX program without this library or PyTorch. Both files are written under temporary names before any file
    is replaced.

    Args:
        program: Result of `torch.onnx.export` (saved as `model.onnx`) or `torch.export.export` (saved as `model.pt2`),
            or the path of a program, such as the result of `torch._inductor.aoti_compile_and_package`. A file is copied
            to `model`, with the same suffix.
        folder: Folder to write, created if it does not exist.
        model: Model that was exported. Its configuration is saved; see `registry.to_config`.
        preprocessing: Description of how to compute the program's inputs, such as image size, channel order, mean and
            standard deviation, or sample rate. Keys are arbitrary, and values must be serializable to JSON.

    Returns:
        Path of the folder.

    Raises:
        TypeError: If the type of `program` is not supported, or a key of `preprocessing` is not a string.
        ValueError: If `preprocessing` is not serializable to JSON, or a class in the model is not registered.

    Example:
        >>> import tempfile
        >>> audio = pc.adapters.Audio(patch_size=4, positions=None)
        >>> model = pc.Perceiver(audio, pc.Encoder(audio.dim, num_latents=3, dim=8), pc.heads.Identity()).eval()
        >>> program = torch.export.export(model, (torch.zeros(2, 99),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pc.checkpoints.save_program(program, folder, model=model, preprocessing={"sample_rate": 16_000})
        ...     sorted(file.name for file in path.iterdir())
        ['deployment.json', 'model.pt2']
    """
    folder, (suffix, write) = path_of("folder", folder), _writer(program)
    content = {"library": "perceiver_core", "model": registry.to_config(unwrapped(model))}
    if not isinstance(preprocessing, Mapping):
        raise TypeError(f"preprocessing must be a dictionary; got {preprocessing!r:.80}")
    try:
        json.dumps(preprocessing, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing must be JSON-serializable: {error}; got {preprocessing!r:.80}") from error
    _check_keys(preprocessing)
    name = PROGRAM + suffix

    def describe(digest: str) -> str:
        entries = {**content, "sha256": {name: digest}, "preprocessing": preprocessing}
        return json.dumps(entries, indent=2, allow_nan=False) + "\n"

    make_folder(folder)
    write_pair(folder / name, write, folder / DEPLOYMENT, describe)
    return folder


def _check_keys(value: object) -> None:
    """Check that all keys are strings. JSON would turn other keys into strings, and lose one of 1 and "1"."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"preprocessing must have strings as keys; got {wrong[0]!r:.80}")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_keys(item)


def _writer(program: Any) -> tuple[str, Callable[[Path], object]]:
    """Return the suffix of a program's file, and a function that writes the file."""
    if isinstance(program, torch.export.ExportedProgram):
        return ".pt2", partial(_write_exported, program)
    if isinstance(program, str | os.PathLike):
        return Path(program).suffix, partial(shutil.copyfile, program)
    if hasattr(program, "model_proto"):  # torch.onnx.ONNXProgram, which cannot be imported without onnx
        return ".onnx", program.save
    raise TypeError(
        f"program must be the result of torch.onnx.export or torch.export.export, or a path; got {program!r:.80}"
    )


def _write_exported(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:  # torch.export.save warns about paths that do not end in .pt2
        deferred = _DeferredErrors(file)
        torch.export.save(program, deferred)  # type: ignore[arg-type]  # stubs of io and typing differ
        deferred.check()


class _DeferredErrors(io.RawIOBase):
    """File whose `write` never fails: the first error is raised by `check`, and everything after it is discarded.

    If a write fails, such as on a full disk, PyTorch's archive writer tries to complete the file when it is destroyed,
    and ends the process when that fails, too.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write data unless an earlier write has failed. Returns the number of bytes of the data."""
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True, since PyTorch warns about files that are not seekable."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Do nothing. PyTorch seeks only when the file is complete."""
        return offset

    def check(self) -> None:
        """Raise the error of the first write that failed, if there is one."""
        if self._error is not None:
            raise self._error
