"""`Factored` strategy. It computes keys and values from the content and one position table per grid axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from perceiver_core import checks, masks, tracing
from perceiver_core.kernels import PartialAttention, fastest, partial_attention
from perceiver_core.kernels.fastest import uses_chunks
from perceiver_core.layers.linear import bypass_reason
from perceiver_core.masks import Mask
from perceiver_core.reads import slabs
from perceiver_core.reads.dense import KeysValues, kernel_cost, rotate
from perceiver_core.reads.factored_keys_values import AttendSlab, FactoredKeysValues, Norm, factor
from perceiver_core.reads.machine import Cost, Machine
from perceiver_core.reads.strategy import ReadContext, Sizes
from perceiver_core.registry import register
from perceiver_core.registry.names import label
from perceiver_core.tokens import Tokens

# In half precision, an RMSNorm with eps=None uses the eps of float32, the dtype in which it computes. PyTorch 2.6 used
# the eps of the half-precision dtype, so that inputs as small as this one are not normalized to 1.
RMS_NORM_USES_HALF_EPS = bool(
    nn.functional.rms_norm(torch.full((1,), 2.0**-10, dtype=torch.bfloat16, device="cpu"), (1,)) < 0.5
)

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # weight types that all operators support; FakeTensor is for torch.export


@partial(register, name="reads.Factored")
@dataclass(frozen=True)
class Factored:
    """Strategy that computes keys and values from the content and one projected position table per grid axis.

    Content and position features are never concatenated. The strategy supports `Tokens` inputs with nn.LayerNorm,
    nn.RMSNorm or nn.Identity as the norm, and plain linear layers as the key and value projections.

    Example:
        >>> image = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=16))
        >>> read = pc.CrossAttend(32, image.dim, strategy=pc.reads.Factored())
        >>> read(torch.randn(2, 5, 32), image(torch.rand(2, 3, 13, 17))).shape
        torch.Size([2, 5, 32])
    """

    def why_not(self, context: ReadContext) -> str:
        """Return the reason why this strategy does not support a read, or an empty string if it does."""
        return why_not_factored(context)

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the predicted cost of projecting the content and the position tables, adding them, and attention."""
        per_token = sizes.batch * sizes.num_tokens
        table_products = sum(sizes.axes) * (sizes.token_dim - sizes.num_channels)
        flops = 2 * sizes.kv_dim * (per_token * sizes.num_channels + table_products)
        moved = per_token * (4 * sizes.kv_dim + sizes.num_channels) * 4
        return kernel_cost(sizes, machine, machine.matmul, flops=flops, moved=moved, overhead=machine.start)

    def prepare(self, context: ReadContext) -> KeysValues | FactoredKeysValues:
        """Compute the keys and values of all tokens, or return them in factored form if the input is large.

        In factored form, keys and values are computed during attention, for one slab (a range of indices along one
        grid axis) at a time. This is not possible if `needs_kernel` returns a reason.
        """
        attention, source = context
        limit = max(1, min(slabs.TOKENS, slabs.FORMED_NUMBERS // attention.kv_dim))
        memory = factored(context, attend_slab, limit)
        if _is_large(memory) and not needs_kernel(context):
            return memory if source.mask is None else masked(memory, source.mask)
        formed = memory.form(checks.product_dtype(memory.content))
        keys, positions = attention.key_norm(formed.keys), source.positions
        keys = attention.rotary(keys) if positions is None else rotate(attention.rotary, keys, positions)
        return KeysValues(keys, formed.values, source.whole_mask())


def attend_slab(q: Tensor, memory: FactoredKeysValues) -> PartialAttention:
    """Compute the keys and values of one slab (see `reads.slabs`), and attend to them."""
    keys, values, mask = memory.form(q.dtype)
    half = uses_chunks(q, keys.shape[-2])
    q = q.expand(keys.shape[0], *q.shape[1:])
    return partial_attention(q, keys, values, mask=mask, half_precision_matmul=half)


def _is_large(memory: FactoredKeysValues) -> bool:
    """Return whether the input has more tokens than one slab may have, so that it is read in several slabs."""
    if torch.compiler.is_compiling() or tracing.transformed():
        return False
    limit = memory.tokens_per_slab * slabs.factor_for(memory.content.device)
    return memory.content.shape[0] * prod(memory.grid()) > limit


def why_not_factored(context: ReadContext) -> str:
    """Return the reason why keys and values cannot be stored in factored form, or an empty string if they can."""
    attention, source = context
    if not isinstance(source.tokens, Tokens):
        return "the input is a tensor, not Tokens, so its positions are mixed with its content"
    norm, key, value = source.norm, attention.key, attention.value
    if type(norm) not in (nn.LayerNorm, nn.RMSNorm, nn.Identity):
        return f"the norm is a {type(norm).__name__}, not a LayerNorm, RMSNorm or Identity"
    for projection in (key, value):
        if type(projection) is not nn.Linear:
            return f"the projection to keys or values is a {label(type(projection))}, not a plain nn.Linear"
    for part in (norm, key, value):
        if reason := bypass_reason(part):
            return f"the norm or a projection to keys or values {reason}"
    for part in (norm, key, value):
        for parameter in (getattr(part, "weight", None), getattr(part, "bias", None)):
            if parameter is not None and type(parameter) not in PLAIN:
                return f"a weight of the norm or of a projection is a {type(parameter).__name__}, not a plain tensor"
    return ""


def needs_kernel(context: ReadContext) -> str:
    """Return the reason why a read needs key and value tensors, or "" if it can use the factored form."""
    attention, source = context
    if attention.kernel is not fastest:
        return f"the kernel {getattr(attention.kernel, '__name__', attention.kernel)} was chosen"
    if type(attention.rotary) is not nn.Identity:
        return "rotary positions rotate the keys"
    if type(attention.key_norm) is not nn.Identity:
        return "the keys of each head are normalized"
    if attention.num_kv_heads != attention.num_heads:
        return "several heads share their keys and values"
    if attention.training and attention.dropout:
        return "attention weights are dropped in training"
    if source.mask is not None:
        rules, tensors = masks.split(masks.from_token_mask(source.mask))
        if rules or any(size != 1 for mask in tensors for size in mask.shape[-3:-1]):
            return "the mask differs between queries"
    return ""


def factored(context: ReadContext, attend_slab: AttendSlab, tokens_per_slab: int) -> FactoredKeysValues:
    """Return keys and values in factored form. `why_not_factored(context)` must return an empty string."""
    tokens, norm, attention = context.source.tokens, context.source.norm, context.attention
    if not isinstance(tokens, Tokens):
        raise TypeError(f"a factored or structured read needs Tokens; got {type(tokens).__name__}")
    key, value = attention.key, attention.value
    return factor(
        tokens,
        _norm_constants(norm, tokens.content.dtype),
        (key.weight, key.bias),
        (value.weight, value.bias),
        num_heads=attention.num_kv_heads,
        attend_slab=attend_slab,
        tokens_per_slab=tokens_per_slab,
    )


def masked(memory: FactoredKeysValues, mask: Mask) -> FactoredKeysValues:
    """Combine the mask of `memory` with `mask` by logical and. `mask` must not differ between queries or heads."""
    rules, tensors = masks.split(masks.from_token_mask(mask))
    if rules:
        raise ValueError(f"mask of a read without keys and values must be the same for all queries; got {mask!r}")
    batch, num_tokens = memory.content.shape[0], prod(memory.grid())
    like = memory.content.new_empty(()).expand(batch, 1, num_tokens, 1)
    valid = memory.mask
    for part in tensors:
        masks.check_broadcast(part, like, like)
        more = part.expand(batch, 1, 1, num_tokens).reshape(batch, *memory.grid())
        valid = more if valid is None else valid & more
    return memory.over(memory.content, memory.tables, valid)


def _norm_constants(norm: nn.Module, dtype: torch.dtype) -> Norm | None:
    if isinstance(norm, nn.LayerNorm):
        return Norm(norm.eps, norm.weight, norm.bias)
    if isinstance(norm, nn.RMSNorm):
        like = dtype if RMS_NORM_USES_HALF_EPS else torch.promote_types(dtype, torch.float32)
        eps = torch.finfo(like).eps if norm.eps is None else norm.eps
        return Norm(eps, norm.weight, None, center=False)
    return None
