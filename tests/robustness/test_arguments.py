"""Wrong arguments of public classes, functions and methods: a finite result, or an error that names the argument."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, heads, kernels, losses, models, positions, queries, reads
from tests.robustness.arguments import Case, EscapeError, cases, run
from tests.robustness.valid_arguments import SUBJECTS

pytestmark = [pytest.mark.refusal, pytest.mark.filterwarnings("ignore")]
CASES_PER_SUBJECT = int(os.environ.get("ARGUMENT_CASES", "12"))  # 1,000,000 for all
PACKAGES = {
    "": pc,
    "adapters.": adapters,
    "heads.": heads,
    "kernels.": kernels,
    "losses.": losses,
    "models.": models,
    "positions.": positions,
    "queries.": queries,
    "reads.": reads,
}
# Protocols, results and containers that users do not build, and functions on files, which have tests of their own.
OTHERS = {
    *("ModelSummary", "PartSummary", "ReadExplanation", "ReadExplanations", "positions.Positions", "load", "save"),
    *("reads.Cost", "reads.Decision", "reads.FactoredKeysValues", "reads.KeysValuesCache", "reads.Memory", "register"),
    *(
        "reads.ReadContext",
        "reads.Sizes",
        "reads.Source",
        "reads.Strategy",
        "reads.factor",
        "KeysValues",
        "reads.KeysValues",
    ),
    *("kernels.PartialAttention", "kernels.merge", "reads.Dense", "reads.Factored", "reads.Structured"),
}


def some(name: str) -> list[Case]:
    """Return cases of a subject: in CI a few, from the shuffled list of all."""
    return [case for case in cases() if case.subject == name][:CASES_PER_SUBJECT]


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_wrong_argument_is_named(name: str) -> None:
    for case in some(name):
        with explained(case):
            run(case)


@contextmanager
def explained(case: Case) -> Iterator[None]:
    try:
        yield
    except EscapeError as escape:
        pytest.fail(f"{' '.join(case)}: {escape}")


def test_every_public_name_has_valid_arguments() -> None:
    public = {
        f"{prefix}{name}"
        for prefix, package in PACKAGES.items()
        for name in getattr(package, "__all__", [])
        if callable(getattr(package, name))
    }
    known = {name.rpartition(".")[2] for name in SUBJECTS}
    missing = {name for name in public - OTHERS - SUBJECTS.keys() if name.rpartition(".")[2] not in known}
    assert missing == set()


def encoder(**options: Any) -> pc.Encoder:
    return pc.Encoder(**{"input_dim": 5, "num_latents": 3, "dim": 8, "depth": 1, "num_heads": 2, **options})


NUMBERS: dict[str, Callable[[float], object]] = {
    "max_resolution": lambda x: positions.Fourier(2, max_resolution=x),
    "max_resolution[1]": lambda x: positions.Fourier(2, max_resolution=(7.0, x)),
    "max_frequency": lambda x: positions.FourierPerAxis(2, max_frequency=x),
    "scale": lambda x: positions.Gaussian(2, scale=x),
    "base": lambda x: positions.Rotary(base=x),
    "rate": lambda x: pc.DropLatents(x),
    "dropout": lambda x: pc.MLP(8, dropout=x),
    "prefix_dropout": lambda x: pc.PerceiverAR(adapters.TokenEmbedding(5, 8), num_latents=2, prefix_dropout=x),
    "sample_rate": lambda x: adapters.LogMel(x, positions=None),
    "f_min": lambda x: adapters.LogMel(8000, positions=None, f_min=x),
    "floor": lambda x: adapters.LogMel(8000, positions=None, floor=x),
    "token_mask_rate['a']": lambda x: adapters.Multimodal({"a": adapters.OneHotLabel(3)}, token_mask_rate={"a": x}),
    "modality_dropout['a']": lambda x: adapters.Multimodal({"a": adapters.OneHotLabel(3)}, modality_dropout={"a": x}),
    "temperature": lambda x: models.sampling.Sample(temperature=x),
    "top_p": lambda x: models.sampling.Sample(top_p=x),
    "label_smoothing": lambda x: losses.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), label_smoothing=x),
    "weight_decay": lambda x: pc.parameter_groups(nn.Linear(2, 2), weight_decay=x),
    "lr": lambda x: pc.parameter_groups(nn.Linear(2, 2), weight_decay=0.1, lr=x),
    "layer_decay": lambda x: pc.parameter_groups(encoder(), weight_decay=0.1, layer_decay=x),
    "linear": lambda x: reads.Machine(linear=x),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        NUMBERS[name](value)


IMAGE = partial(adapters.Image, 3, positions=None)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "positions that take no points": (
        lambda: adapters.PointCloud(positions=positions.Projected(positions.Fourier(3), dim=4)), "positions must",
    ),
    "a stem larger than its image": (
        lambda: IMAGE(stem=partial(adapters.SymmetricPadConvStem, dim=4))(torch.rand(1, 3, 1, 1)), r"\bimages\b|\bx\b",
    ),
    "an image shorter than its stem": (
        lambda: IMAGE(stem=partial(adapters.SymmetricPadConvStem, dim=4))(torch.rand(1, 3, 9, 9), lengths=[[2, 9]]),
        "lengths must be long enough",
    ),
    "a module as kernel": (lambda: pc.MultiHeadAttention(8, kernel=nn.Identity()), "kernel must"),
    "a negative width": (lambda: pc.Decoder(8, query_dim=6, out_dim=-1), "out_dim must"),
    "a width as text": (lambda: pc.Decoder(8, query_dim=6, out_dim="3"), "out_dim must"),
    "an index too large": (lambda: encoder().attention_map(torch.rand(1, 4, 5), queries=99), "queries must lie"),
    "a boolean index": (lambda: encoder().attention_map(torch.rand(1, 4, 5), queries=True), "queries must be"),
    "a fractional index": (lambda: encoder().attention_map(torch.rand(1, 4, 5), queries=1.5), "queries must be"),
    "a label out of range": (lambda: losses.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3])), "labels must lie"),
    "ids on another device": (
        lambda: adapters.TokenEmbedding(5, 8)(torch.zeros(1, 3, dtype=torch.long, device="meta")), "ids is on meta",
    ),
    "a mask on another device": (
        lambda: pc.Tokens(torch.rand(1, 3, 2), mask=torch.ones(1, 3, device="meta").bool()), "mask is on meta",
    ),
    "a depth as text": (lambda: encoder(depth="3"), "depth must"),
    "a rate as a tuple": (lambda: pc.MLP(8, dropout=()), "dropout must"),
    "no resolution": (lambda: positions.Fourier(2, max_resolution=None), "max_resolution must"),
    "a fractional size": (lambda: positions.LearnedGrid((1.5,), dim=4), r"grid\[0\] must"),
    "one rate for all modalities": (
        lambda: adapters.Multimodal({"a": adapters.OneHotLabel(3)}, modality_dropout=0.3), "modality_dropout must",
    ),
    "a factory that returns no module": (lambda: encoder(cross_attention=lambda *_: 3), "cross_attention must"),
    "a factory with other arguments": (lambda: encoder(cross_attention=lambda: 3), "cross_attention must"),
    "a scheme that returns no plan": (lambda: encoder(share=lambda steps: None), "share must return"),
    "a width that does not fit": (lambda: pc.MLP(8)(torch.rand(2, 3, 7)), r"\bx has shape \(2, 3, 7\)"),
    "another dtype": (lambda: pc.SelfAttend(8, num_heads=2)(torch.rand(2, 3, 8).double()), r"\bx has shape"),
    "no tensor": (lambda: pc.SelfAttend(8, num_heads=2)([1.0, 2.0]), "x must be a torch.Tensor"),
    "batches that differ": (
        lambda: pc.CrossAttend(8, 5)(torch.rand(2, 3, 8), torch.rand(3, 4, 5)), "tokens must have the same size as x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_errors_name_the_argument(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_an_error_of_a_users_module_is_unchanged() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("expected a shape that this module likes")

    model = pc.MLP(8, activation=Broken())
    with pytest.raises(RuntimeError, match="that this module likes"):
        model(torch.rand(2, 3, 8))


def test_an_error_names_the_users_argument_and_keeps_its_cause() -> None:
    with pytest.raises(ValueError, match=r"arguments do not fit MLP.forward: x has shape \(2, 3, 7\)") as caught:
        pc.MLP(8)(torch.rand(2, 3, 7))
    assert isinstance(caught.value.__cause__, RuntimeError)
