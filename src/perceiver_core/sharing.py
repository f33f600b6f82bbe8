"""Weight sharing: which set of weights each step of an encoder uses.

A step is a read (cross-attend) followed by a latent transformer. A scheme is any function from the number of
steps to a `Sharing`; steps with the same number use the same module, which is registered once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from perceiver_core import checks
from perceiver_core.registry import register


@dataclass(frozen=True)
class Sharing:
    """For each step, the number of its read's weights and of its latent transformer's.

    Numbers start at 0 and a new one is the next: (0, 1, 1, 2), not (0, 2, 2, 1).

    Raises:
        ValueError: two lengths, or numbers out of order.

    Example:
        >>> from perceiver_core.sharing import Sharing
        >>> Sharing(reads=(0, 1, 0, 1), transformers=(0, 0, 1, 1)).steps
        4
    """

    reads: tuple[int, ...]
    transformers: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.reads) != len(self.transformers):
            raise ValueError(f"reads and transformers must be of one length; got {self.reads} and {self.transformers}")
        for name, plan in (("reads", self.reads), ("transformers", self.transformers)):
            seen = 0
            for number in plan:
                if not 0 <= number <= seen:
                    raise ValueError(f"{name} must count up from 0 without gaps; got {plan}")
                seen = max(seen, number + 1)

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.reads)


@register
@dataclass(frozen=True)
class Shared:
    """A module inside a `functools.partial` that all blocks made from it share; without it each block has a copy.

    Args:
        module: The shared module.

    Example:
        >>> from functools import partial
        >>> import perceiver_core as pc
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.sharing.Shared(pc.positions.Rotary()))
        >>> block = partial(pc.SelfAttend, attention=attention)
        >>> first, second = pc.LatentTransformer(16, depth=2, num_heads=4, block=block).blocks
        >>> first.attention.rotary is second.attention.rotary
        True
    """

    module: nn.Module


Scheme: TypeAlias = Callable[[int], Sharing]


@register
def none(steps: int) -> Sharing:
    """Every step has weights of its own.

    Example:
        >>> from perceiver_core import sharing
        >>> sharing.none(3)
        Sharing(reads=(0, 1, 2), transformers=(0, 1, 2))
    """
    _check(steps)
    return Sharing(tuple(range(steps)), tuple(range(steps)))


@register
def all_(steps: int) -> Sharing:
    """All steps share all weights: a recurrent network that reads its input again and again.

    Example:
        >>> from perceiver_core import sharing
        >>> sharing.all_(3)
        Sharing(reads=(0, 0, 0), transformers=(0, 0, 0))
    """
    _check(steps)
    return Sharing((0,) * steps, (0,) * steps)


@register
def all_but_first(steps: int) -> Sharing:
    """The first read and the first latent transformer stand alone; perceiver-pytorch's `weight_tie_layers`.

    Example:
        >>> from perceiver_core import sharing
        >>> sharing.all_but_first(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 1, 1))
    """
    plan = (0, *(1,) * (steps - 1))
    _check(steps)
    return Sharing(plan, plan)


@register
def paper(steps: int) -> Sharing:
    """The first read stands alone, the other reads share, and so do all latent transformers.

    The paper shares "all but the initial cross-attend"; with it the ImageNet model has the 44.9 million
    parameters that the paper states.

    Example:
        >>> from perceiver_core import sharing
        >>> sharing.paper(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 0, 0))

    Reference: Jaegle et al. 2021 (Perceiver), section 4.1 and appendix.
    """
    _check(steps)
    return Sharing((0, *(1,) * (steps - 1)), (0,) * steps)


def _check(steps: int) -> None:
    checks.positive(at_most=10_000, steps=steps)
