"""Wrong arguments of public classes, functions and methods: a finite result, or an error that names the argument."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, heads, kernels, losses, masks, models, positions, queries, reads, sharing
from tests.robustness.arguments import Case, EscapeError, cases, run
from tests.robustness.subjects import language
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


@pytest.mark.parametrize("name", NUMBERS)
def test_fractions_are_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(name)):
        NUMBERS[name](Fraction(1, 2))


@pytest.mark.parametrize("number", [1, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numbers_of_numpy_are_accepted(number: float) -> None:
    models.sampling.Sample(temperature=number)
    positions.Gaussian(2, scale=number)


IMAGE = partial(adapters.Image, 3, positions=None)
ROW, HEADS = torch.arange(3), torch.rand(1, 1, 3, 4)
ARRAYS = torch.rand(2, 3, 8), torch.rand(2, 5, 5)


def tables(grid: Any = (3, 5), reference: Any = (3, 5)) -> object:
    """Compute position tables whose grid is cached: an equal key, such as 3.0, must be refused, too."""
    fourier = positions.Fourier(2, num_bands=2)
    fourier.tables((3, 5), like=torch.rand(1), reference=(3, 5))
    return fourier.tables(grid, like=torch.rand(1), reference=reference)


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
    "a fractional number of queries": (lambda: masks.materialize(masks.Causal(), queries=2.5, keys=3), "queries must"),
    "a boolean number of keys": (lambda: masks.materialize(masks.Causal(), queries=2, keys=True), "keys must"),
    "complex positions": (lambda: masks.Padding(torch.ones(1, 3).bool())(ROW, ROW.cfloat()), "keys must be whole"),
    "a sparse mask": (lambda: pc.CrossAttend(8, 5)(*ARRAYS, mask=torch.ones(2, 5).bool().to_sparse()), "mask must be"),
    "a sparse mask of a kernel": (lambda: kernels.sdpa(*[HEADS] * 3, mask=ROW.bool().to_sparse()), "mask must be"),
    **{
        f"a reference of {value!r}": (partial(tables, reference=value), "reference must have 2 axes")
        for value in ("12", [True, False], [-1, -1], [0, 0], {3, 5}, (3.0, 5.0), (5,), 5)
    },
    **{
        f"a grid of {value!r}": (partial(tables, grid=value), "grid must have 2 axes")
        for value in ("35", (True, 5), (3.0, 5.0), {3, 5})
    },
    **{
        f"a reference of {value!r} tokens": (partial(positions.coordinates, 5, reference=value), "reference must")
        for value in (True, -3, 0, 2.5)
    },
    "a boolean number of points": (lambda: positions.coordinates(True), "size must"),
    "a fractional number of pairs": (lambda: positions.half_open_exponents(2.5, ROW.float()), "pairs must"),
    "integer position tables": (lambda: positions.LearnedGrid((3,), dim=4).tables((3,), like=ROW), "like must"),
    "complex position tables": (
        lambda: positions.FixedGrid(positions.NeRF(1), (3,)).tables((3,), like=ROW.cfloat()), "like must",
    ),
    **{
        f"a dropout rate of {value!r}": (partial(kernels.reference, *[HEADS] * 3, dropout=value), "dropout must")
        for value in (np.complex64(1j), True, "0.1", math.nan, -0.1, 1.5)
    },
    "a complex image": (lambda: pc.visualize.overlay(torch.rand(3, 4, 5).cfloat(), torch.rand(4, 5)), "image must"),
    "a flag as text": (
        lambda: pc.generate(language(), ROW[None], max_new_tokens=1, use_cache="False"), "use_cache must be True or",
    ),
    **{
        f"no latents for {type(head).__name__}": (partial(head, torch.rand(2, 0, 8)), "latents must not be empty")
        for head in (heads.LatentMean(8), heads.Regression(8), heads.Classification(8, 3))
    },
    "a floor of 0 in float32": (lambda: adapters.LogMel(8000, positions=None, floor=1e-50), "floor must be at least"),
    "a sample rate near 0": (lambda: adapters.LogMel(1e-36, positions=None), "sample_rate must be"),
    "a base near 0": (lambda: positions.Rotary(4, base=1e-60), "base must be at least"),
    "a resolution near infinity": (lambda: positions.Fourier(2, max_resolution=1e300), "max_resolution must be"),
    "a negative throughput": (lambda: reads.Machine(matmul=-2.0, linear=5.0), "matmul must be above 0"),
    "a throughput of 0": (lambda: reads.Machine(linear=0.0), "linear must be above 0"),
    "a negative time": (lambda: reads.Machine(start=-1.0), "start must be at least 0"),
    "heads of odd width": (
        lambda: pc.PerceiverAR(adapters.TokenEmbedding(5, 8), num_latents=3), "num_heads=8 .* heads must have",
    ),
    "latents of odd width": (
        lambda: pc.PerceiverAR(adapters.TokenEmbedding(5, 7), num_latents=3, num_heads=1), "heads must have an even",
    ),
    "an uninitialized parameter": (lambda: pc.MLP(nn.UninitializedParameter()), "dim must"),
    "half of a surrogate pair": (lambda: adapters.Bytes.encode(["a", "b\ud800"]), r"texts\[1\] must be valid Unicode"),
    "bytes as sizes": (lambda: adapters.Table(category_sizes=bytearray(b"ab"), dim=4), "category_sizes must"),
    "a memory view as sizes": (lambda: adapters.Table(category_sizes=memoryview(b"ab"), dim=4), "category_sizes must"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_errors_name_the_argument(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("scheme", [sharing.none, sharing.all_, sharing.all_but_first, sharing.paper])
def test_a_number_of_steps_may_be_an_array(scheme: sharing.Scheme) -> None:
    assert scheme(np.array(3)) == scheme(3)
    with pytest.raises(ValueError, match="steps must"):
        scheme(np.array(2.5))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_fuzzed_case_does_not_change_the_next(name: str) -> None:
    subject = SUBJECTS[name]
    for arguments in (subject.arguments, *subject.methods.values()):
        first, second = arguments(), arguments()
        assert first is not second
        for key, value in first.items():
            assert not isinstance(value, (list, dict, set, torch.Tensor)) or value is not second[key]


def test_an_error_of_a_users_module_is_unchanged() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("expected a shape that this module likes")

    model = pc.MLP(8, activation=Broken())
    with pytest.raises(RuntimeError, match="that this module likes"):
        model(torch.rand(2, 3, 8))


class WithoutAttribute(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.missing(x)


class WithoutPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Identity()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["b"](x)


class WithWrongLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("module", "error"),
    [(WithoutAttribute, AttributeError), (WithoutPart, KeyError), (WithWrongLayer, RuntimeError)],
)
def test_errors_that_pytorch_raises_in_a_users_module_are_unchanged(
    module: type[nn.Module], error: type[Exception]
) -> None:
    for model, inputs in (
        (pc.MLP(8, activation=module()), torch.rand(2, 3, 8)),
        (pc.Perceiver(adapters.Audio(4, positions=None), encoder(input_dim=4), module()), torch.rand(2, 9)),
    ):
        with pytest.raises(error) as caught:
            model(inputs)
        assert type(caught.value) is error


def test_an_error_names_the_users_argument_and_keeps_its_cause() -> None:
    with pytest.raises(ValueError, match=r"arguments do not fit MLP.forward: x has shape \(2, 3, 7\)") as caught:
        pc.MLP(8)(torch.rand(2, 3, 7))
    assert isinstance(caught.value.__cause__, RuntimeError)
