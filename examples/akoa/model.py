"""The Perceiver that classifies the side of a knee, right or left."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

import perceiver_core as pc


@pc.register
class StandardizedStem(nn.Module):
    """Convolutional stem that first standardizes every image, so that the gain of the scanner does not matter.

    Args:
        channels: Number of channels of the images.
        dim: Number of channels of the tokens.

    Example:
        >>> import torch
        >>> StandardizedStem(1, dim=8)(torch.rand(2, 1, 60, 44)).shape
        torch.Size([2, 8, 15, 11])
    """

    def __init__(self, channels: int, *, dim: int) -> None:
        super().__init__()
        self.stem = pc.adapters.ConvStem(channels, dim=dim)
        self.dim = dim

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """Standardize images and apply the convolutional stem."""
        centered = images - images.mean((1, 2, 3), keepdim=True)
        variance = centered.square().mean((1, 2, 3), keepdim=True)
        return self.stem(centered / (variance + 0.05**2).sqrt())  # 0.05, so that a uniform image stays uniform


def knee_model(size: tuple[int, int] = (64, 64)) -> pc.Perceiver:
    """Build the model from gray images `b 1 h w` in [-1, 1] to one logit each, positive for a right knee.

    A token is the output of a convolution of 7 x 7 and pooling for a patch of 4 x 4 standardized pixels, with Fourier
    features of its position. 32 latents read the tokens twice with the same weights, and each read is followed by
    self-attention.

    Args:
        size: Height and width of the training images in pixels, which set the highest frequency of the positions.

    Example:
        >>> import torch
        >>> knee_model((64, 64))(torch.rand(2, 1, 64, 64)).shape
        torch.Size([2, 1])
    """
    dim, grid = 64, tuple(-(-side // 4) for side in size)
    positions = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=grid)
    image = pc.adapters.Image(num_channels=1, positions=positions, stem=partial(StandardizedStem, dim=32))
    encoder = pc.Encoder(
        image.dim,
        num_latents=32,
        dim=dim,
        num_reads=2,
        depth=3,
        num_heads=4,
        share=pc.sharing.all_,
        cross_attention=partial(pc.CrossAttend, num_heads=4, attention=partial(pc.MultiHeadAttention, qk_dim=dim)),
        latent_transformer=partial(
            pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=partial(pc.MLP, widening_factor=2))
        ),
    )
    return pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=1))
