"""Heads of answers: what a decoder gave for each query, as the output that was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init, kinds
from perceiver_core.registry import register


@register
class Values(nn.Module):
    """A linear layer: channels of a pixel, logits of a token.

    Args:
        dim: the width of an answer.
        values: how many it becomes.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Values(32, values=3)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 3])
    """

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        checks.positive(dim=dim, values=values)
        self.dim = dim
        self.values = init.linear(dim, values)

    def forward(self, answers: Float[Tensor, "b q d"]) -> Float[Tensor, "b q values"]:
        """The values of each answer."""
        values: Tensor = self.values(answers)
        return values


@register
class Only(nn.Module):
    """The only answer, after a head if there is one: logits of a picture from one query.

    Args:
        head: what is done to the answer first.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Only(heads.Values(32, values=10))(torch.randn(2, 1, 32)).shape
        torch.Size([2, 10])

    Reference: deepmind-research/perceiver/perceiver.py, `ClassificationDecoder`.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Identity() if head is None else head

    @property
    def dim(self) -> int | None:
        """The width of an answer; None where the head does not say it."""
        return getattr(self.head, "dim", None)

    def forward(self, answers: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b values"]:
        """The answer to the only query.

        Raises:
            ValueError: several answers.
        """
        if answers.ndim != 3 or answers.shape[1] != 1:
            raise ValueError(f"answers must be one a sample, b 1 d; got shape {tuple(answers.shape)}")
        only: Tensor = self.head(answers)[:, 0]
        return only


@register
class Samples(nn.Module):
    """Every answer is a piece of a waveform.

    Args:
        dim: the width of an answer.
        patch: samples a piece.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Samples(32, patch=16)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 960])

    Reference: deepmind-research/perceiver/io_processors.py, `AudioPostprocessor`.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        checks.positive(dim=dim, patch=patch)
        self.dim = dim
        self.samples = init.linear(dim, patch)

    def forward(self, answers: Float[Tensor, "b q d"]) -> Float[Tensor, "b s"]:
        """The pieces, one after the other."""
        return rearrange(self.samples(answers), "b q patch -> b (q patch)")


@partial(register, name="heads.OnGrid")
class OnGrid(nn.Module):
    """An answer for every point of a grid, as an array with channels first: flow, pixels, depth.

    Args:
        grid: its size.
        scale: a factor for all values. Perceiver IO's flow is a hundredth of what its decoder gives.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> flow = heads.OnGrid((5, 7), scale=0.01)
        >>> flow(torch.randn(2, 35, 2)).shape, flow(torch.randn(2, 11, 2)).shape
        (torch.Size([2, 2, 5, 7]), torch.Size([2, 11, 2]))

    Reference: deepmind-research/perceiver/perceiver.py, `FlowDecoder`.
    """

    def __init__(self, grid: Sequence[int], *, scale: float = 1.0) -> None:
        super().__init__()
        checks.positive(**{f"grid[{i}]": size for i, size in enumerate(grid)})
        self.grid, self.scale = tuple(grid), scale

    def forward(self, answers: Float[Tensor, "b q c"]) -> Float[Tensor, "b ..."]:
        """`b c *grid`; answers to some of the queries stay `b q c`."""
        answers = answers * self.scale
        if answers.shape[1] != prod(self.grid):
            return answers
        return answers.movedim(-1, 1).reshape(answers.shape[0], answers.shape[-1], *self.grid)


@partial(register, name="heads.Multimodal")
class Multimodal(nn.Module):
    """A head for each kind of answer.

    Args:
        heads: by name, as the queries are named.

    Raises:
        TypeError: heads that are not modules.
        ValueError: no heads, a name that a module cannot have, or heads of different widths (`.dim`).

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> head = heads.Multimodal({"sound": heads.Samples(32, patch=16), "label": heads.Only(heads.Values(32, 10))})
        >>> answers = {"sound": torch.randn(2, 60, 32), "label": torch.randn(2, 1, 32)}
        >>> {name: tuple(output.shape) for name, output in head(answers).items()}
        {'sound': (2, 960), 'label': (2, 10)}

    Reference: deepmind-research/perceiver/io_processors.py, `MultimodalPostprocessor`.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        kinds.check("heads", heads, "a head")
        self.heads = nn.ModuleDict(heads)
        widths = {name: head.dim for name, head in heads.items() if isinstance(getattr(head, "dim", None), int)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"heads must take answers of one width, as a decoder gives them; they take {widths}")
        self.dim = next(iter(widths.values()), None)

    def forward(self, answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An output for each kind that was asked for.

        Raises:
            ValueError: a kind that there is no head for.
        """
        if unknown := answers.keys() - self.heads.keys():
            raise ValueError(f"answers name {sorted(unknown)}; there are heads for {list(self.heads)}")
        return {name: kinds.call("answers", name, self.heads[name], answer) for name, answer in answers.items()}
