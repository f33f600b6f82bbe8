"""Valid arguments of public functions: kernels, losses, masks, sharing schemes, strategies and tools."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import kernels, losses, masks, reads, sharing
from tests.robustness.subjects import (
    Subject,
    attended,
    drawn,
    fourier,
    kernel,
    of,
    perceiver,
    tokens,
    valid,
    whole,
)

FUNCTIONS: dict[str, Subject] = {
    # Kernels
    "kernels.reference": kernel(kernels.reference, dropout=0.0),
    "kernels.sdpa": kernel(kernels.sdpa, dropout=0.0),
    "kernels.fastest": kernel(kernels.fastest, dropout=0.0),
    "kernels.inverted": kernel(kernels.inverted, dropout=0.0),
    "kernels.chunked": kernel(kernels.chunked, chunk_size=3),
    "kernels.partial_attention": kernel(kernels.partial_attention, chunk_size=3),
    "kernels.add_zero_attn": kernel(kernels.add_zero_attn),
    "kernels.attention_map": of(
        kernels.attention_map, lambda: {name: x for name, x in attended().items() if name != "v"} | {"queries": [0, -1]}
    ),
    "kernels.kernel_attention_map": of(
        kernels.kernel_attention_map,
        lambda: (
            {name: x for name, x in attended().items() if name != "v"}
            | {"kernel": kernels.inverted, "queries": [0, -1], "block": 3}
        ),
    ),
    # Losses
    "losses.end_point_error": of(
        losses.end_point_error, lambda: {"flow": drawn(2, 2, 4, 5), "target": drawn(2, 2, 4, 5), "mask": valid(2, 4, 5)}
    ),
    "losses.cross_entropy": of(
        losses.cross_entropy,
        lambda: {"logits": drawn(2, 5, 7), "labels": whole(7, 2, 5), "weight": drawn(7), "label_smoothing": 0.1},
    ),
    "losses.binary_cross_entropy": of(
        losses.binary_cross_entropy,
        lambda: {
            "logits": drawn(2, 7),
            "targets": drawn(2, 7),
            "pos_weight": drawn(7),
            "mask": valid(2, 7),
            "label_smoothing": 0.1,
        },
    ),
    "losses.weighted": of(
        losses.weighted,
        lambda: {
            "outputs": {"a": drawn(2, 7)},
            "targets": {"a": drawn(2, 7)},
            "losses": {"a": (F.l1_loss, 0.5)},
            "masks": {"a": torch.tensor([True, False])},
        },
    ),
    # Masks
    "masks.Padding": of(
        masks.Padding,
        lambda: {"keys": valid(2, 5)},
        forward=lambda: {"queries": masks.positions(3), "keys": masks.positions(5)},
    ),
    "masks.Queries": of(
        masks.Queries,
        lambda: {"queries": valid(2, 3)},
        forward=lambda: {"queries": masks.positions(3), "keys": masks.positions(5)},
    ),
    "masks.Causal": of(masks.Causal, forward=lambda: {"queries": masks.positions(3), "keys": masks.positions(5)}),
    "masks.Window": of(
        masks.Window,
        lambda: {"before": 1, "after": 1},
        forward=lambda: {"queries": masks.positions(3), "keys": masks.positions(5)},
    ),
    "masks.materialize": of(masks.materialize, lambda: {"mask": masks.Causal(), "queries": 3, "keys": 5}),
    # Sharing
    **{
        f"sharing.{call.__name__}": of(call, lambda: {"steps": 3})
        for call in (sharing.none, sharing.all_, sharing.all_but_first, sharing.paper)
    },
    "sharing.Sharing": of(sharing.Sharing, lambda: {"reads": (0, 1), "transformers": (0, 0)}),
    "sharing.Shared": of(sharing.Shared, lambda: {"module": nn.Linear(2, 2)}),
    # Reads
    "reads.Auto": of(reads.Auto, lambda: {"strategies": [reads.Dense()], "machine": reads.Machine()}),
    "reads.Machine": of(reads.Machine),
    "reads.AttentionCapture": of(reads.AttentionCapture, lambda: {"read": 0, "queries": [0]}),
    "reads.SharedMemory": of(reads.SharedMemory, lambda: {"num_queries": 3}),
    "reads.check_strategy": of(reads.check_strategy, lambda: {"strategy": reads.Dense()}),
    "reads.set_strategy": of(reads.set_strategy, lambda: {"module": perceiver(), "strategy": reads.Dense()}),
    "reads.merged_axes": of(reads.merged_axes, lambda: {"tokens": tokens()}),
    # Tools
    "parameter_groups": of(
        pc.parameter_groups, lambda: {"model": perceiver(), "weight_decay": 0.1, "layer_decay": 0.9, "lr": 0.1}
    ),
    "tensor_parallel_plan": of(
        pc.tensor_parallel_plan, lambda: {"model": pc.SelfAttend(8, num_heads=4), "num_devices": 2}
    ),
    "checkpoint_activations": of(pc.checkpoint_activations, lambda: {"model": perceiver()}),
    "summary": of(
        lambda model, depth: pc.summary(model, drawn(2, 3, 4, 5), depth=depth),
        lambda: {"model": perceiver(), "depth": 2},
    ),
    "explain_reads": of(lambda model: pc.explain_reads(model, drawn(2, 3, 4, 5)), lambda: {"model": perceiver()}),
    "visualize.attention_map": of(
        pc.visualize.attention_map,
        lambda: {"model": perceiver(), "inputs": drawn(2, 3, 4, 5), "read": 0, "queries": [0], "mask": valid(2, 4, 5)},
    ),
    "visualize.overlay": of(
        pc.visualize.overlay, lambda: {"image": drawn(3, 4, 5), "weights": drawn(4, 5), "strength": 0.5}
    ),
    "visualize.position_features": of(
        pc.visualize.position_features, lambda: {"positions": fourier(2), "grid": (3, 5), "columns": 4, "limit": 6}
    ),
    "visualize.architecture": of(pc.visualize.architecture, lambda: {"model": perceiver()}),
}
