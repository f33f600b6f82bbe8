"""A procedural stand-in for the axial knee pictures of `AKOA_Analysis.zip`, which cannot ship.

Here are its patients, their visits, and files named, laid out and broken as the real ones are; what
a picture shows is drawn in `knee.py`. How a name spells its side is dealt out without looking at the
shape of the knee or at the visit, so a spelling says nothing about how hard a picture is.

    python -m examples.akoa.phantom --out data/phantom --patients 101 --seed 0 --layout flat
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.akoa.knee import Knee, Picture, Side, Visit, draw_knee, draw_sibling, draw_visit, render

Layout = Literal["flat", "nested", "sides"]

SLICES = 40

# Counts of the real files, which set the odds of a volume's spelling.
SPELLINGS: dict[Side, dict[str, int]] = {
    "right": {"RIGHT": 9640, "Right": 920, "R_I_G_H_T": 360},
    "left": {"LEFT": 6480, "Left": 1160, "L_E_F_T": 120},
}
BASELINES = ("3_", "3", "4_", "100", "101")
RIGHT_SHARE = 10920 / 18680
FOLDER = "AKOA_Analysis"
MANIFEST = "phantom.json"
VERSION = 1  # raise it when the pictures change, so that an old phantom is not taken for a new one


@dataclass(frozen=True)
class Volume:
    """A planned volume: one knee at one visit, and the part of the file names its slices share."""

    patient: str  # seven digits; real ones begin with 9, these never do
    baseline: str  # visit number, with the underscore where the name has one
    spelling: str
    knee: Knee
    visit: Visit

    def name(self, index: int) -> str:
        """The file name of slice `index`, as the real files are named."""
        return f"OAI{self.patient}_BaseLine_{self.baseline}de3d1_SAG_3D_DESS_WE_{self.spelling}.nii.gz_{index}.png"


def _patients(patients: int, rng: np.random.Generator) -> Iterator[tuple[str, list[Knee], list[str]]]:
    """Each patient's number, knees (one or two) and visits; lone knees keep it 58 % right."""
    numbers = rng.choice(np.arange(1_000_000, 9_000_000), size=patients, replace=False)
    rights = volumes = 0
    for number in numbers:
        visits = int(rng.choice([1, 2, 3], p=[0.72, 0.2, 0.08]))
        unique = rng.choice(["3", "4", "100", "101"], size=visits, replace=False, p=[0.4, 0.3, 0.15, 0.15])
        chosen = [rng.choice([b for b in BASELINES if b.rstrip("_") == n]) for n in sorted(unique)]
        side: Side = "right" if rights < RIGHT_SHARE * (volumes + visits) else "left"
        knees = [draw_knee(side, rng)]
        if rng.uniform() < 0.3:
            knees.append(draw_sibling(knees[0], rng))
        rights += visits * sum(knee.side == "right" for knee in knees)
        volumes += visits * len(knees)
        yield str(number), knees, [str(b) for b in chosen]


def _spellings(side: Side, count: int, rng: np.random.Generator) -> list[str]:
    """`count` spellings of a side in the real proportions, each at least once if it can."""
    weights = SPELLINGS[side]
    upper, *others = weights
    total = sum(weights.values())
    names = [name for name in others for _ in range(max(1, round(count * weights[name] / total)))]
    names = [upper] * max(count - len(names), min(count, 1)) + names
    return [str(name) for name in rng.permutation(names[:count])]


def plan(patients: int = 101, seed: int = 0) -> list[Volume]:
    """All volumes of a phantom: who, which knee, which visit, which spelling; nothing drawn yet."""
    rng = np.random.default_rng(seed)
    rows = [
        (number, baseline, knee)
        for number, knees, baselines in _patients(patients, rng)
        for baseline in baselines
        for knee in knees
    ]
    spellings = {side: iter(_spellings(side, sum(knee.side == side for _, _, knee in rows), rng)) for side in SPELLINGS}
    return [
        Volume(number, baseline, next(spellings[knee.side]), knee, draw_visit(rng)) for number, baseline, knee in rows
    ]


def _truncated(volumes: Sequence[Volume]) -> Volume:
    """The volume whose one file is cut short: a visit that the first patient does not have."""
    first = volumes[0]
    taken = {v.baseline.rstrip("_") for v in volumes if v.patient == first.patient}
    free = next(b for b in BASELINES if b.rstrip("_") not in taken)
    return dataclasses.replace(first, baseline=free)


def _folders(layout: Layout) -> dict[Side, Path]:
    """Where the pictures of each side go, below the output folder."""
    if layout == "sides":
        return {"left": Path(FOLDER, "left"), "right": Path(FOLDER, "right")}
    folder = Path(FOLDER) if layout == "flat" else Path(FOLDER, FOLDER)
    return {"left": folder, "right": folder}


def _store(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(picture[:, :, None], 3, axis=2)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _files(volumes: Sequence[Volume], slices: int, layout: Layout) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """Every file of the phantom, as its path below the output folder and what makes its bytes."""
    folders = _folders(layout)
    for folder in sorted(set(folders.values())):
        yield folder / "Thumbs.db", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)
    broken = _truncated(volumes)
    for volume, count in [*((v, slices) for v in volumes), (broken, 1)]:
        for index in range(count):
            level = index / (slices - 1) if slices > 1 else 0.5
            draw = functools.partial(_slice, volume, level, whole=volume is not broken)
            yield folders[volume.knee.side] / volume.name(index), draw


def _slice(volume: Volume, level: float, *, whole: bool) -> bytes:
    content = _png(render(volume.knee, volume.visit, level))
    return content if whole else content[: len(content) // 3]


def _check(patients: int, slices: int, seed: int, layout: str) -> None:
    if patients < 1:
        raise ValueError(f"patients={patients}: wanted 1 or more")
    if slices < 1:
        raise ValueError(f"slices={slices}: wanted 1 or more")
    if seed < 0:
        raise ValueError(f"seed={seed}: wanted 0 or more")
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r}: wanted one of {', '.join(get_args(Layout))}")


def _found(out: Path) -> set[Path]:
    """Files already below the picture folder, relative to `out`, half-written ones left out."""
    return {p.relative_to(out) for p in (out / FOLDER).rglob("*") if p.is_file() and p.suffix != ".part"}


def write(
    out: Path,
    *,
    patients: int = 101,
    slices: int = SLICES,
    seed: int = 0,
    layout: Layout = "flat",
    progress: bool = False,
) -> int:
    """Write a phantom data set below `out`, or find it there already.

    Besides the pictures there is a `Thumbs.db` in each folder, and one PNG cut short: slice 0 of a
    visit that the first patient does not have, so that every other volume is complete. The manifest
    `phantom.json` is written last; a phantom without one is written again from the start.

    Args:
        out: the folder that will hold `AKOA_Analysis/`.
        patients: how many; the default gives about 7,000 pictures.
        slices: of each volume, spread evenly from shaft to condyles.
        seed: same seed, same bytes.
        layout: `flat` (`AKOA_Analysis/`), `nested` (the same twice) or `sides`
            (`AKOA_Analysis/left/` and `right/`).
        progress: show a bar.

    Returns:
        How many files were written: 0 if `out` held this phantom already.

    Raises:
        ValueError: an argument out of range, or `out` holds files that are not of this phantom.
    """
    _check(patients, slices, seed, layout)
    volumes = plan(patients, seed)
    files = dict(_files(volumes, slices, layout))
    wanted = {
        "version": VERSION,
        "patients": patients,
        "slices": slices,
        "seed": seed,
        "layout": layout,
    }
    manifest, found = out / MANIFEST, _found(out)
    if foreign := sorted(found - set(files)):
        raise ValueError(
            f"out={out}: holds {len(foreign)} files that are not of this phantom, such as "
            f"{foreign[0]}; choose another folder, or delete the old phantom"
        )
    if manifest.exists() and json.loads(manifest.read_text()) == wanted and found == set(files):
        return 0
    manifest.unlink(missing_ok=True)
    for folder in set(_folders(layout).values()):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path, content in tqdm(files.items(), desc="phantom", unit="file", disable=not progress):
        _store(out / path, content())
    _store(manifest, (json.dumps(wanted, indent=2) + "\n").encode())
    return len(files)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write a phantom of the AKOA knee pictures.")
    parser.add_argument("--out", type=Path, required=True, help="folder that will hold AKOA_Analysis/")
    parser.add_argument("--patients", type=int, default=101)
    parser.add_argument("--slices", type=int, default=SLICES, help="pictures of each volume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=get_args(Layout), default="flat")
    options = vars(parser.parse_args(arguments))
    try:
        written = write(progress=True, **options)
    except ValueError as error:
        parser.error(str(error))
    done = f"wrote {written} files" if written else "already complete, nothing to do"
    print(f"{options['out']}: {done}")


if __name__ == "__main__":
    main()
