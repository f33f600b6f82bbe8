"""Heads of answers: what a decoder gave for each query, as the output that was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init, modalities
from perceiver_core.registry import register


@register
class Linear(nn.Module):
    """A linear layer: channels of a pixel, logits of a token.

    Args:
        dim: the width of an answer.
        out_dim: how many it becomes.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Linear(32, out_dim=3)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 3])
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        checks.positive(dim=dim, out_dim=out_dim)
        self.dim = dim
        self.values = init.linear(dim, out_dim)

    def forward(self, answers: Float[Tensor, "b q d"]) -> Float[Tensor, "b q values"]:
        """The values of each answer."""
        values: Tensor = self.values(answers)
        return values


@register
class SingleQuery(nn.Module):
    """The only answer, after a head if there is one: logits of a picture from one query.

    Args:
        head: what is done to the answer first.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.SingleQuery(heads.Linear(32, out_dim=10))(torch.randn(2, 1, 32)).shape
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
class Waveform(nn.Module):
    """Every answer is a piece of a waveform.

    Args:
        dim: the width of an answer.
        patch_size: samples a piece.
        num_channels: of the waveform; one has no axis for them, as `adapters.Audio` wants it.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.Waveform(32, patch_size=16)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 960])
        >>> heads.Waveform(32, patch_size=16, num_channels=2)(torch.randn(2, 60, 32)).shape
        torch.Size([2, 2, 960])

    Reference: deepmind-research/perceiver/io_processors.py, `AudioPostprocessor`.
    """

    def __init__(self, dim: int, patch_size: int, *, num_channels: int = 1) -> None:
        super().__init__()
        checks.positive(dim=dim, patch_size=patch_size, num_channels=num_channels)
        self.dim, self.num_channels = dim, num_channels
        self.samples = init.linear(dim, num_channels * patch_size)

    def forward(self, answers: Float[Tensor, "b q d"]) -> Float[Tensor, "b *c s"]:
        """The pieces, one after the other."""
        checks.has_shape("answers", answers, "b q d", last=self.dim)
        sound = rearrange(self.samples(answers), "b q (patch c) -> b c (q patch)", c=self.num_channels)
        return sound[:, 0] if self.num_channels == 1 else sound


@partial(register, name="heads.Grid")
class Grid(nn.Module):
    """An answer for every point of a grid, as an array: flow, pixels, depth, frames of a film.

    Args:
        grid: its size; None for the one that was asked on, which a `PerceiverIO` says.
        head: what is done to each answer first, such as `Linear`.
        scale: a factor for all values. Perceiver IO's flow is a hundredth of what its decoder gives.
        channel_axis: which axis of the array the values are: 1 for `b c h w`, 2 for films `b t c h w`, -1 for the last.

    Raises:
        ValueError: an axis that the array has not.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> flow = heads.Grid((5, 7), scale=0.01)
        >>> flow(torch.randn(2, 35, 2)).shape, flow(torch.randn(2, 11, 2), query_inputs=torch.arange(11)).shape
        (torch.Size([2, 2, 5, 7]), torch.Size([2, 11, 2]))
        >>> film = heads.Grid((3, 5, 7), head=heads.Linear(32, out_dim=3), channel_axis=2)
        >>> film(torch.randn(2, 105, 32)).shape
        torch.Size([2, 3, 3, 5, 7])

    Reference: deepmind-research/perceiver/perceiver.py, `FlowDecoder`.
    """

    needs_query_layout = True

    def __init__(
        self, grid: Sequence[int] | None, *, head: nn.Module | None = None, scale: float = 1.0, channel_axis: int = 1
    ) -> None:
        super().__init__()
        if grid is not None:
            checks.positive(**{f"grid[{i}]": size for i, size in enumerate(grid)})
            _check_axis(channel_axis, len(grid))
        self.grid, self.scale, self.channel_axis = None if grid is None else tuple(grid), scale, channel_axis
        self.head = nn.Identity() if head is None else head
        if hasattr(self.head, "dim"):
            self.dim = self.head.dim

    def forward(
        self, answers: Float[Tensor, "b q d"], *, query_inputs: Any = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """The array, or `b q c` for some of the points.

        Args:
            answers: one a point.
            query_inputs: which points were asked for; all of the grid unless given.
            grid: the one that was asked on, where that is known.

        Raises:
            ValueError: answers on another grid, or another number of them than it has points.
        """
        values: Tensor = self.head(answers) * self.scale
        if query_inputs is not None:
            return values
        size = self._size(grid)
        if values.ndim != 3 or values.shape[1] != prod(size):
            raise ValueError(
                f"answers must be b {prod(size)} c, one for each point of {size}, where `at` does not say which points "
                f"were asked for; got shape {tuple(answers.shape)}"
            )
        return values.reshape(values.shape[0], *size, values.shape[-1]).movedim(-1, self.channel_axis)

    def _size(self, asked: Sequence[int] | None) -> tuple[int, ...]:
        if asked is None and self.grid is None:
            raise ValueError("grid must be given, to OnGrid or with the answers, where queries do not tell it")
        if asked is not None and self.grid is not None and tuple(asked) != self.grid:
            raise ValueError(
                f"answers are on a grid {tuple(asked)}, and this head makes {self.grid}. Give it None to take any, "
                "or ask on its grid: queries.Grid(grid, positions)"
            )
        size = tuple(asked) if self.grid is None and asked is not None else self.grid
        assert size is not None
        _check_axis(self.channel_axis, len(size))
        return size


@partial(register, name="heads.Unpatchify")
class Unpatchify(nn.Module):
    """Every answer is a patch of a picture `b c h w`, or of a film `b t c h w`.

    Args:
        dim: the width of an answer.
        grid: how many patches there are along each axis; None for the grid that was asked on.
        patch_size: how many pixels a patch has along each axis.
        num_channels: of a pixel.

    Raises:
        ValueError: another number of axes than two or three.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> pictures = heads.Unpatchify(32, grid=(4, 5), patch_size=(2, 3), num_channels=3)
        >>> pictures(torch.randn(2, 20, 32)).shape
        torch.Size([2, 3, 8, 15])
        >>> some = torch.tensor([0, 19])
        >>> pictures(torch.randn(2, 2, 32), query_inputs=some).shape, pictures.cut(torch.rand(2, 3, 8, 15))[:, some].shape
        (torch.Size([2, 2, 18]), torch.Size([2, 2, 18]))

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3, reads films as patches; deepmind-research/perceiver,
    io_processors.py, `reverse_space_to_depth`.
    """

    needs_query_layout = True

    def __init__(self, dim: int, *, grid: Sequence[int] | None, patch_size: Sequence[int], num_channels: int = 3) -> None:
        super().__init__()
        checks.positive(dim=dim, num_channels=num_channels, **{f"size[{i}]": n for i, n in enumerate(patch_size)})
        if len(patch_size) not in (2, 3):
            raise ValueError(f"patch_size must have two axes, of pictures, or three, of films; got {tuple(patch_size)}")
        if grid is not None and len(grid) != len(patch_size):
            raise ValueError(f"grid must have as many axes as size, {len(patch_size)}; got {tuple(grid)}")
        self.dim, self.patch_size, self.num_channels = dim, tuple(patch_size), num_channels
        values = Linear(dim, num_channels * prod(patch_size))
        self.patches = Grid(grid, head=values, channel_axis=-1)

    def forward(
        self, answers: Float[Tensor, "b q d"], *, query_inputs: Any = None, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "b ..."]:
        """The pictures or films; or for some of the patches, in the layout of `cut`, their pixels."""
        found: Tensor = self.patches(answers, query_inputs=query_inputs, grid=grid)
        return found if query_inputs is not None else self._joined(found)

    def _joined(self, patches: Tensor) -> Tensor:
        sizes = dict(zip("tpq"[-len(self.patch_size) :], self.patch_size, strict=True))
        if len(self.patch_size) == 2:
            return rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", **sizes, c=self.num_channels)
        return rearrange(patches, "b f h w (t p q c) -> b (f t) c (h p) (w q)", **sizes, c=self.num_channels)

    def cut(self, pixels: Float[Tensor, "b ..."]) -> Float[Tensor, "b n values"]:
        """Pictures or films as patches, one a query: what answers to some of them are to be compared with.

        Raises:
            ValueError: pixels that are no whole number of patches, or of another number of channels or axes.
        """
        axes = len(self.patch_size)
        letters = "b c h w" if axes == 2 else "b t c h w"
        checks.has_shape("pixels", pixels, letters)
        sides = pixels.shape[2:] if axes == 2 else (pixels.shape[1], *pixels.shape[3:])
        if pixels.shape[-3] != self.num_channels or any(n % of for n, of in zip(sides, self.patch_size, strict=True)):
            raise ValueError(
                f"pixels must be {letters} of {self.num_channels} channels and whole patches {self.patch_size}; "
                f"got shape {tuple(pixels.shape)}"
            )
        sizes = dict(zip("tpq"[-axes:], self.patch_size, strict=True))
        if axes == 2:
            return rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", **sizes)
        return rearrange(pixels, "b (f t) c (h p) (w q) -> b (f h w) (t p q c)", **sizes)


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
        >>> head = heads.Multimodal({"sound": heads.Waveform(32, patch_size=16), "label": heads.SingleQuery(heads.Linear(32, 10))})
        >>> answers = {"sound": torch.randn(2, 60, 32), "label": torch.randn(2, 1, 32)}
        >>> {name: tuple(output.shape) for name, output in head(answers).items()}
        {'sound': (2, 960), 'label': (2, 10)}

    Reference: deepmind-research/perceiver/io_processors.py, `MultimodalPostprocessor`.
    """

    needs_query_layout = True

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        modalities.check("heads", heads, "a head")
        self.heads = nn.ModuleDict(heads)
        widths = {name: head.dim for name, head in heads.items() if isinstance(getattr(head, "dim", None), int)}
        if len(set(widths.values())) > 1:
            raise ValueError(f"heads must take answers of one width, as a decoder gives them; they take {widths}")
        self.dim = next(iter(widths.values()), None)

    def forward(
        self,
        answers: Mapping[str, Tensor],
        *,
        query_inputs: Mapping[str, Any] | None = None,
        grid: Mapping[str, Sequence[int] | None] | None = None,
    ) -> dict[str, Tensor]:
        """An output for each kind that was asked for.

        Args:
            answers: by name.
            query_inputs: by name which queries were asked, as a head such as `Grid` wants to know.
            grid: by name the grid that was asked on, where that is known.

        Raises:
            ValueError: a kind that there is no head for.
        """
        if unknown := answers.keys() - self.heads.keys():
            raise ValueError(f"answers name {sorted(unknown)}; there are heads for {list(self.heads)}")
        outputs = {}
        for name, answer in answers.items():
            head = self.heads[name]
            sees = getattr(head, "needs_query_layout", False)
            more = {"at": (query_inputs or {}).get(name), "grid": (grid or {}).get(name)} if sees else {}
            outputs[name] = modalities.call("answers", name, head, answer, **more)
        return outputs


def _check_axis(channels: int, axes: int) -> None:
    if channels != -1 and not 1 <= channels <= axes + 1:
        raise ValueError(f"channels must be an axis of an array b ... of {axes} axes and one for them; got {channels}")
