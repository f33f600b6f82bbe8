"""Inputs of several kinds as one sequence of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Multimodal(nn.Module):
    """A dictionary of inputs to tokens of one width, one kind after the other in the order of the adapters.

    Tokens of each kind are written out and padded by a learned vector of its own, which also tells kinds apart.

    Args:
        adapters: by name.
        least: how many learned channels the widest kind has.
        hide: by name, the rate at which tokens of a kind are replaced by a learned vector in training, each by itself.
            Those of rate 1 are always replaced, in evaluation too: a kind that is only answered, never seen.
        drop: by name, the rate at which a kind is not there for a sample in training.
        generator: draws what is hidden and dropped; PyTorch's own unless given. It is not saved.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> sound = pc.adapters.Audio(patch=16, positions=pc.positions.Fourier(axes=1, bands=8, max_resolution=60))
        >>> both = pc.adapters.Multimodal({"sound": sound, "label": pc.adapters.Label(10)})
        >>> both({"sound": torch.randn(2, 960), "label": torch.tensor([1, 2])}).content.shape
        torch.Size([2, 61, 37])
        >>> both({"sound": torch.randn(2, 960)}).n
        60

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `MultimodalPreprocessor`.
    """

    def __init__(
        self,
        adapters: Mapping[str, nn.Module],
        *,
        least: int = 4,
        hide: Mapping[str, float] | None = None,
        drop: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("adapters must name an adapter at least; got none")
        checks.positive(least=least)
        self.adapters, self.least = nn.ModuleDict(adapters), least
        self.hide, self.drop, self.generator = dict(hide or {}), dict(drop or {}), generator
        for name, rates in (("hide", self.hide), ("drop", self.drop)):
            _check_rates(name, rates, self.adapters)
        widths = {name: int(adapter.dim) for name, adapter in self.adapters.items()}  # type: ignore[arg-type]
        self.dim = max(widths.values()) + least
        self.padding = nn.ParameterDict({name: init.embedding(self.dim - width) for name, width in widths.items()})
        self.hidden = nn.ParameterDict({name: init.embedding(self.dim) for name in self.hide})

    def forward(self, inputs: Mapping[str, Any], *, mask: Mapping[str, Tensor] | None = None) -> Tokens:
        """The tokens of all kinds that are there.

        Args:
            inputs: by name what each adapter takes; a kind that is not named is not there.
            mask: by name what each adapter takes as its mask, or `b`, for which samples a kind is there. What a tensor
                of a kind holds for the others has no effect, NaN included.

        Raises:
            TypeError: inputs that are not a dictionary.
            ValueError: names that there are not, no kind at all, or kinds of different batch sizes.
        """
        self._check(inputs, mask)
        parts = {name: self._of(name, inputs[name], (mask or {}).get(name)) for name in self.adapters if name in inputs}
        batches = {name: len(tokens.content) for name, tokens in parts.items()}
        if len(set(batches.values())) > 1:
            raise ValueError(f"inputs must have one batch size; got {batches}")
        content = torch.cat([tokens.content for tokens in parts.values()], dim=1)
        if all(tokens.mask is None for tokens in parts.values()):
            return Tokens(content)
        there = [
            content.new_ones(t.content.shape[:2], dtype=torch.bool) if t.mask is None else t.mask
            for t in parts.values()
        ]
        return Tokens(content, mask=torch.cat(there, dim=1))

    def _check(self, inputs: Any, mask: Any) -> None:
        for name, given in (("inputs", inputs), ("mask", {} if mask is None else mask)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"{name} must be a dictionary by kind, of {list(self.adapters)}; got {type(given).__name__}"
                )
            if unknown := given.keys() - self.adapters.keys():
                raise ValueError(f"{name} names {sorted(unknown)}; the kinds are {list(self.adapters)}")
        if not inputs:
            raise ValueError(f"inputs must hold a kind at least, of {list(self.adapters)}; got none")

    def _of(self, name: str, given: Any, mask: Tensor | None) -> Tokens:
        """The tokens of one kind, flat and padded."""
        adapter, samples = self.adapters[name], mask if isinstance(mask, Tensor) and mask.ndim == 1 else None
        if samples is not None and isinstance(given, Tensor) and given.ndim:
            checks.is_mask(f"mask[{name!r}]", samples, (len(given),))
            given = given.masked_fill(~samples.reshape(-1, *[1] * (given.ndim - 1)), 0)
        tokens: Tokens = adapter(given) if mask is None or samples is not None else adapter(given, mask=mask)
        x, there = tokens.dense(), tokens.flat_mask()
        if isinstance(given, Tensor) and not given.is_floating_point():  # class numbers have no dtype to go by
            x = x.to(self.padding[name].dtype)
        x = torch.cat([x, self.padding[name].to(x.dtype).expand(*x.shape[:-1], -1)], dim=-1)
        if name in self.hide and (self.training or self.hide[name] == 1):
            x = torch.where(self._drawn(self.hide[name], x.shape[:2], x)[..., None], self.hidden[name].to(x.dtype), x)
        if samples is not None:
            checks.is_mask(f"mask[{name!r}]", samples, (len(x),))
            there = _both(there, samples[:, None].expand(x.shape[:2]))
        if self.training and self.drop.get(name, 0.0):
            kept = ~self._drawn(self.drop[name], (len(x), 1), x)
            there = _both(there, kept.expand(x.shape[:2]))
        return Tokens(x, mask=there)

    def _drawn(self, rate: float, shape: Any, like: Tensor) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, device=like.device) < rate


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def _check_rates(name: str, rates: Mapping[str, float], adapters: nn.ModuleDict) -> None:
    if unknown := rates.keys() - adapters.keys():
        raise ValueError(f"{name} names {sorted(unknown)}; the kinds are {list(adapters)}")
    for kind, rate in rates.items():
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{name}[{kind!r}] must lie in [0, 1]; got {rate!r}")
