"""Activation checkpointing: store only the inputs of each block, and recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perceiver_core.allocator import return_freed_memory
from perceiver_core.argument_errors import checked
from perceiver_core.blocks import CrossAttend, JointAttend, SelfAttend

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@checked
def checkpoint_activations(model: M, blocks: tuple[type[nn.Module], ...] = (CrossAttend, SelfAttend, JointAttend)) -> M:
    """Make the blocks of a model recompute their activations in the backward pass, to save memory.

    Each block stores only its inputs: its latents and, for cross-attention, its tokens. Keys and values that several
    cross-attentions share are also stored. The model is modified in-place. Its parameters, state dict and outputs do
    not change.

    If the model has parameters on the CPU, this function also calls `allocator.return_freed_memory`, because glibc
    would otherwise keep the freed memory. That setting affects the whole process.

    Args:
        model: Model to modify; any module.
        blocks: Module classes whose activations are recomputed.

    Returns:
        The same model.

    Example:
        >>> encoder = pc.checkpoint_activations(pc.Encoder(10, num_latents=7, dim=32, depth=2, num_heads=4))
        >>> encoder(torch.randn(2, 50, 10)).sum().backward()

    Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    for module in model.modules():
        if isinstance(module, tuple(blocks)) and "forward" not in vars(module):
            module.forward = partial(_checkpointed, module.forward)
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return_freed_memory()
    return model


def _checkpointed(forward: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    if torch.compiler.is_compiling() and kwargs.get("cache") is not None:
        return forward(*args, **kwargs)  # a compiled graph cannot fill a cache inside a checkpoint
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
