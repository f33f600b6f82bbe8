"""Fuzzer of random compositions: each outcome is a result, equal on all paths, or an error that names an argument.

A case draws a model of the library's parts, its inputs, and some checks. In a share of the cases, one argument of one
call is made invalid: the outcome may then be a TypeError or ValueError that the library raises itself and that names
the argument. Everything else raises `Escape`, whose message contains all calls of the case.

    python -m tests.robustness.compositions 17    # runs the case of seed 17 by itself
"""

from __future__ import annotations

import linecache
import random
import re
import sys
import tempfile
import traceback
import warnings
from inspect import signature
from pathlib import Path

import torch
from torch import nn

from perceiver_core import registry
from perceiver_core.checkpoints.card import as_calls
from tests.robustness.composition_checks import CHECKS, is_garbage, shape_and_values
from tests.robustness.composition_draws import Draw, Invalid
from tests.robustness.composition_functions import run_function
from tests.robustness.composition_generation import generated
from tests.robustness.composition_models import Case, draw_case, in_dtype

FUNCTION_SHARE = 0.13  # cases that call functions of the library rather than a model
# Warnings that are right: of positions, and of torch for an nn.RMSNorm of float32 weights under autocast.
WARNINGS = ("positions span the padded input", "Mismatch dtype between input and weight")
GENERATION_SHARE = 0.5  # cases with Perceiver AR that generate


class Escape(Exception):  # noqa: N818 (an outcome)
    """Outcome that is neither a result that is equal on all paths nor an error that names an argument."""


def run_case(seed: int, folder: Path) -> str:
    """Run the case of a seed. Return its outcome, or raise Escape.

    Args:
        seed: Seed of all random choices.
        folder: Empty folder, to which models are saved.
    """
    return run(Draw(random.Random(seed)), folder, f"seed {seed}")


def run(draw: Draw, folder: Path, name: str = "") -> str:
    """Run a case with the choices of `draw`. `name` identifies the case in the message of an escape."""
    case: list[Case] = []
    torch.manual_seed(draw.generator.initial_seed())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message)
            return _outcome(draw, folder, case)
    except Exception as error:
        if draw.invalid is not None and refuses(error, draw):
            return f"refused: {type(error).__name__}"
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Escape(f"{first}\n{name}, {described(draw, case)}") from error


def _outcome(draw: Draw, folder: Path, drawn: list[Case]) -> str:
    if draw.flag(FUNCTION_SHARE):
        return run_function(draw, folder)
    case = draw_case(draw)
    drawn.append(case)
    if all(parameter.is_meta for parameter in case.model.parameters()):
        case.model(case.inputs, **case.options)
        return f"equal: {type(case.model).__name__}, shapes"
    in_dtype(case, draw.dtype)
    args, case.options = draw.call(case.model, case.inputs, **case.options)
    case.inputs = args[0]
    draw.names += names_of(case.model)
    shape_and_values(draw, case, folder)
    if is_garbage(draw, case):
        return "equal: NaN"
    if hasattr(case.model, "num_latents") and "labels" not in case.options and draw.flag(GENERATION_SHARE):
        generated(draw, case, folder)
        return "equal: generation"
    for check in draw.random.sample(CHECKS, len(CHECKS)):
        draw.calls.append(f"# {check.__name__}")
        if check(draw, case, folder):
            break
    return f"equal: {type(case.model).__name__}"


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the forward arguments of all parts of a model, which its errors may name."""
    return tuple({name for part in model.modules() for name in signature(part.forward).parameters})


def refuses(error: Exception, draw: Draw) -> bool:
    """Return whether an error is a refusal of the invalid argument that names it.

    The error has to be raised by a statement of the library. It names the argument itself; an error of a later call
    may instead name an argument of that call, such as a width that does not fit.
    """
    assert draw.invalid is not None
    if type(error) not in (TypeError, ValueError) or not raised_by_library(error):
        return False
    text = str(error)
    invalid: Invalid = draw.invalid
    later = draw.names if draw.calls and not draw.calls[-1].startswith(f"{invalid.call}(") else ()
    if invalid.call.endswith(".forward") or invalid.call == "reference":
        later = (*draw.names, "queries", "keys", "values")  # of two tensors that do not fit, either may be named
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in (invalid.name, *later))


def raised_by_library(error: BaseException) -> bool:
    """Return whether the innermost frame of the traceback is a `raise` statement of the library."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return "perceiver_core" in frame.filename and line.startswith("raise ")


def described(draw: Draw, case: list[Case]) -> str:
    """Return the composition as constructor calls, and all calls and choices of the case."""
    lines = [f"batch {draw.batch}, {draw.dtype}, invalid {draw.invalid}"]
    if case:
        lines[0] += f", {'training' if case[0].training else 'evaluation'}"
        try:
            lines.append(as_calls(registry.to_config(case[0].model)))
        except ValueError:
            lines.append(repr(case[0].model))
    return "\n".join([*lines, *draw.calls])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            print(run_case(int(argument), Path(scratch)))
