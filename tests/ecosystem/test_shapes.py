"""Batches of no samples, and inputs in any memory layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import perceiver_core as pc
from perceiver_core import adapters, heads, kernels, masks, positions, queries, reads
from tests.integration.whole_models import DIM, MODELS, drawn, encoder, make

pytestmark = pytest.mark.no_shape_checks
STRATEGIES = {
    "auto": reads.Auto(),
    "dense": reads.Dense(),
    "factored": reads.Factored(),
    "structured": reads.Structured(),
}
FOURIER = partial(positions.Fourier, num_bands=2, max_resolution=7)


def none_of(value: Any) -> Any:
    """Returns the inputs without their samples: all tensors have the batch as their first axis."""
    return tree_map(lambda x: x[:0] if isinstance(x, Tensor) else x, value)


def check_empty(empty: object, full: object) -> None:
    """Raises unless the outputs for no samples have the shape and dtype of those for some."""
    for actual, expected in zip(tree_leaves(empty), tree_leaves(full), strict=True):
        assert actual.shape == (0, *expected.shape[1:]) and actual.dtype == expected.dtype


def check_module(module: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """Compares outputs for a batch of 0 with those for the whole batch, and checks gradients."""
    full, empty = module(*inputs, **options), module(*none_of(inputs), **none_of(options))
    check_empty(contents(empty), contents(full))
    leaves = [x for x in tree_leaves(contents(empty)) if x.requires_grad]
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    if leaves and parameters:
        gradients = torch.autograd.grad(sum(x.sum() for x in leaves), parameters, allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)


def contents(value: Any) -> Any:
    """Returns what has a batch axis: of tokens, the content and the mask."""
    if isinstance(value, pc.Tokens):
        return [value.content] if value.mask is None else [value.content, value.mask]
    return [contents(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_of_no_samples(name: str, strategy: str, training: bool) -> None:
    if strategy in ("factored", "structured") and not isinstance(make(name)[0], (pc.Perceiver, pc.PerceiverIO)):
        return  # its inputs mix content and positions
    model, inputs = make(name, STRATEGIES[strategy])
    check_module(model.train(training), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["image", "multimodal", "text", "frames"])
def test_other_dtypes_and_autocast(name: str, dtype: torch.dtype) -> None:
    model, inputs = make(name)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            check_module(model, inputs)
    model, inputs = model.to(dtype), tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    check_module(model, inputs)


def mask_of(*shape: int) -> Tensor:
    mask = drawn(*shape, seed=3) > 0.4
    mask.flatten(1)[:, 0] = True
    return mask


TOKENS = pc.Tokens(drawn(2, 4, 5, 3), (drawn(4, 1, 6), drawn(1, 5, 6)), mask=mask_of(2, 4, 5))
ADAPTERS: dict[str, tuple[nn.Module, Any, Any]] = {
    "image": (adapters.Image(3, positions=FOURIER(2)), drawn(2, 3, 4, 5), mask_of(2, 4, 5)),
    "patches": (
        adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.Patches, patch_size=2)),
        drawn(2, 3, 5, 7),
        mask_of(2, 3, 4),
    ),
    "convolution": (
        adapters.Image(3, positions=FOURIER(2), stem=partial(adapters.ConvStem, dim=4)),
        drawn(2, 3, 17, 23),
        mask_of(2, 5, 6),
    ),
    "audio": (adapters.Audio(4, positions=FOURIER(1)), drawn(2, 23), mask_of(2, 6)),
    "spectrogram": (adapters.Spectrogram(positions=FOURIER(2)), drawn(2, 4, 7), mask_of(2, 4, 7)),
    "points": (adapters.PointCloud(2, positions=FOURIER(3)), drawn(2, 11, 5), mask_of(2, 11)),
    "grid": (adapters.Grid(3, positions=FOURIER(3)), drawn(2, 2, 3, 5, 3), mask_of(2, 2, 3, 5)),
    "video": (
        adapters.Video(3, patch_size=(1, 2, 2), positions=FOURIER(3)),
        drawn(2, 2, 3, 4, 6),
        mask_of(2, 2, 2, 3),
    ),
    "frame pair": (adapters.FramePair(positions=FOURIER(2), dim=5), drawn(2, 2, 3, 4, 6), mask_of(2, 4, 6)),
    "text": (adapters.TokenEmbedding(11, DIM), torch.arange(14).reshape(2, 7) % 11, mask_of(2, 7)),
    "bytes": (adapters.Bytes(DIM), torch.arange(14).reshape(2, 7), mask_of(2, 7)),
    "label": (adapters.OneHotLabel(5), torch.tensor([3, 1]), None),
    "soft label": (adapters.OneHotLabel(5), drawn(2, 5), None),
    "table": (adapters.Table(2, (3,), dim=7), {"numbers": drawn(2, 2), "categories": torch.tensor([[2], [0]])}, None),
    "dropped": (
        adapters.DropTokens(adapters.Image(3, positions=FOURIER(2)), rate=0.5),
        drawn(2, 3, 4, 5),
        mask_of(2, 4, 5),
    ),
    "multimodal": (
        adapters.Multimodal(
            {"image": adapters.Image(3, positions=FOURIER(2)), "label": adapters.OneHotLabel(4)},
            token_mask_rate={"image": 0.5},
            modality_dropout={"image": 0.3},
        ),
        {"image": drawn(2, 3, 4, 5), "label": torch.tensor([3, 0])},
        {"image": mask_of(2, 4, 5), "label": torch.tensor([True, True])},
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_and_reads_of_no_samples(name: str, masked: bool, training: bool) -> None:
    adapter, inputs, mask = ADAPTERS[name]
    adapter.train(training)
    options = {"mask": mask} if masked and mask is not None else {}
    check_module(adapter, inputs, **options)
    model = pc.Perceiver(adapter, encoder(adapter.dim), heads.Classification(DIM, 3)).train(training)
    check_module(model, inputs, **options)


MASKS = {
    "none": None,
    "padding": mask_of(2, 20),
    "heads": mask_of(2, 2, 6, 20),
    "rule": masks.Causal(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reads_of_no_samples(strategy: str, mask: str) -> None:
    """Latents may have a batch of 1 or of 0."""
    read = pc.CrossAttend(
        DIM, 9, num_heads=2, attention=partial(pc.MultiHeadAttention, qk_dim=8), strategy=STRATEGIES[strategy]
    )
    given = MASKS[mask]
    context = read.read_context(TOKENS, mask=given)
    if context.source.strategy.why_not(context):
        return
    options = {} if given is None else {"mask": given}
    for latents in (drawn(1, 6, DIM), drawn(2, 6, DIM)):
        full = read(latents, TOKENS, **options)
        none = read(
            latents if len(latents) == 1 else latents[:0],
            pc.Tokens(TOKENS.content[:0], TOKENS.position_tables, mask=TOKENS.mask[:0]),
            **none_of(options),
        )
        check_empty(none, full)


KERNELS = {
    "reference": kernels.reference,
    "sdpa": kernels.sdpa,
    "fastest": kernels.fastest,
    "chunked": partial(kernels.chunked, chunk_size=3),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_no_samples(kernel: str, causal: bool) -> None:
    q, k, v = drawn(2, 3, 5, 8), drawn(2, 3, 7, 8), drawn(2, 3, 7, 6)
    mask = masks.Causal() if causal else mask_of(2, 1, 1, 7)
    attention = partial(pc.MultiHeadAttention, kernel=KERNELS[kernel])
    check_empty(KERNELS[kernel](*none_of((q, k, v)), mask=none_of(mask)), KERNELS[kernel](q, k, v, mask=mask))
    check_module(pc.SelfAttend(DIM, num_heads=2, attention=attention), drawn(2, 7, DIM))


X, Y = drawn(2, 6, DIM), drawn(2, 7, 9)
PARTS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (pc.MultiHeadAttention(DIM, num_heads=2), (X,), {}),
    "grouped queries": (pc.MultiHeadAttention(DIM, num_heads=4, num_kv_heads=2, rotary=positions.Rotary(2)), (X,), {}),
    "normed": (pc.MultiHeadAttention(DIM, num_heads=2, qk_norm=nn.RMSNorm), (X,), {"mask": masks.Causal()}),
    "self-attention": (pc.SelfAttend(DIM, num_heads=2), (X,), {"mask": mask_of(2, 6)}),
    "cross-attention": (pc.CrossAttend(DIM, 9, residual=pc.GRUGate, mlp_residual=pc.TanhGate), (X, Y), {}),
    "joint attention": (pc.JointAttend(DIM, num_heads=2), (X, drawn(2, 7, DIM)), {"mask": mask_of(2, 7)}),
    "transformer": (pc.LatentTransformer(DIM, depth=2, num_heads=2), (X,), {}),
    "residual": (pc.AttentionResidual(DIM), ([X, X],), {}),
    "grouped read": (pc.GroupedRead(9, pc.Level(2, num_latents=3, dim=DIM, depth=1, num_heads=2)), (Y,), {}),
    "grouped read, masked": (
        pc.GroupedRead(9, pc.Level(2, num_latents=3, dim=DIM, depth=1, num_heads=2)),
        (Y,),
        {"mask": mask_of(2, 7)},
    ),
    "mlp": (pc.MLP(DIM, activation=pc.GEGLU()), (X,), {}),
    "latent dropout": (pc.DropLatents(0.5), (X,), {}),
    "decoder": (pc.Decoder(DIM, query_dim=9, out_dim=3), (X, Y), {}),
    "decoder in chunks": (pc.Decoder(DIM, query_dim=9, out_dim=3, chunk_size=2), (X, Y), {}),
    "learned queries": (queries.Learned(7, dim=6), (TOKENS, torch.tensor([[3, 1], [0, 2]])), {}),
    "grid queries": (queries.Grid((4, 5), FOURIER(2)), (TOKENS, torch.tensor([[3, 1], [0, 2]])), {}),
    "external queries": (queries.External(9), (None, Y), {}),
    "coordinates": (queries.Coordinates(FOURIER(2)), (None, drawn(2, 3, 2)), {}),
    "queries from inputs": (queries.FromInputs(9), (Y, torch.tensor([[3, 1], [0, 2]])), {}),
    "classification": (heads.Classification(DIM, 3), (X,), {}),
    "regression": (heads.Regression(DIM), (X,), {}),
    "identity": (heads.Identity(), (X,), {}),
    "linear": (heads.Linear(DIM, 3), (X,), {}),
    "single query": (heads.SingleQuery(heads.Linear(DIM, 3)), (X[:, :1],), {}),
    "grid": (heads.Grid((2, 3), head=heads.Linear(DIM, 3)), (X,), {}),
    "unpatchify": (heads.Unpatchify(DIM, grid=(2, 3), patch_size=(2, 2), num_channels=2), (X,), {}),
    "waveform": (heads.Waveform(DIM, 4), (X,), {}),
    "logits": (heads.Logits(adapters.TokenEmbedding(11, DIM)), (X,), {}),
    "tied logits": (heads.TiedLogits(adapters.TokenEmbedding(11, DIM)), (X,), {}),
    "resampler": (pc.Resampler(9, num_latents=3, dim=DIM, depth=2, num_heads=2), (Y,), {"mask": mask_of(2, 7)}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_no_samples(name: str, training: bool) -> None:
    module, inputs, options = PARTS[name]
    check_module(module.train(training), *inputs, **options)


def test_other_methods_of_no_samples() -> None:
    model, inputs = make("image")
    tokens, none = model.adapter(inputs), model.adapter(inputs[:0])
    check_empty(model.encoder.attention_map(none), model.encoder.attention_map(tokens))
    assert [read.sizes.batch for read in pc.explain_reads(model, inputs[:0])] == [0, 0]
    text, ids = make("text")
    assert pc.generate(text, ids[:0, :5], max_new_tokens=3).shape[0] == 0
    assert text.loss(ids[:0]) == 0
    with pytest.raises(ValueError, match="must not be empty"):
        model(inputs[..., :0])  # other axes hold something


def test_gradients_in_recomputation_of_no_samples() -> None:
    model, inputs = make("image")
    pc.checkpoint_activations(model.train())(inputs[:0]).sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


# Memory layouts


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def inside(x: Tensor) -> Tensor:
    wide = x.new_zeros([size + 2 for size in x.shape])
    middle = wide[tuple(slice(1, -1) for _ in x.shape)]
    return middle.copy_(x)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


@pytest.mark.parametrize("layout", [transposed, every_second, inside, channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_strided_inputs(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """Outputs and gradients equal those for contiguous inputs."""
    model, inputs = make(name)
    found = []
    for change in (layout, Tensor.contiguous):
        given = tree_map(lambda x, change=change: change(x).detach(), inputs)
        floats = [x.requires_grad_() for x in tree_leaves(given) if x.is_floating_point()]
        outputs = tree_leaves(model(given))
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs), floats) if floats else ()
        found.append([*outputs, *gradients])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_expanded_inputs(name: str) -> None:
    model, inputs = make(name)
    one = tree_map(lambda x: x[:1], inputs)
    expanded = tree_map(lambda x: x.expand(3, *x.shape[1:]), one)
    repeated = tree_map(lambda x: x.repeat(3, *[1] * (x.ndim - 1)), one)
    torch.testing.assert_close(model(expanded), model(repeated), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_models_in_channels_last_format(strategy: str) -> None:
    model, inputs = make("gated", STRATEGIES[strategy])
    expected = model(inputs)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(inputs.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strided_tokens_masks_and_weights(strategy: str) -> None:
    read = pc.CrossAttend(
        DIM, 9, num_heads=2, attention=partial(pc.MultiHeadAttention, qk_dim=8), strategy=STRATEGIES[strategy]
    )
    latents = drawn(2, 6, DIM)
    expected = read(latents, TOKENS, mask=mask_of(2, 20))
    for parameter in read.parameters():
        parameter.data = transposed(parameter.data) if parameter.ndim > 1 else every_second(parameter.data)
    tables = tuple(every_second(table) for table in TOKENS.position_tables)
    tokens = pc.Tokens(transposed(TOKENS.content), tables, mask=transposed(TOKENS.mask))
    torch.testing.assert_close(
        read(transposed(latents), tokens, mask=transposed(mask_of(2, 20))), expected, rtol=1e-4, atol=1e-5
    )
