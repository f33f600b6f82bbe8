"""Inputs of several kinds as one sequence of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_core import checks, init, modalities
from perceiver_core.random_draws import RepeatableDraws
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class Multimodal(nn.Module):
    """A dictionary of inputs to tokens of one width, one kind after the other in the order of the adapters.

    Tokens of each kind are written out and padded by a learned vector of its own, which also tells kinds apart. They
    take the dtype of that vector. What each kind was before, on its own grid, stays in `Tokens.modalities`, where
    `queries.Multimodal` finds it; there hidden tokens are zeros, and so are those of a kind that was dropped.

    Args:
        adapters: by name.
        min_modality_channels: how many learned channels the widest kind has.
        token_mask_rate: by name, the rate at which tokens of a kind are replaced by a learned vector in training, each
            by itself. Those of rate 1 are always replaced, in evaluation too: a kind that is only answered, never seen.
        modality_dropout: by name, the rate at which a kind is not there for a sample in training. A sample that would
            lose all its kinds keeps one of them, each as likely as the others, so that with two kinds of rate 0.5 each
            is dropped at a rate of 0.375. Always hidden kinds say nothing and do not count, unless a sample has no
            others.
        generator: draws what is hidden and dropped; PyTorch's own unless given. It is not saved.

    Raises:
        TypeError: adapters that are not modules.
        ValueError: no adapters, a name that a module cannot have, rates of other kinds or outside [0, 1].

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> where = pc.positions.Fourier(num_axes=1, num_bands=8, max_resolution=60)
        >>> sound = pc.adapters.Audio(patch_size=16, positions=where)
        >>> both = pc.adapters.Multimodal({"sound": sound, "label": pc.adapters.OneHotLabel(10)})
        >>> both({"sound": torch.randn(2, 960), "label": torch.tensor([1, 2])}).content.shape
        torch.Size([2, 61, 37])
        >>> both({"sound": torch.randn(2, 960)}).num_tokens
        60

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3; deepmind-research/perceiver, `MultimodalPreprocessor`.
    """

    def __init__(
        self,
        adapters: Mapping[str, nn.Module],
        *,
        min_modality_channels: int = 4,
        token_mask_rate: Mapping[str, float] | None = None,
        modality_dropout: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        modalities.check("adapters", adapters, "an adapter")
        checks.positive(min_modality_channels=min_modality_channels)
        self.adapters, self.min_modality_channels = nn.ModuleDict(adapters), min_modality_channels
        self.token_mask_rate, self.modality_dropout = dict(token_mask_rate or {}), dict(modality_dropout or {})
        self.generator, self._draws = generator, RepeatableDraws()
        for name, rates in (("token_mask_rate", self.token_mask_rate), ("modality_dropout", self.modality_dropout)):
            _check_rates(name, rates, self.adapters)
        widths = {name: int(adapter.dim) for name, adapter in self.adapters.items()}  # type: ignore[arg-type]
        self.dim = max(widths.values()) + min_modality_channels
        self.padding = nn.ParameterDict({name: init.embedding(self.dim - width) for name, width in widths.items()})
        self.hidden = nn.ParameterDict({name: init.embedding(self.dim) for name in self.token_mask_rate})

    def forward(self, inputs: Mapping[str, Any], *, mask: Mapping[str, Tensor] | None = None) -> Tokens:
        """The tokens of all kinds that are there.

        Args:
            inputs: by name what each adapter takes; a kind that is not named is not there.
            mask: by name what each adapter takes as its mask, where a sample may have no token, or `b`, for which
                samples a kind is there. What tensors of a kind hold for the other samples has no effect, NaN included.

        Raises:
            TypeError: inputs that are not a dictionary.
            ValueError: names that there are not, no kind at all, or kinds of different batch sizes.
            TypeError, ValueError: what an adapter raises, with the name of its kind before it.
        """
        self._check(inputs, mask)
        masks = mask or {}
        made = {name: self._made(name, inputs[name], masks.get(name)) for name in self.adapters if name in inputs}
        batches = {name: tokens.content.shape[0] for name, tokens in made.items()}
        first = next(iter(batches.values()))
        if any(batch != first for batch in batches.values()):
            raise ValueError(f"inputs must have one batch size; got {batches}")
        made = self._dropped(made)
        parts, each = [], dict.fromkeys(self.adapters)
        for name, tokens in made.items():
            content, each[name] = self._padded(name, tokens)
            parts.append(content)
        content = torch.cat(parts, dim=1)
        if all(tokens.mask is None for tokens in made.values()):
            return Tokens(content, modalities=each)
        there = torch.cat([_there(tokens) for tokens in made.values()], dim=1)
        checks.leaves_a_token(there)
        return Tokens(content, mask=there, modalities=each)

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

    def _made(self, name: str, given: Any, mask: Any) -> Tokens:
        """The tokens of one kind, on their own grid."""
        adapter, samples, options = self.adapters[name], None, {}
        if mask is not None and not isinstance(mask, Mapping):
            said = f"mask[{name!r}]"
            checks.is_mask(said, mask)
            samples = mask.flatten(1).any(1) if mask.ndim > 1 else mask
            given = _without(given, samples, said, mask.shape[1:])
            if mask.ndim > 1:  # adapters want a token of each sample; that of the others is taken away again below
                options["mask"] = mask | ~_over(samples, mask)
        elif mask is not None:
            options["mask"] = mask
        tokens: Tokens = modalities.call("inputs", name, adapter, given, **options)
        content = tokens.content.to(self.padding[name].dtype)
        if samples is None:
            return Tokens(content, tokens.position_tables, tokens.mask, tokens.modalities)
        checks.is_mask(f"mask[{name!r}]", samples, content.shape[:1])
        return _only(Tokens(content, tokens.position_tables, tokens.mask, tokens.modalities), samples)

    def _dropped(self, made: dict[str, Tokens]) -> dict[str, Tokens]:
        """Without the kinds that training takes away from each sample."""
        rates = [self.modality_dropout.get(name, 0.0) for name in made]
        if not self.training or not any(rates):
            return made
        there = torch.stack([_there(tokens).any(1) for tokens in made.values()], dim=1)  # b kinds
        seen = there & torch.tensor([self.token_mask_rate.get(name, 0.0) < 1 for name in made], device=there.device)
        seen = torch.where(seen.any(1, keepdim=True), seen, there)
        kept = torch.stack([~self._drawn(rate, there.shape[:1], there) for rate in rates], dim=1)
        lost = ~(kept & seen).any(1, keepdim=True)
        chances = torch.empty(there.shape, device=there.device).uniform_(
            generator=self._draws.generator(self.generator)
        )
        one = chances.masked_fill(~seen, -1.0).argmax(1, keepdim=True)
        kept = kept | (lost & torch.zeros_like(kept).scatter(1, one, True))
        return {
            name: _only(tokens, kept[:, i]) if rates[i] else tokens for i, (name, tokens) in enumerate(made.items())
        }

    def _padded(self, name: str, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """The tokens of one kind as a list of the width of all, and on their grid, some of them hidden."""
        x = tokens.materialize()
        x = torch.cat([x, self.padding[name].expand(*x.shape[:-1], -1)], dim=-1)
        if name not in self.token_mask_rate or not (self.training or self.token_mask_rate[name] == 1):
            return x, tokens
        hidden = self._drawn(self.token_mask_rate[name], x.shape[:2], x)
        x = torch.where(hidden[..., None], self.hidden[name].to(x.dtype), x)
        content = tokens.content.masked_fill(hidden.reshape(tokens.content.shape[:-1]).unsqueeze(-1), 0.0)
        return x, Tokens(content, tokens.position_tables, tokens.mask)

    def _drawn(self, rate: float, shape: Any, like: Tensor) -> Tensor:
        # Not torch.rand: with a generator it takes no sizes that torch.compile leaves open.
        return (
            torch.empty(tuple(shape), device=like.device).uniform_(generator=self._draws.generator(self.generator))
            < rate
        )


def _over(samples: Tensor, like: Tensor) -> Tensor:
    """One value a sample, with axes to go with `like`."""
    return samples.reshape(-1, *[1] * (like.ndim - 1))


def _without(given: Any, samples: Tensor, name: str, more: Any) -> Any:
    """An input with zeros for the samples that are not there; `more` are the other axes of the mask that says so."""
    if isinstance(given, Mapping):
        return {key: _without(value, samples, name, more) for key, value in given.items()}
    if not isinstance(given, Tensor) or not given.ndim:
        return given
    if samples.shape[0] != given.shape[0]:
        raise ValueError(
            f"{name} must have shape {(given.shape[0], *more)}, a row a sample; got {(samples.shape[0], *more)}"
        )
    return given.masked_fill(~_over(samples, given), 0)


def _there(tokens: Tokens) -> Tensor:
    """Which tokens are there, `b n`."""
    flat = tokens.flat_mask()
    return (
        tokens.content.new_ones((tokens.content.shape[0], tokens.num_tokens), dtype=torch.bool)
        if flat is None
        else flat
    )


def _only(tokens: Tokens, samples: Tensor) -> Tokens:
    """Tokens that are there in some samples only."""
    full = tokens.content.shape[:-1]
    there = samples.reshape(-1, *[1] * (len(full) - 1)).expand(full)
    mask = there if tokens.mask is None else tokens.mask & there
    return Tokens(tokens.content, tokens.position_tables, mask, tokens.modalities)


def _check_rates(name: str, rates: Mapping[str, float], adapters: nn.ModuleDict) -> None:
    if unknown := rates.keys() - adapters.keys():
        raise ValueError(f"{name} names {sorted(unknown)}; the kinds are {list(adapters)}")
    for kind, rate in rates.items():
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{name}[{kind!r}] must lie in [0, 1]; got {rate!r}")
