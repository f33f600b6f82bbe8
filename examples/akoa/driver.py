r"""Classification of knee images as left or right with a trained model, for files and folders.

    python -m examples.akoa.driver knee.png                       # with the shipped weights
    python -m examples.akoa.driver data/AKOA_Analysis --weights runs/akoa/weights \
        --threshold 0.9 --out results.csv --maps maps

A verdict whose probability is below the threshold is `abstain`. If file names have the form of AKOA, slices are grouped
into volumes, each with a verdict from its mean logit. The side in a file name is printed beside the verdict but never
used. The exit code is 1 if a file could not be read, and 2 if no file was classified. In printed file names, all
characters except printable ASCII are escaped; the table contains the real names.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn
from tqdm import tqdm

from examples.akoa.dataset import tables
from examples.akoa.dataset.file_names import is_system_file, list_files, parse_name
from examples.akoa.dataset.images import UnreadableImageError, read_image
from examples.akoa.dataset.size_option import SizeAction
from examples.akoa.evaluation import plots
from examples.akoa.evaluation.inference import attention_maps, predict
from examples.akoa.evaluation.predictions import probability
from examples.akoa.training.run_record import trained_size
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import check_output_file
from examples.common.terminal import printable
from perceiver_core import load
from perceiver_core.atomic_files import write_atomically

WEIGHTS = Path(__file__).parent / "weights"
HEADER = ("file", "verdict", "probability_right", "map")
_BATCH = 256

GrayImage = UInt8[np.ndarray, "h w"]


@dataclass(frozen=True)
class Verdict:
    """Logit of a file, and the path of its attention map if one was drawn."""

    file: Path
    logit: float
    map_path: Path | None = None

    def line(self, threshold: float) -> tuple[str, ...]:
        """Values of the columns of `HEADER`."""
        side, p = decide(self.logit, threshold)
        return str(self.file), side, f"{p:.6f}", str(self.map_path or "")


@dataclass(frozen=True)
class SkippedFile:
    """File that was skipped, and the reason."""

    file: Path
    reason: str


@dataclass(frozen=True)
class VolumeVerdict:
    """Verdict on a volume: the side in its file names, its number of slices, and their mean logit."""

    patient: str
    visit: int
    named_side: str
    num_slices: int
    logit: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: execute(argv), "nothing was written but maps; run the same command again")


def execute(argv: Sequence[str] | None = None) -> int:
    """Classify the files and folders on the command line. Returns 0, or 1 if files were skipped."""
    return _run(_parser().parse_args(argv))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Collect PNG files: the paths that are files, and all PNG files below those that are folders, each file once.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There are no PNG files.
    """
    images: dict[str, Path] = {}
    path_list = list(paths)
    for path in path_list:
        if path.is_dir():
            names = [n for n in list_files(path) if n.lower().endswith(".png") and not is_system_file(n)]
            files = [path / name for name in names]
        elif os.path.lexists(path):  # also broken links, which are reported as skipped files
            files = [path]
        else:
            raise FileNotFoundError(f"{path} does not exist; give PNG files, or folders with them")
        for file in files:
            images.setdefault(os.path.realpath(file), file)
    if not images:
        raise ValueError(f"no PNG files below {', '.join(map(str, path_list))}")
    return list(images.values())


def load_weights(folder: Path) -> nn.Module:
    """Load the model of a run's `weights` folder.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The weights are damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"weights folder {folder} does not exist; train first (examples.akoa.train writes "
            "runs/akoa/weights), then name it with --weights"
        )
    return load(folder)


def classify(
    model: nn.Module, files: Sequence[Path], size: tuple[int, int], maps: Path | None = None
) -> Iterator[Verdict | SkippedFile]:
    """Classify files in order; files that cannot be read are returned as `SkippedFile`.

    Args:
        model: Module with one logit per image, positive for right.
        files: PNG files of any size, gray or color.
        size: Height and width of the training images, in pixels.
        maps: Existing folder for attention maps; None for none.
    """
    starts = range(0, len(files), _BATCH)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in starts:
            chunk = files[start : start + _BATCH]
            contents = list(pool.map(partial(_read_image, size=size), chunk))
            images = [item for item in contents if isinstance(item, np.ndarray)]
            logits = iter(predict(model, torch.from_numpy(np.array(images)), _BATCH))
            for number, (file, item) in enumerate(zip(chunk, contents, strict=True), start):
                if isinstance(item, SkippedFile):
                    yield item
                    continue
                logit = float(next(logits))
                map_path = None if maps is None else _draw(model, file, item, logit, maps, number)
                yield Verdict(file, logit, map_path)


def decide(logit: float, threshold: float) -> tuple[str, float]:
    """Return the side, or `abstain` if its probability is below the threshold, and p(right).

    Example:
        >>> decide(2.0, 0.8)[0], decide(-2.0, 0.8)[0], decide(2.0, 0.9)[0]
        ('right', 'left', 'abstain')
    """
    p = float(probability(np.array([logit]))[0])
    side = "right" if logit > 0 else "left"
    return (side if max(p, 1 - p) >= threshold else "abstain"), p


def group_by_volume(verdicts: Iterable[Verdict]) -> list[VolumeVerdict]:
    """Group verdicts into volumes by folder and file name; other names are left out."""
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
    parser = ArgumentParser(prog="python -m examples.akoa.driver", description="Classify knee images as left or right.")
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="PNG files, or folders with them")
    add("--weights", type=Path, default=WEIGHTS, help="folder of a trained model (default: the shipped one)")
    add("--threshold", type=float, default=0.5, help="abstain below this probability (%(default)s)")
    size_help = "pixels: one number, or height width (default: that of the weights)"
    add("--size", type=int, nargs="+", action=SizeAction, help=size_help)
    add("--out", type=Path, metavar="CSV", help="file for the verdicts, which are printed otherwise")
    add("--maps", type=Path, metavar="DIR", help="folder for an attention map of each image")
    return parser


def _run(args: argparse.Namespace) -> int:
    if not 0.5 <= args.threshold <= 1:
        raise ValueError(f"threshold is {args.threshold:g}, need a probability from 0.5 to 1")
    if args.out is not None:
        check_output_file(args.out, "out")
        if args.out.suffix.lower() == ".png":
            raise ValueError(
                f"out: {str(args.out)!r} is the name of an image, need one of a table, such as results.csv"
            )
    files = find_images(args.paths)
    model = load_weights(args.weights)
    if args.weights == WEIGHTS:
        print(
            "these weights were trained on a generated phantom; their verdicts on real knees are meaningless",
            file=sys.stderr,
        )
    size = args.size or trained_size(args.weights, model)
    if args.maps is not None:
        args.maps.mkdir(parents=True, exist_ok=True)
        check_output_file(args.maps / "map.png", "maps")
    results = classify(model, files, size, args.maps)
    done = list(tqdm(results, "classifying", len(files), unit="image", disable=None))
    verdicts = [item for item in done if isinstance(item, Verdict)]
    skipped = [item for item in done if isinstance(item, SkippedFile)]
    lines = [verdict.line(args.threshold) for verdict in verdicts]
    if args.out is not None:
        write_atomically({args.out: tables.to_csv(HEADER, lines)})
        print(f"wrote {printable(args.out)}: {len(lines):,} verdicts")
    else:
        for file, side, p, _ in lines:
            print(f"{side:8} p(right) {float(p):.3f}  {printable(file)}")
    _print_volumes(group_by_volume(verdicts), args.threshold)
    for item in skipped:
        print(f"skipped {printable(item.file)}: {printable(item.reason)}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(files)} files were skipped", file=sys.stderr)
    return 1 if skipped else 0


def _print_volumes(volumes: Sequence[VolumeVerdict], threshold: float) -> None:
    if not volumes:
        return
    print(f"\n{'patient':8} {'visit':>6} {'named':6} {'slices':>7} {'p(right)':>9}  verdict")
    for volume in volumes:
        side, p = decide(volume.logit, threshold)
        note = "" if side in (volume.named_side, "abstain") else "  (not as named)"
        print(f"{volume.patient:8} {volume.visit:6} {volume.named_side:6} {volume.num_slices:7} {p:9.3f}  {side}{note}")


def _read_image(file: Path, *, size: tuple[int, int]) -> GrayImage | SkippedFile:
    """Read an image, or return the reason why it cannot be read."""
    try:
        return read_image(file, size)
    except UnreadableImageError as error:
        return SkippedFile(file, error.reason)


def _draw(model: nn.Module, file: Path, image: GrayImage, logit: float, maps: Path, number: int) -> Path:
    """Write the attention map of an image and return its path."""
    side, p = decide(logit, 0.5)
    shares = attention_maps(model, torch.tensor(image)[None])[0]
    # Numbered, since files of several folders may have the same name. Other systems may not allow all characters.
    path = maps / f"{number:05}_{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)[:100]}.png"
    plots.save(plots.single_map(image, shares, f"{side}, p(right) = {p:.3f}"), path)
    return path


if __name__ == "__main__":
    sys.exit(main())
