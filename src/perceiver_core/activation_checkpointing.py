"""Activation checkpointing: store the input of each block only, and compute the rest again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from perceiver_core.allocator import return_freed_memory
from perceiver_core.blocks import CrossAttend, JointAttend, SelfAttend

M = TypeVar("M", bound=nn.Module)


def checkpoint_activations(model: M, blocks: tuple[type[nn.Module], ...] = (CrossAttend, SelfAttend, JointAttend)) -> M:
    """Makes every block of a model compute its activations again in the backward pass, for memory.

    What is kept of a block is what goes into it: latents, and the tokens of a read. Where reads share weights, the
    keys and values that they share are kept too. Changes the model in place, once; weights, `state_dict` and outputs
    stay as they are.

    On the CPU what this saves shows only if freed memory goes back to the system: with glibc it is asked to, for the
    whole process, see `allocator.return_freed_memory`.

    Args:
        model: any module.
        blocks: which of its modules recompute.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> encoder = pc.checkpoint_activations(pc.Encoder(10, num_latents=7, dim=32, depth=2, num_heads=4))
        >>> encoder(torch.randn(2, 50, 10)).sum().backward()

    Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    for module in model.modules():
        if isinstance(module, blocks) and "forward" not in vars(module):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            if isinstance(module, CrossAttend):
                module.keys_values = partial(  # type: ignore[method-assign]
                    checkpoint, module.keys_values, use_reentrant=False
                )
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return_freed_memory()
    return model
