"""NaN and infinity at masked positions have no effect: outputs and gradients are those of zeros, on every path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import adapters, kernels, losses, masks, models, positions, reads

B, N, C, M, DIM = 2, 13, 10, 5, 16
VALID = torch.ones(B, N, dtype=torch.bool)
VALID[0, 7:], VALID[1, 3] = False, False
MASKS: dict[str, Any] = {
    "b n": VALID,
    "b h q k": VALID[:, None, None, :].expand(B, 1, M, N),
    "Padding": masks.Padding(VALID),
    "And": masks.And((masks.Causal(), masks.Padding(VALID))),
    "Or": masks.or_(masks.Padding(VALID), masks.Padding(VALID & torch.eye(B, N).bool())),
    "rule": lambda queries, keys: VALID[:, None, None, :][..., keys],
}
KERNELS: dict[str, Callable[..., Tensor]] = {
    "fastest": kernels.fastest,
    "reference": kernels.reference,
    "chunked": partial(kernels.chunked, chunk_size=4),
    "inverted": kernels.inverted,
    "add_zero_attn": kernels.add_zero_attn,
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
padding = pytest.mark.parametrize("mask", [MASKS[name] for name in ("b n", "Padding", "And")])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_no_effect(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    valid: Tensor,
    parameters: Iterable[nn.Parameter] = (),
    *,
    rows: bool = False,
    tolerance: float = 1e-4,
) -> None:
    """Check outputs (with `rows`, of valid rows only), and the gradients of `x` and of parameters."""
    parameters, expected = list(parameters), None
    for value in (0.0, math.nan, math.inf, 3e38, -1e5):
        given = x.clone()
        given[~valid] = value
        given.requires_grad_()
        out = call(given)[valid] if rows else call(given)
        gradients = torch.autograd.grad(out.float().square().sum(), [given, *parameters], allow_unused=True)
        assert gradients[0][~valid].eq(0).all()
        found = [out, *(g for g in gradients if g is not None)]
        if expected is not None:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        expected = found


@each_mask
@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_cross_attention(kernel: Callable[..., Tensor], num_kv_heads: int, mask: Any) -> None:
    attention = partial(pc.MultiHeadAttention, qk_dim=DIM, kernel=kernel, num_kv_heads=num_kv_heads)
    read, latents = pc.CrossAttend(DIM, C, num_heads=4, attention=attention), drawn(B, M, DIM)
    assert_no_effect(lambda x: read(latents, x, mask=mask), drawn(B, N, C), VALID, read.parameters())


@each_mask
def test_encoder_and_attention(mask: Any) -> None:
    encoder = pc.Encoder(C, num_latents=M, dim=DIM, num_reads=2, depth=1, num_heads=4)
    assert_no_effect(lambda x: encoder(x, mask=mask), drawn(B, N, C), VALID, encoder.parameters())
    attention, latents = pc.MultiHeadAttention(DIM, C, num_heads=2), drawn(B, M, DIM)
    assert_no_effect(lambda x: attention(latents, x, mask=mask), drawn(B, N, C), VALID, attention.parameters())


@padding
def test_self_attention(mask: Any) -> None:
    blocks = (
        pc.SelfAttend(DIM, num_heads=2),
        pc.LatentTransformer(DIM, depth=2, num_heads=2),
        pc.MultiHeadAttention(DIM),
    )
    for block in blocks:
        call = partial(block, mask=mask)
        assert_no_effect(call, drawn(B, N, DIM), VALID, block.parameters(), rows=True)


def test_joint_grouped_and_hierarchical_attention() -> None:
    joint, latents = pc.JointAttend(DIM, num_heads=2), drawn(B, M, DIM)
    assert_no_effect(lambda x: joint(latents, x, mask=VALID), drawn(B, N, DIM), VALID, joint.parameters())
    levels = [pc.Level(4, num_latents=2, dim=DIM, depth=1), pc.Level(1, num_latents=3, dim=DIM, depth=1)]
    hierarchical = pc.HierarchicalPerceiver(C, levels=levels, positions=positions.LearnedGrid((N,), dim=8))
    resampler = pc.Resampler(C, num_latents=3, dim=DIM, depth=2, num_heads=2)
    grouped = pc.GroupedRead(C, levels[0])
    for model in (hierarchical, models.HierarchicalAutoencoder(hierarchical), resampler, grouped):
        assert_no_effect(partial(model, mask=VALID), drawn(B, N, C), VALID, model.parameters())


def test_frames() -> None:
    resampler = pc.Resampler(C, num_latents=3, depth=1, num_heads=2)
    mask = VALID[:, :12].reshape(B, 3, 4)
    for wrapper in (models.EachFrame, models.AllFrames):
        model = wrapper(resampler, frame_positions=positions.LearnedEmbedding(3, dim=C))
        assert_no_effect(partial(model, mask=mask), drawn(B, 3, 4, C), mask, model.parameters())


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
@pytest.mark.parametrize("residual", [True, False])
def test_queries_of_a_decoder(residual: bool, options: dict[str, int]) -> None:
    attention = partial(pc.CrossAttend, residual=residual)
    decoder, latents = pc.Decoder(DIM, query_dim=C, out_dim=3, cross_attention=attention, **options), drawn(B, M, DIM)
    call = partial(decoder, latents, mask=VALID)
    assert_no_effect(call, drawn(B, N, C), VALID, decoder.parameters(), rows=True)


@each_mask
@pytest.mark.parametrize("strategy", [reads.Dense(), reads.Factored(), reads.Structured(), reads.Auto()], ids=str)
def test_tokens_with_a_mask_of_the_read(strategy: reads.Strategy, mask: Any) -> None:
    if isinstance(strategy, reads.Structured) and not (isinstance(mask, masks.Padding) or mask is VALID):
        pytest.skip("it takes key-padding masks only")
    fourier, latents = positions.Fourier(1, num_bands=4, max_resolution=N), drawn(B, M, DIM)
    tables = fourier.tables((N,), like=latents)
    attention = partial(pc.MultiHeadAttention, qk_dim=DIM)
    read = pc.CrossAttend(DIM, C + fourier.dim, num_heads=4, strategy=strategy, attention=attention)
    assert_no_effect(lambda x: read(latents, pc.Tokens(x, tables), mask=mask), drawn(B, N, C), VALID, read.parameters())


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("name", [name for name in MASKS if name != "b n"])
def test_kernels(kernel: Callable[..., Tensor], name: str) -> None:
    q, k, v, mask = drawn(B, 3, M, 8), drawn(B, 3, N, 8), drawn(B, 3, N, 6), MASKS[name]
    valid = VALID[:, None].expand(B, 3, N)
    assert_no_effect(lambda x: kernel(q, x, v, mask=mask), k, valid)
    assert_no_effect(lambda x: kernel(q, k, x, mask=mask), v, valid)
    queries = torch.ones(B, M, dtype=torch.bool)
    queries[0, 2] = False
    keys = nn.Parameter(k)
    call = partial(_of_queries, kernel, keys, v, masks.Queries(queries))
    assert_no_effect(call, q, queries[:, None].expand(B, 3, M), [keys])


def _of_queries(kernel: Callable[..., Tensor], k: Tensor, v: Tensor, mask: masks.Mask, q: Tensor) -> Tensor:
    return kernel(q, k, v, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_keys_and_values_under_autocast(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Keys and values in float16 overflow from smaller numbers on."""
    attention = pc.MultiHeadAttention(DIM, C, num_heads=2, qk_dim=8, kernel=kernel)

    def attend(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return attention(drawn(B, M, DIM), x, mask=VALID)

    assert_no_effect(attend, drawn(B, N, C), VALID, attention.parameters(), tolerance=0.05)


@pytest.mark.parametrize("rule", [None, masks.Causal()], ids=repr)
@pytest.mark.parametrize("strategy", [reads.Dense(), reads.Factored(), reads.Structured()], ids=str)
def test_positions_that_are_masked_in_all_samples(strategy: reads.Strategy, rule: masks.Rule | None) -> None:
    if rule is not None and isinstance(strategy, reads.Structured):
        strategy = reads.Auto()  # structured reads take no rules
    read = pc.CrossAttend(DIM, C, num_heads=2, attention=partial(pc.MultiHeadAttention, qk_dim=8), strategy=strategy)
    content, seen = drawn(B, 3, 5, C - 2), torch.tensor([True, True, False, True, True])
    mask = seen.expand(B, 3, 5)

    def attend(table: Tensor) -> Tensor:
        return read(drawn(B, M, DIM), pc.Tokens(content, (drawn(3, 1, 2), table[None]), mask=mask), mask=rule)

    assert_no_effect(attend, drawn(5, 2), seen, read.parameters())


def test_adapters() -> None:
    cloud = adapters.PointCloud(2, positions=positions.Fourier(3, num_bands=2))
    assert_no_effect(lambda x: cloud(x, mask=VALID).materialize(), drawn(B, N, 5), VALID)
    audio = adapters.Audio(4, positions=None)
    samples = VALID[:, :, None].expand(B, N, 4).flatten(1)
    assert_no_effect(lambda x: audio(x, mask=VALID).materialize(), drawn(B, 4 * N), samples)
    speech = adapters.LogMel(8000, positions=None, num_mels=4, n_fft=16, hop_length=16)
    frames = torch.ones(B, N + 1, dtype=torch.bool)
    frames[0, 5:] = False
    samples = torch.arange(16 * N) < torch.tensor([[16 * 5 - 8], [16 * N]])
    assert_no_effect(lambda x: speech(x, mask=frames).materialize(), drawn(B, 16 * N), samples)
    assert_no_effect(lambda x: speech(x, lengths=[16 * 5 - 8, 16 * N]).materialize(), drawn(B, 16 * N), samples)


def test_losses() -> None:
    labels = torch.arange(B * N).reshape(B, N).remainder(3).masked_fill(~VALID, -100)
    for smoothing in (0.0, 0.1):
        loss = partial(losses.cross_entropy, labels=labels, label_smoothing=smoothing)
        assert_no_effect(loss, drawn(B, N, 3), VALID)
    targets, flow = labels.clamp(0, 1)[..., None], drawn(B, N, 2)
    assert_no_effect(
        partial(losses.binary_cross_entropy, targets=targets, mask=VALID[..., None]), drawn(B, N, 1), VALID
    )
    assert_no_effect(partial(losses.end_point_error, target=flow + 1, mask=VALID), flow, VALID)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    encoder = pc.Encoder(C, num_latents=M, dim=DIM, num_reads=2, depth=1, num_heads=4)
    with torch.autocast("cpu", dtype):
        assert_no_effect(lambda x: encoder(x, mask=VALID), drawn(B, N, C), VALID)


@pytest.mark.compile
def test_compiled(fresh: None) -> None:
    encoder = pc.Encoder(C, num_latents=M, dim=DIM, depth=1, num_heads=4)
    compiled = torch.compile(encoder, fullgraph=True)
    assert_no_effect(lambda x: compiled(x, mask=VALID), drawn(B, N, C), VALID, encoder.parameters())


def test_without_a_mask_values_are_not_touched() -> None:
    x = drawn(B, N, C)
    x[0, 0, 0] = math.nan
    assert pc.MultiHeadAttention(DIM, C, num_heads=2)(drawn(B, M, DIM), x).isnan().any()
