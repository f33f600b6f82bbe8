"""Multi-head attention: projections to heads, a kernel, a projection back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core import masks
from perceiver_core.kernels import fastest, weights_of
from perceiver_core.reads.factored import FactoredKeysValues, attend
from perceiver_core.masks import Mask
from perceiver_core.registry import register


class KeysValues(NamedTuple):
    """Keys and values of an input, ready to be read, once or many times.

    Example:
        >>> import torch
        >>> from perceiver_core import MultiHeadAttention
        >>> attention = MultiHeadAttention(16, 10, num_heads=2)
        >>> read = attention.keys_values(torch.randn(3, 50, 10))
        >>> attention(torch.randn(3, 7, 16), read).shape
        torch.Size([3, 7, 16])
    """

    keys: Float[Tensor, "b g n d"]
    values: Float[Tensor, "b g n e"]
    mask: Mask | None = None

    def then(self, later: KeysValues) -> KeysValues:
        """These and later ones, one array; their masks are left out, since each was made for its own."""
        return KeysValues(torch.cat([self.keys, later.keys], 2), torch.cat([self.values, later.values], 2))


@register
class MultiHeadAttention(nn.Module):
    """Attention with a width of its own for queries and keys, for values and for the output.

    Args:
        dim: the width of what asks.
        input_dim: the width of what is read; `dim` unless given.
        num_heads: how many heads; divides `qk_dim` and `v_dim`.
        qk_dim: the width of all heads' queries and keys together; `input_dim` unless given (the paper's choice).
        v_dim: the width of all heads' values together; `qk_dim` unless given.
        num_kv_heads: how many heads the keys and values have; divides `num_heads`. As many unless given; with fewer,
            neighboring heads of the queries read the same ones (grouped-query attention).
        out_dim: the width of the output; `dim` unless given.
        bias: whether the projections to queries, keys and values have biases.
        out_bias: whether the output projection has one.
        dropout: the rate at which attention weights are dropped in training.
        qk_norm: makes a norm of each head's queries, and another of its keys, from the width of a head.
        rotary: turns queries and keys by their positions; see `positions.Rotary`.
        kernel: any `(q, k, v, *, mask) -> out` on `b h n d`.

    Raises:
        ValueError: heads that do not divide a width; kv_heads that do not divide heads; dropout with a kernel that
            has none.

    Example:
        >>> import torch
        >>> from perceiver_core import MultiHeadAttention
        >>> attention = MultiHeadAttention(1024, 261, num_heads=1)
        >>> attention(torch.randn(2, 5, 1024), attention.keys_values(torch.randn(2, 50, 261))).shape
        torch.Size([2, 5, 1024])

    Reference: Vaswani et al. 2017, section 3.2.2; the widths are those of deepmind-research/perceiver. Grouped queries:
    Ainslie et al. 2023, section 2.2. Norms of queries and keys: Dehghani et al. 2023, section 2.2.
    """

    def __init__(  # noqa: PLR0913 (each is a choice that published models make differently)
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
            raise ValueError(f"num_kv_heads must divide heads; got num_kv_heads={num_kv_heads}, num_heads={num_heads}")
        head_dim, value_dim = qk_dim // num_heads, v_dim // num_heads
        _check_dropout(dropout, kernel)
        self.dim, self.input_dim, self.out_dim, self.num_heads = dim, input_dim, out_dim, num_heads
        self.num_kv_heads, self.kv_dim = num_kv_heads, num_kv_heads * (head_dim + value_dim)
        self.dropout, self.kernel = dropout, kernel
        self.query = init.linear(dim, qk_dim, bias=bias)
        self.key = init.linear(input_dim, num_kv_heads * head_dim, bias=bias)
        self.value = init.linear(input_dim, num_kv_heads * value_dim, bias=bias)
        self.output = init.linear(v_dim, out_dim, bias=out_bias)
        self.query_norm, self.key_norm = qk_norm(head_dim), qk_norm(head_dim)
        self.rotary = nn.Identity() if rotary is None else rotary

    def keys_values(
        self,
        inputs: Float[Tensor, "b n c"],
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b n"] | None = None,
    ) -> KeysValues:
        """What of the input does not depend on who asks.

        Args:
            inputs: what is read.
            mask: which tokens are there, or who may attend to whom.
            positions: where each token stands, for `rotary`, if not one after the other up to the end.
        """
        keys, values = (_split(layer(inputs), self.num_kv_heads) for layer in (self.key, self.value))
        return KeysValues(self.finish_keys(keys, positions), values, masks.of_tokens(mask))

    def finish_keys(
        self, keys: Float[Tensor, "b g n d"], positions: Shaped[Tensor, "*#b n"] | None = None
    ) -> Float[Tensor, "b g n d"]:
        """Projected keys as they are read: normalized, and turned by their positions."""
        return self._turned(self.key_norm(keys), positions)

    def forward(
        self,
        x: Float[Tensor, "#b m d"],
        read: KeysValues | FactoredKeysValues,
        *,
        mask: Mask | None = None,
        positions: Shaped[Tensor, "*#b m"] | None = None,
    ) -> Float[Tensor, "b m o"]:
        """What `x` reads.

        Args:
            x: what asks; a batch of one asks the same of all samples.
            read: keys and values, see `keys_values`; or their parts, see `paths`.
            mask: who may attend to whom, beside the mask of `read`: `b n`, `b h q k`, or a rule of `masks`.
            positions: where each of `x` stands, for `rotary`, if not one after the other up to the end.
        """
        q = self._queries(x, positions)
        if isinstance(read, FactoredKeysValues) and mask is None:
            out = attend(q, read).output
        else:
            q, read = _of_one_shape(q, _formed(read, q.dtype))
            dropout: dict[str, Any] = {"dropout": self.dropout} if self.training and self.dropout else {}
            out = self.kernel(q, read.keys, read.values, mask=masks.and_(read.mask, masks.of_tokens(mask)), **dropout)
        return self.output(rearrange(out, "b h m e -> b m (h e)"))

    def attention_map(
        self,
        x: Float[Tensor, "#b m d"],
        read: KeysValues | FactoredKeysValues,
        *,
        mask: Mask | None = None,
        queries: Any = None,
    ) -> Float[Tensor, "b h chosen n"]:
        """The weights that the kernel gives chosen queries; see `perceiver_core.kernels.weights_of`."""
        q = self._queries(x)
        q, read = _of_one_shape(q, _formed(read, q.dtype))
        allowed = masks.and_(read.mask, masks.of_tokens(mask))
        return weights_of(self.kernel, q, read.keys, mask=allowed, queries=queries)

    def _turned(self, heads: Tensor, positions: Tensor | None) -> Tensor:
        """Queries or keys, turned by their positions."""
        if positions is None or isinstance(self.rotary, nn.Identity):
            turned: Tensor = self.rotary(heads)
        else:
            turned = self.rotary(heads, positions)
        return turned

    def _queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._turned(self.query_norm(_split(self.query(x), self.num_heads)), positions)


def _split(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _formed(read: KeysValues | FactoredKeysValues, dtype: torch.dtype) -> KeysValues:
    if isinstance(read, KeysValues):
        return read
    return KeysValues(*read.formed(dtype), None if read.mask is None else masks.Padding(read.mask.flatten(1)))


def _of_one_shape(q: Tensor, read: KeysValues) -> tuple[Tensor, KeysValues]:
    """Keys and values for every head of the queries; where either has a batch of one, it serves all samples."""
    if (shared := q.shape[1] // read.keys.shape[1]) > 1:
        keys, values = (repeat(x, "b g n d -> b (g shared) n d", shared=shared) for x in (read.keys, read.values))
        read = read._replace(keys=keys, values=values)
    if q.shape[0] == 1:
        return q.expand(read.keys.shape[0], -1, -1, -1), read
    if read.keys.shape[0] == 1:
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (read.keys, read.values))
        return q, read._replace(keys=keys, values=values)
    return q, read


def _check_heads(heads: int, **widths: int) -> None:
    for name, width in widths.items():
        if width % heads:
            raise ValueError(
                f"heads must divide {name}; got heads={heads}, {name}={width}. Choose another number of heads, "
                f"or set the width: attention=partial(MultiHeadAttention, {name}={-(-width // heads) * heads}). Unless "
                "given, qk_dim is input_dim, which in self-attention is dim, and v_dim is qk_dim"
            )


def _check_dropout(dropout: float, kernel: Callable[..., Tensor]) -> None:
    checks.probability(dropout=dropout)
    try:
        parameters = inspect.signature(kernel).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"kernel must be a function (q, k, v, *, mask); wrap {kernel!r} in one") from error
    takes_it = any(p.name == "dropout" or p.kind is p.VAR_KEYWORD for p in parameters)
    if dropout and not takes_it:
        raise ValueError(
            f"dropout={dropout} needs a kernel that takes `dropout`; {getattr(kernel, '__name__', kernel)} does not. "
            "Use kernel=sdpa, or drop from the residual instead"
        )
