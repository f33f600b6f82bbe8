"""Constructor arguments of another library's model, checked against its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from perceiver_core import checks
from perceiver_core.registry import Json

T = TypeVar("T")


class CheckedArguments:
    """Constructor arguments from the caller, with the weights to check them against.

    Args:
        weights: State dict of the model. Tensors on the meta device suffice, except for `layers`.
        arguments: Arguments that the caller passed, by name.
    """

    def __init__(self, weights: Mapping[str, Tensor], arguments: Mapping[str, Json]) -> None:
        self.weights, self.arguments = dict(weights), arguments

    def get(self, name: str, default: Json) -> Json:
        """Return the caller's value of an argument, or `default` if there is none. It is not checked."""
        return self.arguments.get(name, default)

    def agreed(self, name: str, actual: T, key: str) -> T:
        """Return `actual`, the value of an argument as inferred from weight `key`.

        Raises:
            ValueError: If the caller passed another value.
        """
        if (given := self.get(name, actual)) != actual:
            raise ValueError(f"{name} must be {actual}, which the weights have ({key}); got {given!r}")
        return actual

    def length(self, key: str, axis: int = 0) -> int:
        """Return the size of an axis of weight `key`.

        Raises:
            ValueError: If the weight is missing or empty, or does not have the axis.
        """
        if key not in self.weights:
            raise ValueError(f"weights must hold {key}; it is missing. The first are {list(self.weights)[:5]}")
        shape = tuple(self.weights[key].shape)
        if len(shape) <= axis or 0 in shape:
            raise ValueError(f"{key} must have {axis + 1} axes at least and not be empty; its shape is {shape}")
        return shape[axis]

    def size(self, name: str, key: str, axis: int = 0) -> int:
        """Return the size of an axis of weight `key`, after checking it against the caller's argument `name`."""
        return self.agreed(name, self.length(key, axis), key)

    def heads(self, prefix: str, key: str, default: int) -> tuple[int, int]:
        """Return the number of heads, and the total width of all heads, which is the number of rows of weight `key`.

        The caller's arguments are `{prefix}_heads` and `{prefix}_dim_head`. If one of them is missing, it is inferred
        from the number of rows. If both are missing, they are `default` and 64.

        Raises:
            ValueError: If the number of heads times the width of a head is not the number of rows.
        """
        rows, names = self.length(key), (f"{prefix}_heads", f"{prefix}_dim_head")
        given = {name: self.arguments[name] for name in names if name in self.arguments}
        checks.positive(**given)
        heads = given.get(names[0]) or (rows // given[names[1]] if names[1] in given else default)
        width = given.get(names[1]) or (rows // heads if names[0] in given else 64)
        if heads * width != rows:
            raise ValueError(
                f"{names[0]}={heads} times {names[1]}={width} must be {rows}, the rows of {key}; got {heads * width}. "
                f"Give {names[0]}, which the weights do not determine"
            )
        return heads, rows

    def layers(self, first: int) -> tuple[int, bool]:
        """Return the depth, and whether all layers from index `first` on share their weights.

        If they do, `self.weights` keeps only one copy of the shared weights, under index `first`.

        Raises:
            ValueError: If `depth` differs from the number of layers in the weights (with tied layers it may be larger),
                or `weight_tie_layers` is set and the layers differ.
        """
        stored = len({layer for layer in map(layer_of, self.weights) if layer >= 0})
        same = all(self._same_layers(first, other) for other in range(first + 1, stored))
        depth, tied = self.get("depth", stored), self.get("weight_tie_layers", same and stored > first + 1)
        if tied and not same:
            raise ValueError(f"weight_tie_layers must be False, since layers after number {first} differ; got {tied!r}")
        if depth != stored and not (tied and isinstance(depth, int) and depth > stored > first):
            raise ValueError(
                f"depth must be {stored}, the number of layers in the weights; got {depth!r}. Where tied layers were "
                "left out when the weights were saved, give weight_tie_layers=True too"
            )
        if tied:
            self.weights = {name: tensor for name, tensor in self.weights.items() if layer_of(name) <= first}
        return depth, bool(tied)

    def _same_layers(self, one: int, other: int) -> bool:
        for name, a in self.weights.items():
            if layer_of(name) == one:
                b = self.weights.get(name.replace(f".{one}.", f".{other}.", 1))
                if b is None or (a is not b and (a.dtype != b.dtype or not torch.equal(a, b))):
                    return False
        return True


def layer_of(name: str) -> int:
    """Return the layer index in a weight name: `layers.{index}.*` or `attn_residuals.{index}.*`, otherwise -1."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] in ("layers", "attn_residuals") and len(parts) > 2 and parts[1].isdecimal() else -1
