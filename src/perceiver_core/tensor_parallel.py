"""Plan for tensor parallelism that splits attention heads and the hidden channels of MLPs over devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from perceiver_core import checks
from perceiver_core.argument_errors import checked
from perceiver_core.blocks import MLP, MultiHeadAttention

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


@checked
def tensor_parallel_plan(model: nn.Module, num_devices: int) -> dict[str, ParallelStyle]:
    """Return a plan for `torch.distributed.tensor.parallel.parallelize_module`.

    In every `MultiHeadAttention`, the query, key and value projections are split by heads, and the output projection by
    its inputs. In every `MLP`, the first layer is split by hidden channels, and the second by its inputs. All other
    parts are computed on every device, so each device needs the same input and the same random seed.

    - Attention with a single head, such as the default `CrossAttend`, cannot be split and is computed on every device.
      If all query heads share a single key-value head, only the query and output projections are split.
    - An `MLP` is computed on every device if `num_devices` does not divide its number of hidden channels.
    - Gated activations such as `GEGLU` need all hidden channels, so the devices exchange them.
    - For reads with split projections, `reads.Auto` selects the strategy `Dense`. The other strategies raise an error.
    - On each device, captured attention weights are those of the heads of this device.

    Args:
        model: Model, or part of one.
        num_devices: Number of devices over which the heads are split: the size of the device mesh.

    Returns:
        Parallel styles, keyed by module name.

    Raises:
        ValueError: If the number of heads or of key-value heads is neither 1 nor a multiple of `num_devices`.
        ValueError: If the queries or keys have an nn.RMSNorm, and this version of PyTorch cannot split it.

    Example:
        >>> plan = pc.tensor_parallel_plan(pc.SelfAttend(32, num_heads=4), num_devices=2)
        >>> sorted(plan)
        ['attention.key', 'attention.output', 'attention.query', 'attention.value', 'mlp.contract', 'mlp.expand']

    Reference: Shoeybi et al. 2019 (Megatron-LM), section 3.
    """
    checks.positive(num_devices=num_devices)
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        parts: Iterator[tuple[str, ParallelStyle]] = iter(())
        if isinstance(module, MultiHeadAttention):
            parts = _attention(name, module, num_devices)
        elif isinstance(module, MLP):
            parts = _mlp(module, num_devices)
        plan.update({f"{name}.{part}" if name else part: style for part, style in parts})
    return plan


def _attention(name: str, module: MultiHeadAttention, num_devices: int) -> Iterator[tuple[str, ParallelStyle]]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if module.num_heads == 1:
        return
    _check_divides(name, num_devices, num_heads=module.num_heads)
    yield "query", ColwiseParallel()
    yield "output", RowwiseParallel()
    if module.num_kv_heads == 1:
        yield from (("key_norm", _sum_gradients()), ("value", _sum_gradients()))
    else:
        _check_divides(name, num_devices, num_kv_heads=module.num_kv_heads)
        yield from (("key", ColwiseParallel()), ("value", ColwiseParallel()))
    for part in ("query_norm", "key_norm"):
        split = part == "query_norm" or module.num_kv_heads > 1
        norm = getattr(module, part)
        if split and any(True for _ in norm.parameters()):
            if isinstance(norm, nn.RMSNorm) and not hasattr(torch.ops.aten, "_fused_rms_norm"):
                where = f"{name}.{part}".removeprefix(".")
                raise ValueError(
                    f"PyTorch {torch.__version__} computes wrong gradients for a split RMSNorm ({where}); use a "
                    "newer version, or qk_norm=nn.LayerNorm"
                )
            yield part, SequenceParallel(sequence_dim=1, use_local_output=True)  # the axis of the heads


def _mlp(module: MLP, num_devices: int) -> Iterator[tuple[str, ParallelStyle]]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if module.contract.in_features % num_devices:
        return
    if getattr(module.activation, "inputs_per_output", 1) == 1:
        yield from (("expand", ColwiseParallel()), ("contract", RowwiseParallel()))
    else:  # a device may have values without their gates, so the activation gets all channels
        yield "expand", ColwiseParallel(output_layouts=Replicate())
        yield "contract", RowwiseParallel(input_layouts=Replicate())


def _check_divides(name: str, num_devices: int, **sizes: int) -> None:
    for size_name, size in sizes.items():
        if size % num_devices:
            raise ValueError(
                f"num_devices must divide {size_name}={size} of {name or 'the module'}; got {num_devices}. Use another "
                "number of devices, or plan only the other parts of the model"
            )


def _sum_gradients() -> ParallelStyle:
    """Return a style for a module that runs on every device, and whose output each device uses only for its own heads.

    In the backward pass, the gradients of its output are summed over the devices.
    """
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor.parallel import ParallelStyle

    class SumGradients(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            def summed(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
                whole = DTensor.from_local(output, device_mesh, [Replicate()], run_check=False)
                return whole.to_local(grad_placements=[Partial()])

            module.register_forward_hook(summed)
            return module

    return SumGradients()
