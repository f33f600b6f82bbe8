"""Small models of every architecture and modality, with inputs of any batch size and length, for tests of export."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import adapters, heads, positions, queries
from perceiver_core.models import AllFrames, EachFrame, HierarchicalAutoencoder

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
FOURIER = partial(positions.Fourier, num_bands=3, max_resolution=11)
DIM, VOCABULARY = 16, 19


class Case(NamedTuple):
    """Function that builds a model, and function `(batch, n) -> (args, kwargs)` that draws its inputs."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    smallest: int = 1


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def valid(*shape: int) -> Tensor:
    """Mask whose padding is on the left, as PerceiverAR needs it, with one token at least per sample."""
    batch, n = shape[0], shape[-1]
    mask = torch.arange(n) >= torch.arange(batch).remainder(n).view(-1, *(1 for _ in shape[1:]))
    return mask.expand(shape).clone()


def ids(b: int, n: int) -> Tensor:
    return (torch.arange(b * n) * 7 % VOCABULARY).view(b, n)


def encoder(dim: int, **options: Any) -> pc.Encoder:
    return pc.Encoder(dim, **({"num_latents": 5, "dim": DIM, "depth": 1, "num_heads": 2} | options))


def perceiver(adapter: Any, **options: Any) -> pc.Perceiver:
    return pc.Perceiver(adapter, encoder(adapter.dim, **options), heads.Classification(DIM, num_classes=5))


def perceiver_io(adapter: Any, sources: Any, head: nn.Module | None = None, **options: Any) -> pc.PerceiverIO:
    decoder = pc.Decoder(DIM, query_dim=sources.dim, out_dim=DIM, **options)
    return pc.PerceiverIO(adapter, encoder(adapter.dim), sources, decoder, head)


def image(**options: Any) -> adapters.Image:
    return adapters.Image(3, **({"positions": FOURIER(num_axes=2)} | options))


def audio() -> adapters.Audio:
    return adapters.Audio(5, positions=FOURIER(num_axes=1))


def points() -> adapters.PointCloud:
    return adapters.PointCloud(2, positions=FOURIER(num_axes=3))


def text() -> adapters.TokenEmbedding:
    return adapters.TokenEmbedding(VOCABULARY, DIM, positions=positions.LearnedEmbedding(64, DIM))


def captions() -> pc.PerceiverIO:
    """Text and image, both queried at the positions of their inputs."""
    parts = {"text": text(), "image": image()}
    sources = {"image": queries.FromInputs(parts["image"].dim), "text": queries.Grid(None, text().positions)}
    each = {"text": heads.TiedLogits(parts["text"]), "image": heads.Linear(DIM, 3)}
    return perceiver_io(adapters.Multimodal(parts), queries.Multimodal(sources), heads.Multimodal(each))


def autoencoder() -> HierarchicalAutoencoder:
    levels = [pc.Level(5, num_latents=3, dim=14, depth=1, num_heads=7), pc.Level(1, num_latents=4, dim=6, num_heads=3)]
    up = [pc.Level(5, num_latents=3, dim=8, depth=1, num_heads=4)]
    return HierarchicalAutoencoder(
        pc.HierarchicalPerceiver(3, levels=levels, decoder_levels=up, positions=positions.LearnedGrid((23,), 11))
    )


def hierarchical() -> pc.HierarchicalPerceiver:
    levels = [pc.Level(5, num_latents=3, dim=14, depth=1, num_heads=7), pc.Level(1, num_latents=4, dim=6, num_heads=3)]
    return pc.HierarchicalPerceiver(3, levels=levels, positions=positions.LearnedGrid((23,), 11))


def images(b: int, n: int) -> Inputs:
    return (drawn(b, 3, n, n + 2),), {}


def waveforms(b: int, n: int) -> Inputs:
    return (drawn(b, 5 * n - 2),), {}


def masked_points(b: int, n: int) -> Inputs:
    return (drawn(b, n, 5),), {"mask": valid(b, n)}


def sequences(b: int, n: int) -> Inputs:
    return (ids(b, n),), {}


def masked_sequences(b: int, n: int) -> Inputs:
    return (ids(b, n),), {"mask": valid(b, n)}


def rows(b: int, n: int) -> Inputs:
    return ({"numbers": drawn(b, 2), "categories": torch.arange(2 * b).view(b, 2) % 3},), {}


PERCEIVERS = {
    "image": Case(lambda: perceiver(image()), images),
    "masked image": Case(
        lambda: perceiver(image(), num_reads=2, share=pc.sharing.all_),
        lambda b, n: (images(b, n)[0], {"mask": valid(b, n, n + 2)}),
    ),
    "patches": Case(lambda: perceiver(image(stem=partial(adapters.Patches, patch_size=(2, 3)))), images),
    "convolutions": Case(
        lambda: perceiver(image(stem=partial(adapters.ConvStem, dim=8), positions=positions.LearnedGrid((2, 3), 4))),
        images,
    ),
    "video": Case(
        lambda: perceiver(adapters.Video(3, positions=FOURIER(num_axes=3), patch_size=(1, 2, 3))),
        lambda b, n: ((drawn(b, n, 3, n + 1, n + 3),), {}),
    ),
    "frame pair": Case(
        lambda: perceiver(adapters.FramePair(positions=FOURIER(num_axes=2), dim=8)),
        lambda b, n: ((drawn(b, 2, 3, n, n + 2),), {}),
    ),
    "audio": Case(lambda: perceiver(audio()), waveforms),
    "masked audio": Case(lambda: perceiver(audio()), lambda b, n: (waveforms(b, n)[0], {"mask": valid(b, n)})),
    "spectrogram": Case(
        lambda: perceiver(adapters.Spectrogram(positions=FOURIER(num_axes=2))), lambda b, n: ((drawn(b, 7, n),), {})
    ),
    "table": Case(lambda: perceiver(adapters.Table(2, (3, 4), dim=7)), rows),
    "points": Case(lambda: perceiver(points()), lambda b, n: ((drawn(b, n, 5),), {})),
    "masked points": Case(lambda: perceiver(points()), masked_points),
    "text": Case(lambda: perceiver(text()), sequences),
    "masked text": Case(lambda: perceiver(text()), masked_sequences),
    "several reads": Case(
        lambda: perceiver(adapters.PerRead([image(), audio()]), num_reads=2, share=False),
        lambda b, n: (((images(b, n)[0][0], drawn(b, 5 * n)),), {}),
    ),
    "grouped": Case(
        lambda: perceiver(
            image(),
            cross_attention=partial(
                pc.CrossAttend,
                num_heads=4,
                attention=partial(pc.MultiHeadAttention, num_kv_heads=2, qk_dim=16, qk_norm=nn.LayerNorm),
            ),
        ),
        images,
    ),
}
PERCEIVER_IOS = {
    "learned queries": Case(lambda: perceiver_io(image(), queries.Learned(3, 6)), images),
    "grid queries": Case(lambda: perceiver_io(image(), queries.Grid(None, FOURIER(num_axes=2))), images),
    "grid head": Case(
        lambda: perceiver_io(
            image(), queries.Grid(None, FOURIER(num_axes=2)), heads.Grid(None, head=heads.Linear(DIM, 3))
        ),
        images,
    ),
    "input queries": Case(lambda: perceiver_io(image(), queries.FromInputs(image().dim)), images),
    "selected queries": Case(
        lambda: perceiver_io(image(), queries.Grid(None, FOURIER(num_axes=2)), chunk_size=3),
        lambda b, n: (images(b, n)[0], {"query_inputs": torch.arange(b * n).view(b, n) % n}),
    ),
    "coordinates": Case(
        lambda: perceiver_io(points(), queries.Coordinates(FOURIER(num_axes=3))),
        lambda b, n: (masked_points(b, n)[0], {"query_inputs": drawn(b, n + 1, 3)}),
    ),
    "masked queries": Case(
        lambda: perceiver_io(text(), queries.Grid(None, text().positions)),
        lambda b, n: ((ids(b, n),), {"mask": valid(b, n), "query_mask": valid(b, n)}),
    ),
    "captions": Case(captions, lambda b, n: (({"text": ids(b, n), "image": images(b, n + 1)[0][0]},), {})),
    "masked captions": Case(
        captions,
        lambda b, n: (
            ({"text": ids(b, n), "image": images(b, n + 1)[0][0]},),
            {"mask": {"text": valid(b, n), "image": torch.arange(b) % 2 == 0}},
        ),
    ),
}
OTHERS = {
    "AR": Case(
        lambda: pc.PerceiverAR(adapters.TokenEmbedding(VOCABULARY, DIM), num_latents=5, depth=1, num_heads=2), sequences
    ),
    "masked AR": Case(lambda: pc.PerceiverAR(text(), num_latents=5, depth=1, num_heads=2), masked_sequences),
    "resampler": Case(
        lambda: pc.Resampler(7, num_latents=3, dim=DIM, depth=2, num_heads=2),
        lambda b, n: ((drawn(b, n, 7),), {"mask": valid(b, n)}),
    ),
    "all frames": Case(
        lambda: AllFrames(
            pc.Resampler(7, num_latents=3, dim=DIM, depth=1, num_heads=2),
            frame_positions=positions.LearnedEmbedding(32, 7),
        ),
        lambda b, n: ((drawn(b, n, n + 1, 7),), {}),
    ),
    "each frame": Case(
        lambda: EachFrame(pc.Resampler(7, num_latents=3, dim=DIM, depth=1, num_heads=2)),
        lambda b, n: ((drawn(b, n, n + 1, 7),), {}),
    ),
    "hierarchical": Case(hierarchical, lambda b, n: ((drawn(b, n, 3),), {"mask": valid(b, n)}), 5),
    "autoencoder": Case(autoencoder, lambda b, n: ((drawn(b, n, 3),), {}), 5),
    "encoder": Case(lambda: encoder(7), lambda b, n: ((drawn(b, n, 7),), {"mask": valid(b, n)})),
}
CASES = PERCEIVERS | PERCEIVER_IOS | OTHERS


def built(case: Case) -> nn.Module:
    """Build the model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = case.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def varying(model: nn.Module, case: Case) -> dict[str, Any]:
    """Return `dynamic_shapes`: each axis whose size depends on the batch size or on n is dynamic."""

    def axes(x: Tensor, y: Tensor) -> dict[int, Any]:
        return {i: torch.export.Dim.DYNAMIC for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n}

    (args, kwargs) = tree_map(axes, case.inputs(5, 8), case.inputs(7, 12))
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs


def sizes(case: Case) -> list[tuple[int, int]]:
    """Return batch sizes and lengths other than the traced ones: odd, longer, shorter, a batch of 1, one token."""
    return [(3, 11), (2, 9), (1, max(5, case.smallest)), (1, case.smallest), (4, case.smallest)]


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        result: list[Tensor] = tree_leaves(model(*inputs[0], **inputs[1]))
    return result
