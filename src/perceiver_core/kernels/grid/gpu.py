"""Reads of a grid on a GPU, by the Triton kernels of `kernels`: what goes in, and how the parts that come out merge.

The kernels know grids of two axes: the last, and all others as one, for which the axis queries are added up before and
the marginals taken apart after. Parts of the grid are read by programs of their own, each relative to the largest
score that it met, so that a few queries fill a GPU as well (flash-decoding); what they found is merged here.

Results repeat to the bit: nothing is added up in an order that changes, and what is tuned (how many queries a program
has, on how many warps and registers) does not change the order either. Tuning happens at the first read of a kind,
which waits for the GPU; no other read does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.kernels.grid import eager

Options: TypeAlias = dict[str, Any]

LOG2E = 1 / math.log(2)
WARP = 32  # queries come in multiples of a warp's threads
PROGRAMS = 24  # warps of work for each multiprocessor, at least, where the grid can be cut up so far
MOST = 2**31 - 1  # what the kernels multiply in 32 bits
WIDEST = 64  # channels that fit on chip
CAPABILITY = (8, 0)  # of the GPU, at least: what Triton supports

# What is tried at the first read of a kind, the first where nothing can be tried. Few channels stay in registers.
FEW: list[Options] = [
    {"BLOCK": 128, "num_warps": 4},
    {"BLOCK": 128, "num_warps": 4, "maxnreg": 168},
    {"BLOCK": 32, "num_warps": 1},
    {"BLOCK": 32, "num_warps": 1, "maxnreg": 168},
]
MANY: list[Options] = [
    {"BLOCK": 32, "num_warps": 4, "num_stages": 1},
    {"BLOCK": 32, "num_warps": 4, "num_stages": 2},
]
# The same for tokens: columns of a program.
FEW_TOKENS: list[Options] = [{"STRETCH": 32 * warps, "num_warps": warps} for warps in (4, 1, 2)]
MANY_TOKENS: list[Options] = [{"STRETCH": 32, "num_warps": 4, "num_stages": stages} for stages in (1, 2)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # no GPU comes while a graph is made
def missing(device: torch.device, channels: int) -> str:
    """What these kernels are without on a device; empty if they can run."""
    if device.type != "cuda":
        return f"there is no compiled loop for {device.type}"
    if not _has_triton():
        return "Triton is not installed"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "it would need an NVIDIA GPU of compute capability 8.0 or higher"
    if channels > WIDEST:
        return f"content of {channels} channels does not fit on chip; {WIDEST} do"
    return _failed.get(device, "")


_failed: dict[torch.device, str] = {}


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401 (is it there?)
    except ImportError:
        return False
    return True


class Plan(NamedTuple):
    """How a read is cut up."""

    samples: int
    heads: int
    queries: int  # filled up to whole warps
    others: tuple[int, ...]  # axes but the last
    width: int
    stretches: int  # the columns, filled up to whole stretches
    stretch: int
    splits: int  # of the rows
    groups: int  # of the stretches
    constants: Options

    @classmethod
    def of(cls, a: Tensor, content: Tensor, mask: Tensor | None) -> Plan:
        """For these tensors on their device."""
        samples, channels, *others, width = content.shape
        heads, queries = a.shape[1], _filled(a.shape[2], WARP)
        padded = 1 << (channels - 1).bit_length()
        stretch = 16 if padded < 16 else 32
        stretches, height = -(-width // stretch), prod(others)
        parts = -(-PROGRAMS * _processors(content.device) * WARP // (samples * heads * queries))
        groups = min(stretches, -(-parts // min(height, math.isqrt(parts - 1) + 1)), MOST // stretches)
        splits = min(height, -(-parts // groups), MOST // height)
        constants = {
            "CHANNELS": channels,
            "PADDED": padded,
            "SHARED": a.shape[0] == 1,
            "MASKED": mask is not None,
            "PRECISION": "ieee" if content.dtype == torch.float64 else "tf32x3",
        }
        return cls(samples, heads, queries, tuple(others), width, stretches, stretch, splits, groups, constants)

    @property
    def one(self) -> int:
        """Samples and heads together."""
        return self.samples * self.heads

    @property
    def height(self) -> int:
        """Rows."""
        return prod(self.others)

    @property
    def wide(self) -> int:
        """Columns, filled up."""
        return self.stretches * self.stretch

    @property
    def sizes(self) -> tuple[int, ...]:
        """What all kernels are told."""
        return self.heads, self.queries, self.height, self.width, self.wide

    def over_queries(self, kernel: str, *tensors: Tensor) -> None:
        """Launches a kernel whose programs have queries each."""
        few = self.constants["PADDED"] < 16
        options = [option for option in (FEW if few else MANY) if self.queries % option["BLOCK"] == 0]

        def launch(option: Options) -> None:
            blocks = self.queries // option["BLOCK"]
            cut = self.stretches, blocks, self.splits, self.groups
            programs = self.one * self.splits * self.groups * blocks
            options = {"STRETCH": self.stretch, **self.constants, **option}
            _launch(kernel, programs, (*tensors, *self.sizes, *cut), options)

        self._tuned(kernel, launch, options, tensors[0].device)

    def over_tokens(self, kernel: str, *tensors: Tensor) -> None:
        """Launches a kernel whose programs have columns of a row each."""
        padded = self.constants["PADDED"]
        block = 16 if padded <= 4 or padded >= 16 else 8  # queries at a time; more would not fit into registers

        def launch(option: Options) -> None:
            pieces = -(-self.width // option["STRETCH"])
            programs = self.samples * self.height * pieces
            options = {"BLOCK": block, **self.constants, **option}
            _launch(kernel, programs, (*tensors, *self.sizes, pieces), options)

        self._tuned(kernel, launch, FEW_TOKENS if padded < 16 else MANY_TOKENS, tensors[0].device)

    def _tuned(
        self, kernel: str, launch: Callable[[Options], None], options: Sequence[Options], device: torch.device
    ) -> None:
        work = (self.one * self.queries * self.height * self.wide).bit_length()
        key = (kernel, device, work, self.queries, *self.constants.values())
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if key not in _best and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                _best[key] = fastest(launch, options)
            launch(_best.get(key, options[0]))


_best: dict[tuple[Any, ...], Options] = {}


def fastest(launch: Callable[[Options], None], options: Sequence[Options]) -> Options:
    """The option with which a kernel takes the least time, of those that compile and fit on the GPU.

    Raises:
        NoKernelError: none does.
    """
    found = [(_milliseconds(launch, option), number) for number, option in enumerate(options)]
    times = [(time, number) for time, number in found if isinstance(time, float)]
    if not times:
        raise NoKernelError(str(found[-1][0])) from found[-1][0]  # type: ignore[misc]
    return options[min(times)[1]]


class NoKernelError(RuntimeError):
    """No kernel can be made for this GPU."""


def _milliseconds(launch: Callable[[Options], None], option: Options) -> float | Exception:
    """The least of some times, or what Triton says against it."""
    try:
        launch(option)
        return min(_once(launch, option) for _ in range(3))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error


def _once(launch: Callable[[Options], None], option: Options) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    launch(option)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def forward(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read, marginals, base and total: see `op`. Tensors are contiguous."""
    grid = content.shape[2:]
    if (axis := _instead_of_last(grid)) is not None:
        u = _parts_exchanged(u, axis, grid)
        content, scale, mask = (None if x is None else _exchanged(x, axis, grid) for x in (content, scale, mask))  # type: ignore[assignment]
        read, marginals, base, total = forward(a, u, content, scale, mask)
        return read, _parts_exchanged(marginals, axis, content.shape[2:]), base, total
    try:
        return _forward(a, u, content, scale, mask)
    except NoKernelError as error:
        _give_up(content.device, error)
        return eager.forward(a, u, content, scale, mask)


def _instead_of_last(grid: torch.Size) -> int | None:
    """The axis to walk along in place of the last, where that is shorter than a stretch: rows would be too many."""
    longest = max(range(len(grid)), key=lambda axis: grid[axis])
    return longest if grid[-1] < WARP // 2 < grid[longest] else None


def _exchanged(x: Tensor, axis: int, grid: torch.Size) -> Tensor:
    """With an axis of the grid and the last in each other's place."""
    return x.transpose(x.ndim - len(grid) + axis, -1).contiguous()


def _parts_exchanged(tables: Tensor, axis: int, grid: torch.Size) -> Tensor:
    """The same of what lies axis after axis."""
    parts = list(torch.split(tables, list(grid), dim=-1))
    parts[axis], parts[-1] = parts[-1], parts[axis]
    return torch.cat(parts, dim=-1)


def _give_up(device: torch.device, error: NoKernelError) -> None:
    """From now on, reads on this device are plain PyTorch's."""
    _failed[device] = f"no kernel could be made: {error}"
    warnings.warn(f"structured reads on {device} are made by plain PyTorch, slowly: {_failed[device]}", stacklevel=3)


def _forward(
    a: Tensor, u: Tensor, content: Tensor, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = Plan.of(a, content, mask)
    new = content.new_empty
    parts = (plan.one, plan.splits, plan.groups)
    read, bases, totals = new(*parts, a.shape[-1], plan.queries), new(*parts, plan.queries), new(*parts, plan.queries)
    row_sums, row_bases = (new(plan.one, plan.groups, plan.height, plan.queries) for _ in range(2))
    column_sums = new(plan.one, plan.splits, plan.stretches, plan.stretch, plan.queries)
    column_bases = new(plan.one, plan.splits, plan.stretches, plan.queries)
    given = (*_asked(plan, a * LOG2E, u * LOG2E), *_tokens(plan, content, scale, mask))
    found = (read, bases, totals, row_sums, row_bases, column_sums, column_bases)
    plan.over_queries("forward", *given, *found)
    base = bases.amax((1, 2))
    base = base.masked_fill(base == -torch.inf, 0.0)
    share = (bases - base[:, None, None]).exp2()
    total = (totals * share).sum((1, 2))
    rows = row_bases.sub_(base[:, None, None]).exp2_().mul_(row_sums).sum(1)
    columns = column_sums.mul_((column_bases - base[:, None, None]).exp2_()[:, :, :, None]).sum(1)
    marginals = torch.cat([*_of_axes(rows, plan.others), columns.flatten(1, 2)[:, : plan.width]], 1)
    norm = total.where(total > 0, 1.0)[:, None]
    read = (read * share[:, :, :, None]).sum((1, 2)) / norm
    made = (read, marginals / norm, base[:, None], total[:, None])
    turned = [_turned(_per_head(plan, x, a.shape[2])) for x in made]
    return turned[0], turned[1], turned[2][..., 0], turned[3][..., 0]


def backward(  # noqa: PLR0913 (what the forward was given, what it kept and what came back)
    a: Tensor,
    u: Tensor,
    content: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    base: Tensor,
    total: Tensor,
    d_read: Tensor,
    d_marginals: Tensor,
    offset: Tensor,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, u, content and scale."""
    grid = content.shape[2:]
    if (axis := _instead_of_last(grid)) is not None:
        u, d_marginals = (_parts_exchanged(x, axis, grid) for x in (u, d_marginals))
        content, scale, mask = (None if x is None else _exchanged(x, axis, grid) for x in (content, scale, mask))  # type: ignore[assignment]
        d_a, d_u, *rest = backward(a, u, content, scale, mask, base, total, d_read, d_marginals, offset, tokens)
        d_content, d_scale = (_exchanged(x, axis, grid) if tokens else x for x in rest)
        return d_a, _parts_exchanged(d_u, axis, content.shape[2:]), d_content, d_scale
    try:
        return _backward(a, u, content, scale, mask, base, total, d_read, d_marginals, offset, tokens)
    except NoKernelError as error:
        _give_up(content.device, error)
        return eager.backward(a, u, content, scale, mask, base, total, d_read, d_marginals, offset, tokens)


def _backward(  # noqa: PLR0913
    a: Tensor,
    u: Tensor,
    content: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    base: Tensor,
    total: Tensor,
    d_read: Tensor,
    d_marginals: Tensor,
    offset: Tensor,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = Plan.of(a, content, mask)
    inverse = total.where(total > 0, torch.inf).reciprocal()
    gifts = d_read * inverse[..., None], d_marginals * inverse[..., None]
    asked, given = (a * LOG2E, u * LOG2E), _tokens(plan, content, scale, mask)
    own = [_filled_up(x, plan.queries) for x in (base, offset * inverse)]
    parts = (plan.one, plan.splits, plan.groups)
    d_a = content.new_empty(*parts, a.shape[-1], plan.queries)
    d_rows = content.new_empty(plan.one, plan.groups, plan.height, plan.queries)
    d_columns = content.new_empty(plan.one, plan.splits, plan.wide, plan.queries)
    of_asked, of_gifts = _asked(plan, *asked), _asked(plan, *gifts)
    plan.over_queries("backward_queries", *of_asked, *given, own[0], *of_gifts, own[1], d_a, d_rows, d_columns)
    d_u = torch.cat([*_of_axes(d_rows.sum(1), plan.others), d_columns.sum(1)[:, : plan.width]], 1)
    made = (_per_head(plan, x, a.shape[2]) for x in (d_a.sum((1, 2)), d_u))
    d_a, d_u = (_turned(x.sum(0, keepdim=True) if a.shape[0] == 1 else x) for x in made)
    if not tokens:
        return d_a, d_u, content.new_empty(0), scale.new_empty(0)
    # Here the last axis's part lies with its columns last.
    of_asked, of_gifts = ((*x[:2], _columns(plan, y)) for x, y in ((of_asked, asked[1]), (of_gifts, gifts[1])))
    d_content, d_scale = (torch.empty_like(x) for x in given[:2])
    plan.over_tokens("backward_tokens", *of_asked, *given, own[0], *of_gifts, own[1], d_content, d_scale)
    return d_a, d_u, d_content[..., : plan.width].contiguous(), d_scale[..., : plan.width].contiguous()


def _launch(kernel: str, programs: int, arguments: tuple[Any, ...], options: Options) -> None:
    from perceiver_core.kernels.grid import kernels  # needs Triton, which not everyone has

    getattr(kernels, kernel)[(programs,)](*arguments, **options)


def _asked(plan: Plan, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What queries have for the content, for each row, and for each column: `b h .. q`, filled up."""
    *parts, columns = torch.split(u, [*plan.others, plan.width], dim=-1)
    rows = u.new_zeros(*u.shape[:-1], *(1 for _ in plan.others))
    for axis, part in enumerate(parts):
        rows = rows + part.reshape(*u.shape[:-1], *(size if i == axis else 1 for i, size in enumerate(plan.others)))
    made = [_filled_up(_turned(x), plan.queries) for x in (a, rows.reshape(*u.shape[:-1], -1), columns)]
    return made[0], made[1], made[2]


def _columns(plan: Plan, u: Tensor) -> Tensor:
    """What queries have for each column: `b h q columns`, filled up."""
    columns = u[..., u.shape[-1] - plan.width :]
    return F.pad(columns, (0, 0, 0, plan.queries - u.shape[2])).contiguous()


def _tokens(plan: Plan, content: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Content, scale and what the mask adds, with rows filled up; hidden tokens are zero."""
    if mask is None:
        scale = _filled_up(scale, plan.wide, value=1.0)
        return _filled_up(content, plan.wide), scale, scale
    content, scale = content.masked_fill(~mask[:, None], 0.0), scale.masked_fill(~mask, 0.0)
    hidden = torch.zeros_like(scale).masked_fill_(~mask, -torch.inf)
    return _filled_up(content, plan.wide), _filled_up(scale, plan.wide, value=1.0), _filled_up(hidden, plan.wide)


def _filled_up(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """With the last axis filled up to a size."""
    return F.pad(x, (0, size - x.shape[-1]), value=value) if x.shape[-1] < size else x.contiguous()


def _per_head(plan: Plan, x: Tensor, queries: int) -> Tensor:
    """Samples and heads on axes of their own, and the queries that were asked for."""
    return x.reshape(plan.samples, plan.heads, *x.shape[1:])[..., :queries]


def _turned(x: Tensor) -> Tensor:
    """With the last two axes changed about, in memory as well."""
    return x.mT.contiguous()


def _of_axes(rows: Tensor, others: tuple[int, ...]) -> list[Tensor]:
    """Sums over rows, `one rows q`, taken apart: those along each axis but the last, `one size q`."""
    rows = rows.reshape(len(rows), *others, rows.shape[-1]) if others else rows
    axes = range(1, len(others) + 1)
    return [rows.sum([axis for axis in axes if axis != kept]) if len(others) > 1 else rows for kept in axes]


def _filled(number: int, block: int) -> int:
    return -(-number // block) * block


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
