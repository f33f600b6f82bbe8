"""The Perceiver that tells a right knee from a left one: the whole architecture on a screen."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

import perceiver_core as pc


@pc.register
class StandardizedStem(nn.Module):
    """Every picture to mean 0 and deviation 1, whatever the scanner's gain, then a convolutional stem.

    Args:
        channels: of the pictures.
        dim: of the tokens.

    Example:
        >>> import torch
        >>> StandardizedStem(1, dim=8)(torch.rand(2, 1, 60, 44)).shape
        torch.Size([2, 8, 15, 11])
    """

    def __init__(self, channels: int, *, dim: int) -> None:
        super().__init__()
        self.stem = pc.adapters.ConvStem(channels, dim=dim)
        self.dim = dim

    def forward(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """The tokens' content."""
        centered = pictures - pictures.mean((1, 2, 3), keepdim=True)
        variance = centered.square().mean((1, 2, 3), keepdim=True)
        tokens: Tensor = self.stem(centered / (variance + 0.05**2).sqrt())  # a flat picture stays flat
        return tokens


def knee_model(size: tuple[int, int] = (64, 64)) -> pc.Perceiver:
    """Gray pictures `b 1 h w` in [-1, 1] to one logit each: positive means a right knee.

    Tokens are what a convolution of 7 x 7 and pooling make of 4 x 4 standardized pixels, with Fourier
    features of where they lie. 32 latents read them twice with the same weights, and think after each time.

    Args:
        size: height and width that it is trained at, in pixels; the highest frequency follows from it.

    Example:
        >>> import torch
        >>> knee_model((64, 64))(torch.rand(2, 1, 64, 64)).shape
        torch.Size([2, 1])
    """
    dim, grid = 64, tuple(-(-side // 4) for side in size)
    where = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=grid)
    image = pc.adapters.Image(num_channels=1, positions=where, stem=partial(StandardizedStem, dim=32))
    encoder = pc.Encoder(
        image.dim,
        num_latents=32,
        dim=dim,
        num_reads=2,
        depth=3,
        num_heads=4,
        share=pc.sharing.all_,
        cross_attention=partial(pc.CrossAttend, num_heads=4, attention=partial(pc.MultiHeadAttention, qk_dim=dim)),
        latent_transformer=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2))),
    )
    return pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=1))
