"""Layer numbers of a model, in execution order."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from perceiver_core.blocks import CrossAttend, GroupedRead, JointAttend, LatentTransformer, SelfAttend
from perceiver_core.decoder import Decoder
from perceiver_core.encoder import Encoder
from perceiver_core.models import AllFrames, EachFrame, HierarchicalAutoencoder, PerceiverAR, Resampler

_LAYERS = (CrossAttend, SelfAttend, JointAttend, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Parts in execution order, for classes that register them in another order, or whose blocks may be of any class.
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    PerceiverAR: ("embedding", "cross_attention", "latent_transformer", "norm", "head"),
    EachFrame: ("frame_positions", "resampler"),
    AllFrames: ("frame_positions", "resampler"),
    GroupedRead: ("skip", "cross_attention", "latent_transformer"),
    Decoder: ("cross_attention", "output"),
    HierarchicalAutoencoder: ("perceiver", "cross_attention", "output"),
}
_ARE_LAYERS: dict[str, bool | None] = {"cross_attention": True, "latent_transformer": None}


def layer_numbers(model: nn.Module) -> tuple[dict[int, int], int]:
    """Return the layer number of each parameter, keyed by `id(parameter)`, and the number of the last layer.

    Layers are numbered as described in `parameter_groups`. For a model without blocks, return an empty dictionary, 0.
    """
    stages = _stages(model, is_layer=False)
    last_use = {id(stage.module): position for position, stage in enumerate(stages)}
    layers: dict[int, int] = {}
    count = 0
    for position, (module, is_layer) in enumerate(stages):
        if last_use[id(module)] == position:
            count += is_layer
            layer = count if is_layer or not count else count + 1
            for parameter in module.parameters(recurse=is_layer):
                layers[id(parameter)] = max(layer, layers.get(id(parameter), 0))
    return (layers, count + 1) if count else ({}, 0)


class _Stage(NamedTuple):
    """Block, or module whose own parameters (without those of its children) are not part of a block."""

    module: nn.Module
    is_layer: bool


def _stages(module: nn.Module, is_layer: bool | None) -> list[_Stage]:
    """Return the stages of a module in execution order. `is_layer=None`: a layer, unless it contains layers itself."""
    if not any(True for _ in module.parameters()):
        return []  # such as the latent transformer of an encoder with depth=0
    if is_layer:
        return [_Stage(module, True)]
    inside = [stage for child, flag in _children(module) for stage in _stages(child, flag)]
    if is_layer is None and not any(stage.is_layer for stage in inside):
        return [_Stage(module, True)]
    return [_Stage(module, False), *inside]


def _children(module: nn.Module) -> list[tuple[nn.Module, bool | None]]:
    """Return the children of a module in execution order, once per use, each with the flag `is_layer` of `_stages`."""
    if isinstance(module, Encoder):
        parts: list[tuple[Any, bool | None]] = [(module.latent_dropout, False)]
        for read, transformer in zip(module.sharing.reads, module.sharing.transformers, strict=True):
            parts += [(module.reads[read], True), (module.transformers[transformer], None)]
            parts += [] if module.aggregates is None else [(module.aggregates[transformer], False)]
        return parts
    if isinstance(module, Resampler):
        return [(module.projection, False), *((layer, True) for layer in module.layers), (module.norm, False)]
    if isinstance(module, LatentTransformer):
        aggregates = module.aggregates or [None] * len(module.blocks)
        parts = [
            part for block, own in zip(module.blocks, aggregates, strict=True) for part in ((block, True), (own, False))
        ]
    elif names := next((names for part, names in _PARTS.items() if isinstance(module, part)), None):
        parts = [(getattr(module, name), _ARE_LAYERS.get(name, False)) for name in names]
    else:
        parts = [(child, isinstance(child, _LAYERS)) for child in module.children()]
    return [(part, flag) for part, flag in parts if isinstance(part, nn.Module)]
