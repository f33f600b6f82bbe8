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
        ValueError: The program and deployment.json are not of one export.
    """
    deployment = json.loads((folder / "deployment.json").read_text())
    ((name, digest),) = deployment["sha256"].items()
    program = (folder / name).read_bytes()
    if hashlib.sha256(program).hexdigest() != digest:
        raise ValueError(
            f"{folder / name} is not the program that deployment.json describes; copy both from one export"
        )
    return onnxruntime.InferenceSession(program), deployment["preprocessing"]


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
