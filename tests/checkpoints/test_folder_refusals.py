"""Models that cannot be saved, since their constructors do not make them or their tensors are in no file."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import heads, kernels, positions, registry
from tests.checkpoints.folders import DIM, Blend, small

pytestmark = pytest.mark.no_shape_checks


@registry.register
class Homeless(nn.Module):
    def __init__(self, how):
        super().__init__()
        if how == "buffer":
            self.register_buffer("table", torch.arange(7.0), persistent=False)
        elif how == "attribute":
            self.table = torch.arange(7.0)
        elif how == "values":
            self.table = torch.arange(7.0).tolist()
        elif how == "extra":
            self.get_extra_state = lambda: {"steps": 3}
        elif how == "lazy":
            self.table = nn.LazyLinear(7)


class Stranger(nn.Module):
    dim = 1

    def forward(self, x, mask=None):
        return x[..., None]


def attend(model):
    return model.encoder.transformers[0].blocks[0].attention


CHANGES = {
    "a linear of another size": (lambda m: setattr(m.head, "logits", nn.Linear(DIM, 2)), r"head\.logits is .*out_fea"),
    "a linear of another kind": (
        lambda m: setattr(m.head, "logits", Blend(DIM)),
        r"head\.logits is tests\.checkpoints\.folders\.Blend",
    ),
    "an activation": (
        lambda m: setattr(m.encoder.reads[0].mlp, "activation", nn.ReLU()),
        r"encoder\.reads\.0\.mlp\.activation is torch.*ReLU\(\), not torch.*GELU\(approximate='tanh'\)",
    ),
    "rotary": (lambda m: setattr(attend(m), "rotary", positions.Rotary(2)), r"attention\.rotary is .*Rotary\(dim=2"),
    "a kernel": (
        lambda m: setattr(attend(m), "kernel", kernels.chunked),
        r"attention is .*kernel=\{'name': 'chunked'\}.* not .*kernel=\{'name': 'fastest'\}",
    ),
    "dropout": (lambda m: setattr(m.head.dropout, "p", 0.5), r"head\.dropout is .*p=0\.5.* not .*p=0\.0"),
    "positions": (
        lambda m: setattr(m.adapter.positions, "num_bands", 3),
        r"adapter\.positions is .*bands=3.* not .*bands=2",
    ),
    "a module more": (lambda m: setattr(m, "extra", nn.Linear(3, 2)), "extra is .*Linear.*, not missing"),
    "a module less": (lambda m: delattr(m.encoder.reads[0], "mlp_norm"), "mlp_norm is missing, not torch.*LayerNorm"),
    "a parameter": (lambda m: setattr(m, "extra", nn.Parameter(torch.ones(3))), r"unknown \['extra'\]"),
    "tied": (
        lambda m: setattr(m.encoder.reads[0].mlp.expand, "weight", m.encoder.reads[0].mlp.contract.weight),
        r"mlp\.contract\.weight and encoder\.reads\.0\.mlp\.expand\.weight are one tensor, not two",
    ),
    "another dtype": (
        lambda m: setattr(m.head.logits, "bias", nn.Parameter(m.head.logits.bias.to(torch.complex64))),
        r"head\.logits\.bias has shape \(3,\) torch\.complex64, not \(3,\) torch\.float32",
    ),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES.keys())
def test_a_model_that_its_constructor_does_not_make_is_refused(change, message, tmp_path):
    model = small()
    change(model)
    with pytest.raises(
        ValueError, match=f"(?s)Perceiver is no longer as its constructor built it: .*{message}"
    ) as caught:
        pc.save(model, tmp_path / "new")
    assert "Replace whole parts (model.head = ...), or register a part" in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("head", [Stranger(), type("Local", (heads.Identity,), {})()], ids=["stranger", "subclass"])
def test_parts_that_are_not_registered_are_refused(head, tmp_path):
    model = small()
    model.head = head
    with pytest.raises(ValueError, match=r"head is .*, which is not registered. Put @perceiver_core\.register above"):
        pc.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "how, message",
    [
        ("buffer", r"inner \(Homeless\) has a tensor 'table' that is in no file. Keep it in a buffer"),
        ("attribute", r"inner \(Homeless\) has a tensor 'table' that is in no file"),
        ("values", "Homeless cannot be built from its configuration: .*meta"),
        ("extra", r"inner\._extra_state is not a tensor with values \(dict\)"),
        ("lazy", r"inner\.table\.weight is not a tensor with values \(UninitializedParameter\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_tensor_that_is_in_no_file_is_refused(how, message, tmp_path):
    part = Homeless(how)
    if how == "extra":
        type(part).get_extra_state = lambda self: {"steps": 3}
    try:
        with pytest.raises(ValueError, match=message):
            pc.save(Blend(5, inner=part), tmp_path / "new")
    finally:
        if how == "extra":
            del type(part).get_extra_state
    assert not (tmp_path / "new").exists()


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = small()
    with pytest.raises(ValueError, match=r"encoder\.latents is on the meta device, where it has no values to save"):
        pc.save(model, tmp_path)


def test_a_model_of_unequal_settings_says_so_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"factor is inf, which JSON cannot represent"):
        pc.save(Infinite(math.inf), tmp_path / "new")
    with pytest.raises(ValueError, match=r"the config\.json of Infinite must have at most 1048576 bytes"):
        pc.save(Infinite("x" * 2**20), tmp_path / "new")
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module; got partial"):
        pc.save(partial(pc.MLP, widening_factor=3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@registry.register
class Infinite(nn.Module):
    def __init__(self, factor):
        super().__init__()
