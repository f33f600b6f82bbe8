"""torch.profiler on whole models."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_unchanged(name: str) -> None:
    model, inputs = make(name)
    expected = model(inputs)
    options = {"record_shapes": True, "with_flops": True, "profile_memory": True}
    if torch.__version__ < (2, 14):  # later versions deprecate it
        options["with_modules"] = True
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)
    assert "aten::linear" in {event.key for event in profiler.key_averages()}


def test_a_structured_read_has_its_name_and_its_shapes() -> None:
    model, inputs = make("image", pc.reads.Structured())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        with record_function("forward"):
            out = model(inputs)
        out.sum().backward()
    averages = {event.key: event for event in profiler.key_averages(group_by_input_shape=True)}
    assert averages["forward"].count == 1
    read = averages["perceiver_core::read_grid"]
    assert read.input_shapes[2:4] == [[2, 12, 20], [2, 20]]  # content and scale; one learned table merges the axes
    assert "perceiver_core::read_grid_backward" in averages
    assert "perceiver_core::read_grid" in profiler.key_averages().table(sort_by="cpu_time_total")
