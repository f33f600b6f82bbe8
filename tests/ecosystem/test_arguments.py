"""Constructor arguments of NumPy, OmegaConf and Hydra: models are built, equal, saved and loaded."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import pytest
import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import adapters, heads, positions, queries, reads
from perceiver_core.registry import names, to_config
from tests.integration.whole_models import DIM, MODELS, drawn, encoder, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}


class Both(NamedTuple):
    """Inputs of a model, and of its queries."""

    inputs: Tensor
    query_inputs: Tensor


def video() -> tuple[nn.Module, Any]:
    adapter = adapters.Video(3, positions=positions.FourierPerAxis(3, 2, max_frequency=8.0), patch_size=(1, 2, 2))
    mlp = partial(pc.MLP, activation=pc.SwiGLU())
    attention = partial(pc.MultiHeadAttention, qk_dim=8, rotary=pc.sharing.Shared(positions.Rotary(2, base=500.0)))
    transformer = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, mlp=mlp, attention=attention))
    made = encoder(adapter.dim, latent_transformer=transformer, latent_dropout=pc.DropLatents(0.25))
    query = queries.Coordinates(positions.Gaussian(2, 3, scale=4.0))
    decoder = pc.Decoder(DIM, query_dim=6, out_dim=8)
    return pc.PerceiverIO(adapter, made, query, decoder), Both(drawn(2, 2, 3, 4, 6), drawn(2, 5, 2))


def spectrogram() -> tuple[nn.Module, Any]:
    adapter = adapters.DropTokens(adapters.Spectrogram(positions=positions.NeRF(2, 3)), rate=0.25)
    strategy = reads.Auto([reads.Structured(), reads.Factored(), reads.Dense()], machine=reads.Machine(linear=100.0))
    read = partial(pc.CrossAttend, strategy=strategy, dropout=0.125, mlp=partial(pc.MLP, activation=pc.GEGLU()))
    made = encoder(adapter.dim, cross_attention=read, share=False)
    decoder = pc.Decoder(DIM, query_dim=7, cross_attention=partial(pc.CrossAttend, strategy=reads.Dense()))
    return pc.PerceiverIO(adapter, made, queries.External(7), decoder), Both(drawn(2, 4, 7), drawn(2, 5, 7))


def grid() -> tuple[nn.Module, Any]:
    adapter = adapters.Grid(3, positions=positions.Fourier(3, 2, max_resolution=[8.5, 12.5, 16.5], sine_only=True))
    query = queries.Grid([2, 3, 5], positions.Fourier(3, 2, max_resolution=7), endpoint=False)
    decoder = pc.Decoder(DIM, query_dim=query.dim, out_dim=5, chunk_size=7)
    head = heads.Grid([2, 3, 5], head=heads.Linear(5, 2), scale=0.5, channel_axis=2)
    return pc.PerceiverIO(adapter, encoder(adapter.dim), query, decoder, head), drawn(2, 3, 4, 5, 3)


def joint() -> tuple[nn.Module, Any]:
    attention = partial(pc.MultiHeadAttention, num_kv_heads=1, qk_norm=nn.RMSNorm)
    mlp = partial(pc.MLP, hidden_dim=10, activation=pc.SquaredReLU(), bias=False)
    block = partial(pc.JointAttend, attention=attention, mlp=mlp)
    return pc.Resampler(10, num_latents=3, dim=DIM, depth=2, num_heads=2, block=block), drawn(2, 7, 10)


def group() -> tuple[nn.Module, Any]:
    return pc.GroupedRead(9, pc.Level(2, num_latents=3, dim=DIM, depth=1, num_heads=2)), drawn(2, 7, 9)


def log_mel() -> tuple[nn.Module, Any]:
    fixed = positions.FixedGrid(positions.Fourier(1, num_bands=3), (9,))
    adapter = adapters.LogMel(8000, positions=fixed, num_mels=6, n_fft=32, hop_length=16)
    return pc.Perceiver(adapter, encoder(adapter.dim), heads.Identity()), drawn(2, 100)


EXTRA = {"video": video, "log_mel": log_mel, "spectrogram": spectrogram, "grid": grid, "joint": joint, "group": group}


def model_of(name: str) -> tuple[nn.Module, Any]:
    if name in EXTRA:
        torch.manual_seed(0)
        model, inputs = EXTRA[name]()
        return model.eval(), inputs
    return make(name)


def outputs(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs[:1], query_inputs=inputs.query_inputs) if isinstance(inputs, Both) else model(inputs)


def built(config: Any, convert: Callable[[Any], Any], made: dict[str, Any], at: str = "") -> Any:
    """Calls what a configuration describes, with all numbers, lists and dictionaries converted."""
    if isinstance(config, list):
        items = [built(item, convert, made, f"{at}.{i}") for i, item in enumerate(config)]
        return convert(items) if all(isinstance(item, int | float | str) for item in config) else items
    if not isinstance(config, dict):
        return convert(config)
    if "same" in config:
        return made[config["same"]]
    if "dict" in config:
        found = {key: built(item, convert, made, f"{at}.{key}") for key, item in config["dict"].items()}
        return convert(found) if all(isinstance(item, int | float | str) for item in config["dict"].values()) else found
    tag = next(tag for tag in ("part", "partial", "name") if tag in config)
    thing = names._named[config[tag]]
    if tag == "name":
        return thing
    given = {key: built(item, convert, made, f"{at}.{key}".lstrip(".")) for key, item in config.items() if key != tag}
    made[at] = functools.partial(thing, **given) if tag == "partial" else thing(**given)
    return made[at]


def by_numpy(whole: type, real: type, several: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, bool):
            return np.bool_(value)
        if isinstance(value, int):
            return whole(value) if value <= np.iinfo(whole).max else value
        if isinstance(value, float):
            return real(value)
        if isinstance(value, str):
            return np.str_(value)
        return several(value) if isinstance(value, list) else value

    return convert


def by_omegaconf(value: Any) -> Any:
    return OmegaConf.create(value) if isinstance(value, list | dict) else value


def interpolated(value: Any) -> Any:
    """A list or dictionary in a configuration that refers to other places of it."""
    if not isinstance(value, list | dict):
        return value
    items = enumerate(value) if isinstance(value, list) else value.items()
    settings = OmegaConf.create({"values": {f"v{key}": item for key, item in items}})
    refer = [f"${{values.v{i}}}" for i in range(len(value))]
    settings.it = refer if isinstance(value, list) else {key: f"${{values.v{key}}}" for key in value}
    return settings.it


KINDS: dict[str, Callable[[Any], Any]] = {
    "int64": by_numpy(np.int64, np.float64, np.array),
    "int32, float32": by_numpy(np.int32, np.float32, tuple),
    "uint8, float16": by_numpy(np.uint8, np.float16, lambda items: [np.asarray(item) for item in items]),
    "omegaconf": by_omegaconf,
    "omegaconf, interpolated": interpolated,
    "tuples": lambda value: tuple(value) if isinstance(value, list) else value,
}
each_model = pytest.mark.parametrize("name", [*MODELS, *EXTRA])
FEW = ["video", "spectrogram", "multimodal"]


def check_same(other: nn.Module, name: str, folder: Path, *, defaults_may_be_written: bool = False) -> None:
    """Raises unless a model has the configuration, the text and the outputs of the one that plain arguments build."""
    model, inputs = model_of(name)
    assert defaults_may_be_written or to_config(other) == to_config(model)
    json.dumps(to_config(other))
    assert repr(other) == repr(model)
    other.load_state_dict(model.state_dict())
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(other.eval(), inputs), expected, **EXACT)
    torch.testing.assert_close(outputs(pc.load(pc.save(other, folder)), inputs), expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for kind in KINDS for name in [*MODELS, *EXTRA] if name in FEW or kind in ("int64", "omegaconf")],
)
def test_arguments_of_other_libraries(name: str, kind: str, tmp_path: Path) -> None:
    other = built(to_config(model_of(name)[0]), KINDS[kind], {})
    check_same(other, name, tmp_path)
    for module in other.modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_"):
                assert not isinstance(value, np.generic | np.ndarray | DictConfig | ListConfig), (module, attribute)


def parts_in(config: Any) -> set[str]:
    if isinstance(config, list):
        return set().union(*map(parts_in, config)) if config else set()
    if not isinstance(config, dict):
        return set()
    own = {config[tag] for tag in ("part", "partial", "name") if tag in config}
    return own.union(*(parts_in(value) for value in config.values()))


def test_all_registered_classes_are_covered() -> None:
    models = [model_of(name)[0] for name in [*MODELS, *EXTRA]]
    seen = set().union(*(parts_in(to_config(model)) for model in models))
    seen |= {names._names.get(type(module), "") for model in models for module in model.modules()}  # those of defaults
    own = {name for name, thing in names._named.items() if inspect.isclass(thing) and is_own(thing)}
    assert own - seen == set()


def is_own(thing: type) -> bool:
    return thing.__module__.startswith("perceiver_core.")


@pytest.mark.parametrize("number", [torch.tensor(3), torch.tensor(3.0), np.float32(3.5), np.array([3])], ids=repr)
def test_other_numbers_are_refused_as_sizes(number: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        pc.MLP(number)


# Hydra


def hydra_config(config: Any) -> Any:
    """Writes a configuration as users of Hydra do: `_target_` names a class, and `_partial_` makes a factory of it."""
    if isinstance(config, list):
        return [hydra_config(item) for item in config]
    if not isinstance(config, dict):
        return config
    if "dict" in config:
        return {key: hydra_config(item) for key, item in config["dict"].items()}
    tag = next(tag for tag in ("part", "partial", "name") if tag in config)
    thing = names._named[config[tag]]
    path = f"{thing.__module__}.{thing.__qualname__}"
    if tag == "name":
        return {"_target_": "hydra.utils.get_object", "path": path}
    rest = {key: hydra_config(item) for key, item in config.items() if key != tag}
    return {"_target_": path, **({"_partial_": True} if tag == "partial" else {}), **rest}


def is_shared(config: Any) -> bool:
    if isinstance(config, list):
        return any(map(is_shared, config))
    return isinstance(config, dict) and ("same" in config or any(map(is_shared, config.values())))


@pytest.mark.parametrize(
    ("name", "convert"),
    [*((name, "none") for name in [*MODELS, *EXTRA]), *((name, way) for name in FEW for way in ("partial", "all"))],
)
def test_hydra_instantiates_nested_models(name: str, convert: str, tmp_path: Path) -> None:
    config = to_config(model_of(name)[0])
    if is_shared(config):
        return  # Hydra builds each object anew, so that a model with one part in two places is written in Python
    settings = OmegaConf.create(yaml.safe_load(yaml.safe_dump(hydra_config(config), sort_keys=False)))
    # OmegaConf passes a dataclass in a list as a configuration of all its fields.
    written = name == "hierarchical" and convert == "none"
    check_same(hydra.utils.instantiate(settings, _convert_=convert), name, tmp_path, defaults_may_be_written=written)


YAML = """
dim: 16
model:
  _target_: perceiver_core.Perceiver
  adapter:
    _target_: perceiver_core.adapters.Image
    num_channels: 3
    positions:
      _target_: perceiver_core.positions.Fourier
      num_axes: 2
      num_bands: 4
      max_resolution: [32, 48]
  encoder:
    _target_: perceiver_core.Encoder
    input_dim: 21
    num_latents: 8
    dim: ${dim}
    num_heads: 4
    depth: 1
    cross_attention:
      _target_: perceiver_core.CrossAttend
      _partial_: true
      num_heads: 2
      attention:
        _target_: perceiver_core.MultiHeadAttention
        _partial_: true
        qk_dim: 8
  head:
    _target_: perceiver_core.heads.Classification
    dim: ${dim}
    num_classes: 5
"""


def test_a_model_written_for_hydra(tmp_path: Path) -> None:
    """The names are those that the documentation uses, and values refer to each other."""
    model = hydra.utils.instantiate(OmegaConf.create(YAML).model)
    x: Tensor = drawn(2, 3, 32, 48)
    assert model(x).shape == (2, 5)
    again = pc.load(pc.save(model, tmp_path))
    torch.testing.assert_close(again(x), model.eval()(x), **EXACT)
    assert to_config(again) == to_config(model)
