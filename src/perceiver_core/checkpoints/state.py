"""Functions that check the tensors in state dicts (names, shapes, dtypes, memory) and compare two models."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from perceiver_core import registry

_WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)
TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, keyed by name
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state dict, keyed by name. Tied tensors appear only under their first name.

    Raises:
        ValueError: If a value in the state dict is not a tensor.
        ValueError: If a tensor is lazy, sparse, or a wrapper of other tensors, such as a quantized or sharded tensor.
    """
    state = model.state_dict(keep_vars=True)
    hint = (
        ". Save the model before it is quantized, sharded or otherwise changed, or save its state_dict() with the "
        "library that changed it"
    )
    for name, value in state.items():
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value) or value.layout is not torch.strided:
            raise ValueError(f"{name} is not a tensor with values ({type(value).__name__}) and cannot be saved{hint}")
        if _wraps_others(value):
            raise ValueError(
                f"{name} is a {type(value).__name__}, a tensor that has no values itself but wraps others, so it "
                f"cannot be saved{hint}"
            )
    return {name: state[name] for name, first in first_names(model).items() if name == first}


def check_plain_weights(model: nn.Module) -> None:
    """Check that no parametrization, pruning, weight norm or spectral norm computes a weight from other tensors."""
    for path, module in model.named_modules():
        if is_parametrized(module):
            names = ", ".join(module.parametrizations)
            remedy = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
        else:
            hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]
            names = ", ".join(str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")) for hook in hooks)
            remedy = (
                "torch.nn.utils.prune.remove(module, name), torch.nn.utils.remove_weight_norm(module, name) or "
                "torch.nn.utils.remove_spectral_norm(module, name)"
            )
        if names:
            raise ValueError(
                f"{path or 'the model'} computes {names} from other tensors, so it cannot be saved. First make each of "
                f"them a plain weight: {remedy}"
            )


def _wraps_others(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return False
    try:
        return tensor.untyped_storage().data_ptr() == 0
    except (NotImplementedError, RuntimeError):  # the tensor has no storage at all
        return True


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each name in the state dict to the name under which its tensor is saved.

    If "a.weight" and "b.weight" are tied, both map to the first name, "a.weight". All other names map to themselves.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace the tensors of a model with the tensors in `state`, without copying. Tied tensors stay tied.

    The model may be on the meta device. For a tied tensor, `state` needs to contain only its first name.
    """
    new: dict[int, Tensor] = {}
    targets = model.state_dict(keep_vars=True)
    for name, old in targets.items():
        if id(old) not in new:
            tensor = state[name].detach()
            new[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    model.load_state_dict({name: new[id(old)] for name, old in targets.items()}, assign=True)


def check_values(tensors: dict[str, Tensor]) -> None:
    """Check that no tensor is on the meta device and that no two tensors overlap in memory."""
    spans: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, where it has no values to save")
        if tensor.numel():
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + reach * tensor.element_size(), name))
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(spans)):
        if device == other_device and start < end:
            raise ValueError(
                f"{name} and {other} share memory but are two tensors, so their tie would be lost. "
                "Make them one nn.Parameter in the constructor of a registered part, or copy one"
            )


def tensor_specs(tensors: dict[str, Tensor]) -> TensorSpecs:
    """Return the shape and dtype of each tensor, keyed by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def specs_in(file: Any) -> TensorSpecs:
    """Return the shape and dtype of each tensor in an open safetensors file, keyed by name, without reading values."""
    specs: TensorSpecs = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        entry = file.get_slice(name)
        if entry.get_dtype() not in _TORCH_NAMES:
            raise ValueError(f"model.safetensors holds values of type {entry.get_dtype()}, which no part has")
        specs[name] = tuple(entry.get_shape()), getattr(torch, _TORCH_NAMES[entry.get_dtype()])
    return specs


def model_differences(built: nn.Module, model: nn.Module) -> str:
    """Describe how `model` differs from `built`, the model built by its constructor calls. Return "" if they match."""
    was, is_ = (
        {path: registry.settings(module) for path, module in either.named_modules(remove_duplicate=False)}
        for either in (built, model)
    )
    found = [
        f"{path or 'it'} is {is_.get(path, 'missing')}, not {was.get(path, 'missing')}"
        for path in is_ | was
        if is_.get(path) != was.get(path)
    ]
    if not found:
        was, is_ = first_names(built), first_names(model)
        found = [
            f"{name} and {was[name]} are two tensors, not one"
            if first == name
            else f"{name} and {first} are one tensor, not two"
            for name, first in is_.items()
            if first != was.get(name, first)
        ]
    return "; ".join(found[:5])


def spec_differences(expected: TensorSpecs, actual: TensorSpecs) -> str:
    """Describe the differences in tensor names, shapes and dtypes as one line. Return "" if there are none.

    Two different floating-point dtypes count as equal, so that weights may be in half precision.
    """
    missing, unknown = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    others = []
    for name in sorted(expected.keys() & actual.keys()):
        (shape, dtype), (expected_shape, expected_dtype) = actual[name], expected[name]
        both_floating = dtype.is_floating_point and expected_dtype.is_floating_point
        if shape != expected_shape or (dtype != expected_dtype and not both_floating):
            others.append(f"{name} has shape {shape} {dtype}, not {expected_shape} {expected_dtype}")
    parts = [f"missing {missing[:5]}"] * bool(missing) + [f"unknown {unknown[:5]}"] * bool(unknown) + others[:5]
    return "; ".join(parts)
