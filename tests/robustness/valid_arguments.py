"""Valid arguments of every public class and function, and of the methods of each class."""

from __future__ import annotations

import torch

import perceiver_core as pc
from perceiver_core import adapters, heads, models, positions, queries
from perceiver_core.models import presets, sampling
from tests.robustness.subjects import (
    Subject,
    activation,
    drawn,
    encoder,
    fourier,
    head,
    hierarchical,
    image,
    language,
    of,
    resampler,
    stem,
    text,
    tokens,
    valid,
    where,
    whole,
)
from tests.robustness.valid_functions import FUNCTIONS

MODULES: dict[str, Subject] = {
    # Blocks
    "AttentionResidual": of(
        pc.AttentionResidual,
        lambda: {"dim": 8, "rank": 2},
        forward=lambda: {"arrays": [drawn(1, 3, 8), drawn(2, 3, 8)]},
    ),
    "CrossAttend": of(
        pc.CrossAttend,
        lambda: {"dim": 8, "input_dim": 5, "num_heads": 1},
        forward=lambda: {"x": drawn(2, 3, 8), "tokens": drawn(2, 7, 5), "mask": valid(2, 7)},
    ),
    "DropLatents": of(pc.DropLatents, lambda: {"rate": 0.25}, forward=lambda: {"latents": drawn(2, 8, 4)}),
    "GEGLU": activation(pc.GEGLU),
    "GRUGate": of(pc.GRUGate, lambda: {"dim": 8}, forward=lambda: {"x": drawn(2, 3, 8), "output": drawn(2, 3, 8)}),
    "GroupedRead": of(
        pc.GroupedRead,
        lambda: {"input_dim": 5, "level": pc.Level(2, num_latents=3, dim=8, depth=1, num_heads=2), "skip_dim": 4},
        forward=lambda: {"tokens": drawn(2, 7, 5), "mask": valid(2, 7), "skip": drawn(2, 6, 4)},
    ),
    "JointAttend": of(
        pc.JointAttend,
        lambda: {"dim": 8, "num_heads": 2},
        forward=lambda: {"x": drawn(2, 3, 8), "tokens": drawn(2, 7, 8), "mask": valid(2, 7)},
    ),
    "LatentTransformer": of(
        pc.LatentTransformer,
        lambda: {"dim": 8, "depth": 2, "num_heads": 2},
        forward=lambda: {"x": drawn(2, 3, 8), "mask": valid(2, 3)},
    ),
    "Level": of(pc.Level, lambda: {"num_groups": 2, "num_latents": 3, "dim": 8, "depth": 1, "num_heads": 2}),
    "MLP": of(pc.MLP, lambda: {"dim": 8}, forward=lambda: {"x": drawn(2, 3, 8)}),
    "MultiHeadAttention": of(
        pc.MultiHeadAttention,
        lambda: {"dim": 8, "input_dim": 6, "num_heads": 2},
        forward=lambda: {"x": drawn(2, 3, 8), "inputs": drawn(2, 7, 6), "mask": valid(2, 7)},
    ),
    "SelfAttend": of(
        pc.SelfAttend, lambda: {"dim": 8, "num_heads": 2}, forward=lambda: {"x": drawn(2, 3, 8), "mask": valid(2, 3)}
    ),
    "SquaredReLU": activation(pc.SquaredReLU),
    "SwiGLU": activation(pc.SwiGLU),
    "TanhGate": of(pc.TanhGate, lambda: {"dim": 8}, forward=lambda: {"x": drawn(2, 3, 8), "output": drawn(2, 3, 8)}),
    # Models
    "Decoder": of(
        pc.Decoder,
        lambda: {"dim": 8, "query_dim": 6, "out_dim": 2},
        forward=lambda: {"latents": drawn(2, 3, 8), "queries": drawn(2, 5, 6), "mask": valid(2, 5)},
        attention_map=lambda: {"latents": drawn(2, 3, 8), "queries": drawn(2, 5, 6), "mask": valid(2, 5)},
    ),
    "Encoder": of(
        pc.Encoder,
        lambda: {"input_dim": 5, "num_latents": 3, "dim": 8, "num_reads": 2, "depth": 1, "num_heads": 2},
        forward=lambda: {"inputs": drawn(2, 7, 5), "mask": valid(2, 7)},
        attention_map=lambda: {"inputs": drawn(2, 7, 5), "read": 0, "queries": [0, 2], "mask": valid(2, 7)},
    ),
    "HierarchicalPerceiver": of(
        pc.HierarchicalPerceiver,
        lambda: {"input_dim": 3, "levels": [hierarchical().level], "positions": positions.LearnedGrid((7,), dim=4)},
        forward=lambda: {"inputs": drawn(2, 7, 3), "mask": valid(2, 7)},
    ),
    "models.HierarchicalAutoencoder": of(
        models.HierarchicalAutoencoder,
        lambda: {"perceiver": hierarchical()},
        forward=lambda: {"inputs": drawn(2, 7, 3), "mask": valid(2, 7)},
    ),
    "Perceiver": of(
        pc.Perceiver,
        lambda: {"adapter": image(), "encoder": encoder(13), "head": heads.Classification(8, 5)},
        forward=lambda: {"inputs": drawn(2, 3, 4, 5), "mask": valid(2, 4, 5)},
    ),
    "PerceiverAR": of(
        pc.PerceiverAR,
        lambda: {"embedding": text(), "num_latents": 3, "depth": 1, "num_heads": 2},
        forward=lambda: {"ids": whole(11, 2, 7), "mask": valid(2, 7).flip(1), "labels": whole(11, 2, 7)},
        loss=lambda: {"ids": whole(11, 2, 7), "mask": valid(2, 7).flip(1)},
    ),
    "PerceiverIO": of(
        pc.PerceiverIO,
        lambda: {
            "adapter": image(),
            "encoder": encoder(13),
            "queries": queries.Grid(None, fourier(2)),
            "decoder": pc.Decoder(8, query_dim=10, out_dim=2),
            "head": heads.Linear(2, 3),
        },
        forward=lambda: {"inputs": drawn(2, 3, 4, 5), "mask": valid(2, 4, 5), "query_inputs": whole(20, 2, 4)},
    ),
    "Resampler": of(
        pc.Resampler,
        lambda: {"input_dim": 5, "num_latents": 3, "dim": 8, "depth": 2, "num_heads": 2},
        forward=lambda: {"features": drawn(2, 7, 5), "mask": valid(2, 7)},
        attention_map=lambda: {"features": drawn(2, 7, 5), "mask": valid(2, 7), "layer": 0, "queries": 1},
    ),
    **{
        f"models.{call.__name__}": of(
            call,
            lambda: {"resampler": resampler(), "frame_positions": positions.LearnedEmbedding(5, 8)},
            forward=lambda: {"features": drawn(2, 3, 7, 8), "mask": valid(2, 3, 7)},
        )
        for call in (models.EachFrame, models.AllFrames)
    },
    "generate": of(
        pc.generate,
        lambda: {
            "model": language(),
            "prompt": whole(11, 2, 5),
            "max_new_tokens": 3,
            "mask": valid(2, 5).flip(1),
            "stop_ids": (3,),
            "num_initial_latents": 2,
            "context_length": 6,
            "use_cache": True,
        },
    ),
    "models.stream": of(
        lambda **options: list(models.stream(**options)),
        lambda: {"model": language(), "prompt": whole(11, 2, 5), "max_new_tokens": 3},
    ),
    "models.sampling.greedy": of(sampling.greedy, lambda: {"logits": drawn(2, 11)}),
    "models.sampling.Sample": of(
        sampling.Sample,
        lambda: {"temperature": 0.5, "top_k": 5, "top_p": 0.9},
        forward=lambda: {"logits": drawn(2, 11)},
        probabilities=lambda: {"logits": drawn(2, 11)},
    ),
    # Presets are built on the meta device.
    **{
        f"models.presets.{call.__name__}": of(call, dict)
        for call in (
            *(presets.imagenet, presets.small, presets.base, presets.audioset, presets.modelnet40),
            *(presets.idefics2_resampler, presets.hip16, presets.hip256, presets.hip_mini),
        )
    },
    "models.presets.perceiver_ar": of(presets.perceiver_ar, lambda: {"vocab_size": 11, "num_latents": 4, "depth": 1}),
    "create": of(pc.create, lambda: {"name": "perceiver_imagenet"}),
    "list_models": of(pc.list_models),
    # Tokens and registry
    "Tokens": of(
        pc.Tokens,
        lambda: {"content": drawn(2, 5, 3), "position_tables": (drawn(5, 2),), "mask": valid(2, 5)},
        materialize=dict,
    ),
    "registry.from_config": of(pc.registry.from_config, lambda: {"config": {"part": "MLP", "dim": 3}}),
    # Adapters
    "adapters.Audio": of(
        adapters.Audio,
        lambda: {"patch_size": 4, "positions": fourier(1), "num_channels": 1},
        forward=lambda: {"waveform": drawn(2, 16), "mask": valid(2, 4)},
        token_mask=lambda: {"lengths": [5, 9], "size": [16]},
    ),
    "adapters.Bytes": of(
        adapters.Bytes,
        lambda: {"dim": 8, "positions": positions.LearnedEmbedding(9, 8)},
        forward=lambda: {"ids": whole(262, 2, 7), "mask": valid(2, 7)},
        encode=lambda: {"texts": ["ab", "c"], "max_length": 5, "padding_side": "left", "add_special_tokens": True},
        decode=lambda: {"ids": whole(262, 2, 7)},
    ),
    "adapters.ConvStem": stem(adapters.ConvStem, dim=4),
    "adapters.SymmetricPadConvStem": stem(adapters.SymmetricPadConvStem, dim=4),
    "adapters.Patches": stem(adapters.Patches, patch_size=(2, 3)),
    "adapters.Pixels": stem(adapters.Pixels),
    "adapters.Project": stem(adapters.Project, dim=4),
    "adapters.DropTokens": of(
        adapters.DropTokens,
        lambda: {"adapter": adapters.Grid(3, positions=None), "rate": 0.25},
        forward=lambda: {"x": drawn(2, 7, 3), "mask": valid(2, 7)},
    ),
    "adapters.FramePair": of(
        adapters.FramePair,
        lambda: {"positions": fourier(2), "dim": 4},
        forward=lambda: {"frames": drawn(2, 2, 3, 4, 5), "mask": valid(2, 4, 5)},
    ),
    "adapters.Grid": of(
        adapters.Grid,
        lambda: {"num_channels": 3, "positions": fourier(2)},
        forward=lambda: {"x": drawn(2, 4, 5, 3), "mask": valid(2, 4, 5)},
    ),
    "adapters.Image": of(
        adapters.Image,
        lambda: {"num_channels": 3, "positions": fourier(2)},
        forward=lambda: {"images": drawn(2, 3, 4, 5), "mask": valid(2, 4, 5), "lengths": [[4, 4], [4, 5]]},
    ),
    "adapters.LogMel": of(
        adapters.LogMel,
        lambda: {"sample_rate": 800, "positions": None, "num_mels": 4, "n_fft": 32, "hop_length": 16},
        forward=lambda: {"waveform": drawn(2, 64), "mask": valid(2, 5), "lengths": [64, 64]},
    ),
    "adapters.Multimodal": of(
        adapters.Multimodal,
        lambda: {
            "adapters": {"image": image(), "label": adapters.OneHotLabel(4)},
            "token_mask_rate": {"label": 0.5},
            "modality_dropout": {"label": 0.5},
        },
        forward=lambda: {
            "inputs": {"image": drawn(2, 3, 4, 5), "label": whole(4, 2)},
            "mask": {"image": valid(2, 4, 5)},
        },
    ),
    "adapters.OneHotLabel": of(
        adapters.OneHotLabel, lambda: {"num_classes": 4}, forward=lambda: {"labels": whole(4, 2)}
    ),
    "adapters.PerRead": of(
        adapters.PerRead,
        lambda: {"adapters": [image(), adapters.Grid(3, positions=None)]},
        forward=lambda: {"inputs": [drawn(2, 3, 4, 5), drawn(2, 7, 3)], "mask": [None, valid(2, 7)]},
    ),
    "adapters.PointCloud": of(
        adapters.PointCloud,
        lambda: {"num_features": 2, "positions": fourier(3)},
        forward=lambda: {"points": drawn(2, 7, 5), "mask": valid(2, 7)},
    ),
    "adapters.Spectrogram": of(
        adapters.Spectrogram,
        lambda: {"positions": fourier(2)},
        forward=lambda: {"spectrogram": drawn(2, 4, 5), "mask": valid(2, 4, 5)},
    ),
    "adapters.Table": of(
        adapters.Table,
        lambda: {"num_numeric": 2, "category_sizes": (3, 5), "dim": 8},
        forward=lambda: {"rows": {"numbers": drawn(2, 2), "categories": whole(3, 2, 2)}},
    ),
    "adapters.TokenEmbedding": of(
        adapters.TokenEmbedding,
        lambda: {"vocab_size": 11, "dim": 8, "positions": positions.LearnedEmbedding(9, 8)},
        forward=lambda: {"ids": whole(11, 2, 7), "mask": valid(2, 7), "positions": torch.arange(7)},
    ),
    "adapters.Video": of(
        adapters.Video,
        lambda: {"positions": fourier(3), "patch_size": (1, 2, 2)},
        forward=lambda: {"video": drawn(2, 3, 3, 4, 6), "mask": valid(2, 3, 2, 3)},
    ),
    "adapters.hann_window": of(adapters.hann_window, lambda: {"length": 5}),
    "adapters.htk_frequencies": of(adapters.htk_frequencies, lambda: {"f_min": 0.0, "f_max": 9.0, "count": 4}),
    "adapters.slaney_frequencies": of(adapters.slaney_frequencies, lambda: {"f_min": 0.0, "f_max": 9.0, "count": 4}),
    "adapters.pad": of(
        adapters.pad, lambda: {"inputs": [drawn(5), drawn(3)], "adapter": adapters.Audio(4, positions=None)}
    ),
    "adapters.pad_point_clouds": of(adapters.pad_point_clouds, lambda: {"clouds": [drawn(5, 3), drawn(2, 3)]}),
    # Positions
    "positions.FixedGrid": where(positions.FixedGrid, {"positions": fourier(2), "grid": (4, None)}, (3, 5)),
    "positions.Fourier": where(
        positions.Fourier,
        {"num_axes": 2, "num_bands": 3, "max_resolution": 7},
        (3, 5),
        forward=lambda: {"points": drawn(4, 2)},
    ),
    "positions.FourierPerAxis": where(
        positions.FourierPerAxis, {"num_axes": 2, "num_bands": 3}, (3, 5), forward=lambda: {"points": drawn(4, 2)}
    ),
    "positions.NeRF": where(positions.NeRF, {"num_axes": 2}, (3, 5), forward=lambda: {"points": drawn(4, 2)}),
    "positions.Gaussian": where(
        positions.Gaussian, {"num_axes": 2, "num_features": 3}, (3, 5), forward=lambda: {"points": drawn(4, 2)}
    ),
    "positions.LearnedEmbedding": where(
        positions.LearnedEmbedding, {"length": 7, "dim": 4}, (5,), forward=lambda: {"positions": whole(7, 2, 5)}
    ),
    "positions.LearnedGrid": where(positions.LearnedGrid, {"grid": (3, 5), "dim": 4}, (4, 4)),
    "positions.Projected": where(positions.Projected, {"positions": fourier(2), "dim": 4}, (4, 4)),
    "positions.Rotary": of(
        positions.Rotary,
        lambda: {"dim": 4, "base": 100.0},
        forward=lambda: {"heads": drawn(2, 2, 5, 6), "positions": whole(9, 5)},
    ),
    "positions.coordinates": of(positions.coordinates, lambda: {"size": 5, "reference": 7}),
    "positions.grid_points": of(positions.grid_points, lambda: {"grid": (3, 5), "like": drawn(1)}),
    "positions.half_open_exponents": of(positions.half_open_exponents, lambda: {"pairs": 3, "like": drawn(1)}),
    "positions.inclusive_exponents": of(positions.inclusive_exponents, lambda: {"pairs": 3, "like": drawn(1)}),
    # Heads
    "heads.Classification": head(heads.Classification, lambda: {"dim": 8, "num_classes": 3}),
    "heads.LatentMean": head(heads.LatentMean, lambda: {"dim": 8}),
    "heads.Regression": head(heads.Regression, lambda: {"dim": 8, "num_outputs": 2}),
    "heads.Identity": head(heads.Identity),
    "heads.Logits": head(heads.Logits, lambda: {"embedding": text()}),
    "heads.TiedLogits": head(heads.TiedLogits, lambda: {"embedding": text()}),
    "heads.Linear": of(heads.Linear, lambda: {"dim": 8, "out_dim": 3}, forward=lambda: {"outputs": drawn(2, 3, 8)}),
    "heads.Grid": of(
        heads.Grid,
        lambda: {"grid": (3, 5), "scale": 0.5, "head": heads.Linear(8, 2)},
        forward=lambda: {"outputs": drawn(2, 15, 8), "grid": (3, 5)},
    ),
    "heads.Unpatchify": of(
        heads.Unpatchify,
        lambda: {"dim": 8, "grid": (3, 5), "patch_size": (2, 3)},
        forward=lambda: {"outputs": drawn(2, 15, 8), "grid": (3, 5)},
        cut=lambda: {"pixels": drawn(2, 3, 6, 15)},
    ),
    "heads.Waveform": of(
        heads.Waveform, lambda: {"dim": 8, "patch_size": 4}, forward=lambda: {"outputs": drawn(2, 5, 8)}
    ),
    "heads.SingleQuery": of(
        heads.SingleQuery, lambda: {"head": heads.Linear(8, 3)}, forward=lambda: {"outputs": drawn(2, 1, 8)}
    ),
    "heads.Multimodal": of(
        heads.Multimodal,
        lambda: {"heads": {"a": heads.Linear(8, 3)}},
        forward=lambda: {"outputs": {"a": drawn(2, 5, 8)}},
    ),
    # Queries
    "queries.Coordinates": of(
        queries.Coordinates, lambda: {"positions": fourier(2)}, forward=lambda: {"points": drawn(2, 5, 2)}
    ),
    "queries.External": of(queries.External, lambda: {"dim": 4}, forward=lambda: {"queries": drawn(2, 5, 4)}),
    "queries.FromInputs": of(
        queries.FromInputs, lambda: {"dim": 5}, forward=lambda: {"tokens": tokens(), "query_indices": whole(5, 2, 3)}
    ),
    "queries.Grid": of(
        queries.Grid,
        lambda: {"grid": (3, 5), "positions": fourier(2)},
        forward=lambda: {"tokens": None, "query_indices": whole(15, 2, 4)},
    ),
    "queries.Learned": of(
        queries.Learned, lambda: {"num_queries": 5, "dim": 4}, forward=lambda: {"query_indices": whole(5, 2, 3)}
    ),
    "queries.Multimodal": of(
        queries.Multimodal,
        lambda: {"sources": {"a": queries.Learned(5, 4), "b": queries.Learned(2, 3)}},
        forward=lambda: {"query_indices": {"a": whole(5, 2, 3)}},
    ),
}
SUBJECTS = MODULES | FUNCTIONS
