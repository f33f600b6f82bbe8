"""One model in many threads at once: results, gradients, first calls, and settings that belong to a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import reads
from perceiver_core.kernels.grid import cpp_library
from perceiver_core.models.sampling import Sample
from perceiver_core.positions import fourier
from tests.integration.whole_models import DIM, MODELS, drawn, encoder, make

pytestmark = pytest.mark.no_shape_checks
THREADS = 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
STRATEGIES = {"auto": None, "factored": reads.Factored(), "structured": reads.Structured()}


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Runs all calls in threads of their own that start at the same moment; raises their first exception."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        gate.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, call) for call in calls]]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_in_threads(name: str) -> None:
    model, inputs = make(name)
    changed = [tree_map(lambda x, i=i: x.roll(i, -1), inputs) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in changed]

    def compute(x: Any) -> list[Any]:
        with torch.no_grad():
            return [model(x) for _ in range(3)]

    for outputs, wanted in zip(together(*[lambda x=x: compute(x) for x in changed]), expected, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, wanted, **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_gradients_in_threads(strategy: str, recompute: bool) -> None:
    """Each thread has its own graph; gradients are taken without accumulating in the weights."""
    model, image = make("image", STRATEGIES[strategy])
    if recompute:
        pc.checkpoint_activations(model)
    images = [image.roll(i, -1) for i in range(THREADS)]

    def gradients(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    expected = [gradients(x) for x in images]
    for actual, wanted in zip(together(*[lambda x=x: gradients(x) for x in images]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def large_image() -> nn.Module:
    torch.manual_seed(0)
    adapter = pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=4, max_resolution=24))
    return pc.Perceiver(adapter, encoder(adapter.dim), pc.heads.Classification(DIM, 3)).eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_calls_in_threads(strategy: str) -> None:
    """Caches of tables, plans and the compiled kernel are filled by several threads at once."""
    model, x = large_image(), drawn(2, 3, 24, 37)
    if STRATEGIES[strategy] is not None:
        reads.set_strategy(model, STRATEGIES[strategy])
    expected = model(x)
    fourier._cache.clear()
    cpp_library.functions.cache_clear()
    reads.automatic._ranked.cache_clear()
    for actual in together(*[lambda: model(x)] * THREADS):
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_models_are_built_saved_and_loaded_in_threads(tmp_path: Any) -> None:
    x = drawn(2, 3, 24, 37)

    def build(i: int) -> tuple[nn.Module, nn.Module]:
        model = pc.Perceiver(
            adapter := pc.adapters.Image(3, positions=pc.positions.Fourier(2, num_bands=i + 1, max_resolution=24)),
            encoder(adapter.dim, num_reads=i + 1),
            pc.heads.Classification(DIM, i + 2),
        ).eval()
        return model, pc.load(pc.save(model, tmp_path / str(i)))

    for i, (model, again) in enumerate(together(*[lambda i=i: build(i) for i in range(THREADS)])):
        assert again.encoder.sharing.steps == i + 1
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_one_folder_is_loaded_by_many_threads(tmp_path: Any) -> None:
    model, inputs = make("multimodal")
    folder = pc.save(model, tmp_path)
    for again in together(*[lambda: pc.load(folder)] * THREADS):
        torch.testing.assert_close(again(inputs), model(inputs), rtol=0, atol=0)


def test_generation_in_threads() -> None:
    model, ids = make("text")
    prompts = [(ids[:, :5] + i) % 11 for i in range(THREADS)]

    def sample(prompt: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pc.generate(model, prompt, max_new_tokens=5, sampler=Sample(temperature=2.0), generator=generator)

    expected = [sample(prompt, i) for i, prompt in enumerate(prompts)]
    actual = together(*[lambda p=prompt, i=i: sample(p, i) for i, prompt in enumerate(prompts)])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_settings_of_a_thread_stay_in_it() -> None:
    """Inference mode, autocast, capture and explanation in some threads do not change the results of others."""
    model, x = large_image(), drawn(2, 3, 24, 37)
    expected = model(x)

    def plain() -> list[torch.Tensor]:
        return [model(x) for _ in range(5)]

    def inference() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(x) for _ in range(5)]

    def autocast() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [model(x) for _ in range(5)]

    def explained() -> list[torch.Tensor]:
        assert len(pc.explain_reads(model, x)) == 2
        return plain()

    def mapped() -> list[torch.Tensor]:
        weights = model.encoder.attention_map(model.adapter(x), read=0)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        return plain()

    for outputs in together(plain, inference, autocast, explained, mapped, plain):
        for output in tree_leaves(outputs):
            close = {"rtol": 0.1, "atol": 0.05} if output.dtype == torch.bfloat16 else CLOSE
            torch.testing.assert_close(output, expected, check_dtype=False, **close)
            assert output.requires_grad != output.is_inference()
