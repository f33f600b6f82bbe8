"""torch.distributed.pipelining: a model split into stages, by its own tracer, gives the outputs of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.utils._pytree import tree_map

import perceiver_core as pc
from perceiver_core import reads
from tests.ecosystem.processes import run
from tests.integration.whole_models import drawn, encoder, make

pytestmark = [pytest.mark.no_shape_checks, pytest.mark.slow]

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64
Made = tuple[nn.Module, Any]


class Contiguous(nn.Module):
    """Adapter whose tokens can be sent to another process: PyTorch sends contiguous tensors only."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> pc.Tokens:
        tokens = self.adapter(x)
        return pc.Tokens(tokens.content.contiguous(), tuple(table.contiguous() for table in tokens.position_tables))


def vectors(**options: Any) -> Made:
    torch.manual_seed(0)
    return pc.Perceiver(nn.Linear(5, 7), encoder(7, **options), pc.heads.Regression(12)).eval(), drawn(2, 11, 5)


def image() -> Made:
    model, inputs = make("projected")
    model.adapter = Contiguous(model.adapter)
    return model, inputs


CASES: dict[str, tuple[Callable[[], Made], str]] = {
    "steps": (lambda: vectors(share=False), "encoder.reads.1"),
    "steps that share weights": (vectors, "head"),
    "blocks": (lambda: vectors(num_reads=1, depth=3), "encoder.transformers.0.blocks.1"),
    "image": (image, "encoder.reads.1"),
    "decoder": (lambda: make("sound"), "decoder"),
    "language": (lambda: make("text"), "latent_transformer.blocks.1"),
    "tied weights": (lambda: make("byte_text"), "latent_transformer"),
    "layers": (lambda: make("all_frames"), "resampler.layers.1"),
}


def stages_of(case: str) -> tuple[Any, nn.Module, Any]:
    """Reads are dense, because other strategies use the weights of norms and projections without calling them."""
    made, split = CASES[case]
    model, inputs = made()
    if isinstance(model, (pc.Perceiver, pc.PerceiverIO)):
        reads.set_strategy(model, reads.Dense())
    model, inputs = model.double(), tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    one = tree_map(lambda x: x[:1], inputs)
    pipe = pipeline(copy.deepcopy(model), mb_args=(one,), split_spec={split: SplitPoint.BEGINNING})
    assert pipe.num_stages == 2
    return pipe.build_stage(dist.get_rank(), CPU), model, inputs


def same_outputs(cases: list[str]) -> None:
    for case in cases:
        stage, model, inputs = stages_of(case)
        schedule = ScheduleGPipe(stage, n_microbatches=2)
        outputs = schedule.step(inputs) if stage.is_first else schedule.step()
        if stage.is_last:
            torch.testing.assert_close(outputs, model(inputs), **CLOSE, msg=lambda text, case=case: f"{case}: {text}")


def test_outputs() -> None:
    """Two microbatches of one sample."""
    run(same_outputs, list(CASES))


def loss_of(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().sum()


def same_gradients(case: str, schedule_type: type) -> None:
    stage, model, inputs = stages_of(case)
    target = torch.ones_like(model(inputs))
    schedule = schedule_type(stage, n_microbatches=2, loss_fn=loss_of, scale_grads=False)
    if stage.is_first:
        schedule.step(inputs)
    else:
        schedule.step(target=target)
    loss_of(model(inputs), target).backward()
    expected = dict(model.named_parameters())
    found = {name: p.grad for name, p in stage.submod.named_parameters() if p.grad is not None}
    assert len(found) > 5
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, **CLOSE, msg=name)


@pytest.mark.parametrize(("case", "schedule"), [("steps", ScheduleGPipe), ("layers", Schedule1F1B)])
def test_gradients(case: str, schedule: type) -> None:
    run(same_gradients, case, schedule)


@pytest.mark.refusal
def test_tokens_of_images_are_not_contiguous() -> None:
    """PyTorch's own limit, with its own message; `Contiguous` is the workaround."""
    with pytest.raises(RuntimeError, match="contiguous"):
        run(sent_as_they_are, timeout=20)


def sent_as_they_are() -> None:
    CASES["as they are"] = lambda: make("projected"), "encoder.reads.1"
    same_outputs(["as they are"])
