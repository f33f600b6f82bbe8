"""Weight mappings: tables that translate the state dict of another project to ours, and back.

A mapping is a list of entries. Each entry names one or several of our tensors, one or several of theirs, and the
transform between them; most only rename. Every tensor of a state dict is used exactly once, in both directions.

Example:
    >>> import torch
    >>> from perceiver_core.interop.weight_mapping import Entry, WeightMapping, fused, renamed
    >>> key_value = Entry(("key.weight", "value.weight"), "to_kv.weight", fused(2))
    >>> mapping = WeightMapping([*renamed({"query": "to_q"}, parts=["weight"]), key_value]).within("read.", "attn.")
    >>> ours = mapping.load({"attn.to_q.weight": torch.rand(8, 5), "attn.to_kv.weight": torch.rand(16, 3)})
    >>> {name: tuple(tensor.shape) for name, tensor in ours.items()}
    {'read.query.weight': (8, 5), 'read.key.weight': (8, 3), 'read.value.weight': (8, 3)}
    >>> mapping.save(ours)["attn.to_kv.weight"].shape
    torch.Size([16, 3])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

Names: TypeAlias = str | tuple[str, ...]  # of one tensor, or of a group
Tensors: TypeAlias = Tensor | Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensor]

NUM_SHOWN = 5  # names of each sort in an error


class Transform(NamedTuple):
    """Conversion of the tensors of an entry, and its inverse; both also accept meta tensors.

    A single name stands for a tensor, a tuple of names for a sequence of tensors. A tensor may be returned where a
    sequence is expected: it is split along its first axis.

    Args:
        load: Converts their tensors to ours.
        save: Converts our tensors to theirs.
    """

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


def rearranged(pattern: str, **sizes: int) -> Transform:
    """Return a transform by `einops.rearrange`: transposed, reshaped, stacked, fused or interleaved weights.

    A group of tensors is stacked along a new first axis before, or split along the first axis afterwards.

    Args:
        pattern: Pattern of einops from their layout to ours, `"theirs -> ours"`. The reverse pattern saves.
        sizes: Lengths of axes that shapes do not determine.

    Example:
        >>> import torch
        >>> from perceiver_core.interop.weight_mapping import rearranged
        >>> grid = rearranged("(height width) dim -> height width dim", height=7)
        >>> grid.load(torch.rand(35, 3)).shape, grid.save(torch.rand(7, 5, 3)).shape
        (torch.Size([7, 5, 3]), torch.Size([35, 3]))
        >>> gated = rearranged("parts rows ... -> (parts rows) ...", parts=2)  # two matrices of theirs are one of ours
        >>> gated.load([torch.rand(3, 5), torch.rand(3, 5)]).shape
        torch.Size([6, 5])
    """
    theirs, ours = (side.strip() for side in pattern.split("->"))

    def apply(pattern: str, tensors: Tensors) -> Tensor:
        return rearrange(tensors if isinstance(tensors, Tensor) else list(tensors), pattern, **sizes)

    return Transform(partial(apply, f"{theirs} -> {ours}"), partial(apply, f"{ours} -> {theirs}"))


def fused(parts: int, *, num_heads: int = 1) -> Transform:
    """Return the transform for one matrix of theirs that is several of ours, concatenated along the rows.

    Args:
        parts: Number of ours, which have equally many rows: 3 for query, key and value.
        num_heads: Number of heads if the parts are interleaved by head: rows of the first head of each part come first.
    """
    return rearranged("(heads parts rows) ... -> parts (heads rows) ...", parts=parts, heads=num_heads)


def split(*sizes: int) -> Transform:
    """Return the transform of a tensor of theirs that holds several of ours, of these lengths along the first axis."""
    return Transform(lambda theirs: torch.split(_one(theirs), list(sizes)), lambda ours: torch.cat(list(ours)))


def constant(value: Tensor) -> Transform:
    """Return the transform for a tensor of ours that theirs lacks; the names of theirs are `()`."""
    return Transform(lambda _: value.clone(), lambda _: ())


UNCHANGED = Transform(lambda theirs: theirs, lambda ours: ours)
TRANSPOSED = rearranged("... input output -> ... output input")
STACKED = rearranged("parts ... -> parts ...")  # one tensor of theirs holds a group of ours along its first axis


class Entry(NamedTuple):
    """One entry of a mapping: name or names of our tensors, name or names of theirs, and the transform."""

    ours: Names
    theirs: Names
    transform: Transform = UNCHANGED


def renamed(names: Mapping[str, str], *, parts: Sequence[str] = ("weight", "bias")) -> list[Entry]:
    """Return entries for modules that are only renamed.

    Args:
        names: Their name of each module, by our name.
        parts: Names of the tensors of a module.
    """
    return [Entry(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in names.items() for part in parts]


class WeightMapping:
    """Table that converts state dicts of another project to ours, and back. Iterating over it yields its entries.

    Args:
        entries: The lines of the table.

    Raises:
        ValueError: A name occurs in two entries.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = list(entries)
        self.ours = [name for entry in self.entries for name in _as_tuple(entry.ours)]
        self.theirs = [name for entry in self.entries for name in _as_tuple(entry.theirs)]
        for side, names in (("ours", self.ours), ("theirs", self.theirs)):
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{side} must name a tensor once; {repeated[:NUM_SHOWN]} stand in several entries")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def within(self, ours: str, theirs: str) -> WeightMapping:
        """Return the table for the parts of a larger model, with prefixes that end with the separator."""
        return WeightMapping(Entry(_prefixed(ours, e.ours), _prefixed(theirs, e.theirs), e.transform) for e in self)

    def load(self, theirs: State, like: State | None = None) -> dict[str, Tensor]:
        """Convert their state dict to ours. Tensors are views of theirs if the transform allows it.

        Args:
            theirs: Their state dict.
            like: State dict of our model, whose shapes the result must have. Without it, shapes are not checked.

        Raises:
            ValueError: Tensors are missing, unexpected or of another shape; they are listed by their names in `theirs`.
        """
        self.check(theirs, like)
        return _translated(((entry.theirs, entry.transform.load, entry.ours) for entry in self), theirs)

    def save(self, ours: State) -> dict[str, Tensor]:
        """Convert our state dict to theirs.

        Args:
            ours: State dict of our model, with one name for each tensor.

        Raises:
            ValueError: Tensors are missing or unexpected; they are listed by their names in `ours`.
        """
        _raise_if(_differences_of_names(ours, self.ours))
        return _translated(((entry.ours, entry.transform.save, entry.theirs) for entry in self), ours)

    def check(self, theirs: State, like: State | None = None) -> None:
        """Raise the errors of `load` without loading; tensors on the meta device suffice."""
        differences = _differences_of_names(theirs, self.theirs)
        if like is not None:
            expected = self.save({name: tensor.to("meta") for name, tensor in like.items()})
            misfits = [_misfit(name, theirs[name], tensor) for name, tensor in expected.items() if name in theirs]
            differences += [misfit for misfit in misfits if misfit][:NUM_SHOWN]
        _raise_if(differences)


def _as_tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _prefixed(prefix: str, names: Names) -> Names:
    return f"{prefix}{names}" if isinstance(names, str) else tuple(f"{prefix}{name}" for name in names)


def _one(tensors: Tensors) -> Tensor:
    if not isinstance(tensors, Tensor):
        raise ValueError(f"one tensor is expected; got {len(tensors)}")
    return tensors


def _translated(steps: Iterable[tuple[Names, Callable[[Tensors], Tensors], Names]], state: State) -> dict[str, Tensor]:
    """Apply steps `(argument names, function, result names)` to the tensors of a state dict; return the results."""
    translated: dict[str, Tensor] = {}
    for sources, function, targets in steps:
        tensors = state[sources] if isinstance(sources, str) else [state[name] for name in sources]
        try:
            results = function(tensors)
            results = [_one(results)] if isinstance(targets, str) else results
            translated |= zip(_as_tuple(targets), results, strict=True)
        except (RuntimeError, ValueError) as error:  # EinopsError is a RuntimeError
            shapes = [tuple(state[name].shape) for name in _as_tuple(sources)]
            raise ValueError(f"{targets} cannot be made of {sources} with shapes {shapes}: {error}") from error
    return translated


def _differences_of_names(names: Collection[str], expected: Collection[str]) -> list[str]:
    missing, unexpected = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    differences = [f"missing {missing[:NUM_SHOWN]}"] if missing else []
    if unexpected:
        marked = all(name.startswith("module.") for name in names)
        hint = " (take off the module. at the start of all names, which DataParallel puts there)" if marked else ""
        differences.append(f"unexpected {unexpected[:NUM_SHOWN]}{hint}")
    return differences


def _misfit(name: str, tensor: Tensor, expected: Tensor) -> str:
    """Return the difference of a tensor from the expected shape and dtype; empty if there is none."""
    if tensor.shape != expected.shape:
        return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
    floating = expected.is_floating_point()
    if tensor.dtype != expected.dtype and not (floating and tensor.is_floating_point()):
        return f"{name} is of {tensor.dtype}, expected {'a floating point dtype' if floating else expected.dtype}"
    return ""


def _raise_if(differences: list[str]) -> None:
    if differences:
        raise ValueError(f"weights do not fit the model: {'; '.join(differences)}")
