"""Encoder: a learned latent array cross-attends to the input several times, each followed by a latent transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, sharing
from perceiver_core.blocks import CrossAttend, LatentTransformer
from perceiver_core.blocks.attention_residual import Aggregate
from perceiver_core.blocks.factory import build
from perceiver_core.layers import init
from perceiver_core.masks import Mask
from perceiver_core.reads import AttentionCapture, Memory, SharedMemory
from perceiver_core.reads.strategy import QueryIndices
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

Input: TypeAlias = Tokens | Tensor


@register
class Encoder(nn.Module):
    """Latent array that alternately cross-attends to the input and passes through a latent transformer.

        for each step:  latents = cross_attention(latents, input);  latents = latent_transformer(latents)

    Keys and values of the input are computed once for all steps that share the weights of their cross-attention.

    Args:
        input_dim: Width of the input's tokens; one per read where reads have different inputs.
        num_latents: Number of latent vectors.
        dim: Width of the latents.
        num_reads: Number of cross-attentions to the input.
        depth: Number of self-attention blocks after each read.
        num_heads: Number of attention heads of these blocks.
        share: Weight sharing between steps: True for the paper's scheme (`sharing.paper`), False for none, or a
            function such as those of `sharing`.
        cross_attention: Factory `(dim, input_dim) -> module`; `functools.partial` of `CrossAttend` sets the rest.
        latent_transformer: Factory `(dim, depth=depth, num_heads=num_heads) -> module`.
        latent_dropout: Module applied to the latents before the first read, such as `DropLatents`; none by default.
        aggregate: Factory `dim -> module` that combines the outputs of all steps so far, such as `AttentionResidual`;
            steps that share a latent transformer share it. By default the last output is used.

    Raises:
        ValueError: Sizes below 1, or reads that share weights but not the width of their input.

    Example:
        >>> from functools import partial
        >>> read = partial(pc.CrossAttend, num_heads=2)
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=3, depth=2, num_heads=4, cross_attention=read)
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
        self.dim, self.sharing = dim, _sharing(share, num_reads)
        self.input_dim = input_dim if isinstance(input_dim, int) else tuple(input_dim)
        self.num_inputs = 1 if isinstance(input_dim, int) else len(input_dim)
        widths = _read_widths(input_dim, self.sharing)
        self.latents = init.embedding(num_latents, dim)
        self.latent_dropout = nn.Identity() if latent_dropout is None else latent_dropout
        if not isinstance(self.latent_dropout, nn.Module):
            raise TypeError(f"latent_dropout must be a module such as DropLatents(0.1); got {latent_dropout!r}")
        self.reads = nn.ModuleList(build(cross_attention, dim, width) for width in widths)
        num_transformers = len(set(self.sharing.transformers))
        self.transformers = nn.ModuleList(
            build(latent_transformer, dim, depth=depth, num_heads=num_heads) for _ in range(num_transformers)
        )
        self.aggregates = None
        if aggregate is not None:
            self.aggregates = nn.ModuleList(build(aggregate, dim) for _ in range(num_transformers))

    def forward(
        self,
        inputs: Input | Sequence[Input],
        *,
        mask: Mask | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after all steps.

        Args:
            inputs: Tokens or a tensor `b n c` for all reads, or a sequence of one per read.
            mask: Attention mask in addition to the tokens' own; see `masks`.
            capture: Receives the attention weights of one read, after which the latents are returned.

        Raises:
            TypeError, ValueError: Inputs of another width, dtype, device or number.
        """
        given = self._inputs(inputs)
        # (weight index, input index) of each step; inputs that are the same object share an index
        first = [min(i for i, other in enumerate(given) if other is x) for x in given]
        keys = [(number, first[step % len(given)]) for step, number in enumerate(self.sharing.reads)]
        captured = -1 if capture is None else _index(capture.read, len(keys))
        caches: dict[tuple[int, int], SharedMemory] = {}  # of memories that several reads share
        x: Tensor = self.latent_dropout(self.latents.unsqueeze(0))  # a batch of 1 until the first read
        states = [x]
        try:
            for step, key in enumerate(keys):
                read, later = self.reads[key[0]], keys[step + 1 :]
                tokens: Input | Memory = given[key[1]]
                options: dict[str, object] = {}
                if capture is not None and step == captured:
                    options["capture"], capture.grid = capture, getattr(tokens, "grid", None)
                shared = caches.get(key)
                if shared is not None and shared.memory is not None:
                    tokens = shared.memory
                else:
                    options["mask"] = mask
                    # Inputs used once are not cached, so that a read may compute their keys and values again.
                    if key in later and getattr(read, "accepts_cache", False):
                        caches[key] = options["cache"] = SharedMemory(
                            num_queries=x.shape[1] * (1 + len([other for other in later if other == key]))
                        )
                x = read(x, tokens, **options)
                del tokens, options  # a memory that no later read needs is freed before the latent transformer
                # A reentrant checkpoint leaves a memory without a graph, which later reads cannot use.
                if key in caches and (key not in later or not caches[key].has_graph()):
                    caches.pop(key).release()
                if step == captured:
                    return x
                number = self.sharing.transformers[step]
                x = self.transformers[number](x)
                if self.aggregates is not None:
                    states.append(x)
                    x = self.aggregates[number](states)
        finally:  # also after an error: a checkpoint keeps its arguments, and with them the caches
            for cache in caches.values():
                cache.release()
        return x

    def attention_map(
        self,
        inputs: Input | Sequence[Input],
        *,
        read: int = -1,
        queries: QueryIndices = None,
        mask: Mask | None = None,
    ) -> Float[Tensor, "b h chosen n"]:
        """Return the attention weights of one read; the other reads keep their kernel.

        Args:
            inputs: As in `forward`.
            read: Index of the read; negative indices count from the last.
            queries: Indices of the latents whose weights are returned; all of them by default.
            mask: As in `forward`.

        Raises:
            ValueError: An index out of range.

        Example:
            >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=3, depth=1, num_heads=4)
            >>> encoder.attention_map(torch.randn(2, 50, 10), read=0, queries=[0, 6]).shape
            torch.Size([2, 1, 2, 50])
        """
        capture = AttentionCapture(read, queries)
        self(inputs, mask=mask, capture=capture)
        return capture.result()

    def _inputs(self, inputs: Input | Sequence[Input]) -> list[Input]:
        """Return the input of all reads, or one per read."""
        if isinstance(inputs, (Tokens, Tensor)):
            given: list[Input] = [inputs]
        elif isinstance(inputs, Sequence):
            given = list(inputs)
        else:
            raise TypeError(f"inputs must be Tokens, a tensor b n c, or a list of these; got {type(inputs).__name__}")
        if len(given) != self.num_inputs:
            expected = "one for all reads" if self.num_inputs == 1 else f"one for each of {self.num_inputs} reads"
            raise ValueError(f"inputs must be {expected}; got {len(given)}")
        if len(given) > 1:
            batches = [(x.content if isinstance(x, Tokens) else x).shape[0] for x in given]
            if any(batch != batches[0] for batch in batches[1:]):
                raise ValueError(f"inputs of all reads must have one batch size; got {batches}")
        return given


def _index(read: int, num_reads: int) -> int:
    if not -num_reads <= read < num_reads:
        raise ValueError(f"read must lie in {-num_reads} ... {num_reads - 1}; got {read}")
    return read % num_reads


def _sharing(share: bool | sharing.Scheme, num_reads: int) -> sharing.Sharing:
    scheme = {True: sharing.paper, False: sharing.none}[share] if isinstance(share, bool) else share
    if not callable(scheme):
        raise TypeError(f"share must be True, False or a function such as sharing.all_; got {share!r}")
    plan = scheme(num_reads)
    if plan.steps != num_reads:
        raise ValueError(f"share must plan num_reads={num_reads} steps; it planned {plan.steps}")
    return plan


def _read_widths(input_dim: int | Sequence[int], plan: sharing.Sharing) -> list[int]:
    """Return the input width of each set of read weights."""
    widths = [input_dim] * plan.steps if isinstance(input_dim, int) else list(input_dim)
    if len(widths) != plan.steps:
        raise ValueError(f"input_dim must be one width, or one for each of {plan.steps} reads; got {input_dim}")
    by_number: dict[int, int] = {}
    for step, number in enumerate(plan.reads):
        if by_number.setdefault(number, widths[step]) != widths[step]:
            raise ValueError(
                f"reads that share weights must read inputs of one width; read {step} reads {widths[step]}, "
                f"an earlier one {by_number[number]}. Choose share=sharing.none, or project the inputs to one width"
            )
    return list(by_number.values())
