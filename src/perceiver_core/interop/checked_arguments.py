"""Consistency checks between the constructor arguments and the weights of a model from another library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from perceiver_core import checks
from perceiver_core.registry import Json

T = TypeVar("T")


class CheckedArguments:
    """Constructor arguments and weights of a model from another library, with methods that compare them.

    Args:
        weights: State dict of the model. The tensors may be on the meta device, unless `layers` is called, which
            compares their values.
        arguments: Dictionary of the constructor arguments that the caller passed, keyed by name.
    """

    def __init__(self, weights: Mapping[str, Tensor], arguments: Mapping[str, Json]) -> None:
        self.weights, self.arguments = dict(weights), arguments

    def get(self, name: str, default: Json) -> Json:
        """Return the value that the caller passed for an argument, or `default`. The value is not checked."""
        return self.arguments.get(name, default)

    def same_for_all_layers(self, name: str) -> bool:
        """Return an argument that is a bool, or one bool for each layer, as one bool. It defaults to False.

        Raises:
            ValueError: If the argument is not the same for all layers.
        """
        given = self.get(name, False)
        values = {*given} if isinstance(given, (tuple, list)) else {given}
        if values not in ({True}, {False}):
            raise ValueError(f"{name} must be True or False, the same for all layers; got {given!r}")
        return values == {True}

    def agreed(self, name: str, actual: T, key: str) -> T:
        """Return `actual`, after checking that the caller did not pass a different value for the argument `name`.

        `actual` was inferred from the weight named `key`, which appears in the error message.

        Raises:
            ValueError: If the caller passed a different value.
        """
        if (given := self.get(name, actual)) != actual:
            raise ValueError(f"{name} must be {actual}, which the weights have ({key}); got {given!r}")
        return actual

    def length(self, key: str, axis: int = 0) -> int:
        """Return the size of an axis of the weight named `key`.

        Raises:
            ValueError: If the weight is missing, is empty, or does not have the axis.
        """
        if key not in self.weights:
            raise ValueError(f"weights must hold {key}; it is missing. The first are {list(self.weights)[:5]}")
        shape = tuple(self.weights[key].shape)
        if len(shape) <= axis or 0 in shape:
            raise ValueError(f"{key} must have {axis + 1} axes at least and not be empty; its shape is {shape}")
        return shape[axis]

    def size(self, name: str, key: str, axis: int = 0) -> int:
        """Return the size of an axis of the weight `key`, and check that the argument `name`, if passed, agrees."""
        return self.agreed(name, self.length(key, axis), key)

    def heads(self, prefix: str, key: str, default: int) -> tuple[int, int]:
        """Return the number of attention heads and their total width.

        The total width is the number of rows of the weight named `key`. The caller may pass the number of heads as
        `{prefix}_heads` and the head dimension as `{prefix}_dim_head`. If one of them is missing, it is inferred from
        the total width. If both are missing, there are `default` heads of dimension 64.

        Raises:
            ValueError: If the number of heads times the head dimension is not the total width.
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
        """Return the number of layers, and whether the layers from index `first` on share their weights.

        If the layers share weights, all layers after `first` are removed from `self.weights`.

        Raises:
            ValueError: If the caller passed a `depth` that is not the number of layers in the state dict. If layers
                share weights, `depth` may be larger, because a state dict may omit the repeated layers.
            ValueError: If the caller passed `weight_tie_layers=True` and the weights of the layers differ.
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
    """Return the index in a weight name `layers.{index}.*` or `attn_residuals.{index}.*`, or -1 for other names."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] in ("layers", "attn_residuals") and len(parts) > 2 and parts[1].isdecimal() else -1
