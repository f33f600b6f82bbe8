"""How the next id is chosen from its logits: any function `(logits: b v, generator) -> ids: b`."""

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
    """The most likely id.

    Example:
        >>> import torch
        >>> from perceiver_core.models import sampling
        >>> sampling.greedy(torch.tensor([[0.0, 2.0, 1.0]]))
        tensor([1])
    """
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sample:
    """An id drawn by its probability, of those that are left in the race.

    Args:
        temperature: logits are divided by it; 1 leaves them, towards 0 the most likely id wins.
        top_k: only the k most likely ids; all unless given.
        top_p: only the fewest most likely ids that have this probability together, of those that `top_k` leaves.

    Raises:
        TypeError: a temperature or top_p that is no number.
        ValueError: a temperature of 0 or below, a top_k below 1, a top_p outside (0, 1].

    Example:
        >>> import torch
        >>> from perceiver_core.models import sampling
        >>> choose = sampling.Sample(temperature=0.8, top_p=0.9)
        >>> choose(torch.zeros(2, 11), torch.Generator().manual_seed(0)).shape
        torch.Size([2])

    Reference: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, nucleus sampling), section 3.1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if not isinstance(given := getattr(self, name), Real):
                raise TypeError(f"{name} must be a number; got {given!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 and finite; got {self.temperature!r}. For the most likely id use greedy"
            )
        if self.top_k is not None:
            checks.positive(top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p!r}")

    def __call__(self, logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """One id for each row."""
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """The probability of each id to be drawn, in float32 at least."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Differences to the largest may overflow to -inf, as logits could to inf; the least number stands for those
        # below it, which would be zero.
        wide = (wide - wide.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(wide.dtype).tiny)
        ranked, ids = wide.sort(dim=-1, descending=True, stable=True)
        shares = ranked[..., : self.top_k].softmax(-1)
        if self.top_p < 1:
            before = shares.cumsum(-1) - shares
            shares = shares.where(before < self.top_p, 0.0)
            shares = shares / shares.sum(-1, keepdim=True)
        return torch.zeros_like(wide).scatter(-1, ids[..., : self.top_k], shares)
