"""Weight mappings: tables that translate the state dict of another project to ours, and back.

A mapping is a list of entries. Each entry names one or several of our tensors, one or several of theirs, and the
transform between them; most only rename. Every tensor of a state dict is used exactly once, in both directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from einops import rearrange
from torch import Tensor

from perceiver_core.checkpoints.state import spec_differences, tensor_specs

Names: TypeAlias = str | tuple[str, ...]  # of one tensor, or of a group
Tensors: TypeAlias = Tensor | Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensor]

ABSENT = torch.empty(0)


class Transform(NamedTuple):
    """Functions that convert the tensors of an entry from theirs to ours, and back; both also accept meta tensors.

    A single name stands for a tensor, a tuple of names for a sequence of tensors. A tensor may be returned where a
    sequence is expected: it is split along its first axis.
    """

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


def rearranged(pattern: str, **sizes: int) -> Transform:
    """Return a transform by `einops.rearrange`: transposed, reshaped, stacked, fused or interleaved weights.

    A group of tensors is stacked along a new first axis before, or split along the first axis afterwards. The pattern
    is that from their layout to ours, the reverse pattern saves; `sizes` are of axes that shapes do not determine.
    """
    theirs, ours = pattern.split(" -> ")

    def apply(pattern: str, tensors: Tensors) -> Tensor:
        return rearrange(tensors if isinstance(tensors, Tensor) else list(tensors), pattern, **sizes)

    return Transform(partial(apply, pattern), partial(apply, f"{ours} -> {theirs}"))


def fused(parts: int, *, num_heads: int = 1) -> Transform:
    """Return the transform of one matrix of theirs that holds `parts` of ours, with equally many rows each.

    With `num_heads`, the parts are interleaved by head: the rows of the first head of each part come first.
    """
    return rearranged("(heads parts rows) ... -> parts (heads rows) ...", parts=parts, heads=num_heads)


def split(*sizes: int) -> Transform:
    """Return the transform of one tensor of theirs that holds several of ours, of these sizes along the first axis."""
    return Transform(lambda theirs: torch.split(cast(Tensor, theirs), list(sizes)), lambda ours: torch.cat(list(ours)))


UNCHANGED = Transform(lambda theirs: theirs, lambda ours: ours)
TRANSPOSED = rearranged("... input output -> ... output input")


class Entry(NamedTuple):
    """One entry of a mapping: name or names of our tensors, name or names of theirs, and the transform."""

    ours: Names
    theirs: Names
    transform: Transform = UNCHANGED


def renamed(names: Mapping[str, str], *, parts: Sequence[str] = ("weight", "bias")) -> list[Entry]:
    """Return entries for modules that are only renamed: `names` maps ours to theirs; `parts` are their tensors."""
    return [Entry(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in names.items() for part in parts]


class WeightMapping:
    """Table that converts state dicts of another project to ours, and back. Iterating over it yields its entries.

    Raises:
        ValueError: A name occurs in two entries.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = list(entries)
        self.ours = [name for entry in self.entries for name in _as_tuple(entry.ours)]
        self.theirs = [name for entry in self.entries for name in _as_tuple(entry.theirs)]
        for side, names in (("ours", self.ours), ("theirs", self.theirs)):
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{side} must name a tensor once; {repeated[:5]} stand in several entries")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def within(self, ours: str, theirs: str) -> WeightMapping:
        """Return the table for the parts of a larger model, with prefixes that end with the separator."""
        return WeightMapping(Entry(_prefixed(ours, e.ours), _prefixed(theirs, e.theirs), e.transform) for e in self)

    def load(self, theirs: State, like: State | None = None) -> dict[str, Tensor]:
        """Convert their state dict to ours. Tensors are views of theirs if the transform allows it.

        Raises:
            ValueError: Tensors are missing or unexpected, or do not fit our state dict `like`, if it is passed. They
                are listed by their names in `theirs`.
        """
        self.check(theirs, like)
        return _translated(((entry.theirs, entry.transform.load, entry.ours) for entry in self), theirs)

    def save(self, ours: State) -> dict[str, Tensor]:
        """Convert our state dict, with one name for each tensor, to theirs; raise ValueError if it has other names."""
        _check(ours, {name: ours.get(name, ABSENT) for name in self.ours})
        return _translated(((entry.ours, entry.transform.save, entry.theirs) for entry in self), ours)

    def check(self, theirs: State, like: State | None = None) -> None:
        """Raise the errors of `load` without loading; tensors on the meta device suffice."""
        if like is None:
            _check(theirs, {name: theirs.get(name, ABSENT) for name in self.theirs})
        else:
            _check(theirs, self.save({name: tensor.to("meta") for name, tensor in like.items()}))


def _check(actual: State, expected: State) -> None:
    """Raise ValueError unless tensors have the names, shapes and dtypes that are expected."""
    if different := spec_differences(tensor_specs(dict(expected)), tensor_specs(dict(actual))):
        marked = bool(actual) and all(name.startswith("module.") for name in actual)
        hint = ". Take off the module. at the start of all names, which DataParallel puts there" * marked
        raise ValueError(f"weights do not fit the model: {different}{hint}")


def _as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _prefixed(prefix: str, names: Names) -> Names:
    return f"{prefix}{names}" if isinstance(names, str) else tuple(f"{prefix}{name}" for name in names)


def _translated(steps: Iterable[tuple[Names, Callable[[Tensors], Tensors], Names]], state: State) -> dict[str, Tensor]:
    """Apply steps `(argument names, function, result names)` to the tensors of a state dict; return the results."""
    translated: dict[str, Tensor] = {}
    for sources, function, targets in steps:
        tensors = state[sources] if isinstance(sources, str) else [state[name] for name in sources]
        try:
            results = function(tensors)
            if isinstance(targets, str):
                results = [results] if isinstance(results, Tensor) else results
            translated |= zip(_as_tuple(targets), results, strict=True)
        except (RuntimeError, ValueError) as error:  # EinopsError is a RuntimeError
            shapes = [tuple(state[name].shape) for name in _as_tuple(sources)]
            raise ValueError(f"{targets} cannot be made of {sources} with shapes {shapes}: {error}") from error
    return translated
