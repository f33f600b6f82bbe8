"""Classification of images with a folder written by `perceiver_core.checkpoints.save_program`.

It needs NumPy, Pillow and onnxruntime, but neither perceiver-core nor PyTorch.

python examples/deploy/run_program.py FOLDER IMAGE ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def read_folder(folder: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Read the program and the preprocessing.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The program and deployment.json are not of one export, or deployment.json is damaged.
    """
    path = folder / "deployment.json"
    try:
        deployment = json.loads(_read(path))
        ((name, digest),) = deployment["sha256"].items()
        preprocessing = deployment["preprocessing"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as save_program wrote it ({error!r:.200}); copy it again") from error
    program = _read(folder / Path(name).name)
    if hashlib.sha256(program).hexdigest() != digest:
        raise ValueError(
            f"{folder / name} is not the program that deployment.json describes; copy both from one export"
        )
    return onnxruntime.InferenceSession(program), preprocessing


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder that save_program wrote")
    return path.read_bytes()


def read_image(path: Path, preprocessing: dict[str, Any]) -> np.ndarray:
    """Read an image, and resize and normalize it as in training. Return an array `1 c h w`."""
    height, width = preprocessing["size"]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert(preprocessing["mode"]).resize((width, height)), np.float32) / 255
    normalized = (np.atleast_3d(pixels) - preprocessing["mean"]) / preprocessing["std"]
    return normalized.transpose(2, 0, 1)[None].astype(np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the class of each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with model.onnx and deployment.json")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    options = parser.parse_args(argv)
    session, preprocessing = read_folder(options.folder)
    for path in options.images:
        (logits,) = session.run(None, {session.get_inputs()[0].name: read_image(path, preprocessing)})
        print(path.name, preprocessing["classes"][int(logits[0].argmax())])
    return 0


if __name__ == "__main__":
    sys.exit(main())
