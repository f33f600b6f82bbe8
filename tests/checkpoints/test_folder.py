"""Folders: what comes back is what was saved; what is broken or hostile is refused, quickly and in words."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import math
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, allocator, heads, kernels, positions, registry, sharing
from perceiver_core.checkpoints import folder as files
from perceiver_core.kernels.grid import native

DIM, LATENTS, HEADS, CLASSES = 14, 5, 7, 3


@pytest.fixture(autouse=True, scope="module")
def as_it_was():
    tables = (registry._named, registry._names)
    before = [table.copy() for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


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


# ---- everything comes back


def fourier(axes):
    return positions.Fourier(num_axes=axes, num_bands=2, max_resolution=[7.0, 11.0, 13.0][:axes])


PICTURES, SOUND, CLOUD = torch.rand(2, 3, 13, 11), torch.rand(2, 37), torch.rand(2, 17, 5)
ADAPTERS = {
    "Image": (lambda: adapters.Image(positions=fourier(2)), PICTURES),
    "Image without positions": (lambda: adapters.Image(3, positions=None), PICTURES),
    "Patches": (
        lambda: adapters.Image(positions=fourier(2), stem=partial(adapters.Patches, patch_size=(2, 5))),
        PICTURES,
    ),
    "Project": (lambda: adapters.Image(positions=fourier(2), stem=partial(adapters.Project, dim=5)), PICTURES),
    "ConvStem": (lambda: adapters.Image(positions=fourier(2), stem=partial(adapters.ConvStem, dim=5)), PICTURES),
    "Pixels": (lambda: adapters.Image(positions=fourier(2), stem=adapters.Pixels), PICTURES),
    "Audio": (lambda: adapters.Audio(patch_size=5, positions=fourier(1)), SOUND),
    "Spectrogram": (lambda: adapters.Spectrogram(positions=fourier(2)), PICTURES[:, 0]),
    "Points": (lambda: adapters.PointCloud(num_features=2, positions=fourier(3)), CLOUD),
    "Grid": (lambda: adapters.Grid(5, positions=fourier(3)), torch.rand(2, 2, 3, 7, 5)),
    "FourierPerAxis": (lambda: adapters.PointCloud(2, positions=positions.FourierPerAxis(3, num_bands=2)), CLOUD),
    "NeRF": (lambda: adapters.PointCloud(2, positions=positions.NeRF(3, num_bands=2)), CLOUD),
    "Gaussian": (lambda: adapters.PointCloud(2, positions=positions.Gaussian(3, 7, scale=2.0)), CLOUD),
    "Learned": (lambda: adapters.Image(positions=positions.LearnedGrid((5, 7), 3)), PICTURES),
}


@pytest.mark.parametrize("make, inputs", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_every_adapter_stem_and_position_comes_back(make, inputs, tmp_path):
    assert_comes_back(perceiver(make()), inputs, tmp_path)


@pytest.mark.parametrize(
    "head",
    [
        heads.Classification(DIM, CLASSES), heads.Classification(DIM, CLASSES, norm=nn.Identity, dropout=0.1),
        heads.Regression(DIM, 2, norm=partial(nn.RMSNorm, eps=1e-3)), heads.Identity(), nn.Identity(),
    ],
    ids=lambda head: type(head).__name__,
)  # fmt: skip
def test_every_head_comes_back(head, tmp_path):
    assert_comes_back(perceiver(adapters.Audio(5, positions=None), head), SOUND, tmp_path)


MULTI_HEAD = pc.MultiHeadAttention
ENCODERS = {
    **{f"share={share}": {"num_reads": 3, "share": share} for share in (True, False)},
    **{
        scheme.__name__: {"num_reads": 3, "share": scheme}
        for scheme in (sharing.none, sharing.all_, sharing.all_but_first, sharing.paper)
    },
    "reads of several widths": {"input_dim": (11, 11), "num_reads": 2, "share": False},
    "no depth": {"depth": 0},
    "widths": {"cross_attention": partial(
        pc.CrossAttend, attention=partial(MULTI_HEAD, qk_dim=6, v_dim=10, bias=False), num_heads=2)},
    "no residual": {"cross_attention": partial(pc.CrossAttend, residual=False, dropout=0.1)},
    "rotary": {"latent_transformer": partial(pc.LatentTransformer, block=partial(
        pc.SelfAttend, attention=partial(MULTI_HEAD, rotary=positions.Rotary(2, base=100.0))))},
    **{
        f"activation {made}": {"cross_attention": partial(
            pc.CrossAttend, mlp=partial(pc.MLP, widening_factor=2, activation=made))}
        for made in (pc.GEGLU(), pc.SquaredReLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh(),
                           nn.Sigmoid(), nn.Identity())
    },
    **{
        f"norm {norm}": {"cross_attention": partial(pc.CrossAttend, norm=norm)}
        for norm in (nn.LayerNorm, nn.RMSNorm, nn.Identity, partial(nn.LayerNorm, eps=1e-3, bias=False),
                     partial(nn.LayerNorm, elementwise_affine=False))
    },
    **{
        f"kernel {kernel}": {"cross_attention": partial(pc.CrossAttend, attention=partial(MULTI_HEAD, kernel=kernel))}
        for kernel in (kernels.reference, kernels.sdpa, kernels.chunked, partial(kernels.chunked, chunk_size=3))
    },
}  # fmt: skip


@pytest.mark.parametrize("options", ENCODERS.values(), ids=[name.split(" at 0x")[0] for name in ENCODERS])
def test_every_encoder_comes_back(options, tmp_path):
    options = dict(options)
    inputs = torch.rand(2, 17, 11)
    many = [inputs, torch.rand(2, 13, 11)] if "input_dim" in options else inputs
    again = assert_comes_back(encoder(options.pop("input_dim", 11), **options), many, tmp_path)
    kernels = {module.kernel for module in again.modules() if isinstance(module, MULTI_HEAD)}
    assert not any(isinstance(kernel, (str, dict)) for kernel in kernels)


def test_a_read_of_several_inputs_comes_back(tmp_path):
    both = adapters.PerRead([adapters.Image(positions=fourier(2)), adapters.Audio(5, positions=None)])
    assert_comes_back(perceiver(both, num_reads=2, share=False), (PICTURES, SOUND), tmp_path)


@pytest.mark.parametrize(
    "make, inputs",
    [
        (pc.models.presets.imagenet, PICTURES),
        (pc.models.presets.audioset, torch.rand(2, 257)),
        (pc.models.presets.modelnet40, CLOUD[..., :3]),
    ],
    ids=["imagenet", "audioset", "modelnet40"],
)
def test_the_papers_models_come_back_at_a_smaller_size(make, inputs, tmp_path, monkeypatch):
    def smaller(input_dim, *, num_latents, dim, num_heads, **options):
        return pc.Encoder(input_dim, num_latents=LATENTS, dim=56, num_heads=num_heads, **{**options, "depth": 1})

    monkeypatch.setattr(pc.models.presets, "Encoder", smaller)
    assert_comes_back(make(num_classes=CLASSES), inputs, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(dtype, tmp_path):
    model = perceiver(adapters.Image(positions=fourier(2), stem=partial(adapters.ConvStem, dim=5))).to(dtype)
    assert_comes_back(model, PICTURES.to(dtype), tmp_path)


def test_mixed_dtypes_stay_mixed(tmp_path):
    model = small()
    model.head.to(torch.bfloat16)
    again = pc.load(pc.save(model, tmp_path))
    assert {p.dtype for p in again.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in again.head.parameters()} == {torch.bfloat16}


def test_a_model_is_saved_in_training_and_loaded_for_evaluation(tmp_path):
    model = small().train()
    model.encoder.latents.requires_grad_(False)
    again = pc.load(pc.save(model, tmp_path))
    assert model.training
    assert not any(module.training for module in again.modules())
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())  # as its constructors say
    again.train()(PICTURES[:, :1]).sum().backward()


def test_a_loaded_model_owns_its_memory(tmp_path):
    again = pc.load(pc.save(small(), tmp_path))
    before = copy.deepcopy(again.state_dict())
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:  # in place, not replaced
        file.write(b"\xff" * size)
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
    storages = {tensor.untyped_storage().data_ptr() for tensor in again.parameters()}
    assert len(storages) == len(list(again.parameters()))


def test_weights_go_to_the_device(tmp_path):
    pc.save(small(), tmp_path)
    for device in ("meta", torch.device("cpu")):
        assert {p.device for p in pc.load(tmp_path, device=device).parameters()} == {torch.device(device)}
    with pytest.raises(RuntimeError, match="device"):
        pc.load(tmp_path, device="nowhere")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_go_to_the_gpu_and_back(tmp_path):
    again = pc.load(pc.save(small().cuda(), tmp_path), device="cuda")
    assert {p.device.type for p in again.parameters()} == {"cuda"}


def test_neither_saving_nor_loading_draws_random_numbers(tmp_path):
    model = perceiver(adapters.PointCloud(2, positions=positions.Gaussian(3, 7)))
    before = torch.random.get_rng_state()
    pc.load(pc.save(model, tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_left_on_the_meta_device(tmp_path):
    for make, _ in ADAPTERS.values():
        again = pc.load(pc.save(perceiver(make()), tmp_path))
        tensors = [*again.parameters(), *again.buffers(), *(v for m in again.modules() for v in vars(m).values())]
        assert not any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors)


def test_strides_do_not_matter(tmp_path):
    model = perceiver(adapters.Image(positions=fourier(2), stem=partial(adapters.ConvStem, dim=5)))
    assert_comes_back(model.to(memory_format=torch.channels_last), PICTURES, tmp_path)


def test_copies_and_recomputing_models_can_be_saved(tmp_path):
    model = copy.deepcopy(small())
    model.head = heads.Regression(DIM, 2)
    assert_comes_back(pickle.loads(pickle.dumps(model)), PICTURES[:, :1], tmp_path)
    pc.save(pc.checkpoint_activations(model), tmp_path)
    assert torch.equal(pc.load(tmp_path)(PICTURES[:, :1]), model.eval()(PICTURES[:, :1]))


# ---- the files


def test_the_configuration_reads_well(tmp_path):
    pc.save(small(), tmp_path)
    assert (tmp_path / "config.json").read_text() == CONFIG_OF_SMALL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


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


def test_the_same_model_is_the_same_bytes(tmp_path):
    model = trained(small())
    pc.save(model, tmp_path / "a")
    pc.save(pc.load(tmp_path / "a"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_programs_can_read_the_weights(tmp_path):
    model = trained(small())
    pc.save(model, str(tmp_path))
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["two words", "größe-模型", "a/b/c", "it's [1]*?"])
def test_a_folder_is_made_whatever_its_name(name, tmp_path):
    assert pc.save(small(), tmp_path / name) == tmp_path / name
    pc.load(str(tmp_path / name))


def test_saving_again_replaces(tmp_path):
    first, second = trained(small()), perceiver(adapters.Audio(5, positions=None))
    pc.save(first, tmp_path)
    loaded = pc.load(tmp_path)
    for model in (loaded, second, second):
        pc.save(model, tmp_path)
        assert pc.load(tmp_path).state_dict().keys() == model.state_dict().keys()
    assert len(contents(tmp_path)) == 2
    assert torch.equal(loaded.encoder.latents, first.encoder.latents)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_modes_that_the_user_has_set(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        pc.save(small(), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


class CrashError(Exception):
    pass


def crash(*args, **kwargs):
    raise CrashError


@pytest.mark.parametrize("where", ["save_file", "os.replace", "os.fsync", "after save_file"])
def test_a_crash_leaves_the_old_files_and_no_others(where, tmp_path, monkeypatch):
    pc.save(small(), tmp_path)
    before = contents(tmp_path)
    if where == "after save_file":
        monkeypatch.setattr(
            files, "save_file", lambda values, path, metadata: Path(path).write_bytes(b"half") and crash()
        )
    else:
        monkeypatch.setattr(files, where, crash) if "." not in where else monkeypatch.setattr(where, crash)
    with pytest.raises(CrashError):
        pc.save(perceiver(adapters.Audio(5, positions=None)), tmp_path)
    assert contents(tmp_path) == before


def test_weights_of_the_same_architecture_are_replaced_in_one_step(tmp_path, monkeypatch):
    pc.save(small(), tmp_path)
    replaced = []
    monkeypatch.setattr("os.replace", lambda old, new: replaced.append(new.name))
    pc.save(trained(small()), tmp_path)
    assert replaced == ["model.safetensors"]
    assert len(contents(tmp_path)) == 2


def test_links_are_read_through_and_replaced(tmp_path):
    """The Hugging Face hub's cache is made of links: they load, and what they lead to is not written over."""
    pc.save(small(), tmp_path / "blobs")
    before = contents(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "folder").symlink_to(tmp_path / "snapshot")
    pc.load(tmp_path / "folder")
    pc.save(perceiver(adapters.Audio(5, positions=None)), tmp_path / "folder")
    assert contents(tmp_path / "blobs") == before
    assert not (tmp_path / "snapshot" / "model.safetensors").is_symlink()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        pc.save(small(), tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="give load the folder that save wrote"):
        pc.load(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---- a model that is not what its constructor made


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


@registry.register
def second_kernel(q, k, v, *, mask=None):
    return kernels.reference(q, k, v, mask=mask) * 2


def test_a_replaced_head_is_saved(tmp_path):
    model = small()
    model.head = heads.Regression(DIM, 2)
    assert_comes_back(model, PICTURES[:, :1], tmp_path)


def test_a_replaced_adapter_among_several_is_saved(tmp_path):
    both = adapters.PerRead([adapters.Audio(11, positions=None), adapters.Audio(11, positions=None)])
    model = perceiver(both, num_reads=2, share=False)
    model.adapter.adapters[1] = adapters.Image(11, positions=None)
    assert_comes_back(model, (SOUND, torch.rand(2, 11, 3, 7)), tmp_path)


def attend(model):
    return model.encoder.transformers[0].blocks[0].attention


CHANGES = {
    "a linear of another size": (lambda m: setattr(m.head, "logits", nn.Linear(DIM, 2)), r"head\.logits is .*out_fea"),
    "a linear of another kind": (
        lambda m: setattr(m.head, "logits", Blend(DIM)),
        r"head\.logits is test_folder\.Blend",
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
    "a module more": (lambda m: setattr(m, "extra", nn.Linear(3, 2)), "extra is .*Linear.*, not there"),
    "a module less": (lambda m: delattr(m.encoder.reads[0], "mlp_norm"), "mlp_norm is not there, not torch.*LayerNorm"),
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
        ValueError, match=f"(?s)Perceiver is no longer what its constructor made: .*{message}"
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


def test_parts_and_kernels_of_a_user_come_back(tmp_path):
    attends = partial(MULTI_HEAD, kernel=second_kernel)
    model = perceiver(adapters.Audio(5, positions=None), Blend(DIM, inner=Learner()), cross_attention=partial(
        pc.CrossAttend, attention=attends, mlp=partial(pc.MLP, activation=Learner())))  # fmt: skip
    again = assert_comes_back(model, SOUND, tmp_path)
    assert again.encoder.reads[0].attention.kernel is second_kernel


# ---- tensors with two names


def test_a_part_that_is_used_twice_is_one_part_again(tmp_path):
    where = positions.LearnedGrid((5, 7), 3)
    image = adapters.Image(positions=where, stem=partial(adapters.ConvStem, dim=5))
    model = perceiver(adapters.PerRead([image, adapters.Image(5, positions=where), image]), num_reads=3, share=False)
    again = assert_comes_back(model, (PICTURES, torch.rand(2, 5, 7, 3), PICTURES), tmp_path)
    one, two, three = again.adapter.adapters
    assert one is three and one.positions is two.positions and one is not two
    assert len(list(again.parameters())) == len(list(model.parameters()))
    names = load_file(tmp_path / "model.safetensors")
    assert [name for name in names if "vectors" in name] == ["adapter.adapters.0.positions.vectors"]


def test_a_part_that_a_partial_gives_to_many_is_one_part_again(tmp_path):
    block = partial(pc.SelfAttend, attention=partial(pc.MultiHeadAttention, rotary=Learner()))
    model = encoder(num_reads=2, depth=2, share=False, latent_transformer=partial(pc.LatentTransformer, block=block))
    again = assert_comes_back(model, torch.rand(2, 17, 11), tmp_path)
    assert len({id(m) for m in again.modules() if isinstance(m, Learner)}) == 1
    assert len({id(p) for name, p in again.named_parameters(remove_duplicate=False) if "slope" in name}) == 1
    assert len({id(b) for name, b in again.named_buffers(remove_duplicate=False) if "steps" in name}) == 1


def test_weights_that_a_constructor_ties_stay_tied(tmp_path):
    again = assert_comes_back(Blend(5, tied=True), torch.rand(2, 5), tmp_path)
    assert again.a.weight is again.b.weight
    assert len(list(again.parameters())) == 3


def test_weights_that_are_untied_or_tied_by_hand_are_refused(tmp_path):
    untied, tied, shared = Blend(5, tied=True), Blend(5), Blend(5)
    untied.b.weight = nn.Parameter(untied.b.weight.detach().clone())
    tied.b.weight = tied.a.weight
    shared.b.weight = nn.Parameter(shared.a.weight.detach().t())
    for model, message in [
        (untied, r"b\.weight and a\.weight are two tensors, not one"),
        (tied, r"b\.weight and a\.weight are one tensor, not two"),
        (shared, r"[ab]\.weight and [ab]\.weight share memory but are two tensors, so their tie would be lost"),
    ]:
        with pytest.raises(ValueError, match=message):
            pc.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_empty_tensors_share_nothing(tmp_path):
    model = Blend(5)
    model.inner.register_buffer("nothing", torch.zeros(0))
    with pytest.raises(ValueError, match=r"unknown \['inner\.nothing'\]"):
        pc.save(model, tmp_path)
    assert_comes_back(Blend(5, inner=Empty()), torch.rand(2, 5), tmp_path)


@registry.register
class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("nothing", torch.zeros(0, 3))

    def forward(self, x):
        return x


def test_neighbors_in_one_memory_are_not_tied(tmp_path):
    model = Blend(5)
    flat = torch.rand(50)
    model.a.weight = nn.Parameter(flat[:25].unflatten(0, (5, 5)))
    model.b.weight = nn.Parameter(flat[25:].unflatten(0, (5, 5)))
    assert_comes_back(model, torch.rand(2, 5), tmp_path)


# ---- tensors that no file holds


@pytest.mark.parametrize(
    "how, message",
    [
        ("buffer", r"inner \(Homeless\) has a tensor 'table' that is in no file. Keep it in a buffer"),
        ("attribute", r"inner \(Homeless\) has a tensor 'table' that is in no file"),
        ("values", "Homeless cannot be built from its description: .*meta"),
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
    with pytest.raises(ValueError, match=r"factor is inf, which JSON has no word for"):
        pc.save(Infinite(math.inf), tmp_path / "new")
    with pytest.raises(ValueError, match=r"the config\.json of Infinite is larger than any configuration"):
        pc.save(Infinite("x" * 2**20), tmp_path / "new")
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module; got partial"):
        pc.save(partial(pc.MLP, widening_factor=3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@registry.register
class Infinite(nn.Module):
    def __init__(self, factor):
        super().__init__()


# ---- broken and hostile files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return pc.save(trained(small()), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def broken(saved, tmp_path):
    """A good folder, to be broken."""
    for name, content in contents(saved).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def assert_refused(path, message, error=ValueError):
    """In words, in less than two seconds, in little memory."""
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(error, match=message) as caught:
        pc.load(path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 2**10
    assert type(caught.value) is error
    assert len(str(caught.value)) < 2000


def test_a_folder_that_is_not_there(tmp_path):
    assert_refused(
        tmp_path / "new", "config.json is not there; give load the folder that save wrote", FileNotFoundError
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a dead link", "a pipe", "a device"])
def test_a_file_that_is_not_there(name, instead, broken):
    (broken / name).unlink()
    if instead == "a folder":
        (broken / name).mkdir()
    elif instead == "a dead link":
        (broken / name).symlink_to(broken / "elsewhere")
    elif instead == "a pipe":
        os.mkfifo(broken / name)
    elif instead == "a device":
        (broken / name).symlink_to("/dev/zero")
    assert_refused(broken, f"{name} is not there", FileNotFoundError)


def header(content):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


BROKEN_WEIGHTS = {
    "empty": lambda old: b"",
    "eight zeros": lambda old: bytes(8),
    "half": lambda old: old[: len(old) // 2],
    "one byte short": lambda old: old[:-1],
    "one byte more": lambda old: old + b"x",
    "half a header": lambda old: old[:50],
    "a header length of nothing": lambda old: bytes(8) + old[8:],
    "a header length of everything": lambda old: b"\xff" * 8 + old[8:],
    "a header length past the end": lambda old: struct.pack("<Q", len(old) + 7) + old[8:],
    "a header length of a gigabyte": lambda old: struct.pack("<Q", 2**30) + old[8:],
    "random": lambda old: bytes((i * 197 + 31) % 256 for i in range(5000)),
    "text": lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    "a pickle": lambda old: pickle.dumps({"latents": [3.0] * 100}),
    "a zip": lambda old: b"PK\x03\x04" + bytes(100),
    "a header that is a list": lambda old: header([3]),
    "offsets past the end": lambda old: header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
    "a shape that lies": lambda old: header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 0]}}),
    "a shape that overflows": lambda old: header(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
    ),
    "a negative shape": lambda old: header({"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}) + bytes(12),
    "an unknown type": lambda old: header({"a": {"dtype": "OBJECT", "shape": [], "data_offsets": [0, 4]}}) + bytes(4),
    "a deep header": lambda old: struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("change", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS.keys())
def test_broken_weights(change, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    assert_refused(broken, r"model\.safetensors is not a whole safetensors file: .*Copy it again")


OTHER_WEIGHTS = {
    "one missing": (lambda t: t.pop("encoder.latents"), r"missing \['encoder\.latents'\]"),
    "one more": (lambda t: t.update(more=torch.zeros(3)), r"unknown \['more'\]"),
    "none": (lambda t: t.clear(), "missing "),
    "another shape": (
        lambda t: t.update({"encoder.latents": torch.zeros(3, DIM)}),
        r"encoder\.latents has shape \(3, 14\) torch\.float32, not \(5, 14\)",
    ),
    "transposed": (lambda t: t.update({"encoder.latents": torch.zeros(DIM, 5)}), r"has shape \(14, 5\)"),
    "as many values": (lambda t: t.update({"encoder.latents": torch.zeros(5 * DIM)}), r"has shape \(70,\)"),
    "integers": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.int8)}), "int8, not"),
    "truths": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.bool)}), "bool, not"),
    "complex": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.complex64)}), "complex64, not"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS.keys())
def test_weights_of_another_model(change, message, broken):
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    assert_refused(broken, rf"(?s)model\.safetensors does not fit config\.json: .*{message}.*Copy both from one save")


def test_a_type_that_no_part_has(broken):
    (broken / "model.safetensors").write_bytes(
        header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + b"x"
    )
    assert_refused(broken, "holds values of type F4, which no part has")


def test_a_counter_must_count(tmp_path):
    pc.save(Blend(5, inner=Learner()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["inner.steps"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(tmp_path, r"inner\.steps has shape \(3,\) torch\.float32, not \(3,\) torch\.int32")


BROKEN_TEXT = {
    "empty": (b"", "is not valid JSON"),
    "no JSON": (b"model: Perceiver", "is not valid JSON: .*Copy it again"),
    "half": (CONFIG_OF_SMALL.encode()[:200], "is not valid JSON"),
    "no text": (b"\xff\xfe\x00\x01", "is not valid JSON"),
    "UTF-16": (CONFIG_OF_SMALL.encode("utf-16"), "is not valid JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON"),
    "deep objects": (b'{"a":' * 100_000, "is not valid JSON"),
    "huge": (b"[" + b"0," * 10**7 + b"0]", "is larger than any configuration"),
    "NaN": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": NaN').encode(), "NaN is not a finite number"),
    "infinity": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": -Infinity').encode(), "-Infinity is not a finite"),
    "overflow": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": 1e999').encode(), "1e999 is not a finite number"),
    "many digits": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": ' + "1" * 10**5).encode(), "is not valid JSON"),
    "a key twice": (CONFIG_OF_SMALL.replace('"depth": 1', '"dim": 11').encode(), r"key twice; its keys are \['part'"),
    "a list": (b"[3]", r"was not written by perceiver_core\.save; give load a folder that was"),
    "nothing": (b"null", "was not written by"),
    "Hugging Face": (b'{"model_type": "perceiver", "architectures": ["PerceiverModel"]}', "was not written by"),
    "another library": (b'{"library": "other", "format": 1, "model": {}}', "was not written by"),
    "no model": (b'{"library": "perceiver_core", "format": 1}', "was not written by"),
    **{
        f"format {number}": (
            CONFIG_OF_SMALL.replace('"format": 1', f'"format": {number}').encode(),
            r"has format .*; this version reads 1\. Update perceiver-core if the file is newer, or save it again",
        )
        for number in ("0", "2", "-1", "true", "1.0", '"1"', "null", "[1]", f'"{"1" * 9999}"')
    },
    "no format": (CONFIG_OF_SMALL.replace('"format": 1,', "").encode(), "has format None; this version reads 1"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", BROKEN_TEXT.values(), ids=[name[:20] for name in BROKEN_TEXT])
def test_a_broken_configuration(text, message, broken):
    (broken / "config.json").write_bytes(text)
    assert_refused(broken, message)


def described(change):
    """The description of `small`, changed."""
    model = json.loads(CONFIG_OF_SMALL)["model"]
    return change(model) or model


def write(path, model):
    config = {"library": "perceiver_core", "format": 1, "model": model}
    (path / "config.json").write_text(json.dumps(config))


OTHER_MODELS = {
    "another size": (lambda m: m["encoder"].update(dim=21), "head must accept the output width of encoder, 21"),
    "fewer blocks": (lambda m: m["encoder"].update(depth=0), "does not fit"),
    "no module": (lambda m: {"name": "Perceiver"}, "describes a type, not a module"),
    "a partial": (lambda m: {"partial": "Perceiver"}, "describes a partial, not a module"),
    "a number": (lambda m: 3, "describes a int, not a module"),
    "a list": (lambda m: [m], "describes a list, not a module"),
    "a partial for a module": (lambda m: m.update(encoder={"partial": "Encoder"}), "does not fit|cannot be"),
    "a class for a module": (lambda m: m.update(head={"name": "Classification"}), "does not fit|cannot be"),
    "a head for an encoder": (lambda m: m.update(encoder=m["head"]), "does not fit"),
    "a head for positions": (lambda m: m["adapter"].update(positions=m["head"]), "Image cannot be built"),
    "a string for positions": (lambda m: m["adapter"].update(positions="Fourier"), "Image cannot be built"),
    "itself": (lambda m: m.update(head={"same": "head"}), "no part stands there before it"),
    "the encoder again": (lambda m: m.update(head={"same": "encoder"}), "does not fit"),
    "the shell": (lambda m: {"part": "os.system", "command": "true"}, "names 'os.system', which is not registered"),
    "eval": (lambda m: m.update(head={"part": "builtins.eval"}), "head names 'builtins.eval', which is not registered"),
    "torch.load": (lambda m: m.update(head={"name": "torch.load"}), "which is not registered"),
    "a dunder": (lambda m: m.update(__class__={"name": "Perceiver"}), "Perceiver cannot be built"),
    "a dunder name": (lambda m: m.update(head={"part": "__init__"}), "which is not registered"),
    "a dotted name": (lambda m: m.update(head={"part": "Perceiver.__init__"}), "which is not registered"),
    "a module of torch": (lambda m: m.update(head={"partial": "nn.Identity"}), "which is not registered"),
    "the device": (
        lambda m: m["head"].update(norm={"partial": "LayerNorm", "device": "cpu"}),
        r"head\.norm gives LayerNorm \['device'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_a_configuration_of_another_model(change, message, broken):
    write(broken, described(change))
    assert_refused(broken, message)


@pytest.mark.parametrize("path", ["adapter", "adapter.positions", "encoder", "head"])
@pytest.mark.parametrize(
    "value",
    ["7", None, [], [7], 2.5, -3, 0, True, 10**30, -(10**30), {"dict": {}}, {"name": "sdpa"}, {"part": "GEGLU"},
     {"partial": "MLP"}],
    ids=repr,
)  # fmt: skip
def test_arguments_of_a_wrong_type_or_size(path, value, broken):
    part = described(lambda m: None)
    for step in path.split("."):
        part = part[step]
    for name in set(part) - {"part"}:
        model = described(lambda m: None)
        inner = model
        for step in path.split("."):
            inner = inner[step]
        inner[name] = value
        write(broken, model)
        try:
            loaded = pc.load(broken)
        except ValueError as error:
            assert len(str(error)) < 2000
        else:  # another value that gives the same shapes: a resolution, one head
            assert loaded.state_dict().keys() == small().state_dict().keys()


BIG = 10**12
GREEDY = {
    "latents": lambda m: m["encoder"].update(num_latents=BIG),
    "dim": lambda m: m["encoder"].update(dim=7 * BIG),
    "input_dim": lambda m: m["encoder"].update(input_dim=BIG),
    "overflow": lambda m: m["encoder"].update(num_latents=2**62, dim=2**62),
    "depth": lambda m: m["encoder"].update(depth=10**9),
    "depth, nearly": lambda m: m["encoder"].update(depth=10_000),
    "reads": lambda m: m["encoder"].update(num_reads=10**9),
    "reads, nearly": lambda m: m["encoder"].update(num_reads=10_000, share=False),
    "reads of nothing": lambda m: m["encoder"].update(num_reads=10_000, share=False, depth=0),
    "bands": lambda m: m["adapter"]["positions"].update(num_bands=BIG) or m["encoder"].update(dim=21),
    "classes": lambda m: m["head"].update(num_classes=10**15),
    "a grid": lambda m: m["adapter"].update(positions={"part": "LearnedGrid", "grid": [10**9, 10**9], "dim": 3}),
    "a random matrix": lambda m: m["adapter"].update(
        positions={"part": "Gaussian", "num_axes": 2, "num_features": BIG}
    ),
    "widening": lambda m: m["encoder"].update(
        cross_attention={"partial": "CrossAttend", "mlp": {"partial": "MLP", "widening_factor": BIG}}
    ),
    "nested encoders": lambda m: m["encoder"].update(
        cross_attention={
            "partial": "CrossAttend", "norm": {"partial": "Encoder", "num_latents": 3, "dim": 8, "num_reads": 10_000}
        }
    ),
    "blocks of nothing": lambda m: m["encoder"].update(
        num_reads=10_000, share=False, cross_attention={"name": "Identity"},
        latent_transformer={"partial": "LatentTransformer", "block": {"name": "Identity"}},
    ),
    "blocks of nothing, deep": lambda m: m["encoder"].update(
        depth=10_000, latent_transformer={"partial": "LatentTransformer", "block": {"name": "Identity"}}
    ),
    "many parts": lambda m: m.update(head=[{"part": "GEGLU"}] * 20_000),
    "many adapters": lambda m: {"part": "PerRead", "adapters": [{"part": "GEGLU"}] * 20_000},
}  # fmt: skip


@pytest.mark.parametrize("change", GREEDY.values(), ids=GREEDY.keys())
def test_a_small_file_asks_for_nothing_large(change, broken):
    write(broken, described(change))
    assert_refused(broken, ".")


LIMITED = """
import resource, sys, torch, perceiver_core as pc
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20,) * 2)
try:
    pc.load(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["encoder"].update(num_latents=BIG, dim=7 * BIG),
        lambda m: m["adapter"]["positions"].update(num_axes=10**9),
        lambda m: m["adapter"]["positions"].update(num_bands=10**9),
        lambda m: m["head"].update(dim=10**9, norm={"name": "paper"}),
    ],
    ids=["tensors", "axes", "bands", "a scheme for a norm"],
)
def test_large_sizes_are_refused_under_a_limit_of_memory(change, broken):
    write(broken, described(change))
    found = subprocess.run([sys.executable, "-c", LIMITED, str(broken)], capture_output=True, text=True, timeout=60)
    assert "does not fit config.json" in found.stdout or "cannot be built" in found.stdout, found.stderr
    assert "MemoryError" not in found.stdout


def test_a_part_in_the_place_of_another_fails_at_the_first_call_at_the_latest(broken):
    """Where the shapes fit, a file can only describe a model that fails in words."""
    write(broken, described(lambda m: m.update(adapter={"part": "heads.Identity"})))
    model = pc.load(broken)
    with pytest.raises(ValueError, match="tokens must have 3 axes"):
        model(PICTURES)


# ---- fuzzing


def leaves(value, path=()):
    """The path of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


RICH = perceiver(
    adapters.PerRead(
        [adapters.Audio(5, positions=fourier(1)), adapters.Image(1, positions=positions.LearnedGrid((5, 7), 3))]
    ),
    num_reads=2, share=sharing.none, cross_attention=partial(
        pc.CrossAttend, norm=partial(nn.LayerNorm, eps=1e-3), mlp=partial(pc.MLP, activation=pc.GEGLU()),
        attention=partial(MULTI_HEAD, kernel=partial(kernels.chunked, chunk_size=3))),
)  # fmt: skip
CONFIG_OF_RICH = json.loads(json.dumps(registry.to_config(RICH)))
PATHS = list(leaves(CONFIG_OF_RICH))
WORDS = st.sampled_from(sorted(registry._named))
SCALARS = st.none() | st.booleans() | st.integers(-5, 10**5) | st.floats(allow_nan=False, allow_infinity=False)
KINDS = st.sampled_from(["part", "partial", "name", "same", "dict"])
NAMES = st.sampled_from(["dim", "num_heads", "depth", "norm", "mlp", "num_axes", "grid", "patch_size"])


def deeper(inner):
    plain = st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | KINDS, inner, max_size=3)
    calls = st.builds(lambda kind, word, rest: {**rest, kind: word}, KINDS, WORDS, st.dictionaries(NAMES, inner))
    return plain | calls | st.fixed_dictionaries({"part": WORDS})


JSON = st.recursive(SCALARS | WORDS | st.text(max_size=5), deeper, max_leaves=6)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    path = tmp_path_factory.mktemp("rich")
    pc.save(RICH, path)
    return path


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_change_of_a_configuration_loads_or_is_refused(rich, path, value):
    model = copy.deepcopy(CONFIG_OF_RICH)
    inner = model
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    write(rich, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert isinstance(pc.load(rich), nn.Module)
    except ValueError as error:
        assert len(str(error)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 2**10


@settings(max_examples=100, deadline=2000)
@given(data=st.data())
def test_any_change_of_the_weights_loads_or_is_refused(saved, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz")
    good = contents(saved)
    (path / "config.json").write_bytes(good["config.json"])
    weights = bytearray(good["model.safetensors"])
    for _ in range(data.draw(st.integers(1, 3))):
        weights[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(weights[: data.draw(st.integers(0, len(weights)) | st.just(len(weights)))])
    with contextlib.suppress(ValueError):
        pc.load(path)


# ---- what the library does not do


def test_the_library_has_nothing_that_executes():
    for source in Path(pc.__file__).parent.rglob("*.py"):
        tree = ast.parse(source.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names & {"eval", "exec", "compile", "__import__", "globals", "import_module"} == set(), source
        forbidden = {"torch.load", "torch.save", "importlib.import_module", "os.system"}
        if source.name == "files.py":  # tensors alone: see the test below
            forbidden -= {"torch.load"}
        assert dotted & forbidden == set(), source
        loaders = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "importlib", "subprocess", "ctypes"}
        if source == Path(native.__file__):  # compiles and runs the source beside it, which comes with the package
            loaders -= {"subprocess", "ctypes"}
        if source == Path(allocator.__file__):  # one call into the C library
            loaders -= {"ctypes"}
        assert {name.split(".")[0] for name in imported} & loaders == set(), source


def test_what_is_unpickled_is_restricted():
    """`torch.load` reads weights only, and NumPy nothing that is pickled."""
    for source in Path(pc.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "torch.load":
                assert "weights_only=True" in ast.unparse(call), source
            assert not name.startswith("pickle.") and name not in ("np.load", "numpy.load"), source
            if name.endswith("read_array"):
                assert "allow_pickle=False" in ast.unparse(call), source


def test_importing_brings_no_other_loader():
    code = "import sys, torch; old = set(sys.modules); import perceiver_core; print(*set(sys.modules) - old)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"cloudpickle", "dill", "joblib", "shelve", "transformers", "huggingface_hub"} & set(found) == set()
    assert "safetensors" in found
