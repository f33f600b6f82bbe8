"""Classification of images with a folder written by `perceiver_core.checkpoints.save_program`.

It needs NumPy, Pillow and onnxruntime, but neither perceiver-core nor PyTorch.

python examples/deploy/run_program.py FOLDER IMAGE ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_folder(folder: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Read the program and the preprocessing.

    While `save_program` replaces a folder, the name of the new program contains its digest, until it is renamed.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The files are damaged, not of one export, or not of a program that classifies images.
    """
    text: bytes | None = None
    while text != (text := _read(folder / "deployment.json")):  # read again if it was replaced in the meantime
        name, digest, preprocessing = _parse(folder / "deployment.json", text)
        for path in (folder / f"{name}.{digest[:16]}", folder / name):
            program = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(program).hexdigest() == digest:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4  # errors are raised, and not printed as well
                with _explained(f"{path} is no program of onnxruntime; export the model with torch.onnx.export"):
                    return onnxruntime.InferenceSession(program, options), preprocessing
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / 'deployment.json'} describes {name}, which does not exist; copy it, too")
    raise ValueError(f"{folder / name} is not the program that deployment.json describes; copy both from one export")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass the folder that save_program wrote")
    return path.read_bytes()


def _parse(path: Path, text: bytes) -> tuple[str, str, dict[str, Any]]:
    """Return the name and the digest of the program, and the preprocessing."""
    try:
        deployment = json.loads(text)
        ((name, digest),) = deployment["sha256"].items()
        if not name.isprintable() or len(name) > 200:
            raise ValueError("the name of the program is not one that save_program writes")
        preprocessing = dict(deployment["preprocessing"])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as save_program wrote it ({error!r:.200}); copy it again") from error
    mode, size, mean, std, classes = map(preprocessing.get, ("mode", "size", "mean", "std", "classes"))
    means, stds = (x if isinstance(x, list) and len(x) in (1, len(f"{mode}")) else [x] for x in (mean, std))
    if not (
        mode in ("L", "RGB")
        and (isinstance(size, list) and len(size) == 2 and all(type(x) is int and 0 < x <= 10_000 for x in size))
        and all(type(x) in (int, float) and abs(x) < 1e6 for x in means + stds)
        and min(stds) > 1e-6
        and (isinstance(classes, list) and classes and all(isinstance(x, str) for x in classes))
    ):
        raise ValueError(
            f"{path}: preprocessing must have mode (L or RGB), size [height, width], mean and std (a number, or one "
            f"for each channel) and classes (names); got {f'{mode=}, {size=}, {mean=}, {std=}, {classes=}':.300}"
        )
    return Path(name).name, f"{digest}", preprocessing


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the classes of the libraries' errors have no common base
        raise ValueError(f"{problem}: {error!s:.300}") from error


def read_image(path: Path, preprocessing: dict[str, Any]) -> np.ndarray:
    """Read an image, and resize and normalize it as in training. Return an array `1 c h w`.

    The image is read as a viewer shows it: rotated according to its Exif data, with transparent pixels on a black
    background, 16-bit samples reduced to their upper 8 bits, and only the first frame of an animation.

    Raises:
        ValueError: The file is not an image, is damaged, or has more pixels than Pillow's limit.
    """
    height, width = preprocessing["size"]
    with _explained(f"image {str(path)!r} cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not path.is_file():  # a pipe would block
            raise OSError("it does not exist or is not a regular file")
        with Image.open(path) as image:
            resized = _as_shown(image).convert(preprocessing["mode"]).resize((width, height))
    normalized = (np.atleast_3d(np.asarray(resized, np.float32) / 255) - preprocessing["mean"]) / preprocessing["std"]
    return normalized.transpose(2, 0, 1)[None].astype(np.float32)


def _as_shown(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # gray levels that `convert` clips at 255
        low, high = image.getextrema()
        if image.mode == "F" or low < 0 or high >= 2**16:
            raise ValueError("its gray levels are not from 0 to 65,535; save it with 8 or 16 bits")
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image


def _classify(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with model.onnx and deployment.json")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    options, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse would print them unescaped
        raise ValueError(f"unknown arguments {' '.join(unknown)}; pass a folder and image files")
    session, preprocessing = read_folder(options.folder)
    classes, name = preprocessing["classes"], session.get_inputs()[0].name
    for path in options.images:
        image = read_image(path, preprocessing)
        with _explained(f"the program cannot be run on image {str(path)!r}; check the size and mode of preprocessing"):
            logits = np.asarray(session.run(None, {name: image}), np.float32)
        if logits.shape != (1, 1, len(classes)):
            raise ValueError(f"preprocessing has {len(classes)} classes, but the program computes {logits.shape[1:]}")
        print(_escaped(path.name), _escaped(classes[int(logits.argmax())]), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the class of each image. Return 0, or 2 if refused, 130 if interrupted, 141 if stdout was closed."""
    try:
        try:
            _classify(argv)
        finally:
            _flush()
    except BrokenPipeError:  # as in `... | head -1`
        return 141
    except (OSError, ValueError) as error:
        print(f"error: {_escaped(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    return 0


def _escaped(text: str) -> str:
    return ascii(text)[1:-1]  # without control characters, which could change the output


def _flush() -> None:
    try:
        if sys.stdout is not None:  # closed before the start, as by `>&-`
            sys.stdout.flush()
    except OSError:  # Python would try again at exit, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main())
