"""Checks of the values in state dicts of other libraries: one floating-point dtype, and only finite numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTER = "num_batches_tracked"  # last part of the name of the only weight of whole numbers, in batch norms
_MOST_NAMES = 5


def check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors but the counters of batch norms have the same dtype, one of `FLOATS`.

    Raises:
        ValueError: If dtypes differ. The message names the tensors of the dtypes that fewer tensors have.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == COUNTER:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be of a floating point dtype, one of {FLOATS}; got {tensor.dtype}")
        names.setdefault(tensor.dtype, []).append(name)
    most, *others = sorted(names, key=lambda dtype: -len(names[dtype])) or [torch.float32]
    if others:
        widest = most
        for dtype in others:
            widest = torch.promote_types(widest, dtype)
        different = "; ".join(f"{dtype}: {_listed(names[dtype])}" for dtype in others)
        raise ValueError(
            f"{names[others[0]][0]} must be of the dtype of the other weights, {most} ({names[most][0]}); got "
            f"{others[0]}. {len(names[most])} weights are of {most}; of another dtype are {different}. Convert them to "
            f"one, such as {widest}, which keeps all values: {{name: t.to({widest}) for name, t in weights.items()}}"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that floating-point tensors contain neither NaN nor infinity. Tensors on the meta device are skipped.

    Raises:
        ValueError: If there are such values. The message names the tensors and counts the values.
    """
    found: list[str] = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            nan = int(torch.isnan(tensor).sum())
            infinite = int(torch.isinf(tensor).sum())
            counts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
            found.append(f"{name} ({' and '.join(counts)} of {tensor.numel()} values)")
    if found:
        raise ValueError(
            f"weights must be finite numbers; {_listed(found)}. Such a model computes only NaN. Copy the file again if "
            "it may be damaged, or take a checkpoint from before the training diverged. To load the other weights "
            "anyway, replace these values first, for example by torch.nan_to_num"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
