"""Multi-head attention: query, key and value projections, an attention kernel, and an output projection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import cast

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks, masks
from perceiver_core.blocks.factory import build, takes_argument
from perceiver_core.kernels import fastest
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.masked_values import finite_where_masked, without_masked_tokens
from perceiver_core.masks import Mask
from perceiver_core.positions.rotary import check_rotated_heads
from perceiver_core.reads.caches import AttentionCapture, Cache
from perceiver_core.reads.dense import project, project_heads, rotate
from perceiver_core.reads.strategy import AttentionInput, Memory
from perceiver_core.registry import register
from perceiver_core.registry.keywords import check_keywords


@register
class MultiHeadAttention(nn.Module):
    """Multi-head attention with configurable widths of queries and keys, values, and outputs.

    Args:
        dim: Input width of the queries.
        input_dim: Input width of the keys and values; `dim` by default.
        num_heads: Number of query heads; must divide `qk_dim` and `v_dim`.
        qk_dim: Total width of the query heads: `num_heads` times the head dimension of queries and keys; `input_dim` by
            default, as in the paper.
        v_dim: Total width of the attention output: `num_heads` times the head dimension of values; `qk_dim` by default.
        num_kv_heads: Number of key-value heads; `num_heads` by default. It must divide `num_heads`. With fewer
            key-value heads than query heads, adjacent query heads share one (grouped-query attention).
        out_dim: Output width; `dim` by default.
        bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has a bias.
        dropout: Dropout rate of the attention weights.
        qk_norm: Factory `head_dim -> module` for the norms of the queries and keys in each head.
        rotary: Rotary embedding of queries and keys, such as `positions.Rotary`; None for no rotary embedding.
        kernel: Attention kernel `(q, k, v, *, mask) -> out` on `b h n d`; see `kernels`.

    Raises:
        ValueError: If `num_heads` does not divide `qk_dim` or `v_dim`, or `num_kv_heads` does not divide `num_heads`.
        ValueError: If `dropout` is above 0 and the kernel does not support dropout.

    Example:
        >>> attention = pc.MultiHeadAttention(1024, 261, num_heads=1)
        >>> attention(torch.randn(2, 5, 1024), torch.randn(2, 50, 261)).shape
        torch.Size([2, 5, 1024])

    Reference: Vaswani et al. 2017, section 3.2.2; widths as in deepmind-research/perceiver. Grouped queries:
    Ainslie et al. 2023, section 2.2. Norms of queries and keys: Dehghani et al. 2023, section 2.2.
    """

    accepts_source = True  # `inputs` may be a reads.Source, whose keys and values are computed in `forward`
    accepts_cache = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.accepts_cache = takes_argument(cls.forward, "cache")

    def __init__(  # noqa: PLR0913 (published models differ in each of them)
        self,
        dim: int,
        input_dim: int | None = None,
        *,
        num_heads: int = 8,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        num_kv_heads: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        qk_norm: Callable[[int], nn.Module] = nn.Identity,
        rotary: nn.Module | None = None,
        kernel: Callable[..., Tensor] = fastest,
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        qk_dim = input_dim if qk_dim is None else qk_dim
        v_dim = qk_dim if v_dim is None else v_dim
        out_dim = dim if out_dim is None else out_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.positive(dim=dim, input_dim=input_dim, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim, out_dim=out_dim)
        checks.positive(num_kv_heads=num_kv_heads)
        _check_heads(num_heads, qk_dim=qk_dim, v_dim=v_dim)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got num_kv_heads={num_kv_heads}, num_heads={num_heads}"
            )
        head_dim, value_dim = qk_dim // num_heads, v_dim // num_heads
        _check_kernel(kernel, dropout)
        self.dim, self.input_dim, self.out_dim, self.num_heads = dim, input_dim, out_dim, num_heads
        self.num_kv_heads, self.kv_dim = num_kv_heads, num_kv_heads * (head_dim + value_dim)
        self.dropout, self.kernel = dropout, kernel
        self.query = init.linear(dim, qk_dim, bias=bias)
        self.key = init.linear(input_dim, num_kv_heads * head_dim, bias=bias)
        self.value = init.linear(input_dim, num_kv_heads * value_dim, bias=bias)
        self.output = init.linear(v_dim, out_dim, bias=out_bias)
        self.query_norm, self.key_norm = build("qk_norm", qk_norm, head_dim), build("qk_norm", qk_norm, head_dim)
        self.rotary = nn.Identity() if rotary is None else rotary
        check_rotated_heads(self.rotary, num_heads, head_dim)

    def forward(
        self,
        x: Float[Tensor, "#b m d"],
        inputs: Float[Tensor, "#b n c"] | AttentionInput | None = None,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
        cache: Cache | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m o"]:
        """Compute attention from `x` to `inputs`, and return its output.

        Args:
            x: Input of the queries. A batch size of 1 is broadcast.
            inputs: Input of the keys and values, a tensor or a `reads.Source`; `x` by default (self-attention). Cached
                keys and values, such as `reads.KeysValues`, can be passed instead.
            mask: Key-padding mask `b n`, attention mask `b h q k`, or a callable such as `masks.Causal()`.
            positions: Positions of `x` for rotary embeddings; 1 - m ... 0 by default.
            cache: Cache that stores the keys and values: `reads.SharedMemory` or `reads.KeysValuesCache`.
            capture: Container that stores the attention weights; see `reads.AttentionCapture`.
        """
        memory: Memory
        if mask is not None:
            if isinstance(inputs, Tensor):
                inputs = cast(Tensor, without_masked_tokens(inputs, mask, x.shape[1]))
            elif inputs is None and cache is None:
                x = finite_where_masked(x, mask, masks.Padding)
            mask = masks.from_token_mask(mask)
        if inputs is None:
            memory = project(self, x, positions)
        elif isinstance(inputs, Tensor):
            memory = project(self, inputs)
        else:
            memory = inputs.memory(self)
        if cache is not None:
            memory = cache.update(memory)
        q = self.query_norm(project_heads(self.query, x, self.num_heads))
        q = self.rotary(q) if positions is None else rotate(self.rotary, q, positions)
        if capture is not None:
            capture.weights = memory.attention_map(q, self.kernel, mask=mask, queries=capture.queries)
        out = memory.attend(q, self.kernel, mask=mask, dropout=self.dropout if self.training else 0.0)
        return apply_linear(self.output, out.transpose(1, 2).flatten(2))  # b m (h e)


def _check_heads(num_heads: int, **widths: int) -> None:
    for name, width in widths.items():
        if width % num_heads:
            raise ValueError(
                f"num_heads must divide {name}; got num_heads={num_heads}, {name}={width}. Choose another number of "
                "heads, or set the width: attention=partial(MultiHeadAttention, "
                f"{name}={-(-width // num_heads) * num_heads}). By default qk_dim is input_dim, which is dim in "
                "self-attention, and v_dim is qk_dim"
            )


def _check_kernel(kernel: Callable[..., Tensor], dropout: float) -> None:
    checks.probability(dropout=dropout)
    function = kernel.forward if isinstance(kernel, nn.Module) else kernel
    try:
        takes_dropout = takes_argument(function, "dropout")
        inspect.signature(function).bind("q", "k", "v", mask=None)
    except (TypeError, ValueError) as error:
        if isinstance(kernel, partial):
            check_keywords(kernel.func, kernel.keywords)
        raise ValueError(f"kernel must be a function (q, k, v, *, mask); wrap {kernel!r} in one") from error
    if dropout and not takes_dropout:
        raise ValueError(
            f"dropout={dropout} needs a kernel that takes `dropout`; {getattr(kernel, '__name__', kernel)} does not. "
            "Use kernel=sdpa, or drop from the residual instead"
        )
