"""Query module for outputs of several modalities."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, modalities
from perceiver_core.layers.named_vectors import NamedVectors
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="queries.Multimodal")
class Multimodal(nn.Module):
    """Query module that combines one query module per output modality and pads their queries to a common width.

    The padding of each modality is a learned vector that also identifies the modality. A query module with the name of
    an input modality (see `adapters.Multimodal`) is called with the tokens of this modality, on their own grid. Other
    query modules are called with all tokens.

    Args:
        sources: Mapping from modality names to query modules.
        min_modality_channels: Width of the padding of the widest modality. Narrower modalities have more padding.

    Example:
        >>> source = pc.queries.Multimodal({"label": pc.queries.Learned(1, 30), "audio": pc.queries.Learned(50, 20)})
        >>> {name: tuple(x.shape) for name, x in source().items()}
        {'label': (1, 1, 32), 'audio': (1, 50, 32)}

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2; deepmind-research/perceiver, `MultimodalDecoder`.
    """

    def __init__(self, sources: Mapping[str, nn.Module], *, min_modality_channels: int = 2) -> None:
        super().__init__()
        modalities.check("sources", sources, "a source of queries")
        checks.positive(min_modality_channels=min_modality_channels)
        self.sources, self.min_modality_channels = nn.ModuleDict(sources), min_modality_channels
        widths = {name: part.dim for name, part in cast(Mapping[str, Any], sources).items()}
        self.dim = max(widths.values()) + min_modality_channels
        self.padding = NamedVectors({name: self.dim - width for name, width in widths.items()})

    def forward(
        self, tokens: object = None, query_indices: Mapping[str, object] | None = None
    ) -> dict[str, Float[Tensor, "#b q e"]]:
        """Return a dictionary from modality names to queries.

        Args:
            tokens: Input tokens, for query modules that use them.
            query_indices: Mapping from modality names to the second argument of the query module, for example query
                indices for `Learned` or points for `Coordinates`. A modality that is not in the mapping returns all its
                queries. An empty list or tensor omits the modality.

        Raises:
            ValueError: If `query_indices` contains an unknown modality, or all modalities are omitted.
            ValueError: If two modalities have different batch sizes (a batch size of 1 matches any other).
            ValueError: If a query module needs the tokens of a modality that is absent from the input.
            TypeError, ValueError: If a query module raises this error. The modality is added to the message.
        """
        selected = {} if query_indices is None else query_indices
        modalities.check_names("query_indices", selected, self.sources.keys())
        queries = {}
        for name, source in self.sources.items():
            if _is_empty(selected.get(name)):
                continue
            own = _tokens_of(name, tokens)
            if own is None and tokens is not None:
                if isinstance(source, (FromInputs, Grid)) and source.grid_of(None) is None:
                    raise ValueError(
                        f"queries[{name!r}] need the tokens of an absent input. Select no queries of it, "
                        f"query_inputs={{{name!r}: []}}, or pass the input"
                    )
                own = tokens
            x = modalities.call("queries", name, source, own, selected.get(name))
            vector = self.padding(name).to(x.dtype)
            queries[name] = torch.cat([x, vector.expand(*x.shape[:-1], -1)], dim=-1)
        if not queries:
            raise ValueError(f"query_indices must leave some queries; it is empty for all of {list(self.sources)}")
        batches = {name: x.shape[0] for name, x in queries.items()}
        sizes = [batch for batch in batches.values() if batch != 1]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(f"queries must have one batch size, or a batch of 1; got {batches}")
        return queries

    def grid_of(self, tokens: object = None) -> dict[str, tuple[int, ...] | None]:
        """Return a dictionary from modality names to grid sizes, for query modules of type `Grid` and `FromInputs`."""
        return {
            name: source.grid_of(_tokens_of(name, tokens))
            for name, source in self.sources.items()
            if isinstance(source, (FromInputs, Grid))
        }


def _tokens_of(name: str, tokens: object) -> object:
    """Return the tokens for the query module `name`.

    If the adapter has a modality `name`, return the tokens of this modality, or None if it is absent from the input.
    Otherwise, return all tokens.
    """
    present = (tokens.modalities or {}) if isinstance(tokens, Tokens) else {}
    return present.get(name, tokens)


def _is_empty(selected: object) -> bool:
    """Return whether query inputs are empty: a list without items, or `*b q` or `*b q e` with q = 0."""
    if not isinstance(selected, Tensor):
        return isinstance(selected, (list, tuple)) and not selected
    return selected.shape[-2 if selected.is_floating_point() and selected.ndim > 1 else -1 :].numel() == 0
