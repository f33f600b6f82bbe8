"""Random encoders: attention, MLPs, gates, latent transformers, reads and weight sharing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import kernels, positions, reads, sharing
from tests.robustness.composition_draws import Draw

KERNELS = (kernels.fastest, kernels.sdpa, kernels.reference, kernels.chunked, kernels.inverted, kernels.add_zero_attn)
CANDIDATES = (reads.Dense(), reads.Factored(), reads.Structured())


def draw_plan(draw: Draw, steps: int) -> Any:
    """Draw a sharing scheme, or a random plan for this number of steps."""
    if draw.flag(0.8):
        return draw.choice(True, False, sharing.all_, sharing.none, sharing.all_but_first, sharing.paper)
    indices = [tuple(accumulate((draw.choice(0, 0, 1) for _ in range(steps - 1)), initial=0)) for _ in range(2)]
    draw.used.add("perceiver_core.sharing.Sharing")
    plan = sharing.Sharing(*indices)
    return lambda _: plan


def draw_attention(draw: Draw, num_heads: int, *, causal: bool = False, rotary: Any = None) -> Any:
    """Draw a factory of attention with this number of heads. With rotary embeddings, heads have an even width."""
    options: dict[str, Any] = {} if rotary is None else {"rotary": rotary}
    options["qk_dim"] = num_heads * draw.size(1, 3) * (1 if rotary is None else 2)
    if draw.flag():
        options["v_dim"] = num_heads * draw.size(1, 4)
    if draw.flag(0.3):
        options["num_kv_heads"] = draw.choice(*(n for n in range(1, num_heads + 1) if num_heads % n == 0))
    if draw.flag(0.2):
        options["qk_norm"] = draw.choice(rms_norm(draw), nn.LayerNorm)
    if draw.flag(0.3):
        options["kernel"] = draw_kernel(draw, causal=causal)
    if draw.flag(0.1) and options.get("kernel", kernels.fastest) in (kernels.fastest, kernels.sdpa, kernels.reference):
        options["dropout"] = 0.3
    for name in ("bias", "out_bias"):
        if draw.flag(0.15):
            options[name] = False
    return draw.later(pc.MultiHeadAttention, **options)


def draw_kernel(draw: Draw, *, causal: bool) -> Any:
    """Draw a kernel. `inverted` is excluded if it has to be causal: its queries depend on later queries."""
    kernel = draw.choice(*(kernel for kernel in KERNELS if not causal or kernel is not kernels.inverted))
    draw.used.add(f"{kernel.__module__}.{kernel.__qualname__}")
    if kernel is kernels.chunked:
        return draw.later(kernel, chunk_size=draw.size(1, 4))
    if kernel is kernels.add_zero_attn and draw.flag():
        return draw.later(kernel, kernel=draw.choice(kernels.sdpa, kernels.reference))
    return kernel


def draw_rotary(draw: Draw, *, from_end: bool) -> Any:
    """Draw a rotary embedding for heads of an even width. If `from_end` is False, it is drawn as well."""
    exponents = draw.choice(positions.half_open_exponents, positions.inclusive_exponents)
    draw.used.add(f"{exponents.__module__}.{exponents.__qualname__}")
    dim, base, from_end = draw.choice(None, 2), draw.choice(10.0, 10_000), from_end or draw.flag()
    rotary = draw.make(positions.Rotary, dim, base=base, from_end=from_end, exponents=exponents)
    return draw.make(sharing.Shared, rotary) if draw.flag(0.2) else rotary


def draw_mlp(draw: Draw) -> Any:
    options: dict[str, Any] = {}
    if draw.flag(0.4):
        options["widening_factor"] = draw.size(1, 3)
    if draw.flag(0.2):
        options["hidden_dim"] = draw.width(5)
    if draw.flag(0.6):
        options["activation"] = draw.make(
            draw.choice(pc.GEGLU, pc.SwiGLU, pc.SquaredReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ReLU)
        )
    if draw.flag(0.15):
        options["bias"] = False
    return draw.later(pc.MLP, **options)


def draw_norm(draw: Draw) -> Any:
    return draw.choice(nn.LayerNorm, rms_norm(draw), nn.Identity, partial(nn.LayerNorm, eps=1e-3))


def rms_norm(draw: Draw) -> Any:
    """Return a factory of an RMSNorm with a fixed eps. The default depends on the dtype, which would affect results."""
    return nn.RMSNorm if draw.dtype == torch.float64 else partial(nn.RMSNorm, eps=1e-3)


def draw_gate(draw: Draw) -> Any:
    gate = draw.choice(True, True, False, pc.GRUGate, pc.TanhGate)
    if not isinstance(gate, bool):
        draw.used.add(f"{gate.__module__}.{gate.__qualname__}")
    return gate


def block_options(draw: Draw) -> dict[str, Any]:
    """Draw the options of all blocks: MLP, norm and dropout."""
    options: dict[str, Any] = {}
    if draw.flag():
        options["mlp"] = draw_mlp(draw)
    if draw.flag(0.3):  # not nn.Identity: without norms, values may grow beyond all bounds
        options["norm"] = draw.choice(nn.LayerNorm, rms_norm(draw), partial(nn.LayerNorm, eps=1e-3))
    if draw.flag(0.15):
        options["dropout"] = 0.2
    return options


def gate_options(draw: Draw) -> dict[str, Any]:
    return {name: draw_gate(draw) for name in ("residual", "mlp_residual") if draw.flag(0.25)}


def draw_cross_attention(draw: Draw, *, rotary: bool = False, decoder: bool = False, causal: bool = False) -> Any:
    """Draw a factory of cross-attention. In a decoder, the number of heads is an argument of the decoder."""
    heads = draw.size(1, 3)
    options = block_options(draw) | gate_options(draw)
    if draw.flag(0.1):
        options["mlp"] = None
    if draw.flag(0.05):
        options["norm"] = nn.Identity
    embedding = draw_rotary(draw, from_end=causal) if rotary else None
    options["attention"] = draw_attention(draw, heads, causal=causal, rotary=embedding)
    if draw.flag(0.2) and not decoder:
        options["strategy"] = reads.Auto([*draw.random.sample(CANDIDATES[1:], 1), CANDIDATES[0]])
    if decoder:
        return heads, draw.later(pc.CrossAttend, **options)
    return draw.later(pc.CrossAttend, num_heads=heads, **options)


def draw_block(draw: Draw, heads: int, *, rotary: bool = False, causal: bool = False) -> Any:
    """Draw a factory of self-attention blocks with this number of heads."""
    embedding = draw_rotary(draw, from_end=False) if rotary else None
    attention = draw_attention(draw, heads, causal=causal, rotary=embedding)
    return draw.later(pc.SelfAttend, attention=attention, **block_options(draw), **gate_options(draw))


def draw_latent_transformer(draw: Draw, heads: int, *, rotary: bool = False, causal: bool = False) -> Any:
    options: dict[str, Any] = {"block": draw_block(draw, heads, rotary=rotary, causal=causal)}
    if draw.flag(0.2):
        options["num_repeats"] = 2
    if draw.flag(0.2):
        options["aggregate"] = draw.later(pc.AttentionResidual, rank=draw.size(1, 3))
    return draw.later(pc.LatentTransformer, **options)


def draw_encoder(draw: Draw, input_dim: int | Sequence[int]) -> Any:
    """Draw an encoder for tokens of these widths."""
    num_reads, heads = draw.size(1, 4), draw.size(1, 3)
    share = draw_plan(draw, num_reads)
    if not isinstance(input_dim, int):
        num_reads, share = len(input_dim), False
        if len(set(input_dim)) == 1:
            share = draw_plan(draw, num_reads)
    if not isinstance(share, bool):
        draw.used.add(f"perceiver_core.sharing.{getattr(share, '__name__', '')}")
    options: dict[str, Any] = {}
    if draw.flag(0.2):
        options["latent_dropout"] = draw.make(pc.DropLatents, draw.choice(0.0, 0.4, 0.9))
    if draw.flag(0.2):
        options["aggregate"] = draw.later(pc.AttentionResidual, rank=draw.size(1, 3))
    return draw.make(
        pc.Encoder,
        input_dim,
        num_latents=draw.size(1, 5),
        dim=draw.width(8),
        num_reads=num_reads,
        depth=draw.size(0, 2),
        num_heads=heads,
        share=share,
        cross_attention=draw_cross_attention(draw, rotary=draw.flag(0.1)),
        latent_transformer=draw_latent_transformer(draw, heads),
        **options,
    )
