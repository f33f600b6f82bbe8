"""Models, parts and files that the tests of saved folders share."""

from __future__ import annotations

import json

import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, heads, positions, registry

DIM, LATENTS, HEADS, CLASSES = 14, 5, 7, 3
MULTI_HEAD = pc.MultiHeadAttention


def trained(model):
    """Every number made different from what a constructor gives."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else 3)
    return model


def encoder(input_dim=11, **options):
    return pc.Encoder(input_dim, num_latents=LATENTS, dim=DIM, num_heads=HEADS, **{"depth": 1, **options})


def perceiver(adapter, head=None, **options):
    return pc.Perceiver(adapter, encoder(adapter.dim, **options), head or heads.Classification(DIM, CLASSES))


def small():
    return perceiver(adapters.Image(1, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7)))


def assert_comes_back(model, inputs, path):
    model = trained(model).eval()
    again = pc.load(pc.save(model, path))
    wanted, found = model.state_dict(), again.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert repr(again) == repr(model)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))
    return again


def fourier(axes):
    return positions.Fourier(num_axes=axes, num_bands=2, max_resolution=[7.0, 11.0, 13.0][:axes])


PICTURES, SOUND, CLOUD = torch.rand(2, 3, 13, 11), torch.rand(2, 37), torch.rand(2, 17, 5)


CONFIG_OF_SMALL = """\
{
  "library": "perceiver_core",
  "format": 1,
  "model": {
    "part": "Perceiver",
    "adapter": {
      "part": "Image",
      "num_channels": 1,
      "positions": {
        "part": "Fourier",
        "num_axes": 2,
        "num_bands": 2,
        "max_resolution": 7
      }
    },
    "encoder": {
      "part": "Encoder",
      "input_dim": 11,
      "num_latents": 5,
      "dim": 14,
      "depth": 1,
      "num_heads": 7
    },
    "head": {
      "part": "Classification",
      "dim": 14,
      "num_classes": 3
    }
  }
}
"""


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def described(change):
    """The description of `small`, changed."""
    model = json.loads(CONFIG_OF_SMALL)["model"]
    return change(model) or model


def write(path, model):
    config = {"library": "perceiver_core", "format": 1, "model": model}
    (path / "config.json").write_text(json.dumps(config))


@registry.register
class Blend(nn.Module):
    """A part of a user's."""

    def __init__(self, dim, *, inner=None, tied=False):
        super().__init__()
        self.dim = dim
        self.inner = nn.Identity() if inner is None else inner
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.inner(self.a(x) * self.b(x))


@registry.register
class Learner(nn.Module):
    """An activation with weights and a counter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int32))

    def forward(self, x):
        return x * self.slope + self.steps.sum()
