"""Losses for optical flow, for class or token labels, and for several output modalities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.argument_errors import explained

Flow: TypeAlias = Float[Tensor, "b 2 h w"] | Float[Tensor, "b q 2"]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@explained
def end_point_error(
    flow: Flow, target: Flow, mask: Bool[Tensor, "b h w"] | Bool[Tensor, "b q"] | None = None
) -> Float[Tensor, ""]:
    """Compute the mean Euclidean distance between predicted and true flow vectors, usually in pixels.

    Args:
        flow: Predicted flow: `b 2 h w`, or `b q 2` at selected points.
        target: True flow, with the same shape.
        mask: Mask of the points with a known target, True = known; None if all are known. Values at other points are
            ignored, even NaN.

    Raises:
        TypeError: If the mask is not boolean.
        ValueError: If the shapes do not match, or the mask is False everywhere.

    Example:
        >>> pc.losses.end_point_error(torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
        tensor(5.)

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.2 (average end-point error).
    """
    axis = 1 if flow.ndim == 4 else 2
    if flow.shape != target.shape or flow.ndim not in (3, 4) or flow.shape[axis] != 2:
        raise ValueError(
            f"flow and target must both be b 2 h w, or b q 2; got {tuple(flow.shape)} and {tuple(target.shape)}"
        )
    checks.is_real("target", target)
    wide = torch.promote_types(flow.dtype, torch.float32)  # the square of 300 pixels overflows float16
    difference = flow.to(wide) - target.to(wide)
    if mask is not None:
        checks.is_mask("mask", mask, difference.select(axis, 0).shape)
        if not checks.is_true(mask.any, mask):
            raise ValueError("mask must leave at least one point; got none")
        difference = difference.where(mask.unsqueeze(axis), 0.0)
    # The gradient of a norm at zero would be NaN; here it is zero.
    squares = difference.square().sum(axis)
    errors = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return errors.mean() if mask is None else errors.sum() / mask.sum()


@explained
def cross_entropy(
    logits: Float[Tensor, "b ... v"],
    labels: Int[Tensor, "b ..."],
    *,
    weight: Float[Tensor, " v"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy, in nats, of class labels `b` or token labels `b q`.

    Values and gradients are those of `torch.nn.functional.cross_entropy`, computed in float32 or wider.

    Args:
        logits: Logits, with the classes or the vocabulary in the last axis.
        labels: Class indices or token ids.
        weight: Weight of each class, for example to balance rare classes. The loss is then a weighted mean: the sum is
            divided by the total weight of the labels.
        ignore_index: Label to ignore. In masked language modeling, it is the label of all tokens that were not masked.
        label_smoothing: Fraction of the target probability that is spread evenly over all classes, in [0, 1].

    Raises:
        TypeError: If the labels are not integers, or `weight` is not floating point.
        ValueError: If `labels.shape` is not `logits.shape[:-1]`, or all labels are ignored or have weight zero.
        ValueError: If a label is not a class, or `weight` or `label_smoothing` is invalid.

    Example:
        >>> labels = torch.tensor([[2, -100, 0, -100]])
        >>> round(pc.losses.cross_entropy(torch.zeros(1, 4, 262), labels).item(), 3)  # log 262
        5.568

    Reference: Devlin et al. 2019 (BERT), section 3.1; transformers also ignores -100. Label smoothing: Szegedy et al.
    2016 (Inception v3), section 7.
    """
    checks.is_floating("logits", logits)
    labels = checks.whole_numbers("labels", labels)  # -100 cannot be represented in uint8
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of the logits without their last axis, {tuple(logits.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )
    counted = labels != ignore_index
    if not checks.is_true(counted.any, labels):
        raise ValueError(f"labels must hold at least one that is not {ignore_index}; got none")
    checks.below("labels", labels.where(counted, 0), logits.shape[-1])
    _check_smoothing(label_smoothing)
    wide = torch.promote_types(logits.dtype, torch.float32)
    if weight is not None:
        weight = _class_weights("weight", weight, logits).to(wide)
        if not checks.is_true(lambda: (weight[labels[counted]] > 0).any(), labels):
            raise ValueError("weight must be positive for at least one of the labels; it is 0 for all")
    return F.cross_entropy(
        logits.where(counted.unsqueeze(-1), 0.0).to(wide).flatten(0, -2),
        labels.flatten(),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


@explained
def binary_cross_entropy(
    logits: Float[Tensor, "b ... v"],
    targets: Shaped[Tensor, "b ... v"],
    *,
    pos_weight: Float[Tensor, " v"] | None = None,
    label_smoothing: float = 0.0,
    mask: Bool[Tensor, "b ... v"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the mean binary cross-entropy, in nats, for classes that are not mutually exclusive (multi-label).

    Values and gradients are those of `torch.nn.functional.binary_cross_entropy_with_logits`, computed in float32 or
    wider.

    Args:
        logits: Logits, with the classes in the last axis.
        targets: Targets in the shape of the logits: True or 1 for classes that apply, False or 0 for others; or
            probabilities.
        pos_weight: Weight of the positive targets of each class, for example to balance rare classes.
        label_smoothing: Fraction of each target that is replaced by 1/2, in [0, 1].
        mask: Mask of known targets, True = known; None if all are known. Unknown targets are ignored, even if NaN.

    Raises:
        TypeError: If the mask is not boolean, or `pos_weight` is not floating point.
        ValueError: If the targets or the mask do not have the shape of the logits, or the mask is False everywhere.
        ValueError: If a target is not in [0, 1], or `pos_weight` or `label_smoothing` is invalid.

    Example:
        >>> targets = torch.tensor([[True, False, True]])
        >>> round(pc.losses.binary_cross_entropy(torch.zeros(1, 3), targets).item(), 3)  # log 2
        0.693

    Reference: Gemmeke et al. 2017 (AudioSet), a dataset with several labels per clip.
    """
    checks.is_floating("logits", logits)
    checks.is_real("targets", targets)
    if logits.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of the logits, {tuple(logits.shape)}; got {tuple(targets.shape)}"
        )
    _check_smoothing(label_smoothing)
    wide = torch.promote_types(logits.dtype, torch.float32)
    weight, logits, targets = None, logits.to(wide), targets.to(wide)
    if mask is not None:
        checks.is_mask("mask", mask, logits.shape)
        if not checks.is_true(mask.any, mask):
            raise ValueError("mask must leave at least one target; got none")
        weight = mask.to(wide) / mask.sum()
        logits, targets = logits.where(mask, 0.0), targets.where(mask, 0.0)
    if not checks.is_true(lambda: ((targets >= 0) & (targets <= 1)).all(), targets):
        raise ValueError("targets must lie in [0, 1]; got values outside this range")
    if pos_weight is not None:
        pos_weight = _class_weights("pos_weight", pos_weight, logits).to(wide)
    return F.binary_cross_entropy_with_logits(
        logits,
        targets * (1 - label_smoothing) + label_smoothing / 2,
        weight=weight,
        pos_weight=pos_weight,
        reduction="mean" if mask is None else "sum",
    )


def _check_smoothing(label_smoothing: float) -> None:
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {label_smoothing!r}")


def _class_weights(name: str, weight: Tensor, logits: Tensor) -> Tensor:
    """Check that `weight` has one finite, non-negative number per class, and return it."""
    checks.is_floating(name, weight)
    if weight.shape != logits.shape[-1:]:
        raise ValueError(f"{name} must have shape {tuple(logits.shape[-1:])}, one per class; got {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(f"{name} must be on the device of the logits, {logits.device}; it is on {weight.device}")
    if weight.requires_grad:
        raise ValueError(f"{name} must not require a gradient; pass {name}.detach()")
    if not checks.is_true(lambda: (weight.isfinite() & (weight >= 0)).all(), weight):
        raise ValueError(f"{name} must be finite and not negative; got {weight!r:.80}")
    return weight


@explained
def weighted(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    losses: Mapping[str, tuple[Loss, float]],
    *,
    masks: Mapping[str, Bool[Tensor, " b"]] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Compute a weighted sum of losses, one per modality.

    Args:
        outputs: Dictionary of outputs, keyed by modality.
        targets: Dictionary of targets, keyed by modality. Modalities without a target are left out of the sum.
        losses: Dictionary of pairs `(function, weight)`, keyed by modality. A function maps `(output, target)` to a
            scalar loss.
        masks: Dictionary of masks `b`, keyed by modality: True for samples with a target. Targets of other samples are
            ignored. If no sample has a target, the loss is zero. A modality without a mask has targets for all samples.

    Returns:
        Weighted sum (a scalar), and a dictionary of the unweighted losses, keyed by modality.

    Raises:
        TypeError: If a mask is not boolean.
        ValueError: If `targets` is empty, a target has no output or no loss, or a mask has no target.
        ValueError: If a weight is negative, infinite or NaN.
        ValueError: If a mask has the wrong shape, or a floating-point target does not have the shape of its output.

    Example:
        >>> from torch.nn import functional as F
        >>> outputs = {"audio": torch.zeros(2, 9), "label": torch.zeros(2, 3)}
        >>> targets = {"audio": torch.ones(2, 9), "label": torch.tensor([0, 2])}
        >>> losses = {"audio": (F.l1_loss, 1.0), "label": (pc.losses.cross_entropy, 0.5)}
        >>> total, each = pc.losses.weighted(outputs, targets, losses)
        >>> round(total.item(), 3), sorted(each)
        (1.549, ['audio', 'label'])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (weights of video, audio and label).
    """
    masks = masks or {}
    for argument, entries in (("outputs", outputs), ("losses", losses)):
        if missing := targets.keys() - entries.keys():
            raise ValueError(f"targets must have their {argument}; there are none for {sorted(missing)}")
    if not targets:
        raise ValueError("targets must hold at least one modality; got none")
    for name in targets:
        weight = losses[name][1]
        if not isinstance(weight, Tensor) and not 0.0 <= weight < math.inf:
            raise ValueError(f"losses[{name!r}] must have a finite weight of at least 0; got {weight!r:.60}")
    if unknown := masks.keys() - targets.keys():
        raise ValueError(f"masks names {sorted(unknown)}; there are targets for {sorted(targets)}")
    each = {
        name: _modality_loss(name, losses[name][0], outputs[name], target, masks.get(name))
        for name, target in targets.items()
    }
    return torch.stack([losses[name][1] * loss for name, loss in each.items()]).sum(), each


def _modality_loss(name: str, loss: Loss, output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if target.is_floating_point() and target.shape != output.shape:
        raise ValueError(
            f"targets[{name!r}] must have the shape of its output, {tuple(output.shape)}; got {tuple(target.shape)}"
        )
    if mask is None:
        return loss(output, target)
    checks.is_mask(f"masks[{name!r}]", mask, (target.shape[0],))
    if not mask.any():
        return 0.0 * output.sum()  # zero, but connected to all parameters, so that each gets a gradient
    return loss(output[mask], target[mask])
