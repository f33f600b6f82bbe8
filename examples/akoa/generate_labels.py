"""Write labels.csv for a folder of AKOA knees, or say what is wrong with the folder.

    python -m examples.akoa.generate_labels --data data/AKOA_Analysis --out labels.csv
    python -m examples.akoa.generate_labels --data data/AKOA_Analysis --out folds.csv --folds 5

The folder may be flat, nested or split into left/ and right/. Every PNG, and every file with OAI in
its name, is decoded and audited first; other files are ignored, and counted by extension. All
findings are listed in `labels.problems.csv` beside labels.csv, and any finding stops the run: exit
code 1 and no labels.csv, until it is mended or its kind is allowed (`--allow`). Files that are
unparsed, unreadable or disagreeing are then left out, so are the second and later of duplicates;
near-duplicates and contradicting pictures stay in. Bad arguments give exit code 2.

With `--folds K`, the split column holds fold0 to fold<K-1>. Run i tests on fold i, validates on
fold i+1 (modulo K) and trains on the rest.
"""

import argparse
import io
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from examples.akoa import labels, lookalikes, splits
from examples.akoa.labels import Picture, Problem, Row

# The end of every PNG. Pillow is content without it, and a file cut there may have lost rows.
_IEND = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# All that Pillow raises on broken files; anything else is a mistake of ours and must be seen.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Options:
    """What was asked for; `shares` maps each part of the split to its share of patients."""

    data: Path
    out: Path
    shares: Mapping[str, float]
    seed: int
    allow: frozenset[str]
    examples: int

    @property
    def problems(self) -> Path:
        """Where the findings go: labels.problems.csv beside labels.csv."""
        return self.out.with_name(f"{self.out.stem}.problems.csv")


@dataclass(frozen=True)
class Scan:
    """The pictures that could be decoded, their gray thumbnails in that order, and the rest."""

    pictures: list[Picture]
    thumbs: UInt8[np.ndarray, "n h w"]
    sizes: Counter[str]
    problems: list[Problem]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0: written, 1: findings, 2: wrong arguments, 130: interrupted."""
    try:
        return generate(read_options(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: labels were not written", file=sys.stderr)
        return 130


def read_options(argv: Sequence[str] | None) -> Options:
    """Read the command line and check what can be checked without the data.

    Raises:
        ValueError: fractions or folds are impossible, or the output is not a file in a folder.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.akoa.generate_labels",
        description="Write labels.csv for a folder of AKOA knees, split by patient, and audit it.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the PNG files, in any layout")
    add("--out", type=Path, default=Path("labels.csv"), help="file to write (%(default)s)")
    add("--seed", type=int, default=0, help="another seed is another split (%(default)s)")
    add("--examples", type=int, default=5, help="findings of a kind to print (%(default)s)")
    kinds = [*labels.KINDS, "all"]
    add("--allow", nargs="+", choices=kinds, default=[], metavar="KIND", help=", ".join(kinds))
    shares = parser.add_mutually_exclusive_group()
    names = ("TRAIN", "VAL", "TEST")
    three = (0.6, 0.2, 0.2)
    shares.add_argument("--fractions", nargs=3, type=float, default=three, metavar=names)
    shares.add_argument("--folds", type=int, metavar="K", help="fold0 to fold<K-1> instead")
    args = parser.parse_args(argv)
    share = splits.three_way(args.fractions) if args.folds is None else splits.k_fold(args.folds)
    splits.split_sizes(sys.maxsize, share)
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"out: {str(args.out)!r} is not a file in a folder that can be written to")
    allow = frozenset(labels.KINDS if "all" in args.allow else args.allow)
    return Options(args.data, args.out, share, args.seed, allow, args.examples)


def generate(options: Options) -> int:
    """List, decode, split, audit, report; write labels.csv if nothing stands against it.

    Raises:
        FileNotFoundError: there is no such data folder.
        ValueError: it holds no knees, or too few patients for the split.
    """
    paths = _without_outputs(labels.list_files(options.data), options)
    pictures, ignored, problems = labels.sort_out(paths)
    if not any(path.lower().endswith(".png") for path in paths):
        raise ValueError(f"data folder {str(options.data)!r} holds no PNG files")
    if pictures:
        _check_patients(pictures, options, problems)
    scan = scan_pictures(options.data, pictures)
    kept, twice = labels.drop_duplicates(scan.pictures)
    problems += [*scan.problems, *twice]
    rows: list[Row] = []
    if kept:
        _check_patients(kept, options, problems)
        rows = splits.make_rows(kept, options.shares, options.seed)
        labels.audit_split(rows)
        print(f"comparing {len(rows):,} pictures with each other", file=sys.stderr)
        problems += lookalikes.find_lookalikes(rows, _in_order(rows, scan))
    print(manifest(kept, rows, ignored, scan.sizes))
    print(describe(problems, options))
    lines = (astuple(problem) for problem in problems)
    labels.write_table(options.problems, ("kind", "image", "other", "detail"), lines)
    if not rows or any(problem.kind not in options.allow for problem in problems):
        print(f"\n{options.out} was not written; all findings are in {options.problems}")
        return 1
    labels.write_labels(options.out, rows)
    print(f"\nwrote {options.out}: {len(rows):,} pictures")
    return 0


def scan_pictures(root: Path, pictures: Sequence[Picture]) -> Scan:
    """Decode every picture, in order; one thumbnail of 3.6 kB each is kept."""
    readable: list[Picture] = []
    sizes: Counter[str] = Counter()
    problems: list[Problem] = []
    thumbs = np.empty((len(pictures), *lookalikes.THUMB), np.uint8)
    for picture in tqdm(pictures, desc="decoding", unit="picture", disable=None):
        try:
            thumb, size = read_thumbnail(root / picture.image)
        except ValueError as error:
            problems.append(Problem("unreadable", picture.image, "", str(error)))
            continue
        thumbs[len(readable)] = thumb
        readable.append(picture)
        sizes[size] += 1
    return Scan(readable, thumbs[: len(readable)], sizes, problems)


def read_thumbnail(path: Path) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """The whole picture, decoded, as a gray thumbnail of the size `THUMB`, and its size as text.

    Raises:
        ValueError: the file is cut short, damaged, or no PNG.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            height, width = lookalikes.THUMB
            gray = image.convert("L").resize((width, height), Image.Resampling.BOX)
            size = f"{image.width}x{image.height}"
    except _BROKEN as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if _IEND not in data:
        raise ValueError("the file is cut short: its end mark (IEND) is missing")
    return np.asarray(gray), size


def manifest(pictures: Sequence[Picture], rows: Sequence[Row], ignored: Sequence[str], sizes: Counter[str]) -> str:
    """What the folder holds and how it was split, as text; counts are of pictures that are used."""
    spellings = Counter(picture.name.spelling for picture in pictures)
    gaps = Counter("n_de3d1" if p.name.underscore else "nde3d1" for p in pictures)
    slices = Counter(Counter(picture.volume for picture in pictures).values())
    lines = [
        f"ignored     {_counts(Counter(map(_sort_of_file, ignored)))}",
        f"size        {_counts(sizes)}",
        f"spelling    {_counts(spellings)}",
        f"visit       {_counts(gaps)}",
        f"side        {_counts(Counter(picture.name.side for picture in pictures))}",
        "slices      " + (", ".join(f"{k} in {n:,} volumes" for k, n in sorted(slices.items()))),
        "",
        f"{'split':8} {'patients':>9} {'volumes':>9} {'pictures':>9} {'right':>8}",
    ]
    parts = [*labels.SPLITS, *sorted({row.split for row in rows} - set(labels.SPLITS))]
    held = {part: [row for row in rows if row.split == part] for part in parts}
    lines += [_split_line(part, inside) for part, inside in held.items() if inside]
    return _printable("\n".join([*lines, *([_split_line("all", rows)] if rows else [])]))


def describe(problems: Sequence[Problem], options: Options) -> str:
    """The findings by kind: how many, some examples, how to mend and how to allow them."""
    lines = [] if problems else ["no problems found"]
    for kind, advice in labels.KINDS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if not found:
            continue
        allowed = " (allowed)" if kind in options.allow else ""
        lines.append(f"\n{len(found):,} {kind}{allowed}")
        for problem in found[: options.examples]:
            other = f" and {problem.other}" if problem.other else ""
            lines.append(f"    {problem.image}{other}: {problem.detail}")
        if len(found) > options.examples:
            lines.append(f"    ... all {len(found):,} in {options.problems}")
        lines.append(f"  to mend:  {advice.mend}")
        lines.append(f"  to allow: --allow {kind}; then {advice.allowed}")
    return _printable("\n".join(lines))


def _without_outputs(paths: Sequence[str], options: Options) -> list[str]:
    """Leave out what an earlier run has written into the data folder."""
    outputs = {options.out.resolve(), options.problems.resolve()}
    names = {output.name for output in outputs}
    return [
        path
        for path in paths
        if PurePosixPath(path).name not in names or (options.data / path).resolve() not in outputs
    ]


def _check_patients(pictures: Sequence[Picture], options: Options, problems: Sequence[Problem]) -> None:
    """Refuse a split over too few patients; files that were left out are often the reason."""
    try:
        splits.split_sizes(len({picture.name.patient for picture in pictures}), options.shares)
    except ValueError as error:
        found = f"\n{describe(problems, options)}" if problems else ""
        raise ValueError(f"{error}{found}") from error


def _in_order(rows: Sequence[Row], scan: Scan) -> UInt8[np.ndarray, "n h w"]:
    place = {picture.image: i for i, picture in enumerate(scan.pictures)}
    return scan.thumbs[[place[row.image] for row in rows]]


def _printable(text: str) -> str:
    """A name may hold what the terminal cannot show, and a report must not die of that."""
    return text.encode("ascii", "backslashreplace").decode()


def _sort_of_file(path: str) -> str:
    """How an ignored file is counted: junk of a system by its name, all else by extension."""
    name = PurePosixPath(path).name
    if name.startswith("._"):  # macOS adds one of these to every file of a ZIP
        return "._*"
    return name if labels.is_junk(path) else PurePosixPath(name).suffix.lower() or "no extension"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{key} {n:,}" for key, n in sorted(counts.items())) or "none"


def _split_line(name: str, rows: Sequence[Row]) -> str:
    patients = len({row.patient for row in rows})
    volumes = len({(row.patient, row.visit, row.side) for row in rows})
    right = sum(row.side == "right" for row in rows) / len(rows)
    return f"{name:8} {patients:9,} {volumes:9,} {len(rows):9,} {right:8.1%}"


if __name__ == "__main__":
    sys.exit(main())
