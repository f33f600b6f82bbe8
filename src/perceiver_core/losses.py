"""Losses that PyTorch does not have: of optical flow, and of several kinds of output at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks

Flow: TypeAlias = Float[Tensor, "b 2 h w"] | Float[Tensor, "b q 2"]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def end_point_error(
    flow: Flow, target: Flow, mask: Bool[Tensor, "b h w"] | Bool[Tensor, "b q"] | None = None
) -> Float[Tensor, ""]:
    """The mean length of the difference between a flow and the true one, in the units of both, mostly pixels.

    Args:
        flow: `b 2 h w`, or `b q 2` for some points.
        target: the true flow, of the same shape.
        mask: where it is known; everywhere unless given. What both hold elsewhere has no effect, NaN included.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: tensors of different shapes, or a mask that leaves nothing.

    Example:
        >>> import torch
        >>> from perceiver_core.losses import end_point_error
        >>> end_point_error(torch.zeros(1, 2, 3, 5), torch.tensor([3.0, 4.0])[None, :, None, None].expand(1, 2, 3, 5))
        tensor(5.)

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (average end-point error).
    """
    if flow.shape != target.shape or flow.ndim not in (3, 4) or flow.shape[1 if flow.ndim == 4 else 2] != 2:
        raise ValueError(
            f"flow and target must both be b 2 h w, or b q 2; got {tuple(flow.shape)} and {tuple(target.shape)}"
        )
    axis = 1 if flow.ndim == 4 else 2
    difference = flow - target
    if mask is not None:
        checks.is_mask("mask", mask, difference.select(axis, 0).shape)
        if not checks.is_true(mask.any, mask):
            raise ValueError("mask must leave a point at least; got none")
        difference = difference.where(mask.unsqueeze(axis), 0.0)
    # A length whose gradient at zero is zero, not NaN.
    squares = difference.square().sum(axis)
    errors = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return errors.mean() if mask is None else errors.sum() / mask.sum()


def weighted(
    outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], losses: Mapping[str, tuple[Loss, float]]
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The losses of several kinds of output, added up.

    Args:
        outputs: by name.
        targets: by name; kinds without a target cost nothing.
        losses: by name, a function of (output, target) and its weight.

    Returns:
        The weighted sum, and by name each loss before its weight.

    Raises:
        ValueError: targets without an output or without a loss, or none at all.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from perceiver_core.losses import weighted
        >>> outputs = {"sound": torch.zeros(2, 9), "label": torch.zeros(2, 3)}
        >>> targets = {"sound": torch.ones(2, 9), "label": torch.tensor([0, 2])}
        >>> total, each = weighted(outputs, targets, {"sound": (F.l1_loss, 1.0), "label": (F.cross_entropy, 0.5)})
        >>> round(total.item(), 3), sorted(each)
        (1.549, ['label', 'sound'])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (weights of video, sound and label).
    """
    for name, there in (("outputs", outputs), ("losses", losses)):
        if missing := targets.keys() - there.keys():
            raise ValueError(f"targets must have their {name}; there are none for {sorted(missing)}")
    if not targets:
        raise ValueError("targets must hold a kind at least; got none")
    each = {name: losses[name][0](outputs[name], target) for name, target in targets.items()}
    return torch.stack([losses[name][1] * loss for name, loss in each.items()]).sum(), each
