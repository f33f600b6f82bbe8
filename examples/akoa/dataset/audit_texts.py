"""Text output of the audit of a folder: its contents, their split and the problems. File names are escaped."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from examples.akoa.dataset import file_names, labels
from examples.akoa.dataset.file_names import PROBLEM_KINDS, ImageFile, Problem
from examples.akoa.dataset.labels import Row
from examples.common.terminal import printable


def summarize(files: Sequence[ImageFile], rows: Sequence[Row], ignored: Sequence[str], sizes: Counter[str]) -> str:
    """Return a summary of the folder and its split. It counts only images that are used."""
    spellings = Counter(file.name.spelling for file in files)
    gaps = Counter("n_de3d1" if file.name.underscore else "nde3d1" for file in files)
    slices = Counter(Counter(file.volume for file in files).values())
    lines = [
        f"ignored     {printable(_counts(Counter(map(_file_category, ignored))))}",
        f"size        {_counts(sizes)}",
        f"spelling    {_counts(spellings)}",
        f"visit       {_counts(gaps)}",
        f"side        {_counts(Counter(file.name.side for file in files))}",
        "slices      " + (", ".join(f"{k} in {n:,} volumes" for k, n in sorted(slices.items()))),
        "",
        f"{'split':8} {'patients':>9} {'volumes':>9} {'images':>9} {'right':>8}",
    ]
    parts = [*labels.SPLITS, *sorted({row.split for row in rows} - set(labels.SPLITS))]
    rows_by_part = {part: [row for row in rows if row.split == part] for part in parts}
    lines += [_split_line(part, inside) for part, inside in rows_by_part.items() if inside]
    return "\n".join([*lines, *([_split_line("all", rows)] if rows else [])])


def describe_problems(problems: Sequence[Problem], allowed: Collection[str], num_examples: int, table: Path) -> str:
    """Return a description of the problems of each kind: their number, examples, and how to fix or allow them.

    Args:
        problems: All problems.
        allowed: Kinds that are allowed.
        num_examples: Largest number of problems of each kind to show.
        table: File with all problems.
    """
    lines = [] if problems else ["no problems found"]
    for kind, remedy in PROBLEM_KINDS.items():
        matching = [problem for problem in problems if problem.kind == kind]
        if not matching:
            continue
        lines.append(f"\n{len(matching):,} {kind}{' (allowed)' if kind in allowed else ''}")
        for problem in matching[:num_examples]:
            other = f" and {problem.other}" if problem.other else ""
            lines.append(printable(f"    {problem.image}{other}: {problem.detail}"))
        if len(matching) > num_examples:
            lines.append(f"    ... all {len(matching):,} in {printable(table)}")
        lines.append(f"  to fix:   {remedy.fix}")
        lines.append(f"  to allow: --allow {kind}; then {remedy.allowed}")
    return "\n".join(lines)


def _file_category(path: str) -> str:
    """Category of an ignored file for the summary: system files by name, all others by extension."""
    name = PurePosixPath(path).name
    if name.startswith("._"):  # macOS adds one of these to every file of a ZIP
        return "._*"
    return name if file_names.is_system_file(path) else PurePosixPath(name).suffix.lower() or "no extension"


def _counts(counts: Counter[str]) -> str:
    """Return counts as text, sorted by key."""
    return ", ".join(f"{key} {n:,}" for key, n in sorted(counts.items())) or "none"


def _split_line(name: str, rows: Sequence[Row]) -> str:
    """Return a line of the table of the split."""
    patients = len({row.patient for row in rows})
    volumes = len({(row.patient, row.visit, row.side) for row in rows})
    right = sum(row.side == "right" for row in rows) / len(rows)
    return f"{name:8} {patients:9,} {volumes:9,} {len(rows):9,} {right:8.1%}"
