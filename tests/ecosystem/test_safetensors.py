"""safetensors: files of models, some with weights or modules that are used in several places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}
each_model = pytest.mark.parametrize("name", MODELS)


def shared_positions() -> tuple[nn.Module, torch.Tensor]:
    """Returns a model whose input and output positions are one module."""
    where = pc.positions.LearnedGrid((4, 5), dim=6)
    image = pc.adapters.Image(3, positions=where)
    queries = pc.queries.Grid(None, where)
    encoder = pc.Encoder(image.dim, num_latents=5, dim=12, num_reads=3, depth=1, num_heads=2)
    decoder = pc.Decoder(12, query_dim=queries.dim, out_dim=2)
    return pc.PerceiverIO(image, encoder, queries, decoder).eval(), torch.rand(2, 3, 4, 5)


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


@each_model
def test_save_model_and_load_model(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = zeroed(make(name)[0])
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    torch.testing.assert_close(again.state_dict(), model.state_dict(), **EXACT)
    torch.testing.assert_close(again(inputs), model(inputs), **EXACT)


@pytest.mark.parametrize("make_model", [lambda: make("text"), shared_positions], ids=["weights", "modules"])
def test_what_is_shared(make_model, tmp_path: Path) -> None:
    """save_model writes shared tensors once; save_file refuses them, unless each is named once."""
    model, inputs = make_model()
    expected = model(inputs)
    names = [name for name, _ in model.named_parameters()]  # of shared tensors, the first names only
    assert len(names) == len(model.state_dict()) - 1
    path = tmp_path / "model.safetensors"
    save_model(model, str(path))
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == len(names)
    again = zeroed(make_model()[0])
    load_model(again, path)
    torch.testing.assert_close(again(inputs), expected, **EXACT)

    with pytest.raises(RuntimeError, match="share memory"):
        save_file(model.state_dict(), path)
    save_file({name: model.get_parameter(name).detach() for name in names}, path)
    again = zeroed(make_model()[0])
    again.load_state_dict(load_file(path), strict=False)
    torch.testing.assert_close(again(inputs), expected, **EXACT)


@each_model
def test_the_weights_of_a_saved_folder(name: str, tmp_path: Path) -> None:
    """safetensors loads what `pc.save` wrote."""
    model, inputs = make(name)
    pc.save(model, tmp_path)
    again = zeroed(make(name)[0])
    assert load_model(again, tmp_path / "model.safetensors") == (set(), [])
    torch.testing.assert_close(again(inputs), model(inputs), **EXACT)


def test_half_precision(tmp_path: Path) -> None:
    model, inputs = make("image")
    save_model(model.bfloat16(), str(tmp_path / "model.safetensors"))
    again = make("image")[0].bfloat16()
    load_model(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(inputs.bfloat16()), model(inputs.bfloat16()), **EXACT)
