"""The decoder of Perceiver IO: whoever asks reads the latents, and what is asked is what is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perceiver_core import checks, init
from perceiver_core import masks
from perceiver_core.kernels.attention_weights import unwrapped
from perceiver_core.blocks import CrossAttend
from perceiver_core.registry import register

Asked = TypeVar("Asked", Tensor, dict[str, Tensor])


@register
class Decoder(nn.Module):
    """One read of the latents by any number of queries, and a linear layer.

        answers = output(read(queries, latents))

    Args:
        dim: the width of the latents.
        query_dim: the width of the queries.
        out_dim: the width of an answer; None for what the read gives, `query_dim` wide.
        num_heads: attention heads of the read.
        cross_attention: makes the read from (query_dim, dim, heads=heads). `functools.partial` of `CrossAttend` sets
            the rest: `residual=False`, the default, does not add the queries to what they read, as in all published
            decoders but those of the Fourier and convolutional image classifiers; `mlp=None` leaves the MLP out.
        chunk_size: how many queries are answered at once; all of them unless given. In training each chunk is computed
            again in the backward pass, so that memory does not grow with the number of queries but for these
            themselves and the answers. (`torch.func` does not take gradients through what is computed again.)

    Raises:
        ValueError: sizes below 1; a chunk where queries compete, as with the kernel `kernels.inverted`.

    Example:
        >>> import torch
        >>> from perceiver_core import Decoder
        >>> decoder = Decoder(32, query_dim=20, out_dim=2)
        >>> decoder(torch.randn(3, 7, 32), torch.randn(3, 100, 20)).shape
        torch.Size([3, 100, 2])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2 and figure 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        query_dim: int,
        out_dim: int | None = None,
        num_heads: int = 1,
        cross_attention: Callable[..., nn.Module] = partial(CrossAttend, residual=False),  # noqa: B008 (it is a constant)
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        checks.positive(dim=dim, query_dim=query_dim)
        if chunk_size is not None:
            checks.positive(chunk_size=chunk_size)
        self.dim, self.query_dim, self.chunk_size = dim, query_dim, chunk_size
        self.out_dim = query_dim if out_dim is None else out_dim
        self.cross_attention: Any = cross_attention(query_dim, dim, num_heads=num_heads)
        self.output = nn.Identity() if out_dim is None else init.linear(query_dim, out_dim)
        if chunk_size is not None and _compete(self.cross_attention):
            raise ValueError(f"chunk_size must be None where queries compete for what they read; got {chunk_size}")

    def forward(
        self,
        latents: Float[Tensor, "b m d"],
        queries: Asked,
        *,
        mask: Any = None,  # b q, or a dictionary of these
    ) -> Asked:
        """An answer to each query.

        Args:
            latents: what is read.
            queries: `b q e`, or `1 q e` or `q e` where all samples are asked the same; or a dictionary of these, which
                gives a dictionary of answers.
            mask: which queries are there, True = answer; the others read nothing. A dictionary of these for one of
                queries, in which a kind that is not named is all there.

        Raises:
            TypeError: queries that are not floating point, or not of the latents' dtype; a mask of another kind than
                the queries.
            ValueError: queries of another width, batch or device; a mask of another shape.
        """
        checks.is_floating("latents", latents)
        checks.has_shape("latents", latents, "b m d", last=self.dim)
        if isinstance(queries, dict):
            return self._of_each(latents, queries, mask)
        return self._answers(latents, self._checked(latents, queries, mask), mask)

    def _checked(self, latents: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        """Queries with a batch axis, that can be asked."""
        checks.is_floating("queries", queries)
        queries = _batched(queries)
        checks.has_shape("queries", queries, "b q e", last=self.query_dim)
        checks.same_place("queries", queries, next(self.parameters()))
        if queries.shape[0] not in (1, latents.shape[0]):
            raise ValueError(
                f"queries must have a batch of 1 or that of the latents, {len(latents)}; got {len(queries)}"
            )
        if mask is not None:
            checks.is_mask("mask", mask, (len(latents), queries.shape[1]))
        return queries

    def attention_map(
        self,
        latents: Float[Tensor, "b m d"],
        queries: Float[Tensor, "#b q e"] | Float[Tensor, "q e"],
        *,
        mask: Bool[Tensor, "b q"] | None = None,
    ) -> Float[Tensor, "b h q m"]:
        """How much each query attends to each latent. For the weights of some queries, give these.

        Args:
            latents: as in `forward`.
            queries: as in `forward`, a tensor.
            mask: as in `forward`; the others attend to nothing.

        Raises:
            TypeError, ValueError: as in `forward`.

        Example:
            >>> import torch
            >>> from perceiver_core import Decoder
            >>> decoder = Decoder(32, query_dim=20, num_heads=4)
            >>> decoder.attention_map(torch.randn(3, 7, 32), torch.randn(5, 20)).shape
            torch.Size([3, 4, 5, 7])
        """
        queries = self._checked(latents, queries, mask)
        allowed = None if mask is None else masks.Queries(mask)
        weights: Tensor = self.cross_attention.attention_map(queries, latents, mask=allowed)
        return weights

    def _of_each(self, latents: Tensor, queries: dict[str, Tensor], mask: Any) -> dict[str, Tensor]:
        """All are asked at once and told apart afterwards."""
        if not queries:
            raise ValueError("queries must name a tensor at least; got an empty dictionary")
        for name, x in queries.items():
            checks.is_floating(f"queries[{name!r}]", x)
        queries = {name: _batched(x) for name, x in queries.items()}
        batch = latents.shape[0] if any(x.shape[0] != 1 for x in queries.values()) else 1
        for name, x in queries.items():
            if x.shape[0] not in (1, batch):
                raise ValueError(
                    f"queries[{name!r}] must have a batch of 1 or that of the latents, {batch}; got {x.shape[0]}"
                )
        together = torch.cat([x.expand(batch, -1, -1) for x in queries.values()], dim=1)
        present = None if mask is None else _of_all(mask, queries, latents)
        answers = self(latents, together, mask=present).split([x.shape[1] for x in queries.values()], dim=1)
        return dict(zip(queries, answers, strict=True))

    def _answers(self, latents: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        count = queries.shape[1]
        if self.chunk_size is None or count <= self.chunk_size:
            return self._answer(latents, queries, mask)
        pieces = []
        for x, present in _pieces(queries, mask, self.chunk_size):
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self._answer, latents, x, present, use_reentrant=False))
            else:
                pieces.append(self._answer(latents, x, present))
        return torch.cat(pieces, dim=1)

    def _answer(self, latents: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        answers: Tensor = self.output(self.cross_attention(queries, latents, mask=None if mask is None else masks.Queries(mask)))
        return answers


def _compete(read: Any) -> bool:
    kernel = getattr(getattr(read, "attention", None), "kernel", None)
    return bool(getattr(unwrapped(kernel), "competes", False))


def _of_all(mask: Any, queries: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The masks of all kinds, one after the other."""
    if not isinstance(mask, Mapping):
        raise TypeError(f"mask must be a dictionary by kind, as the queries are, {list(queries)}; got {mask!r:.80}")
    if unknown := mask.keys() - queries.keys():
        raise ValueError(f"mask names {sorted(unknown)}; the queries are {list(queries)}")
    parts = []
    for name, x in queries.items():
        shape = (latents.shape[0], x.shape[1])
        if name in mask:
            checks.is_mask(f"mask[{name!r}]", mask[name], shape)
        parts.append(mask[name] if name in mask else latents.new_ones(shape, dtype=torch.bool))
    return torch.cat(parts, dim=1)


def _batched(queries: Tensor) -> Tensor:
    return queries[None] if queries.ndim == 2 else queries


def _pieces(queries: Tensor, mask: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, queries.shape[1], chunk):
        part = slice(start, start + chunk)
        yield queries[:, part], None if mask is None else mask[:, part]
