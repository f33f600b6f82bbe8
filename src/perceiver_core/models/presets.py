"""Presets: functions that build models with the sizes of published models.

`create` builds the same models by name. With `num_classes=0`, a classifier returns features instead of logits: the
mean of the latents.

Example:
    >>> presets = pc.models.presets
    >>> with torch.device("meta"):
    ...     models = [presets.imagenet(), presets.audioset(), presets.modelnet40(), presets.perceiver_ar(256)]
    ...     models += [presets.idefics2_resampler(), presets.hip16()]
    >>> [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    [44912254, 46242333, 44772202, 164279552, 743219200, 100743968]
"""

from __future__ import annotations

from functools import partial

from torch import nn

from perceiver_core import adapters, checks, heads, positions
from perceiver_core.argument_errors import checked
from perceiver_core.blocks import (
    MLP,
    CrossAttend,
    JointAttend,
    LatentTransformer,
    Level,
    MultiHeadAttention,
    SelfAttend,
    SquaredReLU,
    SwiGLU,
)
from perceiver_core.encoder import Encoder
from perceiver_core.models.hierarchical import HierarchicalPerceiver
from perceiver_core.models.perceiver import Perceiver
from perceiver_core.models.perceiver_ar import PerceiverAR
from perceiver_core.models.resampler import Resampler


@checked
def imagenet(num_classes: int = 1000) -> Perceiver:
    """Return the ImageNet Perceiver: 224 x 224 pixels, 64 Fourier bands, 512 latents, 8 reads (cross-attentions).

    Each read is followed by 6 self-attention blocks. The paper reports 44.9 million parameters.

    Reference: Jaegle et al. 2021 (Perceiver), section 4.1.
    """
    fourier = positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
    return _perceiver(adapters.Image(num_channels=3, positions=fourier), num_classes, num_reads=8)


@checked
def small(num_classes: int = 1000) -> Perceiver:
    """Return a small Perceiver for images of 224 x 224 pixels (23 million parameters): 196 latents, 12 blocks.

    The latent transformer has the size of DeiT-S (width 384, 6 heads, MLPs of four times the width), with one latent
    per patch of DeiT-S. A single read (cross-attention) reads the pixels, with the position encoding of `imagenet`. The
    paper has no model of this size.

    Reference: Touvron et al. 2021 (DeiT), table 1.
    """
    return _of_vit(num_classes, dim=384, num_heads=6)


@checked
def base(num_classes: int = 1000) -> Perceiver:
    """Return a Perceiver of the size of DeiT-B (92 million parameters): width 768, 12 heads; see `small`.

    Reference: Touvron et al. 2021 (DeiT), table 1.
    """
    return _of_vit(num_classes, dim=768, num_heads=12)


@checked
def audioset(num_classes: int = 527) -> Perceiver:
    """Return the AudioSet Perceiver: 1.28 s of raw audio at 48 kHz (61,440 samples in 480 patches), 192 Fourier bands.

    No code was published for this model. Sizes that the paper does not state are the same as in `imagenet`.

    Reference: Jaegle et al. 2021 (Perceiver), section 4.2.
    """
    fourier = positions.Fourier(num_axes=1, num_bands=192, max_resolution=480)
    return _perceiver(adapters.Audio(patch_size=128, positions=fourier), num_classes, num_reads=8)


@checked
def modelnet40(num_classes: int = 40) -> Perceiver:
    """Return the ModelNet40 Perceiver: point clouds of about 2,000 points, 64 Fourier bands, 2 cross-attentions.

    The Fourier features have `max_resolution=1120`.

    Reference: Jaegle et al. 2021 (Perceiver), section 4.3.
    """
    fourier = positions.Fourier(num_axes=3, num_bands=64, max_resolution=1120)
    return _perceiver(adapters.PointCloud(positions=fourier), num_classes, num_reads=2)


@checked
def perceiver_ar(
    vocab_size: int, *, context_length: int = 8192, num_latents: int = 1024, depth: int = 12
) -> PerceiverAR:
    """Return Perceiver AR with the default configuration of its published code.

    The model has 1,024 channels, 16 attention heads with rotary embeddings on 32 of their 64 channels, MLPs with
    squared ReLU and a widening factor of 4, and an output layer that is not tied to the embedding. Unlike the published
    code, it does not apply a linear layer to the embeddings that become latents. The published values of the arguments
    depend on the dataset.

    Args:
        vocab_size: Number of token ids.
        context_length: Base of the rotary embeddings. The published code sets this base to the maximum sequence
            length. Longer inputs are also accepted.
        num_latents: Maximum number of latents.
        depth: Number of self-attention blocks.

    Reference: google-research/perceiver-ar, perceiver_ar/experiment.py, `get_config`.
    """
    checks.positive(context_length=context_length)
    rotary = positions.Rotary(32, base=context_length, exponents=positions.inclusive_exponents)
    attention = partial(MultiHeadAttention, rotary=rotary)
    mlp = partial(MLP, widening_factor=4, activation=SquaredReLU())
    block = partial(SelfAttend, attention=attention, mlp=mlp, dropout=0.1)
    return PerceiverAR(
        adapters.TokenEmbedding(vocab_size, dim=1024),
        num_latents=num_latents,
        depth=depth,
        num_heads=16,
        cross_attention=partial(CrossAttend, num_heads=16, attention=attention, mlp=mlp, dropout=0.1),
        latent_transformer=partial(LatentTransformer, block=block),
        head=heads.Logits,
    )


@checked
def idefics2_resampler(input_dim: int = 1152, dim: int = 4096, *, hidden_dim: int = 14_336) -> Resampler:
    """Return the connector of Idefics2-8b: a gated MLP to the width of the text model, then a 3-layer resampler.

    Args:
        input_dim: Width of the vision encoder's features.
        dim: Width of the text model.
        hidden_dim: Hidden width of the gated MLP. In Idefics2, it equals the hidden width of the text model's MLPs.

    Reference: Laurençon et al. 2024 (Idefics2), with the sizes of `Idefics2Config` in transformers.
    """
    norm, gated = partial(nn.RMSNorm, eps=1e-6), partial(MLP, activation=SwiGLU(), bias=False)
    attention = partial(MultiHeadAttention, qk_dim=16 * 96, num_kv_heads=4, bias=False, out_bias=False)
    return Resampler(
        input_dim,
        num_latents=64,
        dim=dim,
        depth=3,
        num_heads=16,
        projection=partial(gated, hidden_dim=hidden_dim),
        block=partial(JointAttend, norm=norm, attention=attention, mlp=partial(gated, widening_factor=4)),
        norm=norm,
    )


@checked
def hip16(input_dim: int = 3, num_tokens: int = 224 * 224) -> HierarchicalPerceiver:
    """Return HiP-16: levels with 16, 4, 1 and 1 groups, then decoder levels with 1, 4 and 16 groups.

    Most of the depth is in the third level, which has 18 self-attention blocks over 256 latents.

    Args:
        input_dim: Width of the input tokens.
        num_tokens: Number of input tokens, each with a learned position.

    Reference: Carreira et al. 2022 (Hierarchical Perceiver); deepmind/hierarchical_perceiver, `perceiver.py`,
    `VARIANTS`.
    """
    levels = [(16, 128, 128, 2, 4), (4, 256, 256, 2, 8), (1, 256, 512, 18, 16), (1, 64, 1024, 2, 32)]
    decoder_levels = [(1, 256, 512, 1, 16), (4, 256, 256, 1, 8), (16, 128, 128, 1, 4)]
    return _hierarchical(input_dim, num_tokens, levels, decoder_levels, position_dim=32)


@checked
def hip256(input_dim: int = 3, num_tokens: int = 224 * 224) -> HierarchicalPerceiver:
    """Return HiP-256: levels with 256, 64, 16, 4, 1 and 1 groups, then decoder levels back to 256 groups.

    See `hip16` for the arguments and the reference.
    """
    levels = [(256, 32, 64, 1, 1), (64, 64, 96, 1, 2), (16, 128, 128, 2, 4)]
    levels += [(4, 256, 256, 2, 8), (1, 256, 512, 18, 16), (1, 64, 1024, 2, 32)]
    decoder_levels = [(1, 256, 256, 1, 16), (4, 256, 128, 1, 8), (16, 128, 64, 1, 4), (64, 64, 32, 1, 2)]
    decoder_levels += [(256, 32, 16, 1, 1)]
    return _hierarchical(input_dim, num_tokens, levels, decoder_levels, position_dim=16)


@checked
def hip_mini(input_dim: int = 3, num_tokens: int = 224 * 224) -> HierarchicalPerceiver:
    """Return HiP-Mini: levels with 16 and 1 groups, then a decoder level with 16 groups.

    See `hip16` for the arguments and the reference.
    """
    levels = [(16, 128, 128, 2, 4), (1, 64, 1024, 1, 32)]
    return _hierarchical(input_dim, num_tokens, levels, [(16, 128, 128, 1, 4)], position_dim=32)


def _hierarchical(
    input_dim: int,
    num_tokens: int,
    levels: list[tuple[int, int, int, int, int]],
    decoder_levels: list[tuple[int, int, int, int, int]],
    *,
    position_dim: int,
) -> HierarchicalPerceiver:
    """Build a Hierarchical Perceiver. Each level is (num_groups, num_latents, dim, depth, num_heads)."""
    checks.positive(num_tokens=num_tokens)
    down, up = (
        [
            Level(groups, num_latents=latents, dim=dim, depth=depth, num_heads=heads)
            for groups, latents, dim, depth, heads in each
        ]
        for each in (levels, decoder_levels)
    )
    grid = positions.LearnedGrid((num_tokens,), dim=position_dim)
    return HierarchicalPerceiver(input_dim, levels=down, positions=grid, decoder_levels=up)


def _perceiver(
    adapter: adapters.Image | adapters.Audio | adapters.PointCloud, num_classes: int, *, num_reads: int
) -> Perceiver:
    encoder = Encoder(adapter.dim, num_latents=512, dim=1024, num_reads=num_reads, depth=6, num_heads=8)
    return Perceiver(adapter, encoder, _head(encoder.dim, num_classes))


def _of_vit(num_classes: int, *, dim: int, num_heads: int) -> Perceiver:
    fourier = positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
    adapter, mlp = adapters.Image(num_channels=3, positions=fourier), partial(MLP, widening_factor=4)
    encoder = Encoder(
        adapter.dim,
        num_latents=14 * 14,
        dim=dim,
        depth=12,
        num_heads=num_heads,
        cross_attention=partial(CrossAttend, mlp=mlp),
        latent_transformer=partial(LatentTransformer, block=partial(SelfAttend, mlp=mlp)),
    )
    return Perceiver(adapter, encoder, _head(encoder.dim, num_classes))


def _head(dim: int, num_classes: int) -> nn.Module:
    """Return the paper's head, which has no norm. If `num_classes` is 0, it returns the mean of the latents."""
    mean = heads.LatentMean(dim, norm=nn.Identity)
    return mean if num_classes == 0 else heads.Classification(dim, num_classes, norm=nn.Identity)
