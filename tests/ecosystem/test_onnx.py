"""Models in ONNX, as they come: exported once, run by onnxruntime for other batch sizes and lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import perceiver_core as pc
from tests.ecosystem.export_cases import (
    CASES,
    DIM,
    Case,
    Inputs,
    built,
    drawn,
    image,
    images,
    outputs,
    perceiver,
    sizes,
    valid,
    varying,
)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.no_shape_checks,
    # torch's own, when it decomposes an exported program
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disables messages of the exporter, such as that torchvision is not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def exported(model: nn.Module, inputs: Inputs, dynamic_shapes: Any = None) -> onnxruntime.InferenceSession:
    program = torch.onnx.export(
        model, inputs[0], kwargs=inputs[1], dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
    )
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: object) -> list[Tensor]:
    names = [x.name for x in session.get_inputs()]
    arrays = [x.numpy() for x in tree_leaves(inputs)]
    return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, arrays, strict=True)))]


def with_kernel(kernel: Callable[..., Tensor]) -> pc.Perceiver:
    attention = partial(pc.MultiHeadAttention, qk_dim=DIM, kernel=kernel)
    return perceiver(image(), num_reads=1, cross_attention=partial(pc.CrossAttend, attention=attention))


def with_strategy(strategy: pc.reads.Strategy) -> pc.Perceiver:
    return perceiver(image(), num_reads=1, cross_attention=partial(pc.CrossAttend, strategy=strategy))


def masked_images(b: int, n: int) -> Inputs:
    return images(b, n)[0], {"mask": valid(b, n, n + 2)}


OPTIONS = {
    "structured reads": Case(lambda: with_strategy(pc.reads.Structured()), masked_images),
    # ONNX has no guards: with the number of chunks of the example inputs, outputs would be wrong, without an error.
    "chunks of keys": Case(lambda: with_kernel(partial(pc.kernels.chunked, chunk_size=48)), masked_images),
}
NAMES = ["masked image", "convolutions", "audio", "masked points", "selected queries", "masked captions", "masked AR"]
TRIED = {name: CASES[name] for name in [*NAMES, "resampler", "hierarchical"]} | OPTIONS


@pytest.mark.parametrize("case", TRIED.values(), ids=TRIED)
def test_it_runs_at_other_sizes(case):
    model = built(case)
    session = exported(model, case.inputs(5, 8), varying(model, case))
    for b, n in sizes(case):
        inputs = case.inputs(b, n)
        torch.testing.assert_close(run(session, inputs), outputs(model, inputs), **CLOSE)


def test_a_dictionary_of_inputs_is_passed_by_name():
    """torch.onnx.export takes a dictionary at the end of `args` for keyword arguments, so it is passed in `kwargs`."""
    case = CASES["table"]
    model, ((rows,), _) = built(case), case.inputs(5, 8)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="missing a required argument: 'inputs'"):
        exported(model, ((rows,), {}), varying(model, case))
    session = exported(model, ((), {"inputs": rows}), varying(model, case))
    for batch in (1, 3):
        inputs = case.inputs(batch, 8)
        torch.testing.assert_close(run(session, inputs), outputs(model, inputs), **CLOSE)


def test_half_precision():
    model = built(CASES["masked points"]).half()
    (points,), named = CASES["masked points"].inputs(5, 8)
    inputs = (points.half(),), named
    actual, expected = run(exported(model, inputs), inputs), outputs(model, inputs)
    assert actual[0].dtype == torch.float16
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


def test_onnxruntime_does_not_run_bfloat16_on_cpus():
    """Exporting works; the CPU kernels of onnxruntime for bfloat16 are missing. If this fails, the docs can say so."""
    model, x = built(CASES["points"]).bfloat16(), drawn(5, 8, 5).bfloat16()
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):  # the type is not public
        exported(model, ((x,), {}))
