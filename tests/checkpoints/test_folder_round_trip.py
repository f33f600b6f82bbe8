"""Models that come back from a folder as they were saved."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, heads, kernels, positions, registry, sharing
from tests.checkpoints.folders import (
    CLASSES,
    CLOUD,
    DIM,
    LATENTS,
    MULTI_HEAD,
    PICTURES,
    SOUND,
    Blend,
    Learner,
    assert_comes_back,
    encoder,
    fourier,
    perceiver,
    small,
)

pytestmark = pytest.mark.no_shape_checks


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
        f"activation {made}": {
            "cross_attention": partial(pc.CrossAttend, mlp=partial(pc.MLP, widening_factor=2, activation=made))}
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
    with pytest.raises(ValueError, match="device"):
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


def test_parts_and_kernels_of_a_user_come_back(tmp_path):
    attends = partial(MULTI_HEAD, kernel=second_kernel)
    model = perceiver(adapters.Audio(5, positions=None), Blend(DIM, inner=Learner()), cross_attention=partial(
        pc.CrossAttend, attention=attends, mlp=partial(pc.MLP, activation=Learner())))  # fmt: skip
    again = assert_comes_back(model, SOUND, tmp_path)
    assert again.encoder.reads[0].attention.kernel is second_kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_without_weights_follow_the_dtype(dtype, tmp_path):
    model = perceiver(adapters.OneHotLabel(11)).to(dtype)
    again = pc.load(pc.save(model, tmp_path))
    labels = torch.tensor([3, 7])
    assert torch.equal(again(labels), model.eval()(labels))
