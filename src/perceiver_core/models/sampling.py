"""Samplers: functions `(logits: b v, generator) -> ids: b` that choose the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from perceiver_core import checks

Sampler: TypeAlias = Callable[[Tensor, torch.Generator | None], Tensor]


def greedy(logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
    """Return the most likely id of each sample.

    Example:
        >>> pc.models.sampling.greedy(torch.tensor([[0.0, 2.0, 1.0]]))
        tensor([1])
    """
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sample:
    """Random sampling of ids by their probability, optionally among the most likely ids only.

    Args:
        temperature: Number that the logits are divided by. As it goes to 0, sampling becomes greedy.
        top_k: Number of most likely ids to sample from; all by default.
        top_p: Probability mass to sample from: the smallest set of most likely ids whose probabilities, after `top_k`,
            sum to at least this.

    Raises:
        TypeError: A temperature or top_p that is not a number.
        ValueError: A temperature of 0 or below, a top_k below 1, a top_p outside (0, 1].

    Example:
        >>> sample = pc.models.sampling.Sample(temperature=0.8, top_p=0.9)
        >>> sample(torch.zeros(2, 11), torch.Generator().manual_seed(0)).shape
        torch.Size([2])

    Reference: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, nucleus sampling), section 3.1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 and finite; got {self.temperature!r}. For the most likely id use greedy"
            )
        if self.top_k is not None:
            checks.positive(top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p!r}")

    def __call__(self, logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """Return one random id per sample."""
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Return the probability of each id to be sampled, in float32 or wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Divided by a tiny temperature, differences to the maximum may overflow to -inf, where logits could to inf. A
        # temperature below the smallest normal number would become zero in this dtype, so it is replaced by that.
        wide = (wide - wide.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(wide.dtype).tiny)
        ranked, ids = wide.sort(dim=-1, descending=True, stable=True)
        shares = ranked[..., : self.top_k].softmax(-1)
        if self.top_p < 1:
            before = shares.cumsum(-1) - shares
            shares = shares.where(before < self.top_p, 0.0)
            shares = shares / shares.sum(-1, keepdim=True)
        return torch.zeros_like(wide).scatter(-1, ids[..., : self.top_k], shares)
