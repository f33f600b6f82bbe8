"""Summaries of models: shapes, parameters, FLOPs by part, and models that stay as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import perceiver_core as pc
from perceiver_core import adapters, heads, positions
from perceiver_core.inspection.summary import _scaled
from tests.integration.whole_models import MODELS, encoder, make

each_model = pytest.mark.parametrize("name", MODELS)


def by_name(model, *inputs, **options):
    return {part.name: part for part in pc.summary(model, *inputs, **options)}


def perceiver(**options):
    adapter = adapters.Image(3, positions=positions.LearnedGrid((4, 5), dim=6))
    made = encoder(adapter.dim, **options)
    return pc.Perceiver(adapter, made, heads.Classification(made.dim, 3))


@each_model
class TestWholeModels:
    def test_the_model_is_the_first_row(self, name):
        model, inputs = make(name)
        whole = pc.summary(model, inputs)[0]
        output = model(inputs)
        expected = (
            {key: tuple(x.shape) for key, x in output.items()} if isinstance(output, dict) else tuple(output.shape)
        )
        assert (whole.name, whole.type, whole.num_calls, whole.output) == ("", type(model).__name__, 1, expected)
        assert whole.num_parameters == whole.num_trainable == sum(p.numel() for p in model.parameters())

    def test_flops_are_those_that_pytorch_counts(self, name):
        """With the attention that it counts: it has no formula for the fused one on a CPU."""
        model, inputs = make(name)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(inputs)
        with torch.no_grad():
            assert pc.summary(model, inputs)[0].flops == counter.get_total_flops() > 0

    def test_parts_of_one_level_add_up(self, name):
        """Every FLOP and every parameter belongs to one part, but for parameters and products of the model itself."""
        model, inputs = make(name)
        whole, *parts = pc.summary(model, inputs, depth=1)
        assert [part.name for part in parts] == [name for name, _ in model.named_children()]
        assert sum(part.flops for part in parts) == whole.flops
        assert sum(part.num_parameters for part in parts) == whole.num_parameters

    @pytest.mark.no_shape_checks  # they draw random numbers
    def test_nothing_changes(self, name):
        model, inputs = make(name)
        model.train()
        next(model.children()).eval()
        first = next(iter(model.parameters()))
        first.grad = torch.ones_like(first)
        before, states = state_of(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        pc.summary(model, inputs, depth=9)
        assert same(state_of(model), before)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


def state_of(model):
    tensors = [
        (path, x, x.clone(), x.requires_grad, x.grad) for path, x in [*model.named_parameters(), *model.named_buffers()]
    ]
    modes = [
        (path, part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for path, part in model.named_modules()
    ]
    return tensors, modes


def same(actual, before):
    tensors = all(
        path == name and x is y and torch.equal(x, old) and flag == needs and grad is gradient
        for (path, x, _, flag, grad), (name, y, old, needs, gradient) in zip(actual[0], before[0], strict=True)
    )
    return tensors and actual[1] == before[1]


def test_flops_by_hand():
    linear = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7, bias=False))
    parts = by_name(linear, torch.zeros(11, 3))
    assert [(part.name, part.flops) for part in parts.values()] == [
        *(("", 2 * 11 * (15 + 35)), ("0", 2 * 11 * 15), ("1", 0), ("2", 2 * 11 * 35)),
    ]
    assert [part.num_parameters for part in parts.values()] == [55, 20, 0, 35]


def test_shared_parts_have_one_row_and_all_their_calls():
    parts = by_name(perceiver(num_reads=3, depth=2), torch.rand(2, 3, 4, 5))
    calls = {name: part.num_calls for name, part in parts.items() if name.startswith("encoder.")}
    assert calls == {"encoder.reads.0": 1, "encoder.reads.1": 2, "encoder.transformers.0": 3}
    alone = by_name(perceiver(num_reads=1, depth=2), torch.rand(2, 3, 4, 5))
    assert parts["encoder.transformers.0"].flops == 3 * alone["encoder.transformers.0"].flops


def test_a_part_that_two_parents_share_has_one_row():
    inner = nn.Linear(3, 3)
    parts = by_name(nn.Sequential(nn.Sequential(inner), inner), torch.zeros(2, 3))
    assert [(name, part.num_calls, part.flops) for name, part in parts.items()][1:] == [("0", 1, 36), ("0.0", 2, 72)]


def test_attention_of_pytorch_is_counted():
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
    flops = by_name(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.zeros(1, 5, 8))[""].flops
    assert flops == 2 * (2 * 5 * (4 * 64 + 2 * 128) + 2 * 2 * 25 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_parameters_count_once():
    parts = by_name(*make("text"))
    assert parts["embedding"].num_parameters == 11 * 12 + 13 * 12
    assert parts["head"].num_parameters == 11


def test_trainable_parameters():
    model = perceiver()
    model.encoder.requires_grad_(False)
    parts = by_name(model, torch.rand(2, 3, 4, 5))
    assert parts["encoder"].num_trainable == parts["encoder.reads.0"].num_trainable == 0
    assert parts[""].num_trainable == parts["adapter"].num_trainable + parts["head"].num_trainable > 0


def test_blocks_are_not_divided_and_levels_are_chosen():
    model = perceiver(num_reads=1)
    assert {part.name.count(".") for part in pc.summary(model, torch.rand(2, 3, 4, 5), depth=9)} == {0, 1, 2, 4}
    assert "encoder.transformers.0.blocks.0" in by_name(model, torch.rand(2, 3, 4, 5), depth=9)
    assert [part.name for part in pc.summary(model, torch.rand(2, 3, 4, 5), depth=0)] == [""]


def test_the_strategy_of_reads_is_that_without_a_summary():
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=8, max_resolution=32))
    model = pc.Perceiver(image, encoder(image.dim, num_reads=1, num_latents=64), heads.Identity()).eval()
    x, chosen = torch.rand(1, 3, 32, 24), []
    expected = type(pc.explain_reads(model, x)[0].strategy)

    class Watched(pc.reads.Auto):
        def choose(self, context):
            decision = super().choose(context)
            chosen.append(type(decision.strategy))
            return decision

    pc.reads.set_strategy(model, Watched())
    pc.summary(model, x, depth=9)
    assert set(chosen) == {expected}


class TestInputs:
    def test_masks_and_keywords(self):
        model, ids = make("text")
        mask = torch.arange(13) >= torch.tensor([[0], [4]])
        assert by_name(model, ids, mask=mask)[""].output == (2, 5, 11)
        assert by_name(model, ids, labels=ids)[""].output == ()
        assert "scalar" in str(pc.summary(model, ids, labels=ids))

    def test_selected_queries(self):
        model, inputs = make("sound")
        assert by_name(model, inputs, query_inputs=torch.tensor([0, 3]))["decoder"].output == (2, 2, 5)

    def test_the_meta_device(self):
        with torch.device("meta"):
            model = pc.create("perceiver_modelnet40")
        whole = pc.summary(model, torch.rand(2, 2000, 3, device="meta"))[0]
        assert whole.output == (2, 40)
        assert whole.num_parameters == 44_772_202

    def test_compiled_models_run_uncompiled(self):
        model, inputs = make("image")
        compiled = torch.compile(model, backend=lambda graph, example: pytest.fail("compiled"))
        assert pc.summary(compiled, inputs) == pc.summary(model, inputs)

    def test_modules_of_pytorch_and_empty_outputs(self):
        class Nothing(nn.Module):
            def forward(self, x):
                return None

        assert by_name(nn.Sequential(nn.Flatten(), Nothing()), torch.zeros(2, 3))["1"].output is None
        assert by_name(nn.LSTM(3, 5), torch.zeros(2, 7, 3))[""].output == [(2, 7, 5), [(1, 7, 5), (1, 7, 5)]]

    def test_batch_norm_and_dropout_in_training(self):
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout()).train()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        pc.summary(model, torch.randn(7, 3))
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert all(part.training for part in model.modules())

    def test_an_error_leaves_the_model_as_it_was(self):
        model = perceiver().train()
        before = state_of(model)
        with pytest.raises(ValueError, match="3 channels"):
            pc.summary(model, torch.rand(2, 5, 4, 5))
        assert same(state_of(model), before)


class TestTable:
    def test_columns_are_aligned(self):
        lines = str(pc.summary(perceiver(), torch.rand(2, 3, 4, 5))).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[0].split() == ["part", "class", "calls", "output", "parameters", "trainable", "FLOP"]
        assert lines[1].startswith("(model)")
        column = lines[0].index("class")
        assert all(line[column - 1] == " " and line[column] != " " for line in lines)

    def test_dictionaries_of_outputs(self):
        assert "image: 2 x 3 x 3 x 5, label: 2 x 4" in str(pc.summary(*make("multimodal")))

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0"), (999, "999"), (1000, "1 k"), (999_999, "1 M"), (12_345e6, "12.3 G"), (3e20, "300 E")],
    )
    def test_numbers_have_three_digits(self, count, text):
        assert _scaled(count) == text
