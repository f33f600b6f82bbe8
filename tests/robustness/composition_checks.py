"""Checks of a composition, which compare the results of two equivalent computations.

Each check returns whether it applies to the case, and raises AssertionError if the results differ.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import adapters, kernels, reads
from perceiver_core.kernels.grid import eager, operator
from perceiver_core.reads import slabs
from tests.robustness.composition_bounds import (
    assert_same,
    assert_within,
    autocasting,
    each_tensor,
    reference,
    run,
)
from tests.robustness.composition_draws import Draw, shown
from tests.robustness.composition_models import Case
from tests.robustness.composition_outputs import fits
from tests.robustness.composition_paths import path

KERNELS = (kernels.sdpa, kernels.reference, partial(kernels.chunked, chunk_size=2))
STRATEGIES = (reads.Dense(), reads.Auto(), *(reads.Factored(), reads.Structured()) * 3)


def is_random(case: Case) -> bool:
    """Return whether the model draws random numbers that depend on the dtype, the batch or the path."""
    drops = (nn.Dropout, pc.DropLatents, adapters.DropTokens, adapters.Multimodal, pc.PerceiverAR, nn.BatchNorm2d)
    attends = (part for part in case.model.modules() if isinstance(part, pc.MultiHeadAttention))
    return case.training and (
        any(isinstance(part, drops) for part in case.model.modules() if getattr(part, "p", 1))
        or any(attention.dropout for attention in attends)
    )


def shape_and_values(draw: Draw, case: Case, folder: Path) -> bool:
    """Check the shape of the output, and that it is finite."""
    torch.default_generator.manual_seed(0)
    case.model.train(case.training)
    output = case.model(case.inputs, **case.options)
    parts = output if isinstance(output, dict) else {"": output}
    shapes = case.shape if isinstance(case.shape, dict) else {"": case.shape}
    assert parts.keys() == shapes.keys(), f"modalities {list(parts)}, expected {list(shapes)}"
    for name, x in parts.items():
        if x.ndim:
            shape = (draw.batch, *(shapes[name] or [-1] * (x.ndim - 1)))
            known = draw.invalid is None  # an argument that was drawn to be invalid may be valid and change the shape
            assert not known or fits(x.shape, shape), f"output {name} has shape {tuple(x.shape)}, expected {shape}"
        assert x.is_meta or x.isfinite().all() or is_garbage(draw, case), f"output {name} is not finite"
        assert x.dtype == draw.dtype or not x.ndim, f"output {name} is {x.dtype}, expected {draw.dtype}"
    return True


def is_garbage(draw: Draw, case: Case) -> bool:
    """Return whether the input was made NaN and goes to a model without adapter. Only adapters check values."""
    x = case.inputs
    return (
        draw.invalid is not None
        and not hasattr(case.model, "adapter")
        and isinstance(x, Tensor)
        and bool(x.isnan().any())
    )


def paths(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare outputs and gradients of one strategy and kernel with those of dense attention in float64."""
    if is_random(case):
        return False
    autocast = draw.dtype == torch.float32 and draw.flag(0.2)
    gradients = draw.flag() and not autocast and draw.dtype != torch.bfloat16  # where they are mostly rounding
    with path(case.model, reads.Dense(), kernels.reference):
        expected = reference(case, draw.dtype, gradients=gradients, autocast=autocast)
    strategy, kernel = draw.choice(*STRATEGIES), kernels.fastest
    if not isinstance(strategy, reads.Structured) and draw.flag():
        kernel = draw.choice(*KERNELS)
    with ExitStack() as stack:
        stack.enter_context(path(case.model, strategy, kernel))
        stack.enter_context(autocasting(autocast))
        if small := draw.flag(0.3):
            stack.enter_context(patch.object(slabs, "TOKENS", 3))
        if slow := draw.flag(0.3):
            stack.enter_context(patch.object(operator, "_backend", lambda _: eager))
        actual = run(case, case.model, case.inputs, case.options, gradients=gradients)
    what = f"{type(strategy).__name__}, {shown(kernel)}, slabs={small}, eager={slow}, autocast={autocast}"
    assert_within(actual, *expected, what)
    return True


def samples(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare a batch with its samples, one by one."""
    if is_random(case) or not draw.batch or isinstance(case.source and case.source.adapter, nn.BatchNorm2d):
        return False
    whole = run(case, case.model, case.inputs, case.options)
    if any(not x.ndim for x in whole) or callable(case.options.get("mask")):
        return False
    bounds = reference(case, draw.dtype).bounds
    for i in range(draw.batch):
        options = {name: _sample_of(name, x, i) for name, x in case.options.items()}
        actual = run(case, case.model, each_sample(case.inputs, i), options)
        assert_within(actual, [x[i : i + 1] for x in whole], bounds, f"sample {i} by itself")
    return True


def _sample_of(name: str, value: Any, i: int) -> Any:
    """Return the value of an argument for one sample. Query inputs may lack a batch axis: all samples share them."""
    if name != "query_inputs":
        return value if name == "num_latents" else each_sample(value, i)
    return each_tensor(lambda x: x[i : i + 1] if x.ndim == (3 if x.is_floating_point() else 2) else x, value)


def each_sample(tree: Any, i: int) -> Any:
    """Return the arguments of one sample. Lengths are lists with one entry per sample."""
    if isinstance(tree, list) and tree and isinstance(tree[0], (int, list)) and not isinstance(tree[0], bool):
        return [tree[i]] if _is_numbers(tree) else [each_sample(item, i) for item in tree]
    if isinstance(tree, dict):
        return {key: each_sample(item, i) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, pc.Tokens):
        return [each_sample(item, i) for item in tree]
    return each_tensor(lambda x: x[i : i + 1] if x.shape[0] > 1 or i == 0 else x, tree)


def _is_numbers(tree: Any) -> bool:
    return all(isinstance(x, int) or (isinstance(x, list) and all(isinstance(n, int) for n in x)) for x in tree)


def masked(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the result with the result after masked values are replaced by NaN, or masked ids by 0."""
    spoil = case.source and case.source.spoil
    if not spoil or not case.options.keys() & {"mask", "lengths"} or is_random(case):
        return False
    x = case.inputs
    if not isinstance(x, Tensor):
        return False
    if x.is_floating_point():
        x = spoil(x, case.options)
    else:
        wide = spoil(x.double(), case.options)
        x = torch.where(wide.isnan(), torch.zeros_like(x), x)
    expected = run(case, case.model, case.inputs, case.options)
    assert_same(run(case, case.model, x, case.options), expected, "masked values replaced")
    return True


def removed(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the latents with those of each sample by itself, given as a tensor without its masked tokens."""
    encoder = getattr(case.model, "encoder", None)
    if not isinstance(encoder, pc.Encoder) or is_random(case):
        return False
    with torch.no_grad():
        tokens = case.model.adapter(case.inputs, **{k: v for k, v in case.options.items() if k in ("mask", "lengths")})
        if not isinstance(tokens, pc.Tokens) or any(
            not isinstance(read.attention.rotary, nn.Identity) for read in encoder.reads
        ):
            return False
        whole, flat = tokens.materialize(), tokens.flat_mask()
        latents = encoder(tokens)
        alone = Case(encoder, tokens, {}, None, case.source, training=case.training)
        bounds = reference(alone, draw.dtype).bounds
        for i in range(draw.batch):
            kept = whole[i : i + 1] if flat is None else whole[i : i + 1, flat[i]]
            assert_within([encoder(kept)], [latents[i : i + 1]], bounds, f"sample {i} without masked tokens")
    return True


def checkpointed(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare outputs and gradients with those under activation checkpointing."""
    expected = run(case, case.model, case.inputs, case.options, gradients=True)
    pc.checkpoint_activations(case.model)
    try:
        actual = run(case, case.model, case.inputs, case.options, gradients=True)
    finally:
        for part in case.model.modules():
            vars(part).pop("forward", None)
    assert_same(actual, expected, "activation checkpointing")
    return True


def saved(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the outputs with those of the saved and loaded model."""
    if draw.dtype != torch.float32 and any(isinstance(part, adapters.OneHotLabel) for part in case.model.modules()):
        return False  # its dtype is not saved
    expected = run(case, case.model, case.inputs, case.options)
    try:
        pc.save(case.model, folder / "model")
    except ValueError as error:
        if "<lambda>" in str(error) or "function" in str(error):
            return False  # sharing plans of their own are not registered
        raise
    loaded = pc.load(folder / "model")
    assert_same(run(case, loaded, case.inputs, case.options), expected, "saved and loaded")
    return True


def copied(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the outputs with those of a deep copy."""
    expected = run(case, case.model, case.inputs, case.options)
    assert_same(run(case, copy.deepcopy(case.model), case.inputs, case.options), expected, "deep copy")
    return True


def strided(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare the outputs with those of the same inputs in tensors that are not contiguous."""
    if is_random(case):
        return False
    other = run(case, case.model, each_tensor(_strided, case.inputs), case.options)
    assert_within(other, *reference(case, draw.dtype), "inputs of other strides")
    return True


def _strided(x: Tensor) -> Tensor:
    """Return the same values in a tensor that is not contiguous."""
    return torch.stack([x, x], dim=-1)[..., 0] if x.ndim else x


def unchunked(draw: Draw, case: Case, folder: Path) -> bool:
    """Compare outputs and gradients of a decoder in chunks with those of all queries at once."""
    if not isinstance(case.model, pc.PerceiverIO) or case.model.decoder.chunk_size is None or is_random(case):
        return False
    decoder: Any = case.model.decoder
    chunk_size, decoder.chunk_size = decoder.chunk_size, None
    expected = reference(case, draw.dtype, gradients=True)
    decoder.chunk_size = chunk_size
    assert_within(run(case, case.model, case.inputs, case.options, gradients=True), *expected, "chunks")
    return True


def maps(draw: Draw, case: Case, folder: Path) -> bool:
    """Check that attention weights have the right shape and sum to at most one, and call `explain_reads`."""
    model = case.model.eval()
    encoder = model if isinstance(model, pc.Encoder) else getattr(model, "encoder", None)
    if not isinstance(encoder, pc.Encoder) or not draw.batch:
        return False
    with torch.no_grad():
        options = {k: v for k, v in case.options.items() if k in ("mask", "lengths")}
        tokens = case.inputs if encoder is model else model.adapter(case.inputs, **options)
        read = draw.random.randrange(-len(encoder.sharing.reads), len(encoder.sharing.reads))
        weights = encoder.attention_map(tokens, read=read, **(options if encoder is model else {}))
        own = tokens[read] if isinstance(tokens, list) and len(tokens) > 1 else tokens
        own = own[0] if isinstance(own, list) else own
    attention = encoder.reads[encoder.sharing.reads[read]].attention
    n = own.num_tokens if isinstance(own, pc.Tokens) else own.shape[1]
    shape = (draw.batch, attention.num_heads, encoder.latents.shape[0], n)
    assert tuple(weights.shape) == shape, f"attention map has shape {tuple(weights.shape)}, expected {shape}"
    assert (weights >= 0).all() and (weights.sum(-1) < 1.1).all(), "attention weights are no distributions"
    pc.explain_reads(encoder, tokens, **(options if encoder is model else {}))
    return True


CHECKS = (
    paths,
    paths,
    paths,
    paths,
    paths,
    paths,
    samples,
    masked,
    removed,
    checkpointed,
    saved,
    copied,
    strided,
    unchunked,
    maps,
)
