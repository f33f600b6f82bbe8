"""Small files of each format that is read, written once for each process, and the functions that read them."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import registry
from perceiver_core.interop import DEEPMIND_NUMERICS
from perceiver_core.interop.published_models import build
from perceiver_core.kernels.grid import cpp_cache
from tests.interop.haiku_writer import KINDS, SMALL, Haiku, original

FOURIER = "PerceiverForImageClassificationFourier"
CONVOLUTIONAL = "PerceiverForImageClassificationConvProcessing"
TINY = SMALL | {"num_blocks": 1, "num_self_attends_per_block": 1, "num_latents": 3, "d_latents": 4}
TINY |= {"num_self_attention_heads": 2, "model_type": "perceiver"}
GIVEN = {"num_blocks": 2, "num_self_attention_heads": 4}
Content = dict[str, Any]  # tensors and descriptions, keyed by name


class Source(NamedTuple):
    """Format of files: functions that write and read them, and the names of the files that have checksums."""

    write: Callable[[Path, int], None]  # arguments: folder, and the seed of the values
    read: Callable[[Path], Content]  # argument: folder
    checked: tuple[str, ...] = ()  # ends of the names of files in which each damage must be noticed
    weight: float = 1.0  # relative frequency of the cases


class Base(NamedTuple):
    """Folders of two models with equal shapes and different values, and the content of the first one."""

    folder: Path
    other: Path
    content: Content


@cache
def base(name: str) -> Base:
    """Write the files of a format once per process, and read them."""
    source, root = SOURCES[name], Path(_root().name) / name
    for seed, folder in enumerate(("first", "second")):
        (root / folder).mkdir(parents=True)
        source.write(root / folder, seed)
    return Base(root / "first", root / "second", source.read(root / "first"))


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def is_equal(one: Any, other: Any) -> bool:
    """Return whether two contents are bit-identical."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(*bits)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(is_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def described(model: nn.Module) -> Content:
    """Return the tensors and the configuration of a model."""
    return {**model.state_dict(), "": json.dumps(registry.to_config(model))}


def _config(architecture: str) -> dict[str, Any]:
    return TINY | KINDS[architecture] | {"architectures": [architecture]}


def _randomized(model: nn.Module, seed: int) -> nn.Module:
    """Set all weights to random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
    return model


def _write_own(folder: Path, seed: int) -> None:
    positions = pc.positions.Fourier(num_axes=2, num_bands=2, max_resolution=7)
    image = pc.adapters.Image(1, positions=positions)
    encoder = pc.Encoder(image.dim, num_latents=3, dim=8, depth=1, num_heads=2)
    pc.save(_randomized(pc.Perceiver(image, encoder, pc.heads.Classification(8, 3)), seed), folder)


def _write_transformers(folder: Path, seed: int) -> None:
    config = _config(CONVOLUTIONAL)
    pc.interop.save_transformers(_randomized(build(config), seed), folder, config=config)


def _write_binary(folder: Path, seed: int) -> None:
    _write_transformers(folder, seed)
    torch.save(_taken(folder), folder / "pytorch_model.bin")


def _write_shards(folder: Path, seed: int) -> None:
    _write_transformers(folder, seed)
    _in_shards(folder, "model", "safetensors", save_file)


def _write_binary_shards(folder: Path, seed: int) -> None:
    _write_transformers(folder, seed)
    _in_shards(folder, "pytorch_model", "bin", torch.save)


def _taken(folder: Path) -> dict[str, Tensor]:
    """Read and remove model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return weights


def _in_shards(folder: Path, stem: str, end: str, save: Callable[[dict[str, Tensor], Path], object]) -> None:
    weights = _taken(folder)
    files = {name: f"{stem}-0000{i % 2 + 1}-of-00002.{end}" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save({name: tensor for name, tensor in weights.items() if files[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def _haiku(seed: int) -> dict[str, dict[str, Any]]:
    tensors = original(FOURIER)[1]
    generator = torch.Generator().manual_seed(seed)
    changed = {name: torch.rand(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    return Haiku(FOURIER, changed).found


def _write_npz(folder: Path, seed: int) -> None:
    arrays = {f"{scope}/{name}": array for scope, held in _haiku(seed).items() for name, array in held.items()}
    np.savez(folder / "weights.npz", **arrays)


def _write_compressed_npz(folder: Path, seed: int) -> None:
    arrays = {f"{scope}/{name}": array for scope, held in _haiku(seed).items() for name, array in held.items()}
    np.savez_compressed(folder / "weights.npz", **arrays)


def _write_pickle(folder: Path, seed: int) -> None:
    (folder / "weights.pystate").write_bytes(pickle.dumps(_haiku(seed), protocol=2 + seed))


def _read_npz(folder: Path) -> Content:
    return described(pc.interop.load_haiku(folder / "weights.npz", numerics=DEEPMIND_NUMERICS, **GIVEN))


def _read_pickle(folder: Path) -> Content:
    return described(pc.interop.load_haiku(folder / "weights.pystate", numerics=DEEPMIND_NUMERICS, **GIVEN))


LUCID = {"attn.norm": (12,), "attn.norm_context": (29,), "attn.fn.to_out": (12, 8), "ff.norm": (12,)}
LUCID |= {"ff.fn.net.0": (96, 12), "ff.fn.net.2": (12, 48)}


def _write_perceiver_pytorch(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"layers.0.cross_{name}.weight": shape for name, shape in LUCID.items()}
    shapes |= {f"layers.0.cross_{name}.bias": shape[:1] for name, shape in LUCID.items()}
    shapes |= {"layers.0.cross_attn.fn.to_q.weight": (8, 12), "layers.0.cross_attn.fn.to_kv.weight": (16, 29)}
    shapes["latents"] = (7, 12)
    weights = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "lucid.safetensors")


def _read_perceiver_pytorch(folder: Path) -> Content:
    file = folder / "lucid.safetensors"
    return described(pc.interop.load_perceiver_pytorch(file, max_freq=10.0, cross_heads=2))


def _write_deployment(folder: Path, seed: int) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0 + seed, 2.0, 3.0])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [value], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    program = folder / "program.onnx"
    program.write_bytes(model.SerializeToString())
    encoder = pc.Encoder(3, num_latents=2, dim=4, depth=1, num_heads=1)
    preprocessing = {"mode": "RGB", "size": [7, 11], "mean": [0.5], "std": [0.25], "classes": ["ant", "bee"]}
    pc.checkpoints.save_program(program, folder, model=encoder, preprocessing=preprocessing)
    program.unlink()


def _read_deployment(folder: Path) -> Content:
    from examples.deploy.run_program import read_folder

    session, preprocessing = read_folder(folder)
    (y,) = session.run(None, {"x": np.ones((1, 3), np.float32)})
    return {"y": torch.from_numpy(y), "preprocessing": preprocessing}


def _write_checkpoint(folder: Path, seed: int) -> None:
    from examples.akoa.training.laterality import AtomicCheckpointIO

    layer = nn.Linear(5, 7)
    optimizer = torch.optim.AdamW(_randomized(layer, seed).parameters())
    layer(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    state = {"epoch": 3, "state_dict": layer.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    AtomicCheckpointIO().save_checkpoint(state, folder / "last.ckpt")


def _read_checkpoint(folder: Path) -> Content:
    from examples.akoa.training.laterality import AtomicCheckpointIO

    content = AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")
    states = content["optimizer_states"][0]["state"]
    moments = {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}
    return {**content["state_dict"], **moments, "epoch": content["epoch"]}


def _write_library(folder: Path, seed: int) -> None:
    cpp_cache.store(folder, "library", random.Random(seed).randbytes(5000))


def _read_library(folder: Path) -> Content:
    """Read the cached library. Errors are those after which the library is compiled again."""
    if not (paths := cpp_cache.stored(folder, "library")):
        raise FileNotFoundError(f"there is no library-*.so in {folder}")
    return {"library": cpp_cache.read(paths[0])}


def _read_own(folder: Path) -> Content:
    return described(pc.load(folder))


def _read_transformers(folder: Path) -> Content:
    return described(pc.interop.load_transformers(folder))


SOURCES = {
    "own": Source(_write_own, _read_own, (".safetensors",), weight=2),
    "transformers": Source(_write_transformers, _read_transformers),
    "transformers shards": Source(_write_shards, _read_transformers, (".index.json",)),
    "transformers .bin": Source(_write_binary, _read_transformers, (".bin",)),
    "transformers .bin shards": Source(_write_binary_shards, _read_transformers, (".bin", ".index.json")),
    "npz": Source(_write_npz, _read_npz, (".npz",)),
    "compressed npz": Source(_write_compressed_npz, _read_npz, (".npz",)),
    "pickle": Source(_write_pickle, _read_pickle),
    "perceiver-pytorch": Source(_write_perceiver_pytorch, _read_perceiver_pytorch),
    "deployment": Source(_write_deployment, _read_deployment, (".onnx",), weight=0.5),
    "library": Source(_write_library, _read_library, (".so",), weight=0.5),
    "training checkpoint": Source(_write_checkpoint, _read_checkpoint, (".ckpt",), weight=0.5),
}


def copy(name: str, folder: Path) -> None:
    """Copy the files of a format to a folder."""
    shutil.copytree(base(name).folder, folder, dirs_exist_ok=True)
