"""Weight sharing: the set of weights that each step of an encoder uses.

A step is a read (cross-attend) followed by a latent transformer. A scheme is a function from the number of steps to a
`Sharing`; steps with the same index use the same module, which is registered once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

from torch import nn

from perceiver_core import checks
from perceiver_core.registry import register


@dataclass(frozen=True)
class Sharing:
    """Weight indices of the read and of the latent transformer of each step.

    Weights are numbered from 0 in the order of their first use: (0, 1, 1, 2), not (0, 2, 2, 1).

    Raises:
        ValueError: The lengths differ, or indices are not in the order of first use.

    Example:
        >>> pc.sharing.Sharing(reads=(0, 1, 0, 1), transformers=(0, 0, 1, 1)).steps
        4
    """

    reads: tuple[int, ...]
    transformers: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.reads) != len(self.transformers):
            raise ValueError(f"reads and transformers must be of one length; got {self.reads} and {self.transformers}")
        for name, indices in (("reads", self.reads), ("transformers", self.transformers)):
            largest = accumulate(indices, max, initial=-1)  # before each index
            if any(not 0 <= index <= before + 1 for index, before in zip(indices, largest, strict=False)):
                raise ValueError(f"{name} must count up from 0 without gaps; got {indices}")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.reads)


@register
@dataclass(frozen=True)
class Shared:
    """Module inside a `functools.partial` that all blocks share; without this marker, each block gets a copy.

    Args:
        module: The shared module.

    Example:
        >>> from functools import partial
        >>> attention = partial(pc.MultiHeadAttention, rotary=pc.sharing.Shared(pc.positions.Rotary()))
        >>> block = partial(pc.SelfAttend, attention=attention)
        >>> first, second = pc.LatentTransformer(16, depth=2, num_heads=4, block=block).blocks
        >>> first.attention.rotary is second.attention.rotary
        True
    """

    module: nn.Module


Scheme: TypeAlias = Callable[[int], Sharing]
_check = partial(checks.positive, at_most=10_000)


@register
def none(steps: int) -> Sharing:
    """Give every step weights of its own.

    Example:
        >>> pc.sharing.none(3)
        Sharing(reads=(0, 1, 2), transformers=(0, 1, 2))
    """
    _check(steps=steps)
    return Sharing(tuple(range(steps)), tuple(range(steps)))


@register
def all_(steps: int) -> Sharing:
    """Share all weights among all steps: a recurrent network that reads its input repeatedly.

    Example:
        >>> pc.sharing.all_(3)
        Sharing(reads=(0, 0, 0), transformers=(0, 0, 0))
    """
    _check(steps=steps)
    return Sharing((0,) * steps, (0,) * steps)


@register
def all_but_first(steps: int) -> Sharing:
    """Share all weights except those of the first step; `weight_tie_layers` of perceiver-pytorch.

    Example:
        >>> pc.sharing.all_but_first(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 1, 1))
    """
    _check(steps=steps)
    indices = (0, *(1,) * (steps - 1))
    return Sharing(indices, indices)


@register
def paper(steps: int) -> Sharing:
    """Share all weights except those of the first read.

    The paper shares "all but the initial cross-attend"; the ImageNet model then has the 44.9 million parameters that
    the paper states.

    Example:
        >>> pc.sharing.paper(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 0, 0))

    Reference: Jaegle et al. 2021 (Perceiver), section 4.1 and appendix.
    """
    _check(steps=steps)
    return Sharing((0, *(1,) * (steps - 1)), (0,) * steps)
