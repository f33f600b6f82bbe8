"""Which patients train, validate and test: in three parts, or in folds.

Unusual here: no random number generator. The split draws from SHA-256 of the seed and the patient
number, so that one seed is one split on every system, in every version and in every layout.

The split is over patients: all knees of all visits stay together.

With folds, the `split` column holds `fold0` to `fold<K-1>`. Run i of a cross-validation tests on
fold i, validates on fold i+1 (modulo K) and trains on the rest: `as_fold(rows, i)` writes that out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256

from examples.akoa.labels import SPLITS, Picture, Row, audit_split

_DRAWS = 300  # orders tried per seed; the best balanced one is kept


def three_way(fractions: Sequence[float]) -> dict[str, float]:
    """The shares of train, val and test as `split_patients` takes them."""
    if len(fractions) != len(SPLITS):
        raise ValueError(f"fractions: got {len(fractions)} numbers, need one each for {SPLITS}")
    return dict(zip(SPLITS, fractions, strict=True))


def k_fold(folds: int) -> dict[str, float]:
    """Equal shares for fold0 to fold<K-1>; at least 3, since a run tests, validates and trains."""
    if folds < len(SPLITS):
        raise ValueError(f"folds: got {folds}, need at least 3 (test, validation, training)")
    return {f"fold{i}": 1 / folds for i in range(folds)}


def split_sizes(patients: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Patients in each part: the largest-remainder rounding of the fractions, nowhere zero.

    Every part is within one patient of its fraction, unless it would be empty: then it takes one
    patient from the largest part.

    Raises:
        ValueError: a fraction is not above 0, they do not add to 1, or patients are too few.

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


def split_patients(
    pictures: Mapping[str, tuple[int, int]], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Give each patient a part of the split, balanced over sides.

    Patients stand in a row by stratum (right only, left only, both) in an order drawn from the
    seed, and the parts take turns along it so that every stretch holds each part in proportion
    within 1.5 patients. Of `_DRAWS` such orders, the one that best balances left and right pictures
    counts.

    Args:
        pictures: left and right pictures of each patient.
        fractions: share of patients of each part, above 0, adding to 1.
        seed: any integer; another seed is another split.

    Returns: the part of each patient. It does not depend on the order of `pictures`.

    Raises:
        ValueError: as `split_sizes`.
    """
    sizes = split_sizes(len(pictures), fractions)
    parts = list(sizes)
    turns = [parts[i] for i in _take_turns(list(sizes.values()))]
    draws = (dict(zip(_draw_order(pictures, seed, draw), turns, strict=True)) for draw in range(_DRAWS))
    return min(draws, key=lambda split: _imbalance(split, pictures, sizes))


def make_rows(pictures: Iterable[Picture], fractions: Mapping[str, float], seed: int) -> list[Row]:
    """Split pictures by patient; rows come sorted by path, whatever the order of `pictures`."""
    ordered = sorted(pictures, key=lambda picture: picture.image)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in ordered:
        counts[picture.name.patient][picture.name.side] += 1
    sides = {patient: (count["left"], count["right"]) for patient, count in counts.items()}
    split = split_patients(sides, fractions, seed)
    return [
        Row(p.image, p.name.patient, p.name.visit, p.name.side, p.name.slice, split[p.name.patient]) for p in ordered
    ]


def as_fold(rows: Sequence[Row], fold: int) -> list[Row]:
    """Run `fold` of a cross-validation: fold i is test, fold i+1 (modulo K) val, the rest train.

    Raises:
        ValueError: the rows hold no folds, or `fold` is not one of them.
    """
    audit_split(rows)
    folds = len({row.split for row in rows} - set(SPLITS))
    if not 0 <= fold < folds:
        raise ValueError(f"fold {fold} is not among the {folds} folds; write them with --folds")
    roles = {f"fold{fold}": "test", f"fold{(fold + 1) % folds}": "val"}
    return [replace(row, split=roles.get(row.split, "train")) for row in rows]


def _digest(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest(), "big")


def _draw_order(pictures: Mapping[str, tuple[int, int]], seed: int, draw: int) -> list[str]:
    """Patients by stratum, shuffled in each, from a random place on: no stratum is always first."""
    order = sorted(
        pictures,
        key=lambda patient: (
            *(count > 0 for count in pictures[patient]),
            _digest(f"{seed}/{draw}/{patient}"),
        ),
    )
    start = _digest(f"{seed}/{draw}") % len(order)
    return order[start:] + order[:start]


def _take_turns(sizes: Sequence[int]) -> list[int]:
    """A sequence with `sizes[i]` times i, in which every beginning is in proportion within 1.

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


def _imbalance(split: Mapping[str, str], pictures: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> int:
    """Pictures too many or too few, summed over parts and sides, times the number of patients."""
    patients = len(pictures)
    totals = [sum(counts[side] for counts in pictures.values()) for side in range(2)]
    held = {part: [0, 0] for part in sizes}
    for patient, part in split.items():
        for side in range(2):
            held[part][side] += pictures[patient][side]
    return sum(abs(held[part][side] * patients - totals[side] * sizes[part]) for part in sizes for side in range(2))
