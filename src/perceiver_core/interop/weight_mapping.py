"""Tables that convert the state dict of a source project to a state dict of this library, and back.

In the code, `theirs` is the source project (transformers, Haiku or perceiver-pytorch) and `ours` is this library.
A mapping is a list of entries. Each entry names tensors on both sides, usually one on each, and the transform between
them. Most entries only rename. Each tensor of a state dict is used exactly once, in both directions.
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

Names: TypeAlias = str | tuple[str, ...]  # name of one tensor, or names of several
Tensors: TypeAlias = Tensor | Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensor]

ABSENT = torch.empty(0)


class Transform(NamedTuple):
    """Pair of functions: `load` converts the source project's tensors to this library's, `save` converts them back.

    An entry with a single name passes a tensor, and an entry with a tuple of names passes a list of tensors. If the
    result has a tuple of names, the function returns a sequence of tensors, or one tensor to be split along its first
    axis. Both functions also accept meta tensors.
    """

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


def rearranged(pattern: str, **sizes: int) -> Transform:
    """Return a transform that calls `einops.rearrange`: to transpose, reshape, stack, fuse or interleave weights.

    Several input tensors are stacked along a new first axis. Several outputs are slices along the first axis.

    Args:
        pattern: Pattern from the source project's layout to this library's. `save` uses the reversed pattern.
        sizes: Axis sizes that the shapes do not determine.
    """
    theirs, ours = pattern.split(" -> ")

    def apply(pattern: str, tensors: Tensors) -> Tensor:
        return rearrange(tensors if isinstance(tensors, Tensor) else list(tensors), pattern, **sizes)

    return Transform(partial(apply, pattern), partial(apply, f"{ours} -> {theirs}"))


def fused(parts: int, *, num_heads: int = 1) -> Transform:
    """Return the transform that splits a fused source matrix into `parts` matrices with equal numbers of rows.

    With `num_heads`, the source rows are ordered by head: the rows of head 0 in all parts, then head 1, and so on.
    """
    return rearranged("(heads parts rows) ... -> parts (heads rows) ...", parts=parts, heads=num_heads)


def split(*sizes: int) -> Transform:
    """Return the transform that splits one source tensor along the first axis into tensors of these `sizes`."""
    return Transform(lambda theirs: torch.split(cast(Tensor, theirs), list(sizes)), lambda ours: torch.cat(list(ours)))


UNCHANGED = Transform(lambda theirs: theirs, lambda ours: ours)
TRANSPOSED = rearranged("... input output -> ... output input")


class Entry(NamedTuple):
    """Entry of a mapping: tensor name or names in this library, name or names in the source project, and transform."""

    ours: Names
    theirs: Names
    transform: Transform = UNCHANGED


def renamed(names: Mapping[str, str], *, parts: Sequence[str] = ("weight", "bias")) -> list[Entry]:
    """Return entries for modules that are only renamed.

    Args:
        names: Source project's name of each module, by its name in this library.
        parts: Names of the tensors in each module.
    """
    return [Entry(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in names.items() for part in parts]


class WeightMapping:
    """Table that converts the source project's state dicts to this library's, and back. Iterating yields its entries.

    Raises:
        ValueError: If a tensor name occurs twice on the same side.
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
        """Return the mapping with prefixes added to all names, for a submodule of a larger model.

        Args:
            ours: Prefix in this library, including the separator at its end.
            theirs: Prefix in the source project, including the separator.
        """
        return WeightMapping(Entry(_prefixed(ours, e.ours), _prefixed(theirs, e.theirs), e.transform) for e in self)

    def load(self, theirs: State, like: State | None = None) -> dict[str, Tensor]:
        """Convert the source project's state dict to this library's.

        Args:
            theirs: Source state dict.
            like: State dict of this library's model, to compare shapes and dtypes with; None to compare names only.

        Returns:
            The state dict for this library. Its tensors are views of the source tensors where the transform allows it.

        Raises:
            ValueError: If source tensors are missing, unexpected, or of a wrong shape or dtype (any floating-point
                dtype fits any other). The message lists source names.
        """
        self.check(theirs, like)
        return _translated(((entry.theirs, entry.transform.load, entry.ours) for entry in self), theirs)

    def save(self, ours: State) -> dict[str, Tensor]:
        """Convert this library's state dict to the source project's.

        Args:
            ours: State dict of this library's model, with tied tensors under one name only.

        Raises:
            ValueError: If the names in `ours` are not the names in the mapping.
        """
        _check(ours, {name: ours.get(name, ABSENT) for name in self.ours})
        return _translated(((entry.ours, entry.transform.save, entry.theirs) for entry in self), ours)

    def check(self, theirs: State, like: State | None = None) -> None:
        """Check the source project's state dict as `load` does, without converting it.

        Tensors on the meta device suffice. Without `like`, only the names are checked.
        """
        if like is None:
            _check(theirs, {name: theirs.get(name, ABSENT) for name in self.theirs})
        else:
            _check(theirs, self.save({name: tensor.to("meta") for name, tensor in like.items()}))


def _check(actual: State, expected: State) -> None:
    """Check that tensors have the expected names, shapes and dtypes. Any two floating-point dtypes match."""
    if different := spec_differences(tensor_specs(dict(expected)), tensor_specs(dict(actual))):
        marked = bool(actual) and all(name.startswith("module.") for name in actual)
        hint = ". Take off the module. at the start of all names, which DataParallel puts there" * marked
        raise ValueError(f"weights do not fit the model: {different}{hint}")


def _as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _prefixed(prefix: str, names: Names) -> Names:
    return f"{prefix}{names}" if isinstance(names, str) else tuple(f"{prefix}{name}" for name in names)


def _translated(steps: Iterable[tuple[Names, Callable[[Tensors], Tensors], Names]], state: State) -> dict[str, Tensor]:
    """Apply steps `(argument names, function, result names)` to the tensors of a state dict and return the results."""
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
