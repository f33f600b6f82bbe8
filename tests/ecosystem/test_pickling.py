"""Models in pickle, copy, torch.save, and other processes, as arguments and in data loaders."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

import perceiver_core as pc
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks
EXACT = {"rtol": 0, "atol": 0}


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "protocol 2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_whole,
}


def with_factories() -> nn.Module:
    """A model whose factories are lambdas, local functions and partials of partials."""

    def norm(width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=1e-3)

    read = partial(partial(pc.CrossAttend, norm=norm), mlp=lambda dim: pc.MLP(dim, widening_factor=2))
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=2, max_resolution=7))
    encoder = pc.Encoder(
        image.dim, num_latents=5, dim=12, num_reads=2, depth=1, num_heads=2, share=lambda n: pc.sharing.all_(n),
        cross_attention=read, latent_transformer=lambda *args, **options: pc.LatentTransformer(*args, **options),
    )  # fmt: skip
    return pc.Perceiver(image, encoder, pc.heads.Classification(12, 3, norm=lambda width: norm(width))).eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*MODELS, "factories"])
def test_copies_equal_the_model(name: str, way: str, tmp_path: Any) -> None:
    """Weights that are tied stay tied, nothing is shared with the original, and the copy is saved like it."""
    model, inputs = (with_factories(), torch.rand(2, 3, 5, 7)) if name == "factories" else make(name)
    again = WAYS[way](model)
    torch.testing.assert_close(again(inputs), model(inputs), **EXACT)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert len(list(again.parameters())) == len(list(model.parameters()))
    assert not {id(parameter) for parameter in again.parameters()} & {id(parameter) for parameter in model.parameters()}
    if name != "factories":
        loaded = pc.load(pc.save(again, tmp_path))
        torch.testing.assert_close(loaded(inputs), model(inputs), **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_head_is_gone(way: str) -> None:
    model, inputs = make("image")
    model.head = pc.heads.Classification(12, 100_003)
    large = weakref.ref(model.head)
    model.head = pc.heads.Classification(12, 3)
    gc.collect()
    assert large() is None
    assert len(pickle.dumps(WAYS[way](model))) < 300_000  # the large head alone has 5 MB
    assert WAYS[way](model)(inputs).shape == (2, 3)


@pytest.mark.parametrize("name", ["image", "text", "multimodal"])
def test_copies_of_used_models(name: str) -> None:
    """Nothing that a forward or backward pass leaves behind keeps a model from being copied."""
    model, inputs = make(name)
    model.train()
    out = model(inputs)
    sum(x.sum() for x in (out.values() if isinstance(out, dict) else [out])).backward()
    pc.explain_reads(model, inputs) if name != "text" else None
    for way in WAYS.values():
        assert set(way(model).state_dict()) == set(model.state_dict())


def forward(model: nn.Module, inputs: Any) -> Any:
    torch.set_num_threads(1)
    with torch.no_grad():
        return model(inputs)


class Features(Dataset[Tensor]):
    """Data set that computes features with a model, in the workers of a loader."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return forward(self.model, self.images[index : index + 1])[0]


class Collate:
    """Collates images and computes tokens with an adapter."""

    def __init__(self, adapter: nn.Module) -> None:
        self.adapter = adapter

    def __call__(self, images: list[Tensor]) -> pc.Tokens:
        with torch.no_grad():
            return self.adapter(torch.stack(images))


METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
slow = pytest.mark.slow
quick_first = [pytest.param(method, marks=() if method == "fork" else slow) for method in METHODS]
# Python's own: the tests before this one may have started threads
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@forks
@pytest.mark.parametrize("method", quick_first)
def test_models_as_arguments_of_processes(method: str) -> None:
    names = ["image", "text"] if method == "fork" else ["image", "text", "multimodal", "frames", "hierarchical"]
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context(method)) as pool:
        made = [make(name) for name in names] + [(with_factories(), torch.rand(2, 3, 5, 7))]
        results = [pool.submit(forward, model.requires_grad_(False), inputs) for model, inputs in made]
        for (model, inputs), result in zip(made, results, strict=True):
            actual = tree_map(torch.clone, result.result(timeout=120))
            torch.testing.assert_close(actual, model(inputs), rtol=1e-5, atol=1e-6)


@forks
@pytest.mark.parametrize("method", quick_first)
def test_models_in_workers_of_data_loaders(method: str) -> None:
    model, _ = make("image")
    images = torch.rand(6, 3, 8, 10)
    model.requires_grad_(False)
    expected = torch.cat([forward(model, image[None]) for image in images])
    loader = DataLoader(Features(model, images), batch_size=3, num_workers=1, multiprocessing_context=method)
    actual = torch.cat([batch.clone() for batch in loader])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@forks
def test_tokens_from_workers_of_data_loaders() -> None:
    model, _ = make("image")
    images = torch.rand(4, 3, 8, 10)
    model.requires_grad_(False)
    loader = DataLoader(list(images), batch_size=2, num_workers=1, collate_fn=Collate(model.adapter))
    for tokens, start in zip(loader, (0, 2), strict=True):
        expected = model(images[start : start + 2])
        torch.testing.assert_close(model.head(model.encoder(tokens)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_shared_memory(name: str) -> None:
    """As in Hogwild training: processes see the changes of each other's weights."""
    model, inputs = make(name)
    expected = model(inputs)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    torch.testing.assert_close(model(inputs), expected, **EXACT)
