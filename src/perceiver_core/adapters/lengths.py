"""Inputs of unequal size: padding them into a batch, and computing token masks from their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from perceiver_core import checks, modalities
from perceiver_core.argument_errors import checked, explained

Size = TypeVar("Size", int, Tensor)
Lengths: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
"""Sizes of the inputs before padding: integers `b` (one per sample) or `b axes` (one per sample and axis)."""


class VariableSize:
    """Base class of adapters for inputs whose size may differ between the samples of a batch.

    Args:
        length_axes: Axes of the input along which its size may differ, as negative indices in ascending order.
        stride: Number of input elements per token along each of these axes; empty if it is 1 along all of them.
        time_axis: Axis to which lengths `b` (one per sample) refer, as an index in `length_axes`; None if lengths must
            be `b axes` (one per sample and axis).
    """

    length_axes: tuple[int, ...] = (-1,)
    stride: tuple[int, ...] = ()
    time_axis: int | None = 0

    def axes_of(self, ndim: int) -> tuple[int, ...]:
        """Return `length_axes` for batches with `ndim` axes. Adapters for arrays of any rank override this method."""
        return self.length_axes

    def num_tokens(self, length: Size, axis: int) -> Size:
        """Return the number of tokens along an axis (index in `length_axes`) for an input of this length.

        An incomplete patch at the end counts as one token.
        """
        return (length + self.stride[axis] - 1) // self.stride[axis] if self.stride else length

    @checked
    def token_mask(self, lengths: Lengths, size: Sequence[int]) -> Bool[Tensor, "b ..."]:
        """Return the mask of valid tokens for a batch of padded inputs.

        Args:
            lengths: Size of each input before padding: one length per sample, or one per sample and axis.
            size: Size of the padded inputs along the same axes.

        Raises:
            TypeError: If the lengths are not integers.
            ValueError: If the lengths have the wrong shape, or one is below 1 or above `size`.

        Example:
            >>> pc.adapters.Audio(patch_size=16, positions=None).token_mask([20, 33], size=[48]).int().tolist()
            [[1, 1, 0], [1, 1, 1]]
        """
        return self._token_mask(self._checked(lengths, size, None), size)

    def _token_mask(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the mask of valid tokens for checked lengths `b axes`."""
        tokens = [self.num_tokens(length, axis) for axis, length in enumerate(lengths.unbind(1))]
        return _box(torch.stack(tokens, dim=1), [self.num_tokens(length, axis) for axis, length in enumerate(size)])

    def _checked(self, given: Lengths, size: Sequence[int], batch: int | None) -> Tensor:
        """Check lengths, and return them as a tensor `b axes`."""
        lengths = given if isinstance(given, Tensor) else _as_tensor(given)
        lengths, axes = checks.whole_numbers("lengths", lengths), len(size)
        time_axis = 0 if axes == 1 else self.time_axis
        one_per_sample = lengths.ndim == 1 and time_axis is not None
        one_per_axis = lengths.ndim == 2 and lengths.shape[1] == axes
        if not (one_per_sample or one_per_axis) or batch not in (None, lengths.shape[0]):
            either = "b or " if time_axis is not None else ""
            raise ValueError(
                f"lengths must be {either}b {axes}{'' if batch is None else f' with b = {batch}'}, one row per sample; "
                f"got shape {tuple(lengths.shape)}"
            )
        full = torch.tensor(list(size), device=lengths.device)
        if one_per_sample:
            is_time = torch.arange(axes, device=lengths.device).eq(time_axis or 0)
            lengths = torch.where(is_time, lengths.unsqueeze(1), full)
        if not checks.is_true(lambda: ((lengths >= 1) & (lengths <= full)).all(), lengths):
            raise ValueError(f"lengths must lie in 1 ... {list(size)}, the padded size; got {lengths.tolist()}")
        return lengths

    def _with_lengths(self, x: Tensor, mask: Tensor | None, lengths: Lengths | None) -> tuple[Tensor, Tensor | None]:
        """Return `x` with zeros beyond the lengths, and the intersection of `mask` and the mask of valid tokens.

        Without lengths, return `x` and `mask`.
        """
        if lengths is None:
            return x, mask
        axes = self.axes_of(x.ndim)
        size = [x.shape[axis] for axis in axes]
        lengths = self._checked(lengths, size, x.shape[0]).to(x.device)
        shape = [x.shape[0]] + [x.shape[axis] if axis - x.ndim in axes else 1 for axis in range(1, x.ndim)]
        x = x.masked_fill(~_box(lengths, size).reshape(shape), 0)
        valid = self._token_mask(lengths, size)
        if not checks.is_true(lambda: valid.flatten(1).any(1).all(), valid):
            raise ValueError(f"lengths must be long enough for one token in each sample; got {lengths.tolist()}")
        if mask is not None:
            checks.is_mask("mask", mask, valid.shape)
            valid = valid & mask
        return x, valid


def _as_tensor(lengths: object) -> Tensor:
    try:
        tensor = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"lengths must be a tensor or list of whole numbers; got {lengths!r:.80}: {error}") from error
    return tensor if tensor.numel() else tensor.long()


def _box(lengths: Tensor, size: Sequence[int]) -> Tensor:
    """Return the mask `b *size` of the elements whose index is below the length of the sample along every axis."""
    box = lengths.new_ones(lengths.shape[0], *[1] * len(size), dtype=torch.bool)
    for axis, (count, own) in enumerate(zip(size, lengths.unbind(1), strict=True)):
        valid = torch.arange(count, device=lengths.device) < own[:, None]
        box = box & valid.reshape(lengths.shape[0], *[1] * axis, count, *[1] * (len(size) - axis - 1))
    return box


def options(**arguments: object) -> dict[str, object]:
    """Return the arguments that are not None, because some adapters do not accept all of them."""
    return {name: argument for name, argument in arguments.items() if argument is not None}


@explained
def pad(inputs: Sequence[Any], adapter: object = None) -> tuple[Any, Any]:
    """Stack inputs of unequal size into a zero-padded batch. Return the batch and the mask of valid tokens.

    Pass both to the adapter or to the model: `model(batch, mask=mask)`.

    Args:
        inputs: Inputs of the adapter, without the batch axis. For a multimodal adapter, a sequence of dictionaries,
            which may lack modalities. For `PerRead`, a sequence of tuples.
        adapter: Adapter that will receive the batch. It determines how many tokens an input has. Without an adapter,
            inputs may differ in the size of their first axis only, and the mask has one entry per element along it.

    Returns:
        The batch `b ...`, and the mask `b *grid`, True = attend. For a multimodal adapter, two dictionaries: modalities
        of a fixed size, such as labels, have a mask `b` if a sample lacks them, otherwise none.

    Raises:
        TypeError: If an input is not a tensor, dtypes differ, or the adapter does not accept inputs of unequal size.
        ValueError: If `inputs` is empty or a single tensor, or the inputs do not have the same number of axes.
        ValueError: If the inputs differ along an axis whose size must be equal for all inputs.

    Example:
        >>> positions = pc.positions.FixedGrid(pc.positions.Fourier(num_axes=1, num_bands=8), grid=(100,))
        >>> audio = pc.adapters.Audio(patch_size=16, positions=positions)
        >>> waveforms, mask = pc.adapters.pad([torch.randn(70), torch.randn(33)], audio)
        >>> waveforms.shape, mask.int().tolist()
        (torch.Size([2, 70]), [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        >>> tokens = audio(waveforms, mask=mask)
    """
    if isinstance(inputs, Tensor) or not (inputs := list(inputs)):
        got = "one tensor" if isinstance(inputs, Tensor) else "none"
        raise ValueError(f"inputs must be a list of at least one input without batch axis; got {got}")
    while not isinstance(adapter, VariableSize) and isinstance(inner := getattr(adapter, "adapter", None), nn.Module):
        adapter = inner  # the adapter inside DropTokens
    parts = getattr(adapter, "adapters", None)
    if isinstance(parts, nn.ModuleDict):
        return _pad_modalities(inputs, parts)
    if isinstance(parts, nn.ModuleList):
        each = [pad(own, part) for own, part in zip(zip(*inputs, strict=True), parts, strict=True)]
        return [batch for batch, _ in each], [mask for _, mask in each]
    for x in inputs:
        if not isinstance(x, Tensor):
            hint = "pass the multimodal adapter" if isinstance(x, Mapping) else "convert them: torch.as_tensor(...)"
            raise TypeError(f"inputs must be tensors; got {type(x).__name__}. {hint.capitalize()}")
    if len({x.dtype for x in inputs}) > 1:
        raise TypeError(f"inputs must have one dtype; got {sorted({str(x.dtype) for x in inputs})}. Convert them")
    if adapter is not None and not isinstance(adapter, VariableSize):
        raise TypeError(f"adapter must accept inputs of unequal size, as adapters.Audio does; got {adapter!r:.80}")
    return _pad(inputs, adapter)


def _pad_modalities(inputs: list[Any], adapters: nn.ModuleDict) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Pad each modality. Samples without a modality have zeros, and their mask is False. Others are stacked."""
    for x in inputs:
        modalities.check_names("inputs", x, adapters.keys())
    batches: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        present = torch.tensor([x.get(name) is not None for x in inputs])
        if not present.any():
            continue
        first = next(x[name] for x in inputs if x.get(name) is not None)
        own = [tree_map(torch.zeros_like, first) if x.get(name) is None else x[name] for x in inputs]
        if isinstance(adapter, VariableSize) or hasattr(adapter, "adapter"):
            batches[name], mask = modalities.call("inputs", name, pad, own, adapter)
            masks[name] = mask & present.to(mask.device).reshape(-1, *[1] * (mask.ndim - 1))
        else:  # inputs of a fixed size, such as labels
            batches[name] = tree_map(lambda *values: torch.stack(values), *own)
            if not present.all():
                masks[name] = present
    return batches, masks


def _pad(inputs: Sequence[Tensor], adapter: VariableSize | None) -> tuple[Tensor, Tensor]:
    shapes = [tuple(x.shape) for x in inputs]
    if len({len(shape) for shape in shapes}) > 1 or not shapes[0]:
        raise ValueError(f"inputs must all have the same number of axes, at least one; got shapes {shapes[:10]}")
    for number, shape in enumerate(shapes):
        if 0 in shape:
            raise ValueError(f"inputs must not be empty; input {number} has shape {shape}. Drop it")
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    unequal = {axis - len(full) for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}
    axes = (-len(full),) if adapter is None else adapter.axes_of(len(full) + 1)
    if unequal - set(axes):
        hint = "; pass the adapter" if adapter is None else ""
        raise ValueError(f"inputs must have equal sizes along all axes but {axes}; got shapes {shapes[:10]}{hint}")
    padded = [
        F.pad(x, [end for size, own in zip(full[::-1], x.shape[::-1], strict=True) for end in (0, size - own)])
        for x in inputs
    ]
    lengths = torch.tensor([[shape[axis] for axis in axes] for shape in shapes], device=inputs[0].device)
    return torch.stack(padded), (adapter or VariableSize()).token_mask(lengths, [full[axis] for axis in axes])
