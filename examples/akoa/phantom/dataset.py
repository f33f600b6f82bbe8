"""Files of the phantom, a generated replacement of the axial knee images of `AKOA_Analysis.zip`, which cannot ship.

The phantom has patients, visits, and files whose names, folders and defects are those of the real data; `rendering`
draws the images. The spelling of the side in a file name is assigned at random, independent of the shape of the knee
and of the visit, so it reveals nothing about the difficulty of an image.

    python -m examples.akoa.phantom --out data/phantom --patients 101 --seed 0 --layout flat

The exit code is 0 if the phantom is complete, 2 for invalid arguments or files, and 130 or 143 after an interruption;
the same command continues.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.akoa.phantom.anatomy import Knee, Side, Visit, sample_knee, sample_other_knee, sample_visit
from examples.akoa.phantom.rendering import GrayImage, render
from examples.common import parse
from examples.common.command import ArgumentParser, run_command
from examples.common.output_folder import output_folder
from examples.common.terminal import printable
from perceiver_core.atomic_files import write_atomically

Layout = Literal["flat", "nested", "sides"]

SLICES = 40

# Numbers of the real files, which give the frequency of each spelling.
SPELLINGS: dict[Side, dict[str, int]] = {
    "right": {"RIGHT": 9640, "Right": 920, "R_I_G_H_T": 360},
    "left": {"LEFT": 6480, "Left": 1160, "L_E_F_T": 120},
}
BASELINES = ("3_", "3", "4_", "100", "101")
RIGHT_SHARE = 10920 / 18680
FOLDER = "AKOA_Analysis"
MANIFEST = "phantom.json"
VERSION = 1  # to be raised when the images change, so that an old phantom is written again


@dataclass(frozen=True)
class Volume:
    """Plan of a volume: one knee at one visit, and the spelling in its file names."""

    patient: str  # seven digits; real numbers begin with 9, those of the phantom never do
    baseline: str  # visit number, with the underscore of the file name if it has one
    spelling: str
    knee: Knee
    visit: Visit

    def name(self, index: int) -> str:
        """File name of slice `index`, in the form of the real files."""
        return f"OAI{self.patient}_BaseLine_{self.baseline}de3d1_SAG_3D_DESS_WE_{self.spelling}.nii.gz_{index}.png"


def _sample_patients(count: int, rng: np.random.Generator) -> Iterator[tuple[str, list[Knee], list[str]]]:
    """Sample the number, the knees (one or two) and the visits of each patient.

    The side of single knees is chosen so that about 58 % of the volumes are right, as in the real data.
    """
    numbers = rng.choice(np.arange(1_000_000, 9_000_000), size=count, replace=False)
    rights = volumes = 0
    for number in numbers:
        visits = int(rng.choice([1, 2, 3], p=[0.72, 0.2, 0.08]))
        unique = rng.choice(["3", "4", "100", "101"], size=visits, replace=False, p=[0.4, 0.3, 0.15, 0.15])
        chosen = [rng.choice([b for b in BASELINES if b.rstrip("_") == n]) for n in sorted(unique)]
        side: Side = "right" if rights < RIGHT_SHARE * (volumes + visits) else "left"
        knees = [sample_knee(side, rng)]
        if rng.uniform() < 0.3:
            knees.append(sample_other_knee(knees[0], rng))
        rights += visits * sum(knee.side == "right" for knee in knees)
        volumes += visits * len(knees)
        yield str(number), knees, [str(b) for b in chosen]


def _sample_spellings(side: Side, count: int, rng: np.random.Generator) -> list[str]:
    """Spellings of a side in random order, in the real proportions, each at least once if `count` allows."""
    weights = SPELLINGS[side]
    upper, *others = weights
    total = sum(weights.values())
    names = [name for name in others for _ in range(max(1, round(count * weights[name] / total)))]
    names = [upper] * max(count - len(names), min(count, 1)) + names
    return [str(name) for name in rng.permutation(names[:count])]


def plan(patients: int = 101, seed: int = 0) -> list[Volume]:
    """Plan all volumes of a phantom: patients, knees, visits and spellings; no image is drawn yet."""
    rng = np.random.default_rng(seed)
    rows = [
        (number, baseline, knee)
        for number, knees, baselines in _sample_patients(patients, rng)
        for baseline in baselines
        for knee in knees
    ]
    spellings = {
        side: iter(_sample_spellings(side, sum(knee.side == side for _, _, knee in rows), rng)) for side in SPELLINGS
    }
    return [
        Volume(number, baseline, next(spellings[knee.side]), knee, sample_visit(rng)) for number, baseline, knee in rows
    ]


def _truncated(volumes: Sequence[Volume]) -> Volume:
    """Volume whose single file is truncated: a visit that the first patient does not have."""
    first = volumes[0]
    taken = {v.baseline.rstrip("_") for v in volumes if v.patient == first.patient}
    free = next(b for b in BASELINES if b.rstrip("_") not in taken)
    return dataclasses.replace(first, baseline=free)


def _folders(layout: Layout) -> dict[Side, Path]:
    """Folder of the images of each side, below the output folder."""
    if layout == "sides":
        return {"left": Path(FOLDER, "left"), "right": Path(FOLDER, "right")}
    folder = Path(FOLDER) if layout == "flat" else Path(FOLDER, FOLDER)
    return {"left": folder, "right": folder}


def _png(image: GrayImage) -> bytes:
    """Encode an image as a PNG file with three equal channels."""
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(image[:, :, None], 3, axis=2)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _files(volumes: Sequence[Volume], slices: int, layout: Layout) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """Relative path of every file of the phantom, with a function that returns its bytes."""
    folders = _folders(layout)
    for folder in sorted(set(folders.values())):
        yield folder / "Thumbs.db", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)
    broken = _truncated(volumes)
    for volume, count in [*((v, slices) for v in volumes), (broken, 1)]:
        for index in range(count):
            level = index / (slices - 1) if slices > 1 else 0.5
            draw = functools.partial(_slice, volume, level, complete=volume is not broken)
            yield folders[volume.knee.side] / volume.name(index), draw


def _slice(volume: Volume, level: float, *, complete: bool) -> bytes:
    """PNG file of one slice, truncated to a third unless `complete`."""
    content = _png(render(volume.knee, volume.visit, level))
    return content if complete else content[: len(content) // 3]


def _check(patients: int, slices: int, seed: int, layout: str) -> None:
    """Raise ValueError for arguments out of range."""
    if patients < 1:
        raise ValueError(f"patients={patients}: expected 1 or more")
    if slices < 1:
        raise ValueError(f"slices={slices}: expected 1 or more")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected 0 or more")
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(get_args(Layout))}")


def _existing_files(out: Path) -> set[Path]:
    """Return the files below the image folder, relative to `out`."""
    return {path.relative_to(out) for path in (out / FOLDER).rglob("*") if path.is_file()}


def _manifest_contains(manifest: Path, record: dict[str, object]) -> bool:
    """Return whether the manifest exists and has this content."""
    try:
        return bool(json.loads(manifest.read_text(encoding="utf-8")) == record)
    except (FileNotFoundError, ValueError):
        return False


def write(
    out: Path,
    *,
    patients: int = 101,
    slices: int = SLICES,
    seed: int = 0,
    layout: Layout = "flat",
    progress: bool = False,
) -> int:
    """Write a phantom data set below `out`, unless `out` contains it already.

    Besides the images, each folder has a `Thumbs.db`, and one PNG file is truncated: slice 0 of a visit that the first
    patient does not have, so that every other volume is complete. The manifest `phantom.json` is written last; a
    phantom without one is written again from the start.

    Args:
        out: Folder that will contain `AKOA_Analysis/`.
        patients: Number of patients; the default gives about 7,000 images.
        slices: Number of slices of each volume, at equal distances from shaft to condyles.
        seed: Seed; the same seed gives the same bytes.
        layout: `flat` (`AKOA_Analysis/`), `nested` (`AKOA_Analysis/AKOA_Analysis/`) or `sides` (`AKOA_Analysis/left/`
            and `AKOA_Analysis/right/`).
        progress: Show a progress bar.

    Returns:
        Number of files written; 0 if `out` contained this phantom already.

    Raises:
        OSError: A file cannot be written.
        ValueError: An argument is out of range, `out` contains files that are not of this phantom, or another command
            works in `out`.
    """
    _check(patients, slices, seed, layout)
    files = dict(_files(plan(patients, seed), slices, layout))
    record: dict[str, object] = {
        "version": VERSION,
        "patients": patients,
        "slices": slices,
        "seed": seed,
        "layout": layout,
    }
    folders = [folder.as_posix() for folder in set(_folders(layout).values())]
    with output_folder(out, *folders):
        return _write(out, files, record, progress=progress)


def _write(out: Path, files: dict[Path, Callable[[], bytes]], record: dict[str, object], *, progress: bool) -> int:
    """Write the files, then the manifest, unless `out` contains them already. Returns the number of files written."""
    manifest, existing = out / MANIFEST, _existing_files(out)
    if foreign := sorted(existing - set(files)):
        raise ValueError(
            f"out={out}: contains {len(foreign)} files that are not of this phantom, such as "
            f"{foreign[0]}; choose another folder, or delete the old phantom"
        )
    if existing == set(files) and _manifest_contains(manifest, record):
        return 0
    manifest.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path, content in tqdm(files.items(), desc="phantom", unit="file", disable=not progress):
        write_atomically({out / path: content()})
    write_atomically({manifest: json.dumps(record, indent=2) + "\n"})
    return len(files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: execute(arguments))


def execute(arguments: Sequence[str] | None = None) -> None:
    """Write the phantom that the command line describes.

    Raises:
        OSError: A file cannot be written.
        ValueError: As in `write`.
    """
    parser = ArgumentParser(description="Write a phantom of the AKOA knee images.")
    parser.add_argument("--out", type=Path, required=True, help="folder that will contain AKOA_Analysis/")
    parser.add_argument("--patients", type=parse.count, default=101)
    parser.add_argument("--slices", type=parse.count, default=SLICES, help="slices of each volume")
    parser.add_argument("--seed", type=parse.seed, default=0)
    parser.add_argument("--layout", choices=get_args(Layout), default="flat")
    options = vars(parser.parse_args(arguments))
    written = write(progress=True, **options)
    done = f"wrote {written} files" if written else "already complete, nothing to do"
    print(f"{printable(options['out'])}: {done}")
