"""Perceiver IO: adapter, encoder, queries, decoder, head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from perceiver_core.heads import Multimodal as Answered
from perceiver_core.models.perceiver import check_module, check_widths
from perceiver_core.queries import Multimodal as Asked
from perceiver_core.registry import register


@register
class PerceiverIO(nn.Module):
    """Whatever the adapter takes, to an answer for each query.

        raw input --adapter--> tokens --encoder--> latents <--decoder-- queries
                                                      answers --head--> output

    Args:
        adapter: raw input to tokens; see `adapters`.
        encoder: tokens to latents; see `Encoder`.
        queries: what is asked; see `queries`.
        decoder: latents and queries to answers; see `Decoder`.
        head: answers to the output; see `heads`. Or what makes one from the adapter, as `heads.TiedLogits` does.
            `nn.Identity()` unless given.

    Raises:
        TypeError: a part that is not a module, a class of heads that makes none from an adapter.
        ValueError: parts whose widths do not meet, a kind of queries that there is no head for.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=32))
        >>> encoder = pc.Encoder(image.dim, num_latents=16, dim=32, depth=2, num_heads=4)
        >>> ask = pc.queries.Grid(None, image.positions)
        >>> model = pc.PerceiverIO(image, encoder, ask, pc.Decoder(encoder.dim, query_dim=ask.dim, out_dim=2))
        >>> pictures = torch.rand(2, 3, 31, 23)
        >>> model(pictures).shape, model(pictures, query_inputs=torch.randint(31 * 23, (2, 50))).shape
        (torch.Size([2, 713, 2]), torch.Size([2, 50, 2]))

    Reference: Jaegle et al. 2022, "Perceiver IO: A General Architecture for Structured Inputs & Outputs", figure 2.
    """

    def __init__(
        self,
        adapter: nn.Module,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        head: nn.Module | Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_module("adapter", adapter)
        head = nn.Identity() if head is None else _made(head, adapter)
        parts = {"encoder": encoder, "queries": queries, "decoder": decoder, "head": head}
        for name, part in parts.items():
            check_module(name, part)
        check_widths("adapter", adapter, "dim", "encoder", encoder, "input_dim")
        check_widths("encoder", encoder, "dim", "decoder", decoder, "dim")
        check_widths("queries", queries, "dim", "decoder", decoder, "query_dim")
        check_widths("decoder", decoder, "out", "head", head, "dim")
        if isinstance(queries, Asked) and isinstance(head, Answered):
            check_kinds(queries, head)
        self.adapter, self.encoder, self.queries, self.decoder, self.head = adapter, encoder, queries, decoder, head

    def forward(self, inputs: Any, *, mask: Any = None, query_inputs: Any = None, query_mask: Any = None) -> Any:
        """An output for each query.

        Args:
            inputs: what the adapter takes.
            mask: which tokens are there, True = attend, in the shape that the adapter says.
            query_inputs: which queries, as `queries` says; all unless given. A loss on some of the outputs needs only
                these.
            query_mask: `b q`, which queries are there, True = answer; a dictionary of these where queries are one.
        """
        tokens = self.adapter(inputs) if mask is None else self.adapter(inputs, mask=mask)
        asked = self.queries(tokens, query_indices=query_inputs)
        answers = self.decoder(self.encoder(tokens), asked, mask=query_mask)
        if not getattr(self.head, "needs_query_layout", False):
            return self.head(answers)
        grid_of = getattr(self.queries, "grid_of", None)
        return self.head(answers, query_inputs=query_inputs, grid=None if grid_of is None else grid_of(tokens))


def check_kinds(queries: Asked, head: Answered) -> None:
    """Raises ValueError unless there is a head for each kind that is asked for."""
    if missing := [kind for kind in queries.sources if kind not in head.heads]:
        raise ValueError(f"head must have a head for each kind of queries; it has none for {missing}")


def _made(head: Any, adapter: nn.Module) -> nn.Module:
    """The head, or what it makes from the adapter.

    Raises:
        TypeError: it makes none, a class that wants something else among them.
    """
    if isinstance(head, nn.Module):
        return head
    what = f"head must be a module, or make one from the adapter, as heads.TiedLogits does; {_name(head)}"
    if isinstance(head, type) and _required(head) != 1:
        raise TypeError(f"{what} is made from other things. Build it first")
    try:
        made: nn.Module = head(adapter)
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from error
    return made


def _required(of: type) -> int:
    """How many arguments a class must be given."""
    every = inspect.signature(of).parameters.values()
    return sum(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in every)


def _name(thing: object) -> str:
    return getattr(thing, "__name__", repr(thing))
