"""`Structured` strategy: exact attention over a grid without computing keys and values; see `kernels.grid`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from perceiver_core import checks, tracing
from perceiver_core.kernels import PartialAttention
from perceiver_core.kernels.grid import missing_kernel, read_grid
from perceiver_core.reads import slabs
from perceiver_core.reads.factored import factored, masked, needs_kernel, why_not_factored
from perceiver_core.reads.factored_keys_values import FactoredKeysValues
from perceiver_core.reads.machine import SHORT_ROW, Cost, Machine
from perceiver_core.reads.strategy import ReadContext, Sizes
from perceiver_core.registry import register

BLOCK = 2**14  # positions of an axis whose products with marginals are summed at once


@partial(register, name="reads.Structured")
@dataclass(frozen=True)
class Structured:
    """Strategy that computes attention from the content and one position table per grid axis.

    Keys and values are not computed. The strategy supports the same reads as `Factored`, except reads with a kernel
    other than the default, a rotary embedding, a key norm, grouped-query attention, attention dropout in training, or a
    mask that is not a key-padding mask.

    Example:
        >>> image = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=16))
        >>> read = pc.CrossAttend(32, image.dim, strategy=pc.reads.Structured())
        >>> read(torch.randn(2, 5, 32), image(torch.rand(2, 3, 13, 17))).shape
        torch.Size([2, 5, 32])
    """

    def why_not(self, context: ReadContext) -> str:
        """Return the reason why this strategy does not support a read, or an empty string if it does."""
        if tracing.needs_more_derivatives():
            return "structured reads support neither forward-mode AD nor second derivatives"
        return why_not_factored(context) or needs_kernel(context)

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the predicted cost of the compiled kernel and of the matrix products before and after it."""
        s, indices, pairs = sizes, sum(sizes.axes), sizes.pairs()
        table_products = indices * (s.token_dim - s.num_channels)
        products = 2 * s.kv_dim * (s.batch * s.num_queries * (s.num_channels + indices) + table_products)
        # Bytes of score terms and sums per axis index (each copied once), and of the content and the scale.
        moved = 4.0 * (
            8 * s.batch * s.num_heads * s.num_queries * indices + 4 * s.batch * s.num_tokens * (s.num_channels + 1)
        )
        per_pair = machine.pair + machine.channel * s.num_channels * (1 + SHORT_ROW / s.axes[-1])
        seconds = machine.start * 1e-6
        seconds += 1e-9 * (products / machine.matmul + moved / machine.copy + pairs * per_pair)
        return Cost(products + pairs * (4 * s.num_channels + 2 * len(s.axes) + 16), moved, seconds)

    def missing(self, context: ReadContext) -> str:
        """Return the reason why the compiled kernel is unavailable, or an empty string if it is available.

        On the CPU, the first check compiles or loads the kernel. Without the kernel, structured reads run in plain
        PyTorch, which uses little memory but is slow.
        """
        content = context.source.content()
        return missing_kernel(content.device, content.shape[-1])

    def prepare(self, context: ReadContext) -> FactoredKeysValues:
        """Return the keys and values in factored form, without computing key and value tensors."""
        memory = factored(context, attend_slab, slabs.TOKENS)
        return memory if context.source.mask is None else masked(memory, context.source.mask)


def attend_slab(q: Tensor, memory: FactoredKeysValues) -> PartialAttention:
    """Compute attention over the tokens of one slab (see `reads.slabs`) with the kernel `read_grid`."""
    keys, values = memory.keys, memory.values
    with checks.full_precision(q.device):
        planes = memory.planes()
        scaled = q.to(planes.dtype) * q.shape[-1] ** -0.5
        read = read_grid(
            scaled @ keys.content,
            torch.cat([scaled @ table.mT for table in memory.project_tables(keys)], dim=-1),
            planes,
            memory.scale(planes),
            memory.mask,
        )
        output = read.content @ values.content.mT
        output = output + _product(read.marginals, torch.cat(memory.project_tables(values), dim=1)) + values.constant
        # The constant term of the keys is the same for all scores of a query. It changes only their log-sum-exp.
        shift = scaled @ keys.constant.mT
        output = output + 0.0 * shift  # so that the gradient of `shift` is zero instead of None
        if memory.mask is not None:
            empty = (read.lse == -torch.inf).unsqueeze(-1)
            output, shift = output.masked_fill(empty, 0.0), shift.masked_fill(empty, 0.0)
        return PartialAttention(output, read.lse + shift.squeeze(-1))


def _product(marginals: Tensor, tables: Tensor) -> Tensor:
    """Return `marginals @ tables`. Long axes are summed in blocks to reduce rounding errors."""
    if tracing.is_exporting() or marginals.shape[-1] <= BLOCK:
        return marginals @ tables
    blocks = zip(torch.split(marginals, BLOCK, -1), torch.split(tables, BLOCK, -2), strict=True)
    return torch.stack([part @ table for part, table in blocks]).sum(0)
