"""Fuzzer of arguments: in a valid call of each public class, function or method, one argument is replaced.

The call must then either work, with a finite result, or raise a TypeError or ValueError that names the argument.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.robustness.subjects import Subject
from tests.robustness.valid_arguments import SUBJECTS

VALUES: dict[str, Callable[[], Any]] = {
    **{repr(x): (lambda x=x: x) for x in (None, "3", b"x", -1, 0, 1.5, 10**30, -(10**30), True, (), [], {}, "", 1e308)},
    **{str(x): (lambda x=x: x) for x in (float("nan"), float("inf"), -float("inf"), 2**62, 1j)},
    "object": object,
    "lambda": lambda: lambda *args, **kwargs: None,
    "unary lambda": lambda: lambda: None,
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(2, 2),
    "scalar tensor": lambda: torch.tensor(3.0),
    "integer tensor": lambda: torch.tensor([1, 2]),
    "matrix": lambda: torch.rand(2, 3),
    "boolean tensor": lambda: torch.ones(2, 3, dtype=torch.bool),
    "numpy nan": lambda: np.float32("nan"),
    "numpy -1": lambda: np.int64(-1),
    "numpy array": lambda: np.array([1.5, -2.0]),
    "list of strings": lambda: ["a", "b"],
    "list of floats": lambda: [1.5, 2.5],
    "list of zeros": lambda: [0, 0],
    "nested list": lambda: [[1], [2, 3]],
    "dictionary": lambda: {"a": 1},
    "dictionary of None": lambda: {3: None},
    "range": lambda: range(3),
    "set": lambda: {1, 2},
    "generator": lambda: torch.Generator(),
    "dtype": lambda: torch.float32,
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda x: x.to("meta"),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "float": lambda x: x.float(),
    "long": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "uint8": lambda x: x.to(torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "first": lambda x: x[0] if x.ndim else x,
    "another axis": lambda x: x[None],
    "trailing axis": lambda x: x[..., None],
    "narrow": lambda x: x[..., :-1],
    "wide": lambda x: torch.cat([x, x], -1) if x.ndim else x,
    "three samples": lambda x: torch.cat([x, x[:1]]) if x.ndim else x,
    "one sample": lambda x: x[:1] if x.ndim else x,
    "second axis": lambda x: x[:, :-1] if x.ndim > 1 else x,
    "flat": lambda x: x.flatten(),
    "scalar": lambda x: x.flatten()[0],
    "no samples": lambda x: x[:0] if x.ndim else x,
    "empty": lambda x: x[..., :0] if x.ndim else x,
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "large": lambda x: x if x.dtype == torch.bool else x + 1000,
    "negative": lambda x: x if x.dtype == torch.bool else -1 - x,
    "gradient": lambda x: x.requires_grad_() if x.is_floating_point() else x,
}

torch.set_warn_always(True)  # by default, PyTorch warns once per process, so only the first case would escape

NOT_FINITE = ("nan", "inf", "-inf", "numpy nan", "1e+308")
# Names of the arguments of a part that gets an argument of a model: an adapter, a read or a query module.
ALIASES = {
    "inputs": ("images", "tokens"),
    "query_inputs": ("query_indices", "queries"),
    "caches": ("cache",),
    "config": ("model",),
    "rows": ("numbers", "categories"),
}


class Case(NamedTuple):
    """Replacement of an argument of a subject, or of one of its methods ("" for the subject itself)."""

    subject: str
    method: str
    argument: str
    value: str


class EscapeError(Exception):
    """Outcome that is neither a finite result nor an error that names the argument."""


@cache
def cases() -> list[Case]:
    """Return all cases, in an order that is random but always the same."""
    found = [Case(*case, value) for case in _arguments() for value in _values(*case)]
    random.Random(0).shuffle(found)
    return found


def _arguments() -> Iterator[tuple[str, str, str]]:
    for name, subject in SUBJECTS.items():
        calls = {"": subject.call, **{method: _method(subject, method) for method in subject.methods}}
        for method, call in calls.items():
            for argument, parameter in inspect.signature(call).parameters.items():
                if argument != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    yield name, method, argument


def _method(subject: Subject, method: str) -> Callable[..., Any]:
    is_module = inspect.isclass(subject.call) and issubclass(subject.call, nn.Module)
    found: Callable[..., Any] = getattr(subject.call, "forward" if is_module and method == "__call__" else method)
    return found


def _values(name: str, method: str, argument: str) -> list[str]:
    subject = SUBJECTS[name]
    given = (subject.methods[method] if method else subject.arguments)().get(argument)
    call = _method(subject, method) if method else subject.call
    words = str(inspect.signature(call).parameters[argument].annotation)
    # Any module and any callable is accepted as a part or a factory; whether it works is its own concern.
    free = (
        ("class", "module", "lambda")
        if re.search("Module|Callable|Scheme|Aggregate|Residual|Sampler|Loss", words)
        else ()
    )
    return [*(value for value in VALUES if value not in free), *(TENSORS if isinstance(given, Tensor) else ())]


def run_case(seed: int, folder: Path | None = None) -> str:
    """Run the case with this number. Return its outcome, or raise `EscapeError`."""
    return run(cases()[seed % len(cases())])


def run(case: Case) -> str:
    """Run a case. Return its outcome, or raise `EscapeError`."""
    subject = SUBJECTS[case.subject]
    torch.manual_seed(0)
    device = torch.device("meta") if "presets" in case.subject or case.subject == "create" else contextlib.nullcontext()
    method = ""
    try:
        with device, warnings.catch_warnings():
            warnings.filterwarnings("error", "Casting complex values to real discards the imaginary part")
            for method, result in _results(case, subject):  # noqa: B007 (the last one is used)
                if not _is_finite(result) and not (case.method and case.value in NOT_FINITE):
                    raise EscapeError("a result that is not finite")
    except EscapeError:
        raise
    except (TypeError, ValueError) as error:
        if not re.search(rf"\b({'|'.join(_names(subject, method, case.argument))})\b", str(error)):
            raise EscapeError(f"{type(error).__name__} without the name: {error}"[:300]) from error
        return f"refused: {type(error).__name__}"
    except Exception as error:
        raise EscapeError(f"{type(error).__name__}: {error}"[:300]) from error
    return "accepted"


def _names(subject: Subject, method: str, argument: str) -> set[str]:
    """Return the names of which an error must contain one: the arguments of the call that failed.

    A value may be legitimate by itself, but not fit another argument, which the error then names.
    """
    call = _method(subject, method) if method else subject.call
    names = {argument, *inspect.signature(call).parameters} - {"self"}
    return names | {alias for name in names for alias in ALIASES.get(name, ())}


def _results(case: Case, subject: Subject) -> Iterator[tuple[str, Any]]:
    """Yield the name of the next call ("" for the construction), then the result of each call."""
    yield "", None

    def arguments(method: str) -> dict[str, Any]:
        given = (subject.methods[method] if method else subject.arguments)()
        if method == case.method:
            before = given.get(case.argument)
            is_change = isinstance(before, Tensor) and case.value in TENSORS
            given[case.argument] = TENSORS[case.value](before) if is_change else VALUES[case.value]()
        return given

    made = subject.call(**arguments(""))
    yield "", made
    for method in subject.methods:
        if case.method in ("", method):
            yield method, None
            yield method, getattr(made, method)(**arguments(method))


def _is_finite(result: Any) -> bool:
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return all(bool(leaf.isfinite().all()) for leaf in leaves if leaf.layout is torch.strided)


def main(pattern: str = "") -> None:
    """Run all cases whose description contains `pattern`, and print the escapes."""
    outcomes: Counter[str] = Counter()
    for case in sorted(cases()):
        if pattern not in ".".join(case):
            continue
        try:
            outcomes[run(case)] += 1
        except EscapeError as escape:
            outcomes["escape"] += 1
            print(*case, "|", escape, flush=True)
    print(outcomes)


if __name__ == "__main__":
    main(*sys.argv[1:])
