"""Small Perceiver IO models: of images, of several modalities, of captioned images, of texts."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_core import Decoder, Encoder, PerceiverIO, adapters, heads, positions, queries

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GRID = (5, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(**options) -> PerceiverIO:
    torch.manual_seed(0)
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=GRID))
    encoder = Encoder(image.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    output_queries = queries.Grid(None, image.positions)
    decoder = Decoder(encoder.dim, query_dim=output_queries.dim, out_dim=2, **options)
    return PerceiverIO(image, encoder, output_queries, decoder).double()


def several(**options) -> PerceiverIO:
    torch.manual_seed(0)
    audio = adapters.Audio(patch_size=3, positions=positions.Fourier(num_axes=1, num_bands=2, max_resolution=7))
    both = adapters.Multimodal({"audio": audio, "label": adapters.OneHotLabel(11)}, **options)
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    output_queries = queries.Multimodal({"audio": queries.Grid((7,), audio.positions), "label": queries.Learned(1, 3)})
    decoder = Decoder(encoder.dim, query_dim=output_queries.dim, out_dim=13)
    each = {"audio": heads.Waveform(13, patch_size=3), "label": heads.SingleQuery(heads.Linear(13, 11))}
    return PerceiverIO(both, encoder, output_queries, decoder, heads.Multimodal(each)).double()


def captions(**options) -> PerceiverIO:
    """Both modalities are queried at the positions of their inputs."""
    torch.manual_seed(0)
    text = adapters.TokenEmbedding(13, dim=6, positions=positions.LearnedEmbedding(11, dim=6))
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=GRID))
    both = adapters.Multimodal({"text": text, "image": image}, **options)
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    output_queries = queries.Multimodal(
        {"image": queries.FromInputs(image.dim), "text": queries.Grid(None, positions.LearnedEmbedding(11, dim=7))}
    )
    decoder = Decoder(encoder.dim, query_dim=output_queries.dim, out_dim=6)
    each = {"text": heads.TiedLogits(text), "image": heads.Linear(6, 3)}
    return PerceiverIO(both, encoder, output_queries, decoder, heads.Multimodal(each)).double()


def words(max_length: int = 11, **options) -> PerceiverIO:
    torch.manual_seed(0)
    text = adapters.TokenEmbedding(13, dim=6, positions=positions.LearnedEmbedding(max_length, dim=6))
    encoder = Encoder(text.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    output_queries = queries.Grid(None, positions.LearnedEmbedding(max_length, dim=7))
    decoder = Decoder(encoder.dim, query_dim=output_queries.dim, out_dim=6)
    return PerceiverIO(text, encoder, output_queries, decoder, heads.TiedLogits).double()
