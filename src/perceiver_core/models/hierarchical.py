"""Hierarchical Perceiver: tokens are split into groups with separate latents, and later levels merge the groups.

    tokens --16 groups--> 16 x z latents --4 groups--> 4 x z latents --1 group--> z latents      levels
    latents --4 groups--> 4 x z latents --16 groups--> 16 x z latents                            decoder_levels

Here, z is the number of latents per group, which may differ between levels. Latents attend only to the tokens in their
group. With g groups and the same total number of latents, cross-attention is g times cheaper, so long inputs can have
many latents. Groups are contiguous segments of the flattened input, so related tokens should be close to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.blocks import CrossAttend, GroupedRead, Level
from perceiver_core.blocks.factory import build
from perceiver_core.blocks.grouped_read import LATENT_TRANSFORMER, grouped
from perceiver_core.layers import init
from perceiver_core.layers.linear import apply_linear
from perceiver_core.positions import Positions
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class HierarchicalPerceiver(nn.Module):
    """Hierarchical Perceiver: levels merge groups of tokens, then optional decoder levels split them again.

        x = embedding(inputs) + positions
        for each level:          x = grouped_read(x)
        for each decoder level:  x = grouped_read(x, skip=x of the opposite level)

    A grouped read is cross-attention and a latent transformer in each group; see `GroupedRead`. Use the model as the
    encoder of a `Perceiver`. Decoder levels are needed only for outputs as large as the input; see
    `HierarchicalAutoencoder`.

    Args:
        input_dim: Width of the input tokens.
        levels: Sizes of each level. In the paper, the number of groups decreases, for example 16, 4, 1.
        positions: Position encoding. A linear layer projects the input tokens to the width `positions.dim`, then the
            position features are added. The paper uses learned positions, `positions.LearnedGrid((n,), dim=32)`.
        decoder_levels: Sizes of each decoder level. Each has a skip connection from its opposite level: the first from
            the second-to-last of `levels`, the second from the level before that, and so on. Opposite levels must have
            the same number of groups and the same number of latents.
        cross_attention: Factory `(dim, input_dim) -> module` for each level.
        latent_transformer: Factory `(dim, depth=depth, num_heads=num_heads) -> module` for each level.

    Raises:
        TypeError: If `positions` does not implement `positions.Positions`.
        ValueError: If `levels` is empty, or `decoder_levels` is not shorter than `levels`.
        ValueError: If opposite levels have different numbers of groups or latents.

    Example:
        >>> sizes = {16: (4, 32), 4: (8, 48), 1: (8, 64)}
        >>> levels = [pc.Level(groups, num_latents=latents, dim=dim) for groups, (latents, dim) in sizes.items()]
        >>> encoder = pc.HierarchicalPerceiver(3, levels=levels, positions=pc.positions.LearnedGrid((500,), dim=32))
        >>> encoder(torch.randn(2, 500, 3)).shape
        torch.Size([2, 8, 64])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver), section 3. Skip connections:
    deepmind/hierarchical_perceiver, `perceiver.py`, `HiP`.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        levels: Sequence[Level],
        positions: Positions,
        decoder_levels: Sequence[Level] = (),
        cross_attention: Callable[..., nn.Module] = CrossAttend,
        latent_transformer: Callable[..., nn.Module] = LATENT_TRANSFORMER,
    ) -> None:
        super().__init__()
        checks.positive(input_dim=input_dim)
        if isinstance(positions, type) or not isinstance(positions, Positions):
            raise TypeError(
                f"positions must be an object such as positions.LearnedGrid((n,), dim=32); got {positions!r}"
            )
        opposites = _opposites(levels, decoder_levels)
        self.input_dim, self.positions = input_dim, positions
        self.embedding = init.linear(input_dim, positions.dim)
        widths = [positions.dim, *(level.dim for level in (*levels, *decoder_levels))]
        read = partial(GroupedRead, cross_attention=cross_attention, latent_transformer=latent_transformer)
        self.encoding = nn.ModuleList(read(width, level) for width, level in zip(widths, levels, strict=False))
        self.decoding = nn.ModuleList(
            read(width, level, skip_dim=opposite.dim)
            for width, level, opposite in zip(widths[len(levels) :], decoder_levels, opposites, strict=False)
        )
        self.level = [*levels, *decoder_levels][-1]
        self.dim = self.level.dim

    def forward(
        self, inputs: Tokens | Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Return the latents of all groups in the last level, ordered by group.

        Args:
            inputs: `Tokens`, or a tensor `b n c`.
            mask: Mask of valid tokens, True = attend, combined with the tokens' own mask. Values of masked tokens are
                ignored, even NaN. Masked tokens are not removed, so they do not change the groups.

        Raises:
            TypeError: If the inputs have the wrong dtype, or the mask is not boolean.
            ValueError: If the inputs have the wrong width, rank or device, or the mask has the wrong shape.
        """
        x = inputs.materialize() if isinstance(inputs, Tokens) else inputs
        checks.is_floating("inputs", x)
        checks.has_shape("inputs", x, "b n c", last=self.input_dim)
        checks.matches_weight("inputs", x, self.embedding)
        if mask is not None:
            checks.is_mask("mask", mask, x.shape[:-1])
        if isinstance(inputs, Tokens) and inputs.mask is not None:
            mask = inputs.flat_mask() if mask is None else mask & inputs.mask.flatten(1)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        x = apply_linear(self.embedding, x) + token_positions(self.positions, inputs)
        outputs = []
        for level in self.encoding:
            x, mask = level(x, mask=mask), None
            outputs.append(x)
        for level, skip in zip(self.decoding, outputs[-2::-1], strict=False):
            x = level(x, skip=skip)
        return x


@register
class HierarchicalAutoencoder(nn.Module):
    """Hierarchical Perceiver that reconstructs every input token, including masked tokens.

    There is one query per token: its position features. Each query cross-attends to the latents of the token's group.
    With a mask, this is the masked auto-encoding of the paper: masked tokens are predicted from valid tokens.

    Args:
        perceiver: Hierarchical Perceiver. The queries are split into as many groups as its last level has.
        output_dim: Width of the outputs; `perceiver.input_dim` by default.
        cross_attention: Factory `(dim, input_dim, residual=False) -> module` for the cross-attention to the latents.

    Example:
        >>> levels = [pc.Level(16, num_latents=4, dim=32), pc.Level(1, num_latents=8, dim=64)]
        >>> positions = pc.positions.LearnedGrid((500,), dim=32)
        >>> perceiver = pc.HierarchicalPerceiver(3, levels=levels, positions=positions, decoder_levels=levels[:1])
        >>> autoencoder = pc.models.HierarchicalAutoencoder(perceiver)
        >>> autoencoder(torch.randn(2, 500, 3), mask=torch.rand(2, 500) < 0.15).shape
        torch.Size([2, 500, 3])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver), masked auto-encoding;
    deepmind/hierarchical_perceiver, `perceiver_blocks.py`, `ReconstructionHead`.
    """

    def __init__(
        self,
        perceiver: HierarchicalPerceiver,
        output_dim: int | None = None,
        *,
        cross_attention: Callable[..., nn.Module] = CrossAttend,
    ) -> None:
        super().__init__()
        if output_dim is not None:
            checks.positive(output_dim=output_dim)
        self.perceiver = perceiver
        width = perceiver.positions.dim
        self.cross_attention = build("cross_attention", cross_attention, width, perceiver.dim, residual=False)
        self.output = init.linear(width, perceiver.input_dim if output_dim is None else output_dim)

    def forward(
        self, inputs: Tokens | Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n o"]:
        """Return one vector per input token. The arguments are the same as for `HierarchicalPerceiver.forward`."""
        groups, latents = self.perceiver.level.num_groups, self.perceiver(inputs, mask=mask)
        positions = token_positions(self.perceiver.positions, inputs)
        queries = repeat(grouped(positions.unsqueeze(0), groups), "g n p -> (b g) n p", b=latents.shape[0])
        outputs = self.cross_attention(queries, rearrange(latents, "b (g z) d -> (b g) z d", g=groups))
        outputs = rearrange(apply_linear(self.output, outputs), "(b g) n o -> b (g n) o", g=groups)
        # Negative padding removes the padding tokens. A slice would specialize a compiled graph to the strides.
        return F.pad(outputs, (0, 0, 0, positions.shape[0] - outputs.shape[1]))


def token_positions(positions: Positions, inputs: Tokens | Float[Tensor, "b n c"]) -> Float[Tensor, "n p"]:
    """Return the position features of every token, with the grid axes flattened."""
    grid, like = (inputs.grid, inputs.content) if isinstance(inputs, Tokens) else (inputs.shape[1:-1], inputs)
    tables = positions.tables(tuple(grid), like=like)
    total = sum(tables[1:], start=tables[0])
    return total.expand(*grid, total.shape[-1]).flatten(0, -2)


def _opposites(levels: Sequence[Level], decoder_levels: Sequence[Level]) -> list[Level]:
    """Check that each decoder level matches its opposite level. Return the opposite levels, `levels[-2::-1]`."""
    if not levels:
        raise ValueError("levels must have at least one level; got none")
    opposites = list(levels)[-2::-1]
    if len(decoder_levels) > len(opposites):
        raise ValueError(
            f"decoder_levels must have at most {len(opposites)} levels, one less than levels; got {len(decoder_levels)}"
        )
    for number, (level, opposite) in enumerate(zip(decoder_levels, opposites, strict=False)):
        if (level.num_groups, level.num_latents) != (opposite.num_groups, opposite.num_latents):
            raise ValueError(
                f"decoder_levels[{number}] must have the groups and latents of the opposite level, "
                f"{opposite.num_groups} x {opposite.num_latents}; got {level.num_groups} x {level.num_latents}"
            )
    return opposites
