"""Building blocks: attention, MLP, cross-attention and self-attention blocks, latent transformer."""

from perceiver_core.blocks.attention_residual import AttentionResidual
from perceiver_core.blocks.cross_attend import CrossAttend
from perceiver_core.blocks.drop_latents import DropLatents
from perceiver_core.blocks.gates import GRUGate, TanhGate
from perceiver_core.blocks.grouped_read import GroupedRead, Level
from perceiver_core.blocks.joint_attend import JointAttend
from perceiver_core.blocks.latent_transformer import LatentTransformer
from perceiver_core.blocks.mlp import GEGLU, MLP, SquaredReLU, SwiGLU
from perceiver_core.blocks.multi_head_attention import MultiHeadAttention
from perceiver_core.blocks.self_attend import SelfAttend

__all__ = [
    "GEGLU",
    "MLP",
    "AttentionResidual",
    "CrossAttend",
    "DropLatents",
    "GRUGate",
    "GroupedRead",
    "JointAttend",
    "LatentTransformer",
    "Level",
    "MultiHeadAttention",
    "SelfAttend",
    "SquaredReLU",
    "SwiGLU",
    "TanhGate",
]
