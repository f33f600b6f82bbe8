"""Perceiver models for PyTorch, built from composable parts.

    adapter: raw input -> tokens      encoder: tokens -> latents      head: latents -> output

Example:
    >>> import torch
    >>> import perceiver_core as pc
    >>> fourier = pc.positions.Fourier(num_axes=1, num_bands=8, max_resolution=64)
    >>> audio = pc.adapters.Audio(patch_size=16, positions=fourier)
    >>> encoder = pc.Encoder(audio.dim, num_latents=8, dim=32, depth=2, num_heads=4)
    >>> model = pc.Perceiver(audio, encoder, pc.heads.Regression(encoder.dim, num_outputs=1))
    >>> model(torch.randn(3, 999)).shape
    torch.Size([3, 1])
"""

from perceiver_core import (
    adapters,
    checkpoints,
    heads,
    interop,
    kernels,
    losses,
    masks,
    models,
    positions,
    queries,
    reads,
    registry,
    sharing,
)
from perceiver_core.activation_checkpointing import checkpoint_activations
from perceiver_core.blocks import (
    GEGLU,
    MLP,
    AttentionResidual,
    CrossAttend,
    DropLatents,
    GroupedRead,
    GRUGate,
    JointAttend,
    LatentTransformer,
    Level,
    MultiHeadAttention,
    SelfAttend,
    SquaredReLU,
    SwiGLU,
    TanhGate,
)
from perceiver_core.checkpoints import load, save
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.inspection import visualize
from perceiver_core.inspection.explain import ReadExplanation, ReadExplanations, explain_reads
from perceiver_core.inspection.summary import ModelSummary, PartSummary, summary
from perceiver_core.models import HierarchicalPerceiver, Perceiver, PerceiverAR, PerceiverIO, Resampler, generate
from perceiver_core.named_models import create, list_models
from perceiver_core.parameter_groups import parameter_groups
from perceiver_core.reads import KeysValues
from perceiver_core.registry import register
from perceiver_core.tensor_parallel import tensor_parallel_plan
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
    "GRUGate",
    "GroupedRead",
    "HierarchicalPerceiver",
    "JointAttend",
    "KeysValues",
    "LatentTransformer",
    "Level",
    "ModelSummary",
    "MultiHeadAttention",
    "PartSummary",
    "Perceiver",
    "PerceiverAR",
    "PerceiverIO",
    "ReadExplanation",
    "ReadExplanations",
    "Resampler",
    "SelfAttend",
    "SquaredReLU",
    "SwiGLU",
    "TanhGate",
    "Tokens",
    "adapters",
    "checkpoint_activations",
    "checkpoints",
    "create",
    "explain_reads",
    "generate",
    "heads",
    "interop",
    "kernels",
    "list_models",
    "load",
    "losses",
    "masks",
    "models",
    "parameter_groups",
    "positions",
    "queries",
    "reads",
    "register",
    "registry",
    "save",
    "sharing",
    "summary",
    "tensor_parallel_plan",
    "visualize",
]
