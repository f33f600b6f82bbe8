"""Perceivers for PyTorch: parts that compose.

    adapter: raw input -> tokens      encoder: tokens -> latents      head: latents -> answer

Example:
    >>> import torch
    >>> import perceiver_core as pc
    >>> audio = pc.adapters.Audio(patch=16, positions=pc.positions.Fourier(axes=1, bands=8, max_resolution=64))
    >>> encoder = pc.Encoder(audio.dim, latents=8, dim=32, depth=2, heads=4)
    >>> model = pc.Perceiver(audio, encoder, pc.heads.Regress(encoder.dim, values=1))
    >>> model(torch.randn(3, 999)).shape
    torch.Size([3, 1])
"""

from perceiver_core import (
    adapters,
    attention,
    checkpoints,
    heads,
    losses,
    models,
    positions,
    queries,
    registry,
    sharing,
    visualize,
)
from perceiver_core.blocks import (
    GEGLU,
    MLP,
    AttentionResidual,
    CrossAttend,
    DropLatents,
    GroupedRead,
    GRUGate,
    JointAttend,
    KeysValues,
    LatentTransformer,
    Level,
    MultiHeadAttention,
    SelfAttend,
    SquaredReLU,
    SwiGLU,
    TanhGate,
    paths,
)
from perceiver_core.checkpoints import load, save
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.explain import Explanation, explain
from perceiver_core.models import HierarchicalPerceiver, Perceiver, PerceiverAR, PerceiverIO, Resampler, generate
from perceiver_core.recompute import recompute_activations
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "GEGLU",
    "MLP",
    "AttentionResidual",
    "CrossAttend",
    "Decoder",
    "DropLatents",
    "Encoder",
    "Explanation",
    "GRUGate",
    "GroupedRead",
    "HierarchicalPerceiver",
    "JointAttend",
    "KeysValues",
    "LatentTransformer",
    "Level",
    "MultiHeadAttention",
    "Perceiver",
    "PerceiverAR",
    "PerceiverIO",
    "Resampler",
    "SelfAttend",
    "SquaredReLU",
    "SwiGLU",
    "TanhGate",
    "Tokens",
    "adapters",
    "attention",
    "checkpoints",
    "explain",
    "generate",
    "heads",
    "load",
    "losses",
    "models",
    "paths",
    "positions",
    "queries",
    "recompute_activations",
    "register",
    "registry",
    "save",
    "sharing",
    "visualize",
]
