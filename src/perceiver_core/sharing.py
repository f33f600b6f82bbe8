"""Weight sharing between the steps of an encoder.

A step is a read (a cross-attention block) followed by a latent transformer. A `Sharing` assigns a read module and a
latent transformer to each step, both by index. Steps with the same index use the same module, which is registered once.
A scheme is a function that maps the number of steps to a `Sharing`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from torch import nn

from perceiver_core import argument_types, checks
from perceiver_core.registry import register


@dataclass(frozen=True)
class Sharing:
    """Plan of weight sharing: for each step, the index of its read (cross-attention) and of its latent transformer.

    Modules are numbered from 0 in the order of first use: (0, 1, 1, 2), not (0, 2, 2, 1).

    Args:
        reads: Index of the read module of each step.
        transformers: Index of the latent transformer of each step.

    Raises:
        ValueError: If the two tuples have different lengths, or the indices are not in the order of first use.

    Example:
        >>> pc.sharing.Sharing(reads=(0, 1, 0, 1), transformers=(0, 0, 1, 1)).steps
        4
    """

    reads: tuple[int, ...]
    transformers: tuple[int, ...]

    def __post_init__(self) -> None:
        argument_types.check_fields(self)
        if len(self.reads) != len(self.transformers):
            raise ValueError(f"reads and transformers must be of one length; got {self.reads} and {self.transformers}")
        for name, indices in (("reads", self.reads), ("transformers", self.transformers)):
            largest = accumulate(indices, max, initial=-1)  # largest earlier index, per step
            if any(not 0 <= index <= before + 1 for index, before in zip(indices, largest, strict=False)):
                raise ValueError(f"{name} must count up from 0 without gaps; got {indices}")

    @property
    def steps(self) -> int:
        """Number of encoder steps."""
        return len(self.reads)


@register
@dataclass(frozen=True)
class Shared:
    """Wrapper that makes all blocks share a module passed in a `functools.partial`. Without it, blocks get copies.

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
argument_types.describe(Scheme, "a function such as sharing.all_")


def _checked(steps: int) -> int:
    """Check the number of steps, and return it as an int."""
    checks.positive(at_most=10_000, steps=steps)
    return operator.index(steps)


@register
def none(steps: int) -> Sharing:
    """Return a plan in which every step has its own weights.

    Example:
        >>> pc.sharing.none(3)
        Sharing(reads=(0, 1, 2), transformers=(0, 1, 2))
    """
    steps = _checked(steps)
    return Sharing(tuple(range(steps)), tuple(range(steps)))


@register
def all_(steps: int) -> Sharing:
    """Return a plan in which all steps share all weights, as in a recurrent network.

    Example:
        >>> pc.sharing.all_(3)
        Sharing(reads=(0, 0, 0), transformers=(0, 0, 0))
    """
    steps = _checked(steps)
    return Sharing((0,) * steps, (0,) * steps)


@register
def all_but_first(steps: int) -> Sharing:
    """Return a plan in which all steps but the first share weights, like `weight_tie_layers` in perceiver-pytorch.

    Example:
        >>> pc.sharing.all_but_first(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 1, 1))
    """
    steps = _checked(steps)
    indices = (0, *(1,) * (steps - 1))
    return Sharing(indices, indices)


@register
def paper(steps: int) -> Sharing:
    """Return the paper's plan: all weights are shared, except that the first cross-attention has its own weights.

    The paper shares "all but the initial cross-attend". With this scheme, the ImageNet model has 44.9 million
    parameters, the number stated in the paper.

    Example:
        >>> pc.sharing.paper(3)
        Sharing(reads=(0, 1, 1), transformers=(0, 0, 0))

    Reference: Jaegle et al. 2021 (Perceiver), section 4.1 and appendix.
    """
    steps = _checked(steps)
    return Sharing((0, *(1,) * (steps - 1)), (0,) * steps)
