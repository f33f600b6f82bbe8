"""Lightning: training, going on after a break, precisions, summaries, averages of weights, graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.model_summary import ModelSummary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import perceiver_core as pc
from tests.ecosystem.lightning_module import WARNINGS, Wrapped, batches, loss_of, trainer, wrapped
from tests.integration.whole_models import MODELS, make

pytestmark = [
    pytest.mark.no_shape_checks,
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
    # PyTorch's, of an RMSNorm under autocast
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
each_model = pytest.mark.parametrize("name", MODELS)
each_class = pytest.mark.parametrize("name", ["image", "multimodal", "text", "all_frames", "hierarchical"])


def train(model: nn.Module, inputs: Any, steps: int = 4, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Trains by a plain loop. Returns the weights after each step."""
    states = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _, batch in zip(range(steps), [*batches(inputs)] * 3, strict=False):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):  # as Lightning
            loss = loss_of(model(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return states


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@each_class
def test_fit_is_a_plain_loop(name: str, precision: str) -> None:
    model, inputs = make(name)
    module = wrapped(model)
    trainer(max_epochs=1, precision=precision).fit(module, batches(inputs))
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    torch.testing.assert_close(module.model.state_dict(), train(model.train(), inputs, dtype=dtype)[-1], **EXACT)
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}


@each_class
def test_bfloat16_weights(name: str) -> None:
    """Lightning converts inputs, too, and makes bfloat16 the default dtype, on which no part relies."""
    model, inputs = make(name)
    module = wrapped(model)
    trainer(max_epochs=1, precision="bf16-true").fit(module, batches(inputs))
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    plain = model.train().bfloat16()
    halved = tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, [*batches(inputs)])
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    for batch in halved:
        optimizer.zero_grad()
        loss_of(plain(batch)).backward()
        optimizer.step()
    torch.testing.assert_close(module.model.state_dict(), plain.state_dict(), **EXACT)


@each_class
def test_a_resumed_run_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    whole = wrapped(model)
    kept = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(max_epochs=2, callbacks=[kept], enable_checkpointing=True).fit(whole, batches(inputs))
    resumed = wrapped(MODELS[name]()[0])
    trainer(max_epochs=2).fit(resumed, batches(inputs), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), **EXACT)

    again = Wrapped.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), **EXACT)
    loaded = pc.load(pc.save(again.model, tmp_path / "model"))
    torch.testing.assert_close(loaded.state_dict(), whole.model.state_dict(), **EXACT)


# Summaries


@pytest.mark.parametrize("depth", [1, -1])
@each_model
def test_a_summary_with_flops_and_sizes(name: str, depth: int) -> None:
    model, inputs = make(name)
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    module = wrapped(model)
    module.example_input_array = inputs if isinstance(inputs, torch.Tensor) else {"inputs": inputs}
    summary = ModelSummary(module, max_depth=depth)
    assert summary.total_flops == counter.get_total_flops() > 0
    assert summary.total_parameters == sum(weight.numel() for weight in model.parameters())
    outputs = model(inputs)
    if isinstance(outputs, torch.Tensor) and isinstance(inputs, torch.Tensor):
        assert (summary.in_sizes[0], summary.out_sizes[0]) == (list(inputs.shape), list(outputs.shape))
    assert "model" in str(summary)


def test_the_trainer_prints_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    module = wrapped(make("image")[0])
    module.example_input_array = make("image")[1]
    trainer(max_steps=1, enable_model_summary=True).fit(module, batches(make("image")[1]))
    assert "FLOPs" in capsys.readouterr().out


# Averages of weights


@each_class
def test_an_exponential_moving_average(name: str) -> None:
    model, inputs = make(name)
    module = wrapped(model)
    trainer(max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.75)]).fit(module, batches(inputs))
    first, *others = train(model.train(), inputs)
    average = {key: first[key] for key, _ in model.named_parameters()}
    for state in others:
        average = {key: 0.75 * value + 0.25 * state[key] for key, value in average.items()}
    actual = {key: value.detach() for key, value in module.model.named_parameters()}
    torch.testing.assert_close(actual, average, **CLOSE)


@each_class
def test_stochastic_weight_averaging(name: str) -> None:
    model, inputs = make(name)
    module = wrapped(model)
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer(max_epochs=3, callbacks=[average]).fit(module, batches(inputs))
    starts = [copy.deepcopy(model.state_dict()), *train(model.train(), inputs, steps=8)][::4]  # of each epoch
    expected = {key: torch.stack([state[key] for state in starts]).mean(0) for key, _ in model.named_parameters()}
    actual = {key: value.detach() for key, value in module.model.named_parameters()}
    torch.testing.assert_close(actual, expected, **CLOSE)


# Loggers


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # traces record sizes as constants
@pytest.mark.parametrize("name", ["image", "text"])
def test_a_graph_for_tensorboard(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    module = wrapped(model)
    module.example_input_array = inputs
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    trainer(max_steps=1, logger=logger).fit(module, batches(inputs))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    nodes = {node.name for node in events.Graph().node}
    assert any("Encoder[encoder]/CrossAttend" in node or "CrossAttend[cross_attention]" in node for node in nodes)


# Several processes: tests/ecosystem/test_lightning_strategies.py


def test_fsdp_of_lightning_needs_a_gpu() -> None:
    """It is FSDP1's; ModelParallelStrategy is FSDP2's, and takes a CPU."""
    with pytest.raises(ValueError, match="strategy `fsdp` requires a GPU"):
        trainer(strategy=FSDPStrategy())
