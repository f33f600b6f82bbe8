"""Random calls of functions: losses, attention kernels, and padding of inputs of unequal size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import adapters, kernels, losses, masks
from tests.robustness.composition_bounds import largest
from tests.robustness.composition_draws import Draw
from tests.robustness.composition_inputs import audio, point_cloud, token_ids, video
from tests.robustness.composition_models import converted


def near(draw: Draw, actual: Tensor, expected: Tensor, epsilon: float, what: str) -> None:
    """Check that a result is finite and equal to the expected one within the rounding error of a short sum."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if draw.invalid is not None and not actual.isfinite().all():  # from NaN in an argument
        return
    assert actual.isfinite().all(), f"{what}: not finite"
    off, bound = largest(actual.double() - expected.double()), 64 * epsilon * (1 + largest(expected))
    assert off <= bound, f"{what}: off by {off:.2e}, bound {bound:.2e}"


def loss(draw: Draw, folder: Path) -> str:
    """Compare a loss with its formula in float64."""
    draw.batch = max(draw.batch, 1)
    kind = draw.choice("flow", "classes", "labels", "weighted")
    epsilon = torch.finfo(draw.dtype).eps
    q, v = draw.size(1, 5), draw.size(2, 6)
    logits = draw.tensor(draw.batch, q, v).to(draw.dtype)
    if kind == "flow":
        shape = (draw.batch, 2, q, v) if draw.flag() else (draw.batch, q, 2)
        flow, target = draw.tensor(*shape).to(draw.dtype), draw.tensor(*shape).to(draw.dtype)
        valid = draw.mask(*(shape[2:] if len(shape) == 4 else (q,)))
        actual = draw.make(losses.end_point_error, flow, target, valid)
        errors = (flow.double() - target.double()).norm(dim=1 if len(shape) == 4 else 2)
        near(draw, actual, (errors if valid is None else errors[valid]).mean(), epsilon, "end_point_error")
    elif kind == "classes":
        labels = draw.integers(v, draw.batch, q).long()
        labels[0, 1:] = -100
        smoothing, weight = draw.choice(0.0, 0.1, 1.0), draw.choice(None, draw.tensor(v).abs().to(draw.dtype) + 0.1)
        actual = draw.make(losses.cross_entropy, logits, labels, weight=weight, label_smoothing=smoothing)
        wide = None if weight is None else weight.double()
        expected = F.cross_entropy(logits.double().mT, labels, weight=wide, label_smoothing=smoothing)
        near(draw, actual, expected, epsilon, "cross_entropy")
    elif kind == "labels":
        targets, valid = draw.tensor(draw.batch, q, v) > 0, draw.mask(q, v)
        weight = draw.choice(None, draw.tensor(v).abs().to(draw.dtype))
        actual = draw.make(losses.binary_cross_entropy, logits, targets, pos_weight=weight, mask=valid)
        wide = None if weight is None else weight.double()
        each = F.binary_cross_entropy_with_logits(logits.double(), targets.double(), pos_weight=wide, reduction="none")
        if draw.invalid is None or draw.invalid.name != "pos_weight":  # which may be of another dtype
            near(draw, actual, (each if valid is None else each[valid]).mean(), epsilon, "binary_cross_entropy")
    else:
        names = ["a", "b"][: draw.choice(1, 2)]
        outs = {name: draw.tensor(draw.batch, q).to(draw.dtype) for name in names}
        targets = {name: draw.tensor(draw.batch, q).to(draw.dtype) for name in names}
        valid = {"a": draw.tensor(draw.batch) > 0} if draw.flag() else None
        total, each = draw.make(losses.weighted, outs, targets, dict.fromkeys(names, (F.l1_loss, 0.5)), masks=valid)
        kept = {n: valid[n] if valid and n in valid else torch.ones(draw.batch, dtype=torch.bool) for n in names}
        expected = sum(
            0.5 * (outs[n] - targets[n]).double()[kept[n]].abs().sum() / max(1, q * int(kept[n].sum())) for n in names
        )
        near(draw, total, torch.as_tensor(expected), epsilon, "weighted")
    return f"equal: loss {kind}"


def kernel(draw: Draw, folder: Path) -> str:
    """Compare an attention kernel with the plain formula in float64, outputs and gradients."""
    b, h, q, k, d, e = draw.batch, draw.size(1, 3), draw.size(1, 6), draw.size(1, 9), draw.size(1, 5), draw.size(1, 5)
    given = [draw.tensor(b, h, n, width).to(draw.dtype) * 2 for n, width in ((q, d), (k, d), (k, e))]
    mask = draw_mask(draw, b, h, q, k)
    functions: dict[str, Any] = {
        "sdpa": kernels.sdpa,
        "fastest": kernels.fastest,
        "chunked": partial(kernels.chunked, chunk_size=draw.size(1, 4)),
        "add_zero_attn": kernels.add_zero_attn,
        "merge": _merged,
        "merged": _merged,
        "reference": kernels.reference,
        "inverted": kernels.inverted,
    }
    name = draw.choice(*functions)
    draw.used.update(f"{f.__module__}.{f.__qualname__}" for f in USED.get(name, (getattr(kernels, name, None),)) if f)
    plain = {"add_zero_attn": partial(kernels.add_zero_attn, kernel=kernels.reference), "inverted": kernels.inverted}
    expected = _with_gradients(plain.get(name, kernels.reference), converted(given, torch.float64), mask)
    _, options = draw._recorded(kernels.reference, (), dict(zip("qkv", given, strict=True), mask=mask))
    actual = _with_gradients(functions[name], [options["q"], options["k"], options["v"]], options["mask"])
    if draw.invalid is not None:
        return f"equal: kernel {name}"  # kernels do not check values, and accept other shapes
    for part, (a, x) in enumerate(zip(actual, expected, strict=True)):
        near(draw, a, x, 8 * torch.finfo(draw.dtype).eps, f"kernel {name}, result {part}")
    weights = kernels.kernel_attention_map(kernels.reference, given[0], given[1], mask=mask)
    assert weights.shape == (b, h, q, k) and (weights.sum(-1) < 1.1).all(), "attention weights are no distributions"
    return f"equal: kernel {name}"


USED = {
    "merged": (kernels.attention_map,),
    "merge": (kernels.merge, kernels.partial_attention),
    "sdpa": (kernels.sdpa, kernels.kernel_attention_map),
}


def draw_mask(draw: Draw, b: int, h: int, q: int, k: int) -> Any:
    """Draw an attention mask: a rule, a tensor that broadcasts, or a combination; queries may have no key."""
    kind = draw.choice("none", "tensor", "padding", "queries", "causal", "and", "or", "empty")
    tensor = draw.tensor(draw.choice(1, b), draw.choice(1, h), draw.choice(1, q), draw.choice(1, k)) > -0.3
    rules = {
        "none": None,
        "tensor": tensor,
        "padding": masks.Padding(draw.tensor(b, k) > 0),
        "queries": masks.Queries(draw.tensor(b, q) > 0),
        "causal": masks.Causal(),
        "and": masks.and_(masks.Causal(), masks.Window(draw.size(0, 2), draw.size(0, 2)), tensor),
        "or": masks.or_(masks.Window(0, 0), tensor),
        "empty": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    }
    return rules[kind]


def _merged(q: Tensor, k: Tensor, v: Tensor, *, mask: Any) -> Tensor:
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)):
        return kernels.partial_attention(q, k, v, mask=mask).output  # raises an error
    if mask is not None:
        mask = masks.materialize(mask, queries=q.shape[-2], keys=k.shape[-2])
        mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    cut = (k.shape[-2] + 1) // 2
    parts = [slice(0, cut)] + [slice(cut, None)] * (cut < k.shape[-2])
    each = [
        kernels.partial_attention(q, k[..., part, :], v[..., part, :], mask=None if mask is None else mask[..., part])
        for part in parts
    ]
    return kernels.merge(*each).output


def _with_gradients(function: Any, given: list[Any], mask: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    out = function(*leaves, mask=mask)
    (out * 0.5).sum().backward()
    return [out.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def padded(draw: Draw, folder: Path) -> str:
    """Check the grid and the mask of a padded batch against the tokens of its shorter input by itself."""
    draw.batch = 1
    source = draw.choice(audio, video, point_cloud, token_ids)(draw)
    adapter = source.adapter
    if not isinstance(source.inputs, Tensor) or getattr(adapter, "spanned_axes", None):
        return "equal: nothing to pad"
    x = source.inputs[0].to(draw.dtype) if source.inputs.is_floating_point() else source.inputs[0]
    shorter = x
    for axis in adapter.axes_of(x.ndim + 1)[: draw.choice(1, 3)]:
        shorter = shorter.narrow(axis, 0, draw.random.randint(1, x.shape[axis]))
    if isinstance(adapter, adapters.PointCloud):
        adapters.pad_point_clouds([x, shorter])
        draw.used.add("perceiver_core.adapters.point_cloud.pad_point_clouds")
    batch, mask = draw.make(adapters.pad, [x, shorter], adapter)
    adapter.to(draw.dtype)
    whole, alone = adapter(batch, mask=mask), adapter(shorter[None])
    assert tuple(mask.shape) == (batch.shape[0], *whole.grid), f"mask {tuple(mask.shape)} for a grid {whole.grid}"
    assert int(mask[1].sum()) == alone.num_tokens, f"{int(mask[1].sum())} valid tokens, {alone.num_tokens} alone"
    return "equal: padded"


def point_coordinates(draw: Draw, folder: Path) -> str:
    """Compare the coordinates of grid points with the coordinates along each axis."""
    grid = tuple(draw.size(1, 4) for _ in range(draw.choice(1, 2, 3)))
    points = pc.positions.grid_points(grid, torch.zeros((), dtype=torch.float64))
    for axis, n in enumerate(grid):
        line = pc.positions.coordinates(n, None, torch.float64)
        assert torch.equal(points.movedim(axis, 0).reshape(n, -1, len(grid))[:, 0, axis], line), f"axis {axis}"
    draw.used.update(f"perceiver_core.positions.grid.{name}" for name in ("grid_points", "coordinates"))
    return "equal: positions"


FUNCTIONS = (loss, loss, loss, loss, kernel, kernel, kernel, kernel, kernel, kernel, padded, padded, point_coordinates)


def run_function(draw: Draw, folder: Path) -> str:
    """Draw a function and check it. Return the outcome."""
    return draw.choice(*FUNCTIONS)(draw, folder)
