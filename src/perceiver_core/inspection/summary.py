"""Summary of a model: its parts, with output shapes, parameters and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_core.argument_errors import checked
from perceiver_core.blocks import CrossAttend, JointAttend, SelfAttend
from perceiver_core.inspection.explain import frozen_state
from perceiver_core.tokens import Tokens

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Shape: TypeAlias = "tuple[int, ...] | list[Shape] | dict[str, Shape] | None"
"""Shape of a tensor or of `Tokens` (with position channels), list or dictionary of shapes, or None if unknown."""

_BLOCKS = (CrossAttend, SelfAttend, JointAttend)


@dataclass
class PartSummary:
    """Summary of one part of a model.

    Args:
        name: Qualified name; empty for the model itself.
        type: Name of the class.
        num_calls: Number of calls in one forward pass; more than 1 if several steps share the part.
        output: Shape of the output of the last call.
        num_parameters: Number of parameters. Parameters that several parts share count only in the first of them.
        num_trainable: Number of trainable parameters.
        flops: Number of floating-point operations in all calls: two per multiply-add in matrix products, convolutions
            and attention.

    Example:
        >>> pc.summary(nn.Linear(3, 5), torch.randn(2, 3))[0]
        PartSummary(name='', type='Linear', num_calls=1, output=(2, 5), num_parameters=20, num_trainable=20, flops=60)
    """

    name: str
    type: str
    num_calls: int = 0
    output: Shape = None
    num_parameters: int = 0
    num_trainable: int = 0
    flops: int = 0


class ModelSummary(tuple[PartSummary, ...]):
    """Tuple with one `PartSummary` per part, the model itself first. It prints as a table.

    Example:
        >>> resampler = pc.Resampler(10, num_latents=7, dim=32, depth=2, num_heads=4)
        >>> [(part.name, part.output) for part in pc.summary(resampler, torch.randn(2, 50, 10))][:3]
        [('', (2, 7, 32)), ('projection', (2, 50, 32)), ('layers.0', (2, 7, 32))]
    """

    def __str__(self) -> str:
        """Return a table with one row per part."""
        rows = [("part", "class", "calls", "output", "parameters", "trainable", "FLOP"), *map(_row, self)]
        columns = []
        for number, column in enumerate(zip(*rows, strict=True)):
            align = str.ljust if number in (0, 1, 3) else str.rjust  # text columns to the left, numbers to the right
            columns.append([align(text, max(map(len, column))) for text in column])
        return "\n".join(map("  ".join, zip(*columns, strict=True)))

    __repr__ = __str__


@checked
def summary(model: nn.Module, *inputs: object, depth: int = 2, **options: object) -> ModelSummary:
    """Run a model once, and report its parts with output shapes, parameters and floating-point operations.

    The model runs in evaluation mode without gradients. Afterwards, its mode and the random generators are restored.
    FLOPs are counted by PyTorch's `FlopCounterMode`. Operators that are not registered with it count as 0.

    Args:
        model: Any module. A compiled model is run without torch.compile.
        inputs: Positional arguments of the model's `forward`.
        depth: Number of levels of parts to report. The parts of blocks (cross-attention and self-attention) are not
            reported.
        options: Keyword arguments of the model's `forward`.

    Returns:
        One `PartSummary` per part, the model itself first, in a tuple that prints as a table. Parts below the first
        level without parameters and FLOPs are omitted.

    Example:
        >>> audio = pc.adapters.Audio(patch_size=16, positions=pc.positions.LearnedGrid((9,), dim=8))
        >>> encoder = pc.Encoder(audio.dim, num_latents=8, dim=32, depth=1, num_heads=4)
        >>> model = pc.Perceiver(audio, encoder, pc.heads.Regression(encoder.dim))
        >>> pc.summary(model, torch.randn(2, 999), depth=1)
        part     class       calls  output       parameters  trainable   FLOP
        (model)  Perceiver       1  2 x 1            11,969     11,969  703 k
        adapter  Audio           1  2 x 63 x 24          72         72      0
        encoder  Encoder         1  2 x 8 x 32       11,800     11,800  702 k
        head     Regression      1  2 x 1                97         97    128
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {model!r:.80}. Build it, or use create(...)")
    model = getattr(model, "_orig_mod", model)  # unwraps a module from torch.compile
    names: dict[nn.Module, str] = {}
    for name, part in _parts(model, "", depth):
        names.setdefault(part, name)
    parts = {name: part for part, name in names.items()}
    rows = {name: PartSummary(name, type(part).__name__) for name, part in parts.items()}
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which is slow

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, _Untracked())
    devices = {x.device.index for x in model.parameters() if x.device.type == "cuda"}
    with _evaluation(model), frozen_state(model), torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(_observe(part, rows[name], counter))
        with _counted_attention(model), counter:
            model(*inputs, **options)
    for path, parameter in model.named_parameters():
        for name, row in rows.items():
            if not name or path.startswith(f"{name}."):
                row.num_parameters += parameter.numel()
                row.num_trainable += parameter.numel() if parameter.requires_grad else 0
    return ModelSummary(row for row in rows.values() if row.num_parameters or row.flops or "." not in row.name)


class _Untracked:
    """No-op module tracker for `FlopCounterMode`. The original fails on views of parameters under torch.no_grad()."""

    parents = frozenset({"Global"})
    is_bw = False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _parts(module: nn.Module, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and its parts, down to `depth` levels. Items of containers are parts; containers are not."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield name, module
        depth -= 1
    if depth >= 0 and not isinstance(module, _BLOCKS):
        for child_name, child in module.named_children():
            yield from _parts(child, f"{name}.{child_name}" if name else child_name, depth)


@contextmanager
def _counted_attention(model: nn.Module) -> Iterator[None]:
    """Context manager that selects attention operators whose FLOPs PyTorch counts.

    PyTorch has no formula for its fused attention on a CPU, nor for the fast path of `nn.TransformerEncoder`.
    """
    fast, on_cpu = torch.backends.mha.get_fastpath_enabled(), all(x.device.type == "cpu" for x in model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _observe(part: nn.Module, row: PartSummary, counter: FlopCounterMode) -> Iterator[None]:
    """Context manager that records the calls of a part, their output and their FLOPs in its row."""
    starts: list[int] = []

    def before(*_: object) -> None:
        starts.append(counter.get_total_flops())

    def after(part: nn.Module, args: object, output: object) -> None:
        row.num_calls, row.output = row.num_calls + 1, _shape(output)
        row.flops += counter.get_total_flops() - starts.pop()

    handles = part.register_forward_pre_hook(before), part.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Context manager that sets a model to evaluation mode, and restores the mode of each module at the end."""
    training = [part for part in model.modules() if part.training]
    try:
        model.eval()
        yield
    finally:
        for part in training:
            part.training = True


def _shape(output: object) -> Shape:
    if isinstance(output, Tokens):
        return (*output.content.shape[:-1], output.dim)
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        return {str(key): _shape(item) for key, item in output.items()}
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [_shape(item) for item in output]
    return None


def _row(part: PartSummary) -> tuple[str, ...]:
    counts = (f"{part.num_parameters:,}", f"{part.num_trainable:,}", _scaled(part.flops))
    return (part.name or "(model)", part.type, str(part.num_calls), _text(part.output), *counts)


def _scaled(count: float) -> str:
    """Return a number with three digits and a unit prefix, such as "12.3 G"."""
    power = 0
    while float(f"{count:.3g}") >= 1000:
        count, power = count / 1000, power + 1
    return f"{count:.3g}{('', ' k', ' M', ' G', ' T', ' P', ' E')[power]}"


def _text(shape: Shape) -> str:
    """Return a shape as text, such as "2 x 5 x 10"."""
    if isinstance(shape, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in shape.items())
    if isinstance(shape, list):
        return ", ".join(map(_text, shape))
    return "" if shape is None else " x ".join(map(str, shape)) or "scalar"
