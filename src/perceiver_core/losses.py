"""Losses: of optical flow, of labels some of which do not count, and of several kinds of output at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

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
    wide = torch.promote_types(flow.dtype, torch.float32)  # the square of 300 pixels is too much for float16
    difference = flow.to(wide) - target.to(wide)
    if mask is not None:
        checks.is_mask("mask", mask, difference.select(axis, 0).shape)
        if not checks.is_true(mask.any, mask):
            raise ValueError("mask must leave a point at least; got none")
        difference = difference.where(mask.unsqueeze(axis), 0.0)
    # A length whose gradient at zero is zero, not NaN.
    squares = difference.square().sum(axis)
    errors = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return errors.mean() if mask is None else errors.sum() / mask.sum()


def cross_entropy(
    logits: Float[Tensor, "b ... v"], labels: Int[Tensor, "b ..."], *, ignore_index: int = -100
) -> Float[Tensor, ""]:
    """The mean cross-entropy of labels, in nats: of classes `b v`, or of tokens `b q v`, the last axis the vocabulary.

    Args:
        logits: of each label.
        labels: which it is; `ignore_index` where none is asked for, as in a masked language model where nothing was
            hidden.
        ignore_index: the label that does not count.

    Raises:
        TypeError: labels that are not whole numbers.
        ValueError: labels of another shape than the logits without their last axis, or none that counts.

    Example:
        >>> import torch
        >>> from perceiver_core.losses import cross_entropy
        >>> labels = torch.tensor([[2, -100, 0, -100]])
        >>> round(cross_entropy(torch.zeros(1, 4, 262), labels).item(), 3)  # log 262
        5.568

    Reference: Devlin et al. 2019 (BERT), section 3.1; transformers counts -100 nowhere too.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers; got {labels.dtype}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without their last axis, {tuple(logits.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )
    if not checks.is_true(lambda: (labels != ignore_index).any(), labels):
        raise ValueError(f"labels must hold one at least that is not {ignore_index}; got none")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, -2), labels.flatten().long(), ignore_index=ignore_index)


def weighted(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    losses: Mapping[str, tuple[Loss, float]],
    *,
    masks: Mapping[str, Bool[Tensor, " b"]] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The losses of several kinds of output, added up.

    Args:
        outputs: by name.
        targets: by name; kinds without a target cost nothing.
        losses: by name, a function of (output, target) and its weight.
        masks: by name `b`, which samples have a target of a kind; all unless given. What a target holds for the others
            has no effect, and a kind that no sample has costs nothing.

    Returns:
        The weighted sum, and by name each loss before its weight.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: targets without an output or without a loss, or none at all; floating-point targets of another
            shape than their output, which PyTorch would stretch.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from perceiver_core.losses import cross_entropy, weighted
        >>> outputs = {"sound": torch.zeros(2, 9), "label": torch.zeros(2, 3)}
        >>> targets = {"sound": torch.ones(2, 9), "label": torch.tensor([0, 2])}
        >>> total, each = weighted(outputs, targets, {"sound": (F.l1_loss, 1.0), "label": (cross_entropy, 0.5)})
        >>> round(total.item(), 3), sorted(each)
        (1.549, ['label', 'sound'])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (weights of video, sound and label).
    """
    for name, there in (("outputs", outputs), ("losses", losses)):
        if missing := targets.keys() - there.keys():
            raise ValueError(f"targets must have their {name}; there are none for {sorted(missing)}")
    if not targets:
        raise ValueError("targets must hold a kind at least; got none")
    if unknown := (masks or {}).keys() - targets.keys():
        raise ValueError(f"masks names {sorted(unknown)}; there are targets for {sorted(targets)}")
    each = {
        name: _of_kind(name, losses[name][0], outputs[name], target, (masks or {}).get(name))
        for name, target in targets.items()
    }
    return torch.stack([losses[name][1] * loss for name, loss in each.items()]).sum(), each


def _of_kind(name: str, loss: Loss, output: Tensor, target: Tensor, there: Tensor | None) -> Tensor:
    if target.is_floating_point() and target.shape != output.shape:
        raise ValueError(
            f"targets[{name!r}] must have the shape of its output, {tuple(output.shape)}; got {tuple(target.shape)}"
        )
    if there is None:
        return loss(output, target)
    checks.is_mask(f"masks[{name!r}]", there, (target.shape[0],))
    if not there.any():
        return 0.0 * output.sum()  # so that what made the output has a gradient, of zero
    return loss(output[there], target[there])
