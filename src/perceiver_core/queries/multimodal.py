"""Queries of several kinds, padded to one width by learned vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register


@partial(register, name="queries.Multimodal")
class Multimodal(nn.Module):
    """A dictionary of sources of queries; what it asks is a dictionary, all of one width.

    Each kind is padded by a learned vector of its own, which also tells the decoder what kind is asked for.

    Args:
        sources: by name.
        least: how many learned channels the widest kind has.

    Example:
        >>> import torch
        >>> from perceiver_core import queries
        >>> ask = queries.Multimodal({"label": queries.Learned(1, 30), "sound": queries.Learned(50, 20)})
        >>> {name: tuple(asked.shape) for name, asked in ask().items()}
        {'label': (1, 1, 32), 'sound': (1, 50, 32)}

    Reference: Jaegle et al. 2022 (Perceiver IO), section 3.2; deepmind-research/perceiver, `MultimodalDecoder`.
    """

    def __init__(self, sources: Mapping[str, nn.Module], *, least: int = 2) -> None:
        super().__init__()
        if not sources:
            raise ValueError("sources must name a source of queries at least; got none")
        checks.positive(least=least)
        self.sources, self.least = nn.ModuleDict(sources), least
        widths = {name: int(source.dim) for name, source in self.sources.items()}  # type: ignore[arg-type]
        self.dim = max(widths.values()) + least
        self.padding = nn.ParameterDict({name: init.embedding(self.dim - width) for name, width in widths.items()})

    def forward(
        self, tokens: Any = None, *, at: Mapping[str, Tensor] | None = None
    ) -> dict[str, Float[Tensor, "#b q e"]]:
        """What each source asks.

        Args:
            tokens: those of the input, for sources that look at them.
            at: by name, which queries; all of a source that is not named. An empty tensor asks nothing of it, which
                is then left out.

        Raises:
            ValueError: a name that there is not.
        """
        chosen = dict(at or {})
        if unknown := chosen.keys() - self.sources.keys():
            raise ValueError(f"at names {sorted(unknown)}; the sources are {sorted(self.sources)}")
        asked = {name: source for name, source in self.sources.items() if not _is_nothing(chosen.get(name))}
        return {name: self._padded(name, source(tokens, at=chosen.get(name))) for name, source in asked.items()}

    def _padded(self, name: str, asked: Tensor) -> Tensor:
        vector = self.padding[name].to(asked.dtype)
        return torch.cat([asked, vector.expand(*asked.shape[:-1], -1)], dim=-1)


def _is_nothing(at: Tensor | None) -> bool:
    return isinstance(at, Tensor) and at.numel() == 0
