"""The encoder: a learned latent array reads the input and thinks about it, `reads` times over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init, sharing
from perceiver_core.masks import Mask
from perceiver_core.blocks import CrossAttend, LatentTransformer
from perceiver_core.blocks.attention_residual import Aggregate, onward
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

Input: TypeAlias = Tokens | Tensor
Memories: TypeAlias = dict[tuple[int, int], Any]
"""What reads made of their inputs, by the number of the read's weights and that of the input."""


@register
class Encoder(nn.Module):
    """Latents read the input, attend to each other, read again, ...

        for each step:  latents = read(latents, input);  latents = transformer(latents)

    Where steps share the weights of their read, keys and values of the input are computed once.

    Args:
        input_dim: the width of the input's tokens; one for each read where reads have different inputs.
        num_latents: how many latents.
        dim: their width.
        num_reads: how many times the input is read.
        depth: how many self-attends follow each read.
        num_heads: heads of these.
        share: which steps share weights: True for the paper's scheme (`sharing.paper`), False for none, or
            any scheme of `sharing`, or your own.
        cross_attention: makes a cross-attend from (dim, input_dim); `functools.partial` of `CrossAttend` sets the rest.
        latent_transformer: makes a latent transformer from (dim, depth=depth, heads=heads).
        latent_dropout: what becomes of the latents before they read, `DropLatents` for example; nothing unless given.
        aggregate: makes, for each step, from (dim), what goes on from the latents before and after all steps so far,
            such as `AttentionResidual`; steps that share a transformer share it. Unless given, those after the last go
            on.

    Raises:
        ValueError: sizes below 1, or reads that share weights but not their input's width.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from perceiver_core import CrossAttend, Encoder
        >>> encoder = Encoder(10, num_latents=7, dim=32, num_reads=3, depth=2, num_heads=4, cross_attention=partial(CrossAttend, num_heads=2))
        >>> encoder(torch.randn(2, 50, 10)).shape
        torch.Size([2, 7, 32])

    Reference: Jaegle et al. 2021 (Perceiver), figure 1.
    """

    def __init__(  # noqa: PLR0913 (each is a number or a part of the figure)
        self,
        input_dim: int | Sequence[int],
        *,
        num_latents: int,
        dim: int,
        num_reads: int = 1,
        depth: int = 6,
        num_heads: int = 8,
        share: bool | sharing.Scheme = True,
        cross_attention: Callable[..., nn.Module] = CrossAttend,
        latent_transformer: Callable[..., nn.Module] = LatentTransformer,
        latent_dropout: nn.Module | None = None,
        aggregate: Aggregate | None = None,
    ) -> None:
        super().__init__()
        checks.positive(num_latents=num_latents, dim=dim, num_heads=num_heads)
        checks.positive(at_most=10_000, num_reads=num_reads)
        self.dim, self.sharing = dim, _plan(share, num_reads)
        self.input_dim = input_dim if isinstance(input_dim, int) else tuple(input_dim)
        widths = _read_widths(input_dim, self.sharing)
        self.num_inputs = 1 if isinstance(input_dim, int) else len(input_dim)
        self.latents = init.embedding(num_latents, dim)
        self.latent_dropout = nn.Identity() if latent_dropout is None else latent_dropout
        self.reads = nn.ModuleList(cross_attention(dim, width) for width in widths)
        self.transformers = nn.ModuleList(
            latent_transformer(dim, depth=depth, num_heads=num_heads) for _ in set(self.sharing.transformers)
        )
        many = len(self.transformers)
        self.aggregates = [None] * many if aggregate is None else nn.ModuleList(aggregate(dim) for _ in range(many))

    def forward(self, inputs: Input | Sequence[Input], *, mask: Mask | None = None) -> Float[Tensor, "b m d"]:
        """The latents after all reads.

        Args:
            inputs: tokens, or a tensor `b n c`, which every read reads; or one of these for each read.
            mask: who may attend to whom, beside the tokens' own mask; see `masks`.

        Raises:
            TypeError, ValueError: inputs of another width, dtype, device or number.
        """
        return self._after(self.sharing.steps, self._given(inputs), mask, {})

    def attention_map(
        self,
        inputs: Input | Sequence[Input],
        *,
        read: int = -1,
        queries: int | Sequence[int] | Tensor | None = None,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h chosen n"]:
        """How much chosen latents attend to each token in one read; the other reads stay on their kernel.

        Args:
            inputs: as in `forward`.
            read: which read, from 0; negative numbers count from the last.
            queries: which latents, by index; all of them unless given.
            mask: as in `forward`.

        Raises:
            ValueError: a read that there is not.

        Example:
            >>> import torch
            >>> from perceiver_core import Encoder
            >>> encoder = Encoder(10, num_latents=7, dim=32, num_reads=3, depth=1, num_heads=4)
            >>> encoder.attention_map(torch.randn(2, 50, 10), read=0, queries=[0, 6]).shape
            torch.Size([2, 1, 2, 50])
        """
        steps = self.sharing.steps
        if not -steps <= read < steps:
            raise ValueError(f"read must lie in {-steps} ... {steps - 1}; got {read}")
        given = self._given(inputs)
        kept: Memories = {}
        x = self._after(read % steps, given, mask, kept)
        tokens, present = self._memory(read % steps, given, mask, kept)
        return self._read(read % steps).attention_map(x, tokens, mask=present, queries=queries)

    def _given(self, inputs: Input | Sequence[Input]) -> list[Input]:
        """The input of all reads, or that of each."""
        if not isinstance(inputs, (Tokens, Tensor, Sequence)):
            raise TypeError(f"inputs must be Tokens, a tensor b n c, or a list of these; got {type(inputs).__name__}")
        given = [inputs] if isinstance(inputs, (Tokens, Tensor)) else list(inputs)
        if len(given) != self.num_inputs:
            wanted = "one for all reads" if self.num_inputs == 1 else f"one for each of {self.num_inputs} reads"
            raise ValueError(f"inputs must be {wanted}; got {len(given)}")
        batches = [_batch(tokens) for tokens in given]
        if any(batch != batches[0] for batch in batches[1:]):
            raise ValueError(f"inputs of all reads must have one batch size; got {batches}")
        return given

    def _after(self, steps: int, given: list[Input], mask: Mask | None, kept: Memories) -> Tensor:
        """The latents after so many steps; `kept` holds what later ones will read again."""
        x: Tensor = self.latent_dropout(self.latents.unsqueeze(0))  # the same for all samples until they have read
        past = [x]
        for step in range(steps):
            tokens, present = self._memory(step, given, mask, kept)
            after = self._transformer(step)(self._read(step)(x, tokens, mask=present))
            x = onward(self.aggregates[self.sharing.transformers[step]], past, after)
        return x

    def _read(self, step: int) -> Any:  # a CrossAttend, or a user's own
        return self.reads[self.sharing.reads[step]]

    def _transformer(self, step: int) -> nn.Module:
        return self.transformers[self.sharing.transformers[step]]

    def _memory(self, step: int, given: list[Input], mask: Mask | None, kept: Memories) -> tuple[Any, Mask | None]:
        """What a step reads, and the mask to read it with.

        What is read once with some weights stays tokens, whose keys and values are the read's own business (to
        compute again, say). What is read again becomes keys and values, kept while a later step needs them.
        """
        # An input that is given twice is the same input: the first place it stands in is its name.
        first = [min(i for i, other in enumerate(given) if other is tokens) for tokens in given]
        wanted = [(number, first[i % len(given)]) for i, number in enumerate(self.sharing.reads)]
        key, again = wanted[step], wanted[step] in wanted[step + 1 :]
        if key not in kept and not again:
            return given[key[1]], mask
        if key not in kept:
            read, more = self._read(step), {}
            if isinstance(read, CrossAttend):  # a read of the user's own need not ask how many will read
                more = {"queries": len(self.latents) * wanted.count(key)}
            kept[key] = read.keys_values(given[key[1]], mask=mask, **more)
        return (kept[key] if again else kept.pop(key)), None


def _plan(share: bool | sharing.Scheme, reads: int) -> sharing.Sharing:
    scheme = {True: sharing.paper, False: sharing.none}[share] if isinstance(share, bool) else share
    if not callable(scheme):
        raise TypeError(f"share must be True, False or a scheme such as sharing.all_; got {share!r}")
    plan = scheme(reads)
    if plan.steps != reads:
        raise ValueError(f"share must plan for reads={reads} steps; it planned {plan.steps}")
    return plan


def _read_widths(input_dim: int | Sequence[int], plan: sharing.Sharing) -> list[int]:
    """The input width of each set of read weights."""
    widths = [input_dim] * plan.steps if isinstance(input_dim, int) else list(input_dim)
    if len(widths) != plan.steps:
        raise ValueError(f"input_dim must be one width, or one for each of {plan.steps} reads; got {input_dim}")
    of: dict[int, int] = {}
    for step, number in enumerate(plan.reads):
        if of.setdefault(number, widths[step]) != widths[step]:
            raise ValueError(
                f"reads that share weights must read inputs of one width; read {step} reads {widths[step]}, "
                f"an earlier one {of[number]}. Choose share=sharing.none, or project the inputs to one width"
            )
    return list(of.values())


def _batch(tokens: Input) -> int:
    return (tokens.content if isinstance(tokens, Tokens) else tokens).shape[0]
