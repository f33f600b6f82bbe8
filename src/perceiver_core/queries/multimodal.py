"""Queries of several kinds, padded to one width by learned vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init, modalities
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="queries.Multimodal")
class Multimodal(nn.Module):
    """A dictionary of sources of queries; what it asks is a dictionary, all of one width.

    Each kind is padded by a learned vector of its own, which also tells the decoder what kind is asked for. A source
    that is named as a kind of the input (`adapters.Multimodal`) looks at the tokens of this kind, on their own grid;
    others look at all of them.

    Args:
        sources: by name.
        min_modality_channels: how many learned channels the widest kind has.

    Raises:
        TypeError: sources that are not modules.
        ValueError: no sources, or a name that a module cannot have.

    Example:
        >>> import torch
        >>> from perceiver_core import queries
        >>> ask = queries.Multimodal({"label": queries.Learned(1, 30), "sound": queries.Learned(50, 20)})
        >>> {name: tuple(asked.shape) for name, asked in ask().items()}
        {'label': (1, 1, 32), 'sound': (1, 50, 32)}

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2; deepmind-research/perceiver, `MultimodalDecoder`.
    """

    def __init__(self, sources: Mapping[str, nn.Module], *, min_modality_channels: int = 2) -> None:
        super().__init__()
        modalities.check("sources", sources, "a source of queries")
        checks.positive(min_modality_channels=min_modality_channels)
        self.sources, self.min_modality_channels = nn.ModuleDict(sources), min_modality_channels
        widths = {name: int(source.dim) for name, source in self.sources.items()}  # type: ignore[arg-type]
        self.dim = max(widths.values()) + min_modality_channels
        self.padding = nn.ParameterDict({name: init.embedding(self.dim - width) for name, width in widths.items()})

    def forward(self, tokens: Any = None, *, query_indices: Mapping[str, Any] | None = None) -> dict[str, Float[Tensor, "#b q e"]]:
        """What each source asks.

        Args:
            tokens: those of the input, for sources that look at them.
            query_indices: by name, which queries; all of a source that is not named. A source that is given an empty
                list or tensor is not asked, and what is asked has no entry for it.

        Raises:
            TypeError: `query_indices` that is not a dictionary.
            ValueError: a name that there is not, no source that is asked, queries of different batch sizes, or a source
                that asks at the places of a kind that is not there.
            TypeError, ValueError: what a source raises, with its name before it.
        """
        chosen = self._chosen(query_indices)
        asked = {}
        for name, source in self.sources.items():
            if not _is_empty(chosen.get(name)):
                queries = modalities.call("queries", name, source, self._seen(name, tokens), query_inputs=chosen.get(name))
                asked[name] = self._padded(name, queries)
        if not asked:
            raise ValueError(f"query_indices must leave something to ask; it is empty for all of {list(self.sources)}")
        batches = {name: queries.shape[0] for name, queries in asked.items()}
        many = [batch for batch in batches.values() if batch != 1]
        if any(batch != many[0] for batch in many):
            raise ValueError(f"queries must have one batch size, or a batch of 1; got {batches}")
        return asked

    def grid_of(self, tokens: Any = None) -> dict[str, tuple[int, ...] | None]:
        """By name the grid that a source asks on, for those that ask on one."""
        return {
            name: source.grid_of(self._seen(name, tokens))
            for name, source in self.sources.items()
            if isinstance(source, (FromInputs, Grid)) and not self._has_no_places(name, tokens)
        }

    def _chosen(self, at: Any) -> Mapping[str, Any]:
        at = {} if at is None else at
        if not isinstance(at, Mapping):
            raise TypeError(f"at must be a dictionary by kind, of {list(self.sources)}; got {type(at).__name__}")
        if unknown := at.keys() - self.sources.keys():
            raise ValueError(f"at names {sorted(unknown)}; the sources are {sorted(self.sources)}")
        return at

    def _seen(self, name: str, tokens: Any) -> Any:
        """What a source looks at: the kind of its name, if there is one."""
        if self._has_no_places(name, tokens):
            raise ValueError(
                f"queries[{name!r}] ask at the places of an input that is not there. Ask nothing of it, "
                f"at={{{name!r}: []}}, or give it"
            )
        kind = _kinds(tokens).get(name)
        return tokens if kind is None else kind

    def _has_no_places(self, name: str, tokens: Any) -> bool:
        """Whether a source asks at the places of a kind that is not there."""
        of_each = _kinds(tokens)
        if name not in of_each or of_each[name] is not None:
            return False
        source = self.sources[name]
        return isinstance(source, FromInputs) or (isinstance(source, Grid) and source.grid is None)

    def _padded(self, name: str, asked: Tensor) -> Tensor:
        vector = self.padding[name].to(asked.dtype)
        return torch.cat([asked, vector.expand(*asked.shape[:-1], -1)], dim=-1)


def _kinds(tokens: Any) -> Mapping[str, Tokens | None]:
    """What the input has of each kind; nothing where it is not of several."""
    return (tokens.modalities or {}) if isinstance(tokens, Tokens) else {}


def _is_empty(at: Any) -> bool:
    return at.numel() == 0 if isinstance(at, Tensor) else isinstance(at, (list, tuple)) and not at
