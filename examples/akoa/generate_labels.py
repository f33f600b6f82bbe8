"""Generation of labels.csv for a folder of AKOA knees, with an audit of the files.

    python -m examples.akoa.generate_labels --data data/AKOA_Analysis --out labels.csv
    python -m examples.akoa.generate_labels --data data/AKOA_Analysis --out folds.csv --folds 5

The folder may be flat, nested or divided into left/ and right/. Every PNG file, and every file with OAI in its name, is
decoded and audited first; other files are ignored and counted by extension. All problems are listed in
`labels.problems.csv` beside labels.csv, and any problem stops the run with exit code 1 and without labels.csv, until it
is fixed or its kind is allowed (`--allow`). Of the allowed kinds, unparsed, unreadable and disagreeing files are left
out, and all but the first of duplicates; near-duplicates and contradicting images are kept. Invalid arguments give exit
code 2. An earlier labels.csv with another content is kept as `labels.csv.previous`.

With `--folds K`, the split column contains fold0 to fold<K-1>. Run i tests on fold i, validates on fold i+1 (modulo K)
and trains on the rest.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from examples.akoa.dataset import audit_texts, file_names, images, labels, near_duplicates, splits, tables
from examples.akoa.dataset.file_names import PROBLEM_KINDS, ImageFile, Problem
from examples.akoa.dataset.labels import Row
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import check_output_file
from examples.common.terminal import printable
from perceiver_core.atomic_files import write_atomically


@dataclass(frozen=True)
class Options:
    """Options of the command; `shares` maps each part of the split to its share of patients."""

    data: Path
    out: Path
    shares: Mapping[str, float]
    seed: int
    allow: frozenset[str]
    examples: int

    @property
    def problems(self) -> Path:
        """Path of the list of problems: labels.problems.csv beside labels.csv."""
        return self.out.with_name(f"{self.out.stem}.problems.csv")

    @property
    def previous(self) -> Path:
        """Path to which an earlier labels.csv is renamed."""
        return self.out.with_name(f"{self.out.name}.previous")


@dataclass(frozen=True)
class Scan:
    """Image files that could be decoded, their gray thumbnails in that order, their sizes, and the problems."""

    files: list[ImageFile]
    thumbnails: UInt8[np.ndarray, "n h w"]
    sizes: Counter[str]
    problems: list[Problem]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: execute(argv), "labels were not written; run the same command again")


def execute(argv: Sequence[str] | None = None) -> int:
    """Write labels.csv as configured on the command line. Returns 0, or 1 if problems prevent it."""
    return generate(read_options(argv))


def read_options(argv: Sequence[str] | None) -> Options:
    """Parse the command line and check everything that does not need the data.

    Raises:
        ValueError: Fractions or folds are impossible, or the output is not a file in a writable folder.
    """
    parser = ArgumentParser(
        prog="python -m examples.akoa.generate_labels",
        description="Write labels.csv for a folder of AKOA knees, split by patient, and audit it.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the PNG files, in any layout")
    add("--out", type=Path, default=Path("labels.csv"), help="file to write (%(default)s)")
    add("--seed", type=parse.seed, default=0, help="seed of the split (%(default)s)")
    add("--examples", type=int, default=5, help="number of problems of each kind to print (%(default)s)")
    kinds = [*PROBLEM_KINDS, "all"]
    add("--allow", nargs="+", choices=kinds, default=[], metavar="KIND", help=", ".join(kinds))
    shares = parser.add_mutually_exclusive_group()
    names, default = ("TRAIN", "VAL", "TEST"), (0.6, 0.2, 0.2)
    shares.add_argument("--fractions", nargs=3, type=float, default=default, metavar=names)
    shares.add_argument("--folds", type=int, metavar="K", help="split into fold0 to fold<K-1> instead")
    args = parser.parse_args(argv)
    share = splits.three_way(args.fractions) if args.folds is None else splits.k_fold(args.folds)
    splits.split_sizes(sys.maxsize, share)
    check_output_file(args.out, "out")
    if args.out.suffix.lower() == ".png":
        raise ValueError(f"out: {str(args.out)!r} is the name of an image, need one of a table, such as labels.csv")
    allow = frozenset(PROBLEM_KINDS if "all" in args.allow else args.allow)
    options = Options(args.data, args.out, share, args.seed, allow, args.examples)
    for path in (options.problems, options.previous):
        check_output_file(path, "out")
    return options


def generate(options: Options) -> int:
    """List, decode, split and audit the files, and write labels.csv unless a problem prevents it.

    Returns:
        Exit code: 0 if labels.csv was written, else 1.

    Raises:
        FileNotFoundError: The data folder does not exist.
        ValueError: It contains no knees, or too few patients for the split.
    """
    paths = _without_outputs(file_names.list_files(options.data), options)
    files, ignored, problems = file_names.classify_files(paths)
    if not any(path.lower().endswith(".png") for path in paths):
        raise ValueError(f"data folder {str(options.data)!r} contains no PNG files")
    if files:
        _check_patients(files, options, problems)
    scan = scan_images(options.data, files)
    kept, duplicates = file_names.drop_duplicates(scan.files)
    problems += [*scan.problems, *duplicates]
    rows: list[Row] = []
    if kept:
        _check_patients(kept, options, problems)
        rows = splits.make_rows(kept, options.shares, options.seed)
        labels.audit_split(rows)
        print(f"comparing {len(rows):,} images with each other", file=sys.stderr)
        problems += near_duplicates.find_near_duplicates(rows, _in_order(rows, scan))
    print(audit_texts.summarize(kept, rows, ignored, scan.sizes))
    print(_describe(problems, options))
    stopped = not rows or any(problem.kind not in options.allow for problem in problems)
    kept_as = write_results(options, problems, None if stopped else rows)
    out = printable(options.out)
    print(
        f"\n{out} was not written; all problems are in {printable(options.problems)}"
        if stopped
        else f"\nwrote {out}: {len(rows):,} images"
    )
    if kept_as is not None:
        print(f"the labels of an earlier run are now {printable(kept_as)}")
    return int(stopped)


def write_results(options: Options, problems: Sequence[Problem], rows: Sequence[Row] | None) -> Path | None:
    """Write the list of problems, and labels.csv unless `rows` is None.

    An earlier labels.csv is renamed first, so that even a crash never leaves it beside the problems of another run.

    Returns:
        New name of the earlier labels.csv, if there was one with another content.
    """
    lines = (astuple(problem) for problem in problems)
    content = {options.problems: tables.to_csv(("kind", "image", "other", "detail"), lines)}
    if rows is not None:
        content[options.out] = labels.to_csv(rows)
    old_labels, old_problems = _content(options.out), _content(options.problems)
    if old_labels in (None, content.get(options.out)):
        write_atomically(content)
        return None
    options.out.replace(options.previous)
    try:
        write_atomically(content)
    except BaseException:
        if _content(options.problems) == old_problems:  # nothing was written
            options.previous.replace(options.out)
        raise
    return options.previous


def scan_images(root: Path, files: Sequence[ImageFile]) -> Scan:
    """Decode every image in order, and keep a thumbnail of 3.6 kB of each."""
    readable: list[ImageFile] = []
    sizes: Counter[str] = Counter()
    problems: list[Problem] = []
    thumbnails = np.empty((len(files), *near_duplicates.THUMBNAIL_SIZE), np.uint8)
    for file in tqdm(files, desc="decoding", unit="image", disable=None):
        try:
            thumbnail, size = read_thumbnail(root / file.path)
        except images.UnreadableImageError as error:
            problems.append(Problem("unreadable", file.path, "", error.reason))
            continue
        thumbnails[len(readable)] = thumbnail
        readable.append(file)
        sizes[size] += 1
    return Scan(readable, thumbnails[: len(readable)], sizes, problems)


def read_thumbnail(path: Path) -> tuple[UInt8[np.ndarray, "h w"], str]:
    """Decode an image, and return a gray thumbnail of the size `THUMBNAIL_SIZE` and the original size as text.

    Raises:
        UnreadableImageError: As in `images.read_gray`.
    """
    gray = images.read_gray(path)
    height, width = near_duplicates.THUMBNAIL_SIZE
    return np.asarray(gray.resize((width, height), Image.Resampling.BOX)), f"{gray.width}x{gray.height}"


def _describe(problems: Sequence[Problem], options: Options) -> str:
    return audit_texts.describe_problems(problems, options.allow, options.examples, options.problems)


def _without_outputs(paths: Sequence[str], options: Options) -> list[str]:
    """Leave out files that an earlier run has written into the data folder."""
    outputs = {path.resolve() for path in (options.out, options.problems, options.previous)}
    names = {output.name for output in outputs}
    return [
        path
        for path in paths
        if PurePosixPath(path).name not in names or (options.data / path).resolve() not in outputs
    ]


def _content(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else None


def _check_patients(files: Sequence[ImageFile], options: Options, problems: Sequence[Problem]) -> None:
    """Check the number of patients; the error lists the problems, since left-out files are often its reason."""
    try:
        splits.split_sizes(len({file.name.patient for file in files}), options.shares)
    except ValueError as error:
        details = f"\n{_describe(problems, options)}" if problems else ""
        raise ValueError(f"{error}{details}") from error


def _in_order(rows: Sequence[Row], scan: Scan) -> UInt8[np.ndarray, "n h w"]:
    """Thumbnails in the order of the rows."""
    position = {file.path: i for i, file in enumerate(scan.files)}
    return scan.thumbnails[[position[row.image] for row in rows]]


if __name__ == "__main__":
    sys.exit(main())
