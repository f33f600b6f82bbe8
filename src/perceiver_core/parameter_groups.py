"""Parameter groups for PyTorch optimizers: weight decay for matrices only, and layer-wise learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from perceiver_core.argument_errors import checked
from perceiver_core.layer_order import layer_numbers

Decays: TypeAlias = Callable[[nn.Module, str, nn.Parameter], bool]
"""Rule for weight decay: `(module, attribute name of the parameter, parameter) -> whether the parameter decays`."""

_MATRICES = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_VECTORS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter. This is the default rule of `parameter_groups`.

    Weight decay applies to the weights of torch.nn's linear, convolutional, recurrent and attention layers and their
    subclasses. In other modules, except embeddings and norms, it applies to a parameter that is named `weight` and has
    at least two axes longer than 1. It does not apply to other parameters: biases, gates, scales, and arrays of
    vectors, such as latents, queries and position tables.

    Args:
        module: Module that holds the parameter.
        name: Name of the parameter in the module.
        parameter: Parameter to check.

    Example:
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> query = encoder.reads[0].attention.query
        >>> decays(query, "weight", query.weight), decays(encoder, "latents", encoder.latents)
        (True, False)
    """
    if isinstance(module, _MATRICES):
        is_bias = name.startswith("bias")  # bias_k of nn.MultiheadAttention has three axes
        return (parameter.ndim >= 2 and not is_bias) or name.startswith("weight")  # FSDP1 flattens weights
    return name == "weight" and not isinstance(module, _VECTORS) and sum(size > 1 for size in parameter.shape) >= 2


@checked
def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    lr: float | None = None,
    decays: Decays = decays,
) -> list[dict[str, Any]]:
    """Return parameter groups for a PyTorch optimizer, with weight decay only for the weights of layers.

    With `layer_decay`, the learning rate of layer k is `lr * layer_decay ** (last - k)`. Layers are the blocks of this
    library (cross-attention, self-attention) and of torch.nn, numbered from 1 in the order of their last use. Layer 0
    contains the parameters before the first block (adapter, latents), and the last layer those after the last block
    (norm, head). Parameters between two blocks, such as queries, belong to the layer of the second block.

    A block that is shared by several steps has a single number, that of its last use. If the number were that of the
    first use, the blocks that compute the output would have the low learning rates of early layers: with the sharing of
    the paper, all blocks but one. Likewise, a tied embedding belongs to the last layer, with the head.

    Args:
        model: Any module, possibly wrapped, for example by DistributedDataParallel, torch.compile or PEFT.
        weight_decay: Weight decay of the parameters for which `decays` returns True; 0 for all others.
        layer_decay: Ratio of the learning rates of a layer and the next layer, in (0, 1]; None for the same learning
            rate in all layers.
        lr: Learning rate of the last layer. If None, groups have no entry `lr`. With `layer_decay`, they then have an
            entry `lr_scale`, which PyTorch ignores, and by which schedulers such as timm's multiply the learning rate.
        decays: Rule for weight decay; see `decays`. A shared parameter decays only if the rule returns True for every
            module that holds it.

    Returns:
        List of dictionaries with the entries `params`, `name` and `weight_decay`; `lr` or `lr_scale`; and, with
        `layer_decay`, `layer`. Each trainable parameter is in one group, even if several modules share it. Frozen
        parameters are in none.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> audio = pc.adapters.Audio(patch_size=16, positions=pc.positions.LearnedGrid((9,), dim=8))
        >>> encoder = pc.Encoder(audio.dim, num_latents=8, dim=32, depth=1, num_heads=4)
        >>> model = pc.Perceiver(audio, encoder, pc.heads.Regression(encoder.dim))
        >>> groups = pc.parameter_groups(model, weight_decay=0.05)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
        [('decay', 0.05, 13), ('no_decay', 0.0, 27)]
        >>> groups = pc.parameter_groups(model, weight_decay=0.05, layer_decay=0.5, lr=1e-3)
        >>> {group["layer"]: group["lr"] for group in groups}
        {0: 0.000125, 1: 0.00025, 2: 0.0005, 3: 0.001}

    Reference: Clark et al. 2020 (ELECTRA), section 3.1 and Bao et al. 2022 (BEiT), appendix (layer-wise decay); Howard
    and Ruder 2018 (ULMFiT), section 3.2 (smaller learning rates for earlier layers).
    """
    _check_numbers(weight_decay, layer_decay, lr)
    free = {id(parameter) for module, name, parameter in _owned(model) if not decays(module, name, parameter)}
    layers, last = layer_numbers(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            layer, decay = 0 if layer_decay is None else layers.get(id(parameter), last), id(parameter) not in free
            group: dict[str, Any] = {"params": [], "name": "decay" if decay else "no_decay"}
            group["weight_decay"] = weight_decay if decay else 0.0
            if layer_decay is not None:
                scale = layer_decay ** (last - layer)
                group |= {"name": f"layer_{layer}.{group['name']}", "layer": layer}
                group |= {"lr_scale": scale} if lr is None else {"lr": lr * scale}
            elif lr is not None:
                group["lr"] = lr
            groups.setdefault((layer, not decay), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _check_numbers(weight_decay: float, layer_decay: float | None, lr: float | None) -> None:
    for name, value in {"weight_decay": weight_decay, "layer_decay": layer_decay, "lr": lr}.items():
        if isinstance(value, (str, bool)) or (value is None and name == "weight_decay"):
            raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0; got {weight_decay!r}")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must lie in (0, 1]; got {layer_decay!r}")
    if lr is not None and not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be at least 0; got {lr!r}")


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (module, name, parameter) for each parameter. A shared parameter occurs once per module that holds it."""
    for path, module in model.named_modules():
        owner, names = module, None
        if isinstance(module, ParametrizationList):  # `layer.parametrizations.weight` counts as `layer.weight`
            parent, _, names = path.rpartition(".")
            owner = model.get_submodule(parent.rpartition(".")[0])
        for name, parameter in module.named_parameters(recurse=False):
            yield owner, names or name, parameter
