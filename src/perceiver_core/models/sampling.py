"""Samplers: callables `(logits: b v, generator) -> ids: b` that choose the next token of each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from perceiver_core import argument_types, checks
from perceiver_core.argument_errors import explained

Sampler: TypeAlias = Callable[[Tensor, torch.Generator | None], Tensor]


@explained
def greedy(logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
    """Return the most likely token id of each sample, `b`. The generator is not used.

    Example:
        >>> pc.models.sampling.greedy(torch.tensor([[0.0, 2.0, 1.0]]))
        tensor([1])
    """
    _check(logits)
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sample:
    """Sampler that draws token ids from the softmax distribution, optionally restricted to the most likely ids.

    Args:
        temperature: Positive divisor of the logits. As it approaches 0, sampling becomes greedy.
        top_k: Number of most likely ids to sample from; None for all ids.
        top_p: Probability mass for nucleus sampling, in (0, 1]: sample from the smallest set of most likely ids whose
            probabilities sum to at least `top_p`. Applied after `top_k`.

    Raises:
        TypeError: If `temperature` or `top_p` is not a number.
        ValueError: If `temperature` is not positive and finite, or `top_p` is outside (0, 1].
        ValueError: If `top_k` is not a positive integer.

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
        argument_types.check_fields(self)
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0; got {self.temperature!r}. For the most likely id use greedy"
            )
        if self.top_k is not None:
            checks.positive(top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p!r}")

    @explained
    def __call__(self, logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """Draw one token id per sample."""
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    @explained
    def probabilities(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Return the probability of each token id, with temperature, top-k and top-p applied.

        The dtype is float64 for float64 logits, otherwise float32.
        """
        _check(logits)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The maximum is subtracted first: with a tiny temperature, the differences can overflow to -inf, which is
        # harmless, but the logits could overflow to inf. The temperature is clamped so that it does not underflow to 0.
        wide = (wide - wide.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(wide.dtype).tiny)
        ranked, ids = wide.sort(dim=-1, descending=True, stable=True)
        shares = ranked[..., : self.top_k].softmax(-1)
        if self.top_p < 1:
            before = shares.cumsum(-1) - shares
            shares = shares.where(before < self.top_p, 0.0)
            shares = shares / shares.sum(-1, keepdim=True)
        return torch.zeros_like(wide).scatter(-1, ids[..., : self.top_k], shares)


def _check(logits: Tensor) -> None:
    """Check that the largest logit of each sample is finite. Smaller ones may be -inf, to exclude ids."""
    if not checks.is_true(lambda: logits.amax(-1).isfinite().all(), logits):
        raise ValueError(
            "logits must not be NaN or infinite, except for -inf at some ids; check the weights of the model and the "
            "inputs"
        )
