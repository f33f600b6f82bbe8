"""Differences between two models, or between the tensors of two, as text."""

from __future__ import annotations

from torch import nn

from perceiver_core import registry
from perceiver_core.checkpoints.state import TensorSpecs, first_names


def model_differences(built: nn.Module, model: nn.Module) -> str:
    """Describe the differences between a model and the one that its constructor calls build; empty if none."""
    was = {path: registry.settings(module) for path, module in built.named_modules(remove_duplicate=False)}
    is_ = {path: registry.settings(module) for path, module in model.named_modules(remove_duplicate=False)}
    found = [
        f"{path or 'it'} is {is_.get(path, 'missing')}, not {was.get(path, 'missing')}"
        for path in [*is_, *(path for path in was if path not in is_)]
        if is_.get(path) != was.get(path)
    ]
    if not found:
        was, is_ = first_names(built), first_names(model)
        tied = [name for name in is_ if is_[name] != was.get(name, is_[name])]
        found = [
            f"{name} and {is_[name] if is_[name] != name else was[name]} are "
            f"{'one tensor, not two' if is_[name] != name else 'two tensors, not one'}"
            for name in tied
        ]
    return "; ".join(found[:5])


def spec_differences(expected: TensorSpecs, actual: TensorSpecs) -> str:
    """Describe the differences of names, shapes and dtypes in one line; empty if there are none.

    Floating point dtypes may differ (weights in half precision).
    """
    missing = sorted(expected.keys() - actual.keys())
    unknown = sorted(actual.keys() - expected.keys())
    others = [
        f"{name} has shape {actual[name][0]} {actual[name][1]}, not {expected[name][0]} {expected[name][1]}"
        for name in sorted(expected.keys() & actual.keys())
        if expected[name][0] != actual[name][0]
        or (expected[name][1] != actual[name][1] and not expected[name][1].is_floating_point)
        or actual[name][1].is_floating_point != expected[name][1].is_floating_point
    ]
    parts = [f"missing {missing[:5]}"] * bool(missing) + [f"unknown {unknown[:5]}"] * bool(unknown) + others[:5]
    return "; ".join(parts)
