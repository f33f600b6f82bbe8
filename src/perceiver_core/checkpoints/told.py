"""The arguments of another library's constructor, held against the weights of what it made."""

from __future__ import annotations

from typing import Any

import torch

from perceiver_core import checks
from perceiver_core.checkpoints.renamed import Weights


class Told:
    """What was told of a model, and what its weights say.

    Args:
        weights: of the model.
        arguments: what was told, by the names of the constructor's arguments.
    """

    def __init__(self, weights: Weights, arguments: dict[str, Any]) -> None:
        self.weights, self.arguments = weights, arguments

    def get(self, name: str, default: Any) -> Any:
        """An argument that weights do not tell."""
        return self.arguments.get(name, default)

    def agreed(self, name: str, found: Any, key: str) -> Any:
        """An argument that weights tell.

        Raises:
            ValueError: something else was told.
        """
        told = self.get(name, found)
        if told != found:
            raise ValueError(f"{name} must be {found}, which the weights have ({key}); got {told!r}")
        return found

    def length(self, key: str, axis: int = 0) -> int:
        """The length of an axis of a weight.

        Raises:
            ValueError: the weight is missing, or has no such axis.
        """
        if key not in self.weights:
            raise ValueError(f"state_dict must hold {key}; it is missing")
        shape = tuple(self.weights[key].shape)
        if len(shape) <= axis or 0 in shape:
            raise ValueError(f"{key} must have {axis + 1} axes at least and not be empty; its shape is {shape}")
        return shape[axis]

    def size(self, name: str, key: str, axis: int = 0) -> int:
        """An argument that is the length of an axis of a weight."""
        return int(self.agreed(name, self.length(key, axis), key))

    def heads(self, kind: str, key: str, default: int) -> tuple[int, int]:
        """How many heads make the rows of a weight, and how wide all are together; each is 64 unless told.

        Raises:
            ValueError: heads that do not make as many rows.
        """
        rows, names = self.length(key), (f"{kind}_heads", f"{kind}_dim_head")
        told = {name: self.arguments[name] for name in names if name in self.arguments}
        checks.positive(**told)
        heads, width = (told.get(name) for name in names)
        if heads is None:
            heads = default if width is None else rows // width
        if width is None:
            width = rows // heads if names[0] in told else 64
        if heads * width != rows:
            raise ValueError(
                f"{names[0]}={heads} times {names[1]}={width} must be {rows}, the rows of {key}; got {heads * width}. "
                f"Give {names[0]}, which weights do not tell"
            )
        return heads, rows

    def layers(self, first: int) -> tuple[int, bool]:
        """How many layers there are, and whether all from `first` on are one; then only that one is kept.

        Raises:
            ValueError: another depth than there are layers, or tied layers that differ.
        """
        there = len({layer for layer in map(layer_of, self.weights) if layer >= 0})
        same = all(self._same(first, other) for other in range(first + 1, there))
        depth, tied = self.get("depth", there), self.get("weight_tie_layers", same and there > first + 1)
        if tied and not same:
            raise ValueError(f"weight_tie_layers must be False, since layers after number {first} differ; got {tied!r}")
        if depth != there and not (tied and isinstance(depth, int) and depth > there > first):
            raise ValueError(
                f"depth must be {there}, the number of layers in the weights; got {depth!r}. Where tied layers were "
                "left out when the weights were saved, give weight_tie_layers=True too"
            )
        if tied:
            self.weights = {name: x for name, x in self.weights.items() if layer_of(name) <= first}
        return depth, bool(tied)

    def _same(self, one: int, other: int) -> bool:
        for name, a in self.weights.items():
            if layer_of(name) == one:
                b = self.weights.get(name.replace(f".{one}.", f".{other}.", 1))
                if b is None or (a is not b and (a.dtype != b.dtype or not torch.equal(a, b))):
                    return False
        return True


def layer_of(name: str) -> int:
    """The number of the layer that a weight is in, `layers.{number}` or `attn_residuals.{number}`; -1 for none.

    Example:
        >>> from perceiver_core.checkpoints.told import layer_of
        >>> layer_of("layers.3.norm.weight"), layer_of("latents")
        (3, -1)
    """
    parts = name.split(".")
    return int(parts[1]) if parts[0] in ("layers", "attn_residuals") and len(parts) > 2 and parts[1].isdecimal() else -1
