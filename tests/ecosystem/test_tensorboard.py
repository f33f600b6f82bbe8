"""TensorBoard: graphs of models, and histograms of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    # PyTorch's own: the graph is of torch.jit.trace, which warns of everything that it records as a constant
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning"),
]
DICTIONARIES = ("multimodal",)  # torch.jit.trace takes no dictionary of inputs that holds another one


@pytest.mark.parametrize("name", [name for name in MODELS if name not in DICTIONARIES])
def test_graph_and_histograms(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    expected = model(inputs)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, (inputs,))
        for parameter, value in model.named_parameters():
            writer.add_histogram(parameter, value)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["histograms"]) == {parameter for parameter, _ in model.named_parameters()}
    assert b"Linear" in events._graph
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_graph_of_nested_dictionaries_is_refused_by_torch_jit(tmp_path: Path) -> None:
    model, inputs = make("multimodal")
    with SummaryWriter(str(tmp_path)) as writer, pytest.raises(RuntimeError, match="Tracer cannot infer type"):
        writer.add_graph(model, (inputs,))
