"""The sizes of the papers, by name.

Each is a short call to the parts. Parameter counts are tested.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from perceiver_core import adapters, heads, positions
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


def imagenet(num_classes: int = 1000) -> Perceiver:
    """The ImageNet Perceiver: 224 x 224 pixels with 64 Fourier bands, 512 latents, 8 reads of 6 self-attends.

    The paper states 44.9 million parameters.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     model = presets.imagenet()
        >>> sum(p.numel() for p in model.parameters())
        44912254

    Reference: Jaegle et al. 2021 (Perceiver), section 4.1.
    """
    where = positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
    return _perceiver(adapters.Image(num_channels=3, positions=where), num_classes, reads=8)


def audioset(num_classes: int = 527) -> Perceiver:
    """Raw sound: 1.28 s at 48 kHz, 61,440 samples in 480 patches of 128, with 192 Fourier bands.

    No code was published for this model; where the text gives no number, it has those of `imagenet`.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     model = presets.audioset()
        >>> model.adapter.dim, sum(p.numel() for p in model.parameters())
        (513, 46242333)

    Reference: Jaegle et al. 2021 (Perceiver), section 4.2.
    """
    where = positions.Fourier(num_axes=1, num_bands=192, max_resolution=480)
    return _perceiver(adapters.Audio(patch_size=128, positions=where), num_classes, reads=8)


def modelnet40(num_classes: int = 40) -> Perceiver:
    """Point clouds: about 2,000 points, 64 Fourier bands up to resolution 1,120, 2 reads of 6 self-attends.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     model = presets.modelnet40()
        >>> model.adapter.dim, sum(p.numel() for p in model.parameters())
        (387, 44772202)

    Reference: Jaegle et al. 2021 (Perceiver), section 4.3.
    """
    where = positions.Fourier(num_axes=3, num_bands=64, max_resolution=1120)
    return _perceiver(adapters.PointCloud(positions=where), num_classes, reads=2)


def perceiver_ar(vocab_size: int, *, context_length: int = 8192, num_latents: int = 1024, depth: int = 12) -> PerceiverAR:
    """Perceiver AR as its published code is set up, but for the sizes that each data set has of its own.

    1,024 channels, 16 heads of 64 channels everywhere, of which 32 are turned, MLPs four times as wide with squared
    ReLUs, logits of their own. The latents are the embeddings, which in that code go through a linear layer first.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     model = presets.perceiver_ar(256)
        >>> sum(p.numel() for p in model.parameters())
        164279552

    Reference: google-research/perceiver-ar, perceiver_ar/experiment.py, `get_config`.
    """
    turned = positions.Rotary(32, base=context_length, exponents=positions.inclusive_exponents)
    attention = partial(MultiHeadAttention, rotary=turned)
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


def idefics2_resampler(input_dim: int = 1152, dim: int = 4096, *, hidden_dim: int = 14_336) -> Resampler:
    """The connector of Idefics2-8b: a gated projection to the width of the text, 64 latents, 3 layers.

    Args:
        input_dim: the width of the vision encoder.
        dim: the width of the text model.
        hidden_dim: the width inside the projection, which is that inside the text model's MLPs.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     resampler = presets.idefics2_resampler()
        >>> sum(p.numel() for p in resampler.parameters())
        743219200

    Reference: Laurençon et al. 2024 (Idefics2); the sizes are those of transformers' `Idefics2Config`.
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


def hip16(input_dim: int = 3, num_tokens: int = 224 * 224) -> HierarchicalPerceiver:
    """HiP-16: 16, 4 and 1 groups, 18 self-attends over 256 latents in the middle, and back to 16 groups.

    Example:
        >>> import torch
        >>> from perceiver_core.models import presets
        >>> with torch.device("meta"):
        ...     model = presets.hip16()
        >>> model(torch.empty(1, 50176, 3, device="meta")).shape
        torch.Size([1, 2048, 128])

    Reference: Carreira et al. 2022 (Hierarchical Perceiver); deepmind/hierarchical_perceiver, `perceiver.py`,
    `VARIANTS`.
    """
    levels = [
        Level(16, num_latents=128, dim=128, depth=2, num_heads=4),
        Level(4, num_latents=256, dim=256, depth=2, num_heads=8),
        Level(1, num_latents=256, dim=512, depth=18, num_heads=16),
        Level(1, num_latents=64, dim=1024, depth=2, num_heads=32),
    ]
    decode = [
        Level(1, num_latents=256, dim=512, depth=1, num_heads=16),
        Level(4, num_latents=256, dim=256, depth=1, num_heads=8),
        Level(16, num_latents=128, dim=128, depth=1, num_heads=4),
    ]
    where = positions.LearnedGrid((num_tokens,), dim=32)
    return HierarchicalPerceiver(input_dim, levels=levels, positions=where, decode=decode)


def _perceiver(adapter: adapters.Image | adapters.Audio | adapters.PointCloud, classes: int, *, reads: int) -> Perceiver:
    encoder = Encoder(adapter.dim, num_latents=512, dim=1024, num_reads=reads, depth=6, num_heads=8)
    return Perceiver(adapter, encoder, heads.Classification(encoder.dim, classes, norm=nn.Identity))
