"""AKOA file names: their form, the image files of a folder, and the kinds of problems with them.

The results do not depend on the operating system or on the order in which it lists a folder: names are sorted by code
point.

A *visit* is the number after `BaseLine`; it is not a patient. A *volume* is one patient, visit and side, usually of
40 slices.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from examples.common.terminal import quoted

SIDES = ("left", "right")
NAME_FORMAT = "OAI<7 digits>_BaseLine_<n>[_]de3d1_SAG_3D_DESS_WE_<SIDE>.nii.gz_<k>.png"

# ASCII, because without it "ignore case" also lets the long s and the Kelvin sign pass for s and k.
_NAME = re.compile(
    r"OAI(?P<patient>[0-9]{7})_BaseLine_(?P<visit>[0-9]{1,9})(?P<gap>_?)de3d1_SAG_3D_DESS_WE_"
    r"(?P<side>LEFT|L_E_F_T|RIGHT|R_I_G_H_T)\.nii\.gz_(?P<slice>[0-9]{1,9})\.png",
    re.IGNORECASE | re.ASCII,
)
_SIDE_WORD = re.compile(r"(?<![a-z])(?:LEFT|L_E_F_T|RIGHT|R_I_G_H_T)(?![a-z])", re.IGNORECASE | re.ASCII)
_SYSTEM_FILES = frozenset({"thumbs.db", ".ds_store", "desktop.ini", ".lock"})  # the last one is of these commands


@dataclass(frozen=True)
class FileName:
    """Parts of a file name: `spelling` is the side as written, `underscore` is True for `_de3d1`."""

    patient: str
    visit: int
    side: str
    slice: int
    spelling: str
    underscore: bool


@dataclass(frozen=True)
class ImageFile:
    """An image file: its POSIX path relative to the data folder, and the parts of its name."""

    path: str
    name: FileName

    @property
    def volume(self) -> tuple[str, int, str]:
        """Patient, visit and side, which the slices of one scan share."""
        return self.name.patient, self.name.visit, self.name.side


@dataclass(frozen=True)
class Problem:
    """Finding of the audit about `image`, and about `other` if two files are concerned."""

    kind: str
    image: str
    other: str
    detail: str


@dataclass(frozen=True)
class Remedy:
    """Way to fix a kind of problem, and the treatment of the files if the problem is allowed."""

    fix: str
    allowed: str


PROBLEM_KINDS: Mapping[str, Remedy] = {
    "unparsed": Remedy(f"rename the file to {NAME_FORMAT}, or move it away", "the file is left out"),
    "unreadable": Remedy("unpack the file again from AKOA_Analysis.zip", "the file is left out"),
    "disagreeing": Remedy("move the file to the folder of its side", "the file is left out"),
    "duplicates": Remedy("delete one of the two files", "the first by path is kept, others left out"),
    "near-duplicates": Remedy("find out whether two patients are one; delete a copy", "both are kept"),
    "contradicting": Remedy("look at both images and correct the side of one", "both are kept"),
}


def parse_name(name: str) -> FileName:
    """Parse a file name, in any case and spelling.

    Raises:
        ValueError: The name is not of the form `NAME_FORMAT`, with LEFT or RIGHT (or spaced, L_E_F_T) as its side.

    Example:
        >>> parse_name("OAI9000099_BaseLine_3de3d1_SAG_3D_DESS_WE_R_I_G_H_T.nii.gz_7.png").side
        'right'
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name {quoted(name)} is not of the form {NAME_FORMAT} with SIDE left or right")
    return FileName(
        patient=match["patient"],
        visit=int(match["visit"]),
        side=match["side"].replace("_", "").lower(),
        slice=int(match["slice"]),
        spelling=match["side"],
        underscore=bool(match["gap"]),
    )


def folder_sides(path: str) -> set[str]:
    """Sides among the names of the folders of a path, such as `Left/` and `RIGHT/`."""
    return {part.lower() for part in PurePosixPath(path).parts[:-1]} & set(SIDES)


def name_sides(path: str) -> set[str]:
    """Sides that the file name of a path contains as words, such as `_RIGHT.` and `_R_I_G_H_T.`.

    Example:
        >>> name_sides("right/knee-L_E_F_T (1).png")
        {'left'}
    """
    return {word.replace("_", "").lower() for word in _SIDE_WORD.findall(PurePosixPath(path).name)}


def is_system_file(path: str) -> bool:
    """True for files that an operating system adds (Thumbs.db, .DS_Store, ._*), which are not data."""
    name = PurePosixPath(path).name
    return name.lower() in _SYSTEM_FILES or name.startswith("._")


def is_candidate(path: str) -> bool:
    """True for files whose names must parse: PNG files, and all with OAI in their name, but no system files."""
    name = PurePosixPath(path).name.lower()
    return (name.endswith(".png") or "oai" in name) and not is_system_file(path)


def list_files(root: Path) -> list[str]:
    """List the POSIX paths of all files under `root`, relative to it, sorted by code point.

    Upper case thus comes before lower case on every system. Links are followed, also out of the folder, and each real
    folder is visited once. Pipes, sockets, devices, broken links and folders with the name of a PNG file are listed
    too: they cannot be read, and whoever reads them reports it.

    Raises:
        FileNotFoundError: `root` is not a folder.
        OSError: A folder below it cannot be listed; skipping it would silently lose patients.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} does not exist or is not a folder")
    paths: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()  # of a folder linked twice, the same name is met first on every system
        files += [name for name in subfolders if name.lower().endswith(".png")]
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(paths)


def classify_files(paths: Iterable[str]) -> tuple[list[ImageFile], list[str], list[Problem]]:
    """Sort files into image files, ignored files, and problems (unparsed, disagreeing)."""
    files, ignored, problems = [], [], []
    for path in sorted(paths):
        if not is_candidate(path):
            ignored.append(path)
            continue
        try:
            check_path(path)
            file = ImageFile(path, parse_name(PurePosixPath(path).name))
        except ValueError as error:
            problems.append(Problem("unparsed", path, "", str(error)))
            continue
        folders = folder_sides(path)
        if folders - {file.name.side}:
            detail = f"folder {'/'.join(sorted(folders))}, name {file.name.spelling}"
            problems.append(Problem("disagreeing", path, "", detail))
        else:
            files.append(file)
    return files, ignored, problems


def drop_duplicates(files: Iterable[ImageFile]) -> tuple[list[ImageFile], list[Problem]]:
    """Keep the first by path of all files with the same patient, visit, side and slice."""
    first: dict[tuple[str, int, str, int], ImageFile] = {}
    problems = []
    for file in sorted(files, key=lambda file: file.path):
        kept = first.setdefault((*file.volume, file.name.slice), file)
        if kept is not file:
            detail = "patient {}, visit {}, {}, slice {} is in both".format(*file.volume, file.name.slice)
            problems.append(Problem("duplicates", file.path, kept.path, detail))
    return list(first.values()), problems


def check_path(image: str) -> None:
    """Check the path of an image.

    Raises:
        ValueError: The path leaves the data folder on some system, cannot be printed, or is not in its shortest form,
            so that two paths could be the same file.
    """
    # A backslash and a drive are parts of a path on Windows only.
    outside = image.startswith("/") or ".." in image.split("/") or "\\" in image or image[1:2] == ":"
    if outside or not image.isprintable() or str(PurePosixPath(image)) != image or image == ".":
        raise ValueError(
            f"image is {quoted(image)}, need a POSIX path inside the data folder, "
            "without '.', '..', '//', backslash, drive or control characters"
        )


def _raise(error: OSError) -> None:
    raise error
