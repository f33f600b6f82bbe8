"""Adapter that joins several modalities into one token sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from perceiver_core import checks, modalities
from perceiver_core.adapters.lengths import Lengths, options
from perceiver_core.layers.named_vectors import NamedVectors
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

ModalityMask: TypeAlias = "Tensor | Mapping[str, object]"


@register
class Multimodal(nn.Module):
    """Adapter that concatenates the tokens of several modalities, after padding them to a common width.

    Modalities are concatenated in the order of `adapters`. Each modality has a learned padding vector, which also
    identifies the modality. Tokens are converted to the dtype of this vector.

    The attribute `modalities` of the result holds the tokens of each modality before padding and concatenation, for use
    by `queries.Multimodal`. In these tokens, the content of replaced tokens (see `token_mask_rate`) is zero, and
    dropped modalities are masked.

    Args:
        adapters: Mapping from modality names to adapters.
        min_modality_channels: Number of padding channels of the widest modality. Narrower modalities have more.
        token_mask_rate: Mapping from modality names to the probability that a token is replaced with a learned vector
            in training. At rate 1, all tokens are replaced, in training and in evaluation. Use rate 1 for modalities
            that the model predicts and must not see.
        modality_dropout: Mapping from modality names to the probability that a sample loses the modality in training:
            all its tokens are masked. If a sample would lose all modalities, a random one is kept. With two modalities
            of rate 0.5, each is therefore dropped with probability 0.375. Modalities with a `token_mask_rate` of 1 do
            not count as kept, unless the sample has no others.
        generator: Random generator; None for PyTorch's default generator. It is not saved with the model.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=1, num_bands=8, max_resolution=60)
        >>> audio = pc.adapters.Audio(patch_size=16, positions=positions)
        >>> both = pc.adapters.Multimodal({"audio": audio, "label": pc.adapters.OneHotLabel(10)})
        >>> both({"audio": torch.randn(2, 960), "label": torch.tensor([1, 2])}).content.shape
        torch.Size([2, 61, 37])
        >>> both({"audio": torch.randn(2, 960)}).num_tokens
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
            modalities.check_names(name, rates, adapters)
            for modality, rate in rates.items():
                if not 0.0 <= rate <= 1.0:
                    raise ValueError(f"{name}[{modality!r}] must lie in [0, 1]; got {rate!r}")
        widths = {name: part.dim for name, part in cast(Mapping[str, Any], adapters).items()}
        self.dim = max(widths.values()) + min_modality_channels
        self.padding = NamedVectors({name: self.dim - width for name, width in widths.items()})
        self.mask_tokens = NamedVectors(dict.fromkeys(self.token_mask_rate, self.dim))

    def forward(
        self,
        inputs: Mapping[str, object],
        *,
        mask: Mapping[str, ModalityMask] | None = None,
        lengths: Mapping[str, Lengths] | None = None,
    ) -> Tokens:
        """Convert all modalities in `inputs` to one token sequence.

        Args:
            inputs: Mapping from modality names to inputs. At least one modality is required.
            mask: Mapping from modality names to masks, True = attend. A mask of shape `b` marks the samples that have
                the modality. Any other mask is passed to the modality's adapter, and may be all False for samples
                without the modality. The inputs of such samples are ignored, even if they are NaN.
            lengths: Mapping from modality names to the sizes of the inputs before padding, as the adapter of the
                modality expects them. For samples without the modality, any size from 1 to the padded size is accepted.

        Raises:
            ValueError: If `inputs` is empty, or `inputs`, `mask` or `lengths` contains an unknown modality.
            ValueError: If the batch sizes differ, or a sample has no valid token.
            TypeError, ValueError: If an adapter raises it. The name of the modality is added to the message.
        """
        masks = {} if mask is None else mask
        sizes = {} if lengths is None else lengths
        modalities.check_names("inputs", inputs, self.adapters.keys())
        modalities.check_names("mask", masks, self.adapters.keys())
        modalities.check_names("lengths", sizes, self.adapters.keys())
        if not inputs:
            raise ValueError(f"inputs must hold a modality at least, of {list(self.adapters)}; got none")
        padding = {name: self.padding(name) for name in self.adapters if name in inputs}
        each = {
            name: self._adapt(name, inputs[name], masks.get(name), sizes.get(name), vector.dtype)
            for name, vector in padding.items()
        }
        batches = {name: tokens.content.shape[0] for name, tokens in each.items()}
        first = next(iter(batches.values()))
        if any(batch != first for batch in batches.values()):
            raise ValueError(f"inputs must have one batch size; got {batches}")
        if self.training and any(self.modality_dropout.get(name) for name in each):
            each = self._drop_modalities(each)
        parts, on_grids = [], dict.fromkeys(list(self.adapters.keys()))
        for name, tokens in each.items():
            content, on_grids[name] = self._join(name, tokens, padding[name])
            parts.append(content)
        content = torch.cat(parts, dim=1)
        if all(tokens.mask is None for tokens in each.values()):
            return Tokens(content, modalities=on_grids)
        valid = torch.cat([_valid(tokens) for tokens in each.values()], dim=1)
        checks.leaves_a_token(valid)
        return Tokens(content, mask=valid, modalities=on_grids)

    def _adapt(
        self, name: str, x: object, mask: ModalityMask | None, lengths: Lengths | None, dtype: torch.dtype
    ) -> Tokens:
        """Convert the input of one modality to tokens, and mask the samples that do not have the modality."""
        samples = None
        passed = mask
        if mask is not None and not isinstance(mask, Mapping):
            checks.is_mask(f"mask[{name!r}]", mask)
            samples = mask.flatten(1).any(1) if mask.ndim > 1 else mask
            x = _zero_samples(x, samples, f"mask[{name!r}]", mask.shape[1:])
            # Adapters require a valid token per sample, so samples without this modality are masked after the adapter.
            passed = mask | ~_aligned(samples, mask.ndim) if mask.ndim > 1 else None
        if lengths is not None and samples is not None:
            lengths = _valid_lengths(lengths, samples)
        arguments = options(mask=passed, lengths=lengths)
        tokens: Tokens = modalities.call("inputs", name, self.adapters[name], x, **arguments)
        content = tokens.content.to(dtype)
        tokens = Tokens(content, tokens.position_tables, tokens.mask, tokens.modalities)
        if samples is None:
            return tokens
        checks.is_mask(f"mask[{name!r}]", samples, tokens.content.shape[:1])
        return _mask_samples(tokens, samples)

    def _drop_modalities(self, each: dict[str, Tokens]) -> dict[str, Tokens]:
        """Apply modality dropout: mask random modalities of each sample."""
        rates = [self.modality_dropout.get(name, 0.0) for name in each]
        present = torch.stack([_valid(tokens).any(1) for tokens in each.values()], dim=1)  # b modalities
        seen = present & torch.tensor([self.token_mask_rate.get(name, 0.0) < 1 for name in each], device=present.device)
        seen = torch.where(seen.any(1, keepdim=True), seen, present)
        kept = torch.stack([self._uniform(present.shape[:1], present) >= rate for rate in rates], dim=1)
        lost = ~(kept & seen).any(1, keepdim=True)
        one = self._uniform(present.shape, present).masked_fill(~seen, -1.0).argmax(1, keepdim=True)
        kept = kept | (lost & torch.zeros_like(kept).scatter(1, one, True))
        return {
            name: _mask_samples(tokens, kept[:, i]) if rates[i] else tokens
            for i, (name, tokens) in enumerate(each.items())
        }

    def _join(self, name: str, tokens: Tokens, padding: Tensor) -> tuple[Tensor, Tokens]:
        """Pad the tokens of one modality to width `dim`, and replace random tokens (see `token_mask_rate`).

        Return the padded sequence `b n dim`, and the unpadded tokens with zeros in place of the replaced ones.
        """
        x = tokens.materialize()
        x = torch.cat([x, padding.expand(*x.shape[:-1], -1)], dim=-1)
        rate = self.token_mask_rate.get(name)
        if rate is None or not (self.training or rate == 1):
            return x, tokens
        shape = x.shape[:2]
        masked = self._uniform(shape, x) < rate if self.training else x.new_ones(shape, dtype=torch.bool)
        x = torch.where(masked[..., None], self.mask_tokens(name).to(x.dtype), x)
        content = tokens.content.masked_fill(masked.reshape(tokens.content.shape[:-1]).unsqueeze(-1), 0.0)
        return x, Tokens(content, tokens.position_tables, tokens.mask)

    def _uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        generator = self._draws.generator(self.generator)
        # torch.rand with a generator does not support the dynamic shapes of torch.compile.
        return torch.empty(tuple(shape), device=like.device).uniform_(generator=generator)


def _valid_lengths(lengths: Lengths, samples: Tensor) -> Tensor:
    """Return lengths with 1 for samples without the modality, whose lengths may be anything."""
    own = torch.as_tensor(lengths, device=samples.device)
    return own.where(_aligned(samples, own.ndim), torch.ones_like(own)) if own.ndim else own


def _aligned(samples: Tensor, ndim: int) -> Tensor:
    """Reshape a tensor `b` to `b 1 ... 1` with `ndim` axes, for broadcasting."""
    return samples.reshape(-1, *[1] * (ndim - 1))


def _zero_samples(x: object, samples: Tensor, name: str, other_axes: Sequence[int]) -> object:
    """Return the input `x` with zeros in the samples where `samples` (shape `b`) is False.

    `name` (name of the mask) and `other_axes` (sizes of its axes after the first) are used only in the error message.
    """
    if isinstance(x, Mapping):
        return {key: _zero_samples(value, samples, name, other_axes) for key, value in x.items()}
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    shape, expected = (samples.shape[0], *other_axes), (x.shape[0], *other_axes)
    if shape[0] != expected[0]:
        raise ValueError(f"{name} must have shape {expected}, one row per sample; got {shape}")
    return x.masked_fill(~_aligned(samples, x.ndim), 0)


def _valid(tokens: Tokens) -> Tensor:
    """Return the mask `b n` of valid tokens. All tokens are valid if there is no mask."""
    mask = tokens.content.new_ones(tokens.content.shape[:-1], dtype=torch.bool) if tokens.mask is None else tokens.mask
    return mask.flatten(1)


def _mask_samples(tokens: Tokens, samples: Tensor) -> Tokens:
    """Return `tokens` with all tokens masked in the samples where `samples` (shape `b`) is False."""
    valid = _aligned(samples, tokens.content.ndim - 1).expand(tokens.content.shape[:-1])
    mask = valid if tokens.mask is None else tokens.mask & valid
    return Tokens(tokens.content, tokens.position_tables, mask, tokens.modalities)
