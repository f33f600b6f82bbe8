"""Encoder of the Perceiver: cross-attention from learned latents to the input alternates with self-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import argument_types, checks, sharing
from perceiver_core.blocks import CrossAttend, LatentTransformer
from perceiver_core.blocks.attention_residual import Aggregate
from perceiver_core.blocks.factory import build
from perceiver_core.kernels.reference import QueryIndices
from perceiver_core.layers import init
from perceiver_core.masks import Mask
from perceiver_core.reads import AttentionCapture, SharedMemory
from perceiver_core.reads.caches import OpaqueMemory
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

Input: TypeAlias = Tokens | Tensor


@register
class Encoder(nn.Module):
    """Perceiver encoder. It maps an input of any length to a fixed number of latents.

    Each step is a read (cross-attention from the latents to the input) followed by a latent transformer:

        for each step:  latents = cross_attention(latents, input);  latents = latent_transformer(latents)

    The keys and values of reads with the same input and the same weights are computed only once.

    Args:
        input_dim: Width of the input tokens, or a sequence of one width per read if the reads have different inputs.
        num_latents: Number of latent vectors.
        dim: Width of the latents.
        num_reads: Number of steps, each with one read.
        depth: Number of self-attention blocks in the latent transformer after each read.
        num_heads: Number of attention heads in these blocks.
        share: Weight sharing between steps: True for the paper's scheme (`sharing.paper`), False for no sharing, or a
            function from the number of steps to a `sharing.Sharing`, such as `sharing.all_`.
        cross_attention: Factory `(dim, input_dim) -> module`. Use `functools.partial(CrossAttend, ...)` to set options.
        latent_transformer: Factory `(dim, depth=depth, num_heads=num_heads) -> module`.
        latent_dropout: Module applied to the latents before the first read, such as `DropLatents`; None for no module.
        aggregate: Factory `dim -> module`, such as `AttentionResidual`. After each step, the module combines the
            initial latents and the outputs of all steps so far into the new latents. Steps that share a latent
            transformer also share this module. None to use only the output of the last step.

    Raises:
        TypeError: If `latent_dropout` is not a module, or `share` is neither a boolean nor a function.
        ValueError: If a size is out of range, or `share` or `input_dim` does not match `num_reads`.
        ValueError: If reads that share weights have inputs of different widths.

    Example:
        >>> from functools import partial
        >>> read = partial(pc.CrossAttend, num_heads=2)
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=3, depth=2, num_heads=4, cross_attention=read)
        >>> encoder(torch.randn(2, 50, 10)).shape
        torch.Size([2, 7, 32])

    Reference: Jaegle et al. 2021 (Perceiver), figure 1.
    """

    def __init__(  # noqa: PLR0913 (sizes and components of the architecture)
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
        self.reads = nn.ModuleList(build("cross_attention", cross_attention, dim, width) for width in widths)
        num_transformers = len(set(self.sharing.transformers))
        self.transformers = nn.ModuleList(
            build("latent_transformer", latent_transformer, dim, depth=depth, num_heads=num_heads)
            for _ in range(num_transformers)
        )
        self.aggregates = None
        if aggregate is not None:
            self.aggregates = nn.ModuleList(build("aggregate", aggregate, dim) for _ in range(num_transformers))

    def forward(
        self,
        inputs: Input | Sequence[Input],
        *,
        mask: Mask | None = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents after all steps.

        Args:
            inputs: `Tokens` or a tensor `b n c` for all reads (cross-attentions), or a sequence of one input per read.
            mask: Mask for all reads: a key-padding mask `b n`, an attention mask `b h q k`, or a callable such as
                `masks.Causal()`. It is combined with the tokens' own mask by logical and.
            capture: Container that stores the attention weights of the read with index `capture.read` (default: the
                last). The forward pass stops after this read and returns the latents.

        Raises:
            TypeError: If an input is neither `Tokens` nor a tensor, or has the wrong dtype.
            ValueError: If the number of inputs is wrong, or an input has the wrong width, batch size or device.
        """
        given = self._inputs(inputs)
        # One (weight index, input index) per step. Inputs that are the same object have the same index.
        first = [min(i for i, other in enumerate(given) if other is x) for x in given]
        keys = [(number, first[step % len(given)]) for step, number in enumerate(self.sharing.reads)]
        captured = -1 if capture is None else argument_types.index("read", capture.read, len(keys))
        caches: dict[tuple[int, int], SharedMemory] = {}  # memories that several reads share
        # Batch size 1 until the first read. A copy, because hooks of FlopCounterMode fail on views of parameters.
        x: Tensor = self.latent_dropout(self.latents.unsqueeze(0).clone())
        states = [x]
        try:
            for step, key in enumerate(keys):
                read, later = self.reads[key[0]], keys[step + 1 :]
                tokens: Input | OpaqueMemory = given[key[1]]
                options: dict[str, object] = {}
                if capture is not None and step == captured:
                    options["capture"], capture.grid = capture, getattr(tokens, "grid", None)
                shared = caches.get(key)
                if shared is not None and shared.memory is not None:
                    tokens = OpaqueMemory(shared.memory)
                else:
                    options["mask"] = mask
                    # Inputs used once are not cached, so a read is free to recompute their keys and values.
                    if key in later and getattr(read, "accepts_cache", False):
                        caches[key] = options["cache"] = SharedMemory(
                            num_queries=x.shape[1] * (1 + len([other for other in later if other == key]))
                        )
                x = read(x, tokens, **options)
                del tokens, options  # frees a memory that no later read needs before the latent transformer runs
                # A memory computed inside a reentrant checkpoint has no autograd graph, so later reads cannot use it.
                if key in caches and (key not in later or not caches[key].has_graph()):
                    caches.pop(key).release()
                if step == captured:
                    return x
                number = self.sharing.transformers[step]
                x = self.transformers[number](x)
                if self.aggregates is not None:
                    states = [*states, x]  # a new list, because activation checkpointing keeps the arguments
                    x = self.aggregates[number](states)
        finally:  # also after an error, because a checkpoint keeps its arguments alive, including the caches
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
        """Return the attention weights of one read (cross-attention) over the n input tokens.

        Args:
            inputs: Same as in `forward`.
            read: Index of the read; negative indices count from the last.
            queries: Indices of the selected latents; None for all latents.
            mask: Same as in `forward`.

        Returns:
            Attention weights `b h chosen n`, where `chosen` is the number of selected latents.

        Raises:
            ValueError: If `read` is out of range.

        Example:
            >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=3, depth=1, num_heads=4)
            >>> encoder.attention_map(torch.randn(2, 50, 10), read=0, queries=[0, 6]).shape
            torch.Size([2, 1, 2, 50])
        """
        capture = AttentionCapture(read, queries)
        self(inputs, mask=mask, capture=capture)
        return capture.result()

    def _inputs(self, inputs: Input | Sequence[Input]) -> list[Input]:
        """Check the inputs and return them as a list: one input for all reads, or one per read."""
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


def _sharing(share: bool | sharing.Scheme, num_reads: int) -> sharing.Sharing:
    scheme = {True: sharing.paper, False: sharing.none}[share] if isinstance(share, bool) else share
    try:
        plan = scheme(num_reads)
    except TypeError as error:
        raise TypeError(f"share must be a function of the number of steps, such as sharing.all_: {error}") from error
    if not isinstance(plan, sharing.Sharing):
        raise TypeError(f"share must return a sharing.Sharing, as sharing.all_ does; it returned {plan!r:.80}")
    if plan.steps != num_reads:
        raise ValueError(f"share must plan num_reads={num_reads} steps; it planned {plan.steps}")
    return plan


def _read_widths(input_dim: int | Sequence[int], plan: sharing.Sharing) -> list[int]:
    """Return the input width of each read module. Check that steps with the same module have the same width."""
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
