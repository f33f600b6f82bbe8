"""Perceiver IO model, composed of an adapter, an encoder, queries, a decoder and a head."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from perceiver_core.adapters.lengths import options
from perceiver_core.blocks.factory import build
from perceiver_core.heads import Multimodal as MultimodalHead
from perceiver_core.models.perceiver import check_parts
from perceiver_core.queries import Multimodal as MultimodalQueries
from perceiver_core.reads import AttentionCapture
from perceiver_core.registry import register


@register
class PerceiverIO(nn.Module):
    """Perceiver IO: a Perceiver with a decoder that computes one vector per query.

        raw input --adapter--> tokens --encoder--> latents
        latents and queries --decoder--> vectors --head--> output

    Args:
        adapter: Module that maps the raw input to tokens; see `adapters`.
        encoder: Module that maps tokens to latents; see `Encoder`.
        queries: Module that returns the query vectors; see `queries`.
        decoder: Module that maps latents and queries to one vector per query; see `Decoder`.
        head: Module that maps the decoder's vectors to the output (see `heads`), or a factory `adapter -> module`, such
            as `heads.TiedLogits`. The default is `nn.Identity()`.

    Raises:
        TypeError: If a component is not a module, or a head factory requires arguments other than the adapter.
        ValueError: If the widths of connected components differ, or a modality of the queries has no head.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=32)
        >>> image = pc.adapters.Image(num_channels=3, positions=positions)
        >>> encoder = pc.Encoder(image.dim, num_latents=16, dim=32, depth=2, num_heads=4)
        >>> queries = pc.queries.Grid(None, positions)
        >>> model = pc.PerceiverIO(image, encoder, queries, pc.Decoder(encoder.dim, query_dim=queries.dim, out_dim=2))
        >>> images = torch.rand(2, 3, 31, 23)
        >>> model(images).shape, model(images, query_inputs=torch.randint(31 * 23, (2, 50))).shape
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
        check_parts({"adapter": adapter}, {})  # checked before the head is built from the adapter
        head = nn.Identity() if head is None else _built(head, adapter)
        check_parts(
            {"adapter": adapter, "encoder": encoder, "queries": queries, "decoder": decoder, "head": head},
            {
                "adapter.dim": "encoder.input_dim",
                "encoder.dim": "decoder.dim",
                "queries.dim": "decoder.query_dim",
                "decoder.out_dim": "head.dim",
            },
        )
        if isinstance(queries, MultimodalQueries) and isinstance(head, MultimodalHead):
            missing = [name for name in queries.sources if name not in head.heads]
            if missing:
                raise ValueError(f"head must have a head for each modality of the queries; it has none for {missing}")
        self.adapter, self.encoder, self.queries, self.decoder, self.head = adapter, encoder, queries, decoder, head

    def forward(
        self,
        inputs: object,
        *,
        mask: object = None,
        lengths: object = None,
        query_inputs: object = None,
        query_mask: object = None,
        capture: AttentionCapture | None = None,
    ) -> object:
        """Return the output of the head: a tensor, or a dictionary of tensors keyed by modality.

        Args:
            inputs: Input of the adapter.
            mask: Mask of valid inputs, True = attend, in the shape that the adapter expects.
            lengths: Sizes of the inputs before padding, as the adapter expects them, such as numbers of samples, `b`.
            query_inputs: Input of the query module: query indices, points or query vectors, depending on the module.
                None for all queries. To train on a subset of the outputs, pass the indices of their queries.
            query_mask: Mask of valid queries `b q`, True = decode, or a dictionary of masks if the queries are a
                dictionary.
            capture: Container for the attention weights of the encoder read (cross-attention) with index
                `capture.read` (default: the last). The encoder stops after this read, so the output is not the model's
                usual output.
        """
        tokens = self.adapter(inputs, **options(mask=mask, lengths=lengths))
        queries = self.queries(tokens, query_inputs)
        latents = self.encoder(tokens) if capture is None else self.encoder(tokens, capture=capture)
        outputs = self.decoder(latents, queries, mask=query_mask)
        if not getattr(self.head, "needs_query_layout", False):
            return self.head(outputs)
        grid_of = getattr(self.queries, "grid_of", None)
        return self.head(outputs, query_inputs=query_inputs, grid=None if grid_of is None else grid_of(tokens))


def _built(head: nn.Module | Callable[[nn.Module], nn.Module], adapter: nn.Module) -> nn.Module:
    """Return `head` if it is a module. If it is a factory, build the head from the adapter."""
    if isinstance(head, nn.Module):
        return head
    name = getattr(head, "__name__", repr(head))
    expected = f"head must be a module, or a factory of one from the adapter, such as heads.TiedLogits; got {name}"
    if isinstance(head, type):
        parameters = inspect.signature(head).parameters.values()
        if sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) != 1:
            raise TypeError(f"{expected}, which takes other arguments. Build it first")
    try:
        return build("head", head, adapter)
    except TypeError as error:
        raise TypeError(f"{expected}: {error}") from error
