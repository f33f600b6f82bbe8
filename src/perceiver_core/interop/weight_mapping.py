"""Weight mappings, which convert state dicts of another project to state dicts of this library and back.

In the code, `theirs` is the other project (transformers, Haiku or perceiver-pytorch) and `ours` is this library.
A mapping is a list of `Entry` tuples. An entry consists of one or more tensor names in each project, and the transform
between the tensors. Most entries only rename a tensor. Each tensor of a state dict belongs to exactly one entry.
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
    """Pair of functions: `load` converts tensors of the other project to this library, and `save` converts them back.

    If an `Entry` has one name on each side, both functions take and return one tensor. For a tuple of input names, a
    function takes a list of tensors. For a tuple of output names, it returns a sequence of tensors, or one tensor to
    unbind along the first axis. Both functions also accept meta tensors.
    """

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


def rearranged(pattern: str, **sizes: int) -> Transform:
    """Return a transform that calls `einops.rearrange`, for example to transpose, reshape, stack or split weights.

    If there are several input tensors, they are stacked along a new first axis. If there are several results, the
    rearranged tensor is unbound along its first axis.

    Args:
        pattern: einops pattern from the other project's layout to this library's. `save` uses the reversed pattern.
        sizes: Axis sizes that the tensor shapes do not determine.
    """
    theirs, ours = pattern.split(" -> ")

    def apply(pattern: str, tensors: Tensors) -> Tensor:
        return rearrange(tensors if isinstance(tensors, Tensor) else list(tensors), pattern, **sizes)

    return Transform(partial(apply, pattern), partial(apply, f"{ours} -> {theirs}"))


def fused(parts: int, *, num_heads: int = 1) -> Transform:
    """Return a transform that splits a fused matrix, such as a `qkv` weight, into matrices with equally many rows.

    Args:
        parts: Number of matrices, such as 2 for keys and values.
        num_heads: Number of heads if the rows are grouped by head: q, k and v of head 0, then q, k and v of head 1.
            1 if the rows are grouped by matrix: all of q, then all of k, then all of v.
    """
    return rearranged("(heads parts rows) ... -> parts (heads rows) ...", parts=parts, heads=num_heads)


def split(*sizes: int) -> Transform:
    """Return a transform whose `load` splits a tensor along its first axis into tensors of lengths `sizes`."""
    return Transform(lambda theirs: torch.split(cast(Tensor, theirs), list(sizes)), lambda ours: torch.cat(list(ours)))


UNCHANGED = Transform(lambda theirs: theirs, lambda ours: ours)
TRANSPOSED = rearranged("... input output -> ... output input")


class Entry(NamedTuple):
    """Tensor names in both projects, and the transform between the tensors. A `WeightMapping` is a list of these."""

    ours: Names  # name or tuple of names in this library
    theirs: Names  # name or tuple of names in the other project
    transform: Transform = UNCHANGED


def renamed(names: Mapping[str, str], *, parts: Sequence[str] = ("weight", "bias")) -> list[Entry]:
    """Return entries for modules that have a different name in the other project but the same tensors.

    Args:
        names: Dictionary from the name of each module in this library to its name in the other project.
        parts: Names of the tensors in each module.
    """
    return [Entry(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in names.items() for part in parts]


class WeightMapping:
    """List of `Entry` tuples that converts state dicts of another project to this library (`load`) and back (`save`).

    Raises:
        ValueError: If a tensor name of this library, or of the other project, occurs twice.
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
        """Return a mapping with prefixes added to all names, for a module that is part of a larger model.

        Args:
            ours: Prefix of the names in this library, including the separator at its end.
            theirs: Prefix of the names in the other project, including the separator at its end.
        """
        return WeightMapping(Entry(_prefixed(ours, e.ours), _prefixed(theirs, e.theirs), e.transform) for e in self)

    def load(self, theirs: State, like: State | None = None) -> dict[str, Tensor]:
        """Convert a state dict from the other project to this library's format.

        Args:
            theirs: State dict from the other project.
            like: State dict of the target model, used to check shapes and dtypes. If None, only the names are checked.

        Returns:
            Converted state dict. Its tensors share memory with those in `theirs` where possible.

        Raises:
            ValueError: If tensors in `theirs` are missing or unexpected.
            ValueError: If tensors in `theirs` have the wrong shape or dtype. Floating-point dtypes may differ.
        """
        self.check(theirs, like)
        return _translated(((entry.theirs, entry.transform.load, entry.ours) for entry in self), theirs)

    def save(self, ours: State) -> dict[str, Tensor]:
        """Convert a state dict of this library to a state dict of the other project.

        Args:
            ours: State dict of this library's model. It must contain each tied tensor under one name only.

        Raises:
            ValueError: If the tensor names in `ours` are not the names in the mapping.
        """
        _check(ours, {name: ours.get(name, ABSENT) for name in self.ours})
        return _translated(((entry.ours, entry.transform.save, entry.theirs) for entry in self), ours)

    def check(self, theirs: State, like: State | None = None) -> None:
        """Check a state dict of the other project without converting it. The tensors may be on the meta device.

        The arguments and errors are the same as for `load`.
        """
        if like is None:
            _check(theirs, {name: theirs.get(name, ABSENT) for name in self.theirs})
        else:
            _check(theirs, self.save({name: tensor.to("meta") for name, tensor in like.items()}))


def _check(actual: State, expected: State) -> None:
    """Check that a state dict has the expected names, shapes and dtypes. Floating-point dtypes may differ."""
    if different := spec_differences(tensor_specs(dict(expected)), tensor_specs(dict(actual))):
        marked = bool(actual) and all(name.startswith("module.") for name in actual)
        hint = ". Take off the module. at the start of all names, which DataParallel puts there" * marked
        raise ValueError(f"weights do not fit the model: {different}{hint}")


def _as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _prefixed(prefix: str, names: Names) -> Names:
    return f"{prefix}{names}" if isinstance(names, str) else tuple(f"{prefix}{name}" for name in names)


def _translated(steps: Iterable[tuple[Names, Callable[[Tensors], Tensors], Names]], state: State) -> dict[str, Tensor]:
    """Convert a state dict by calling the function of each step `(argument names, function, result names)`."""
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
