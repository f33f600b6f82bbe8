"""Small models that together contain every part with weights, each with its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import adapters, heads, positions, queries, reads
from perceiver_core.models import AllFrames, EachFrame, HierarchicalAutoencoder

Model = tuple[nn.Module, Any]
DIM = 12
BLOCK = partial(
    pc.SelfAttend, attention=partial(pc.MultiHeadAttention, qk_norm=nn.RMSNorm, num_kv_heads=1), residual=pc.GRUGate
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def encoder(input_dim: int, **options: Any) -> pc.Encoder:
    return pc.Encoder(
        input_dim, **{"num_latents": 5, "dim": DIM, "num_reads": 3, "depth": 1, "num_heads": 2, **options}
    )


def image() -> Model:
    where = positions.LearnedGrid((4, 5), dim=6)
    adapter = adapters.Image(3, positions=where, stem=partial(adapters.Patches, patch_size=2))
    return pc.Perceiver(adapter, encoder(adapter.dim), heads.Classification(DIM, 3)), drawn(2, 3, 8, 10)


def gated() -> Model:
    adapter = adapters.Image(
        3,
        positions=positions.Projected(positions.LearnedGrid((2, 3), dim=4), dim=6),
        stem=partial(adapters.ConvStem, dim=4),
    )
    read = partial(
        pc.CrossAttend, residual=pc.TanhGate, mlp_residual=pc.GRUGate, mlp=partial(pc.MLP, widening_factor=2)
    )
    transformer = partial(pc.LatentTransformer, block=BLOCK, aggregate=pc.AttentionResidual)
    options = {"cross_attention": read, "latent_transformer": transformer, "aggregate": pc.AttentionResidual}
    return pc.Perceiver(adapter, encoder(adapter.dim, **options), heads.Regression(DIM)), drawn(2, 3, 17, 23)


def padded_stem() -> Model:
    stem = partial(adapters.SymmetricPadConvStem, dim=4)
    adapter = adapters.Image(3, positions=positions.LearnedGrid((4, 5), dim=6), stem=stem)
    return pc.Perceiver(adapter, encoder(adapter.dim), heads.LatentMean(DIM)), drawn(2, 3, 17, 23)


def projected() -> Model:
    adapter = adapters.Image(3, positions=positions.LearnedGrid((7, 5), dim=6), stem=partial(adapters.Project, dim=4))
    return pc.Perceiver(adapter, encoder(adapter.dim, share=False), heads.Identity()), drawn(2, 3, 7, 5)


def inputs_per_read() -> Model:
    audio = [adapters.Audio(patch, positions=positions.LearnedGrid((7,), dim=9 - patch)) for patch in (4, 3)]
    adapter = adapters.PerRead(audio)
    made = encoder(adapter.dim, num_reads=2, share=pc.sharing.all_)
    return pc.Perceiver(adapter, made, heads.Identity()), (drawn(2, 28), drawn(2, 20))


def multimodal() -> Model:
    sources = {
        "image": adapters.Image(3, positions=positions.LearnedGrid((3, 5), dim=6)),
        "table": adapters.Table(2, (3,), dim=7),
        "label": adapters.OneHotLabel(4),
    }
    adapter = adapters.Multimodal(sources, token_mask_rate={"label": 1.0})
    asked = {"image": queries.Grid(None, positions.LearnedGrid((3, 5), dim=6)), "label": queries.Learned(1, dim=5)}
    query = queries.Multimodal(asked)
    decoder = pc.Decoder(DIM, query_dim=query.dim, out_dim=6, chunk_size=4)
    each = {
        "image": heads.Grid(None, head=heads.Linear(6, 3)),
        "label": heads.SingleQuery(heads.Linear(6, 4)),
    }
    inputs = {
        "image": drawn(2, 3, 3, 5),
        "table": {"numbers": drawn(2, 2), "categories": torch.tensor([[2], [0]])},
        "label": torch.tensor([3, 0]),
    }
    return pc.PerceiverIO(adapter, encoder(adapter.dim), query, decoder, heads.Multimodal(each)), inputs


def flow() -> Model:
    adapter = adapters.FramePair(positions=positions.LearnedGrid((4, 6), dim=6), dim=5)
    query = queries.FromInputs(adapter.dim)
    decoder = pc.Decoder(DIM, query_dim=query.dim, out_dim=7)
    head = heads.Unpatchify(7, grid=(4, 6), patch_size=(1, 1), num_channels=2)
    return pc.PerceiverIO(adapter, encoder(adapter.dim), query, decoder, head), drawn(2, 2, 3, 4, 6)


def sound() -> Model:
    adapter = adapters.Audio(4, positions=positions.LearnedGrid((7,), dim=6))
    query = queries.Learned(7, dim=6)
    decoder = pc.Decoder(DIM, query_dim=6, out_dim=5)
    return pc.PerceiverIO(adapter, encoder(adapter.dim), query, decoder, heads.Waveform(5, 4)), drawn(2, 28)


def points() -> Model:
    adapter = adapters.PointCloud(2, positions=positions.Fourier(num_axes=3, num_bands=2, max_resolution=7))
    where = positions.Fourier(num_axes=3, num_bands=2, max_resolution=7)
    model = pc.PerceiverIO(
        adapter,
        encoder(adapter.dim),
        queries.Learned(5, dim=7),
        pc.Decoder(DIM, query_dim=7),
        heads.Linear(7, where.dim),
    )
    return model, drawn(2, 11, 5)


def text() -> Model:
    embedding = adapters.TokenEmbedding(vocab_size=11, dim=DIM, positions=positions.LearnedEmbedding(13, dim=DIM))
    return pc.PerceiverAR(embedding, num_latents=5, depth=2, num_heads=2), torch.arange(26).reshape(2, 13) % 11


def byte_text() -> Model:
    model = pc.PerceiverAR(adapters.Bytes(DIM), num_latents=5, depth=1, num_heads=2, head=heads.Logits)
    return model, torch.arange(26).reshape(2, 13) + 97


def frames() -> Model:
    resampler = pc.Resampler(10, num_latents=5, dim=DIM, depth=2, num_heads=2)
    return EachFrame(resampler, frame_positions=positions.LearnedEmbedding(5, dim=10)), drawn(2, 3, 7, 10)


def all_frames() -> Model:
    resampler = pc.Resampler(DIM, num_latents=5, depth=2, num_heads=2)
    return AllFrames(resampler, frame_positions=positions.LearnedGrid((3,), dim=DIM)), drawn(2, 3, 7, DIM)


def hierarchical() -> Model:
    levels = [
        pc.Level(2, num_latents=3, dim=DIM, depth=1, num_heads=2),
        pc.Level(1, num_latents=5, dim=DIM, num_heads=2),
    ]
    perceiver = pc.HierarchicalPerceiver(3, levels=levels, positions=positions.LearnedGrid((13,), dim=6))
    return HierarchicalAutoencoder(perceiver), drawn(2, 13, 3)


MAKERS = (
    *(image, gated, padded_stem, projected, inputs_per_read, multimodal, flow, sound, points),
    *(text, byte_text, frames, all_frames, hierarchical),
)
MODELS: dict[str, Callable[[], Model]] = {make.__name__: make for make in MAKERS}


def make(name: str, strategy: reads.Strategy | None = None) -> Model:
    """Returns a model in evaluation and its input; parameters are perturbed, because some start at zero."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if strategy is not None and isinstance(model, (pc.Perceiver, pc.PerceiverIO)):
        reads.set_strategy(model.encoder, strategy)  # reads of tokens; those of a decoder are dense
    return model.eval(), inputs
