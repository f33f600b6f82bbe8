"""Split of the patients into training, validation and test, or into folds.

The split uses no random number generator: it draws from SHA-256 of the seed and the patient number, so that one seed
gives one split on every system, in every version and for every layout of the files.

The split is over patients: all knees of all visits of a patient are in the same part.

For a cross-validation the `split` column contains `fold0` to `fold<K-1>`. Run i tests on fold i, validates on fold i+1
(modulo K) and trains on the rest: `as_fold(rows, i)` assigns these roles.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256

from examples.akoa.dataset.file_names import ImageFile
from examples.akoa.dataset.labels import SPLITS, Row, audit_split

MAX_FOLDS = 10_000
_DRAWS = 300  # orders tried per seed; the best balanced one is kept


def three_way(fractions: Sequence[float]) -> dict[str, float]:
    """Shares of train, val and test, as `split_patients` takes them.

    Raises:
        ValueError: The number of fractions is not three.
    """
    if len(fractions) != len(SPLITS):
        raise ValueError(f"fractions: got {len(fractions)} numbers, need one each for {SPLITS}")
    return dict(zip(SPLITS, fractions, strict=True))


def k_fold(folds: int) -> dict[str, float]:
    """Equal shares of fold0 to fold<K-1>.

    Raises:
        ValueError: The number of folds is below 3 (a run needs one each for test, validation and training) or above
            `MAX_FOLDS`.
    """
    if not len(SPLITS) <= folds <= MAX_FOLDS:
        raise ValueError(f"folds: got {folds}, need 3 (test, validation, training) to {MAX_FOLDS:,}")
    return {f"fold{i}": 1 / folds for i in range(folds)}


def split_sizes(patients: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Number of patients in each part: the fractions rounded by largest remainder, but never zero.

    Every part is within one patient of its fraction, unless it would be empty: then it takes one patient from the
    largest part.

    Raises:
        ValueError: A fraction is not above 0, the fractions do not add to 1, or there are fewer patients than parts.

    Example:
        >>> split_sizes(101, {"train": 0.6, "val": 0.2, "test": 0.2})
        {'train': 61, 'val': 20, 'test': 20}
    """
    shown = " ".join(f"{name} {share:g}" for name, share in fractions.items())
    if not all(share > 0 for share in fractions.values()):
        raise ValueError(f"fractions: got {shown}; each must be above 0, or its part is empty")
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions: got {shown}, which add to {sum(fractions.values()):g}, not 1")
    if patients < len(fractions):
        raise ValueError(f"got {patients} patients, too few for {len(fractions)} parts")
    shares = {name: Fraction(f).limit_denominator(10**6) for name, f in fractions.items()}
    exact = {name: share * patients / sum(shares.values()) for name, share in shares.items()}
    sizes = {name: int(size) for name, size in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: exact[name] - sizes[name], reverse=True)
    for name in by_remainder[: patients - sum(sizes.values())]:
        sizes[name] += 1
    for name, size in sizes.items():
        if size == 0:
            sizes[max(sizes, key=lambda other: sizes[other])] -= 1
            sizes[name] = 1
    return sizes


def split_patients(counts: Mapping[str, tuple[int, int]], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Assign each patient to a part of the split, balanced over sides.

    Patients are ordered by stratum (right only, left only, both), in an order drawn from the seed, and the parts are
    interleaved along it so that every stretch contains each part in proportion within 1.5 patients. Among `_DRAWS` such
    orders, the one with the best balance of left and right images is used.

    Args:
        counts: Numbers of left and of right images of each patient.
        fractions: Share of patients of each part, above 0, with sum 1.
        seed: Any integer; another seed gives another split.

    Returns:
        Part of each patient, independent of the order of `counts`.

    Raises:
        ValueError: As in `split_sizes`.
    """
    sizes = split_sizes(len(counts), fractions)
    parts = list(sizes)
    turns = [parts[i] for i in _interleave(list(sizes.values()))]
    draws = (dict(zip(_draw_order(counts, seed, draw), turns, strict=True)) for draw in range(_DRAWS))
    return min(draws, key=lambda split: _imbalance(split, counts, sizes))


def make_rows(files: Iterable[ImageFile], fractions: Mapping[str, float], seed: int) -> list[Row]:
    """Split image files by patient; rows are sorted by path, independent of the order of `files`."""
    ordered = sorted(files, key=lambda file: file.path)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for file in ordered:
        counts[file.name.patient][file.name.side] += 1
    sides = {patient: (count["left"], count["right"]) for patient, count in counts.items()}
    split = split_patients(sides, fractions, seed)
    return [
        Row(f.path, f.name.patient, f.name.visit, f.name.side, f.name.slice, split[f.name.patient]) for f in ordered
    ]


def as_fold(rows: Sequence[Row], fold: int) -> list[Row]:
    """Assign the roles of run `fold` of a cross-validation: fold i is test, fold i+1 (modulo K) val, the rest train.

    Raises:
        ValueError: The rows are not split into folds, or `fold` is not one of them.
    """
    audit_split(rows)
    folds = len({row.split for row in rows} - set(SPLITS))
    if not 0 <= fold < folds:
        raise ValueError(f"fold {fold} is not among the {folds} folds; write them with --folds")
    roles = {f"fold{fold}": "test", f"fold{(fold + 1) % folds}": "val"}
    return [replace(row, split=roles.get(row.split, "train")) for row in rows]


def _digest(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest(), "big")


def _draw_order(counts: Mapping[str, tuple[int, int]], seed: int, draw: int) -> list[str]:
    """Patients by stratum, shuffled within each and rotated by a random offset, so that no stratum is always first."""
    order = sorted(
        counts,
        key=lambda patient: (
            *(count > 0 for count in counts[patient]),
            _digest(f"{seed}/{draw}/{patient}"),
        ),
    )
    start = _digest(f"{seed}/{draw}") % len(order)
    return order[start:] + order[:start]


def _interleave(sizes: Sequence[int]) -> list[int]:
    """Order of parts that contains part i `sizes[i]` times, with every prefix in proportion within 1.

    Reference: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
    """
    total, slack = sum(sizes), 2 * len(sizes) - 2
    taken = [0] * len(sizes)
    order = []
    for turn in range(1, total + 1):
        owed = [slack * (s * turn - total * n) for s, n in zip(sizes, taken, strict=True)]
        deadlines = (
            (Fraction(total * (slack - 1) - owed[i], sizes[i]), i) for i in range(len(sizes)) if owed[i] >= total
        )
        _, chosen = min(deadlines)
        taken[chosen] += 1
        order.append(chosen)
    return order


def _imbalance(split: Mapping[str, str], counts: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> int:
    """Excess or deficit of images, summed over parts and sides, times the number of patients."""
    patients = len(counts)
    totals = [sum(pair[side] for pair in counts.values()) for side in range(2)]
    actual = {part: [0, 0] for part in sizes}
    for patient, part in split.items():
        for side in range(2):
            actual[part][side] += counts[patient][side]
    return sum(abs(actual[part][side] * patients - totals[side] * sizes[part]) for part in sizes for side in range(2))
