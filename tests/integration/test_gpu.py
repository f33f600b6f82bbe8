"""On a CUDA GPU: the expected kernels run and are right, the CPU does not wait, graphs are captured, results repeat.

`make gpu` runs these, the Triton cases of tests/kernels/grid, and the benchmarks. Without a GPU they skip themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import perceiver_core as pc
from perceiver_core import masks, reads
from perceiver_core.kernels import reference, sdpa
from perceiver_core.kernels.grid import read_grid, triton_launch
from perceiver_core.kernels.sdpa import kernel_for
from perceiver_core.masks import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Otherwise plain PyTorch would pass these tests; a marker has priority over -W on the command line.
    pytest.mark.filterwarnings("error::perceiver_core.kernels.grid.GridFallbackWarning"),
]

CUDA = torch.device("cuda")
STRUCTURED = reads.Structured()
KERNELS = {
    "flash or cuDNN": {"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"},
    "flash, packed": {"_flash_attention_forward"},
    "memory-efficient": {"_scaled_dot_product_efficient_attention"},
}
FALLBACKS = {"_scaled_dot_product_attention_math", "_softmax"}


def events_of(call: Callable[[], object]) -> set[str]:
    """Returns the names of the operators and of the kernels that a call runs."""
    call()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return {event.name.removeprefix("aten::") for event in profiler.events() or []}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CUDA).to(dtype).requires_grad_()


@contextmanager
def raise_on_synchronization() -> Iterator[None]:
    """Raises an error if the CPU waits for the GPU."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over that of the expected tensor."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def padding(batch: int, keys: int) -> Tensor:
    return torch.arange(keys, device=CUDA) < torch.tensor([[keys], [keys // 3 + 1]] * (batch // 2), device=CUDA)


def model(strategy: reads.Strategy | None = None, *, num_reads: int = 2) -> pc.Perceiver:
    torch.manual_seed(0)
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=64))
    encoder = pc.Encoder(image.dim, num_latents=48, dim=64, depth=2, num_heads=4, num_reads=num_reads)
    perceiver = pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=10)).to(CUDA)
    if strategy is not None:
        reads.set_strategy(perceiver, strategy)
    return perceiver


IMAGES = (4, 3, 61, 67)


# Flash kernels

MASKS: dict[str, Callable[[int, int], Mask | None]] = {
    "none": lambda batch, keys: None,
    "causal": lambda batch, keys: masks.Causal(),
    "padding": lambda batch, keys: masks.Padding(padding(batch, keys)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "widths", [(64, 64), (128, 128), (40, 40), (33, 57), (250, 250), (261, 261), (322, 322), (704, 704)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 64, 300])
def test_the_predicted_kernel_runs_and_is_right(
    mask: str, widths: tuple[int, int], dtype: torch.dtype, queries: int
) -> None:
    batch, keys = 2, 300
    allowed = MASKS[mask](batch, keys)
    q, k = (normal(batch, 2, n, widths[0], seed=seed, dtype=dtype) for seed, n in ((1, queries), (2, keys)))
    v = normal(batch, 2, keys, widths[1], seed=9, dtype=dtype)
    predicted = kernel_for(*widths, dtype, CUDA, None if mask == "causal" and queries == keys else allowed).name
    names = events_of(lambda: sdpa(q, k, v, mask=allowed))
    assert names & KERNELS[predicted] and not names & FALLBACKS
    out, expected = sdpa(q, k, v, mask=allowed), reference(*(x.double() for x in (q, k, v)), mask=allowed)
    upstream = normal(*out.shape, seed=5, dtype=dtype).detach()
    results = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    expected_results = [expected, *torch.autograd.grad(expected, (q, k, v), upstream.double())]
    for a, b in zip(results, expected_results, strict=True):
        assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("mask", [None, "padding"])
def test_one_batch_of_queries_serves_all_samples(mask: str | None) -> None:
    """Expanded queries have a stride of zero."""
    q, k, v = (normal(n, 2, m, 64, seed=m) for n, m in ((1, 64), (4, 300), (4, 301)))
    v, allowed = v[:, :, :300], None if mask is None else MASKS[mask](4, 300)
    out, expected = (
        sdpa(q.expand(4, -1, -1, -1), k, v, mask=allowed),
        reference(q.double(), k.double(), v.double(), mask=allowed),
    )
    assert relative_error(out, expected) < 2e-2
    assert relative_error(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0]) < 2e-2


def test_samples_without_valid_keys_are_zero() -> None:
    valid = padding(2, 40)
    valid[1] = False
    q, k, v = (normal(2, 2, n, 64, seed=n) for n in (7, 40, 41))
    k, v = k[:, :, :40], v[:, :, :40].detach().masked_fill(~valid[:, None, :, None], torch.nan)
    out = sdpa(q, k, v, mask=masks.Padding(valid))
    assert not out[1].any() and out[0].isfinite().all()
    assert torch.autograd.grad(out.sum(), k)[0].isfinite().all()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_model_has_no_fallback(masked: bool) -> None:
    perceiver = model(reads.Dense())
    images, mask = torch.rand(IMAGES, device=CUDA), torch.rand(4, 61, 67, device=CUDA) < 0.5

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            perceiver(images, mask=mask if masked else None).square().mean().backward()

    names = events_of(step)
    assert names & KERNELS["flash or cuDNN"] and not names & (FALLBACKS | KERNELS["memory-efficient"])
    assert bool(names & KERNELS["flash, packed"]) is masked or not masked


def test_explain_names_the_kernel() -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        first = pc.explain_reads(model(reads.Dense()), torch.rand(IMAGES, device=CUDA))[0]
    assert "by the flash or cuDNN kernel" in first.why


# Structured reads


def test_the_triton_kernels_run_and_nothing_else_attends() -> None:
    perceiver, images = model(STRUCTURED), torch.rand(IMAGES, device=CUDA, requires_grad=True)
    names = events_of(lambda: perceiver(images).square().mean().backward())
    assert {"forward", "backward_queries", "backward_tokens"} <= names
    names = events_of(lambda: perceiver.encoder.reads[0](perceiver.encoder.latents[None], perceiver.adapter(images)))
    assert not set().union(*KERNELS.values()) & names and not FALLBACKS & names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_strategies_agree(dtype: torch.dtype) -> None:
    results = []
    for strategy in (reads.Dense(), STRUCTURED, reads.Factored()):
        perceiver = model(strategy).to(dtype)
        out = perceiver(torch.rand(IMAGES, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1)).to(dtype))
        gradients = torch.autograd.grad(out.float().square().mean(), list(perceiver.parameters()))
        results.append([out.double(), torch.nn.utils.get_total_norm(gradients).double()])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert relative_error(a, b) < (1e-4 if dtype == torch.float32 else 5e-2)


def test_results_repeat_to_the_bit() -> None:
    perceiver, images = model(STRUCTURED), torch.rand(IMAGES, device=CUDA, requires_grad=True)

    def step() -> list[Tensor]:
        out = perceiver(images)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), [images, *perceiver.parameters()])]

    first = step()
    tuned, triton_launch._tuned = triton_launch._tuned, {}
    try:
        for again in (step(), step()):
            torch.testing.assert_close(again, first, rtol=0.0, atol=0.0)
    finally:
        triton_launch._tuned = tuned


def test_no_tensor_of_latents_times_tokens_is_made() -> None:
    """512 latents and 512 x 512 tokens: scores take 512 MB in float32, the image 1 MB, and the marginals 2 MB."""
    positions = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=512)
    adapter = pc.adapters.Grid(1, positions=positions)
    read = pc.CrossAttend(64, adapter.dim, strategy=STRUCTURED).to(CUDA)
    latents, tokens = normal(1, 512, 64, dtype=torch.float32), adapter(torch.rand(1, 512, 512, 1, device=CUDA))

    def step() -> None:
        read(latents, tokens).sum().backward()

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < 128e6


@pytest.mark.slow
def test_a_grid_beyond_32_bits() -> None:
    """An image of 2^31 numbers is read like its half twice."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")
    side = 2**15
    half = torch.randn(1, 2, side // 2, side, device=CUDA)
    content, scale = torch.cat([half, half], 2), torch.ones(1, side, side, device=CUDA)
    content_queries, rows, columns = (torch.randn(1, 1, 3, n, device=CUDA) / 100 for n in (2, side // 2, side))
    small = read_grid(content_queries, torch.cat([rows, columns], -1), half, scale[:, : side // 2])
    large = read_grid(content_queries, torch.cat([rows, rows, columns], -1), content, scale)
    torch.testing.assert_close(large.content, small.content, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(large.lse, small.lse + torch.tensor(2.0, device=CUDA).log(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(large.marginals[..., :1], small.marginals[..., :1] / 2, rtol=1e-3, atol=1e-9)


# Synchronization, graphs, export


@pytest.mark.parametrize(
    "strategy", [reads.Dense(), STRUCTURED, reads.Factored(), reads.Auto()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_no_forward_pass_waits_for_the_gpu(strategy: reads.Strategy, masked: bool) -> None:
    perceiver, images = model(strategy), torch.rand(IMAGES, device=CUDA)
    mask = torch.rand(4, 61, 67, device=CUDA) < 0.5 if masked else None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        perceiver(images, mask=mask)
        with raise_on_synchronization():
            perceiver(images, mask=mask).sum().backward()


@pytest.mark.compile
@pytest.mark.parametrize("strategy", [reads.Dense(), STRUCTURED], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_it_compiles_to_one_graph_and_to_cuda_graphs(strategy: reads.Strategy, mode: str | None) -> None:
    perceiver = model(strategy)
    compiled = torch.compile(perceiver, fullgraph=True, mode=mode)
    for seed in range(3):
        perceiver.zero_grad(set_to_none=True)  # otherwise gradients would be in memory that the graph overwrites
        torch.compiler.cudagraph_mark_step_begin()
        images = torch.rand(IMAGES, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed))
        out = compiled(images)
        torch.testing.assert_close(out.detach(), perceiver(images).detach(), rtol=1e-3, atol=1e-4)
        out.sum().backward()


def test_a_structured_read_is_captured_in_a_cuda_graph() -> None:
    perceiver, images = model(STRUCTURED).eval(), torch.rand(IMAGES, device=CUDA)
    with torch.no_grad():
        perceiver(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = perceiver(images)
        images.copy_(torch.rand(IMAGES, device=CUDA))
        graph.replay()
        torch.testing.assert_close(out, perceiver(images), rtol=0.0, atol=0.0)


@pytest.mark.compile
def test_it_is_exported_for_any_batch() -> None:
    perceiver = model(STRUCTURED).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(perceiver, (torch.rand(IMAGES, device=CUDA),), dynamic_shapes=({0: batch},))
    images = torch.rand(7, *IMAGES[1:], device=CUDA)
    torch.testing.assert_close(program.module()(images), perceiver(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [reads.Dense(), STRUCTURED], ids=lambda p: type(p).__name__)
def test_inputs_elsewhere_than_weights_are_refused(strategy: reads.Strategy) -> None:
    with pytest.raises(ValueError, match=r"tokens is on cpu, the model on cuda:0; move one: tokens\.to\('cuda:0'\)"):
        model(strategy)(torch.rand(IMAGES))


def test_recomputed_activations_give_the_same_gradients() -> None:
    images, results = torch.rand(IMAGES, device=CUDA), []
    for make in (model, lambda strategy: pc.checkpoint_activations(model(strategy))):
        perceiver = make(STRUCTURED)
        results.append(torch.autograd.grad(perceiver(images).square().mean(), list(perceiver.parameters())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)


def test_the_choice_is_structured_where_heads_are_wide_and_dense_where_there_is_little_to_read() -> None:
    read = partial(pc.CrossAttend, 64, 261)
    positions = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
    tokens = pc.adapters.Grid(3, positions=positions)(torch.rand(8, 224, 224, 3, device=CUDA))
    few = pc.adapters.Grid(3, positions=positions)(torch.rand(1, 8, 8, 3, device=CUDA))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        wide = read().to(CUDA)
        assert reads.Auto().choose(wide.read_context(tokens)).strategy == STRUCTURED
        assert reads.Auto().choose(wide.read_context(few)).strategy == reads.Dense()
