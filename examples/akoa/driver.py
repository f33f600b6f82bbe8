"""Left or right? Ask a trained model about files and folders.

    python -m examples.akoa.driver knee.png                       # with the weights that ship
    python -m examples.akoa.driver data/AKOA_Analysis --weights runs/akoa/weights \
        --threshold 0.9 --out results.csv --maps maps

A verdict whose probability is below the threshold is `abstain`. Where file names are those of AKOA,
slices are gathered into volumes, each with a verdict from its mean logit. A name's side is printed
beside it but never used. Exit code 1: a file could not be read; 2: nothing could be done.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import nn
from tqdm import tqdm

from examples.akoa import plots
from examples.akoa.data import read_picture
from examples.akoa.inference import attention, predict
from examples.akoa.labels import is_junk, list_files, parse_name, write_table
from examples.akoa.predictions import probability
from examples.akoa.runs import trained_size
from perceiver_core import load

WEIGHTS = Path(__file__).parent / "weights"
HEADER = ("file", "verdict", "probability_right", "map")
_BATCH = 256
# What Pillow raises on broken files, beyond the ValueError that `read_picture` makes of the usual.
_BROKEN = (ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

Picture = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class Verdict:
    """What the model says about a file, and where its attention map is, if one was drawn."""

    file: Path
    logit: float
    picture_map: Path | None = None

    def line(self, threshold: float) -> tuple[str, ...]:
        """The columns of `HEADER`."""
        side, p = judge(self.logit, threshold)
        return str(self.file), side, f"{p:.6f}", str(self.picture_map or "")


@dataclass(frozen=True)
class Unreadable:
    """A file that was skipped, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class VolumeVerdict:
    """The verdict on one volume: what its files are named, how many they are, their mean logit."""

    patient: str
    visit: int
    named: str
    slices: int
    logit: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0: done, 1: files were skipped, 2: an error, 130: interrupted."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written but maps", file=sys.stderr)
        return 130


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files given, and all PNG files below the folders given; each file once.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: no PNG files are found.
    """
    found: dict[str, Path] = {}
    given = list(paths)
    for path in given:
        if path.is_dir():
            names = [n for n in list_files(path) if n.lower().endswith(".png") and not is_junk(n)]
            files = [path / name for name in names]
        elif path.exists():
            files = [path]
        else:
            raise FileNotFoundError(f"{path} is not there; give PNG files, or folders with them")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    if not found:
        raise ValueError(f"no PNG files below {', '.join(map(str, given))}")
    return list(found.values())


def load_weights(folder: Path) -> nn.Module:
    """The model that a run left in its `weights` folder.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"weights folder {folder} is not there; train first (examples.akoa.train writes "
            "runs/akoa/weights), then name it with --weights"
        )
    model: nn.Module = load(folder)
    return model


def classify(
    model: nn.Module, files: Sequence[Path], size: tuple[int, int], maps: Path | None = None
) -> Iterator[Verdict | Unreadable]:
    """A verdict for each file, in order; files that cannot be read are named and passed over.

    Args:
        model: one logit a picture, positive = right.
        files: PNG files of any size, gray or color.
        size: height and width, in pixels, that the model was trained at.
        maps: an existing folder for attention maps; None for none.
    """
    starts = range(0, len(files), _BATCH)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in starts:
            chunk = files[start : start + _BATCH]
            read = list(pool.map(partial(_read, size=size), chunk))
            pictures = [item for item in read if isinstance(item, np.ndarray)]
            logits = iter(predict(model, torch.from_numpy(np.array(pictures)), _BATCH))
            for number, (file, item) in enumerate(zip(chunk, read, strict=True), start):
                if isinstance(item, Unreadable):
                    yield item
                    continue
                logit = float(next(logits))
                drawn = None if maps is None else _draw(model, file, item, logit, maps, number)
                yield Verdict(file, logit, drawn)


def judge(logit: float, threshold: float) -> tuple[str, float]:
    """The side, or `abstain` where its probability is below the threshold; and p(right).

    Example:
        >>> judge(2.0, 0.8)[0], judge(-2.0, 0.8)[0], judge(2.0, 0.9)[0]
        ('right', 'left', 'abstain')
    """
    p = float(probability(np.array([logit]))[0])
    side = "right" if logit > 0 else "left"
    return (side if max(p, 1 - p) >= threshold else "abstain"), p


def gather(verdicts: Iterable[Verdict]) -> list[VolumeVerdict]:
    """Volumes of the files whose names are AKOA's; slices of one volume lie in one folder."""
    volumes: dict[tuple[Path, str, int, str], list[float]] = defaultdict(list)
    for verdict in verdicts:
        try:
            name = parse_name(verdict.file.name)
        except ValueError:
            continue
        key = (verdict.file.parent, name.patient, name.visit, name.side)
        volumes[key].append(verdict.logit)
    return [
        VolumeVerdict(patient, visit, side, len(logits), float(np.mean(logits)))
        for (_, patient, visit, side), logits in sorted(volumes.items())
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.akoa.driver", description="Tell left knees from right ones."
    )
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="PNG files, or folders with them")
    add("--weights", type=Path, default=WEIGHTS, help="folder of a trained model (the shipped one)")
    add("--threshold", type=float, default=0.5, help="abstain below this probability (%(default)s)")
    add("--size", type=int, nargs="+", help="pixels: one number, or height width (the weights')")
    add("--out", type=Path, metavar="CSV", help="write verdicts there, not to the screen")
    add("--maps", type=Path, metavar="DIR", help="draw an attention map of each picture there")
    return parser


def _run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.threshold <= 1:
        raise ValueError(f"threshold is {args.threshold:g}, need a probability from 0.5 to 1")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ValueError(f"out: {str(args.out)!r} is not a file in an existing folder")
    files = find_pictures(args.paths)
    model = load_weights(args.weights)
    if args.weights == WEIGHTS:
        print("these weights were trained on a generated phantom: they mean nothing for a real knee", file=sys.stderr)
    size = (args.size[0], args.size[-1]) if args.size else trained_size(args.weights, model)
    if args.maps is not None:
        args.maps.mkdir(parents=True, exist_ok=True)
    answers = classify(model, files, size, args.maps)
    done = list(tqdm(answers, "classifying", len(files), unit="picture", disable=None))
    verdicts = [item for item in done if isinstance(item, Verdict)]
    skipped = [item for item in done if isinstance(item, Unreadable)]
    lines = [verdict.line(args.threshold) for verdict in verdicts]
    if args.out is not None:
        write_table(args.out, HEADER, lines)
        print(f"wrote {args.out}: {len(lines):,} verdicts")
    else:
        for file, side, p, _ in lines:
            print(f"{side:8} p(right) {float(p):.3f}  {_printable(file)}")
    _print_volumes(gather(verdicts), args.threshold)
    for item in skipped:
        print(f"skipped {_printable(item.file)}: {_printable(item.reason)}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(files)} files were skipped", file=sys.stderr)
    return 1 if skipped else 0


def _print_volumes(volumes: Sequence[VolumeVerdict], threshold: float) -> None:
    if not volumes:
        return
    print(f"\n{'patient':8} {'visit':>6} {'named':6} {'slices':>7} {'p(right)':>9}  verdict")
    for volume in volumes:
        side, p = judge(volume.logit, threshold)
        note = "" if side in (volume.named, "abstain") else "  (not as named)"
        print(f"{volume.patient:8} {volume.visit:6} {volume.named:6} {volume.slices:7} {p:9.3f}  {side}{note}")


def _read(file: Path, *, size: tuple[int, int]) -> Picture | Unreadable:
    try:
        return read_picture(file, size)
    except _BROKEN as error:
        # The reader's advice is about labels; the reason alone is what counts here.
        return Unreadable(file, str(error.__cause__ or error))


def _draw(model: nn.Module, file: Path, picture: Picture, logit: float, maps: Path, number: int) -> Path:
    side, p = judge(logit, 0.5)
    shares = attention(model, torch.tensor(picture)[None])[0]
    # Numbered, since files of several folders may have one name.
    path = maps / f"{number:05}_{file.stem}.png"
    plots.save(plots.single_map(picture, shares, f"{side}, p(right) = {p:.3f}"), path)
    return path


def _printable(text: object) -> str:
    """A name may hold what the terminal cannot show, and a run must not die of that."""
    return str(text).encode("ascii", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
