"""Attention residuals: the formula, and their place in latent transformers and encoders."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch

import perceiver_core as pc
from perceiver_core import masks

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Pool = partial(pc.AttentionResidual, rank=3)


def arrays(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]


def test_the_formula_vector_by_vector():
    pool, past = Pool(7).double(), arrays(3, 2, 5, 7)
    expected = torch.empty(2, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        for b in range(2):
            for m in range(5):
                vectors = torch.stack([x[b, m] for x in past])
                normed = vectors / (vectors.square().mean(1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
                logits = (normed * pool.norm.weight) @ pool.project.weight.T @ pool.expand.weight.T
                expected[b, m] = (logits.exp() / logits.exp().sum(0) * vectors).sum(0)
    torch.testing.assert_close(pool(past), expected, **EXACT)
    assert torch.autograd.gradcheck(lambda *past: pool(past), arrays(3, 1, 2, 7))


def test_one_array_is_returned_unchanged():
    (x,) = arrays(1, 2, 5, 7)
    torch.testing.assert_close(Pool(7).double()([x]), x, **EXACT)


def test_arrays_with_and_without_batch_axis_broadcast():
    pool, past = Pool(7).double(), [*arrays(1, 1, 5, 7), *arrays(2, 2, 5, 7)]
    torch.testing.assert_close(pool(past), pool([past[0].expand(2, -1, -1), *past[1:]]), **EXACT)


@pytest.mark.parametrize("repeats", [1, 2])
def test_each_block_combines_all_earlier_outputs(repeats):
    (x,) = arrays(1, 2, 5, 12)
    transformer = pc.LatentTransformer(12, depth=3, num_heads=2, aggregate=Pool, num_repeats=repeats).double()
    past = [x]
    now = x
    for number in range(3 * repeats):
        past.append(transformer.blocks[number % 3](now))
        now = transformer.aggregates[number % 3](past)
    torch.testing.assert_close(transformer(x), now, **EXACT)
    assert len({id(p) for p in transformer.parameters()}) == sum(1 for _ in transformer.state_dict())


@pytest.mark.parametrize("repeats", [1, 2])
def test_parts_of_an_array_equal_the_whole(repeats):
    (x,) = arrays(1, 2, 5, 12)
    transformer = pc.LatentTransformer(12, depth=2, num_heads=2, aggregate=Pool, num_repeats=repeats).double()
    caches = [pc.reads.KeysValuesCache() for _ in range(transformer.num_layers)]
    first = transformer(x[:, :3], mask=masks.Causal(), caches=caches)
    last = transformer(x[:, 3:], mask=masks.Causal(), caches=caches)
    torch.testing.assert_close(torch.cat([first, last], 1), transformer(x, mask=masks.Causal()), **EXACT)


@pytest.mark.parametrize("share", [True, False])
def test_each_encoder_step_combines_all_earlier_outputs(share):
    (tokens,) = arrays(1, 2, 11, 10)
    encoder = pc.Encoder(
        10, num_latents=5, dim=12, num_reads=3, depth=1, num_heads=2, share=share, aggregate=Pool
    ).double()
    assert len(encoder.aggregates) == len(encoder.transformers)
    past = [encoder.latents[None].expand(2, -1, -1)]
    now = past[0]
    for read, transformer in zip(encoder.sharing.reads, encoder.sharing.transformers, strict=True):
        past.append(encoder.transformers[transformer](encoder.reads[read](now, tokens)))
        now = encoder.aggregates[transformer](past)
    torch.testing.assert_close(encoder(tokens), now, **EXACT)


def test_a_model_with_it_is_saved_and_loaded(tmp_path):
    encoder = pc.Encoder(
        10,
        num_latents=5,
        dim=12,
        num_reads=2,
        depth=2,
        num_heads=2,
        aggregate=Pool,
        latent_transformer=partial(pc.LatentTransformer, aggregate=Pool),
    )
    model = pc.Perceiver(
        pc.adapters.Grid(10, positions=None), encoder, pc.heads.Classification(12, num_classes=3)
    ).eval()
    points = torch.randn(2, 11, 10)
    torch.testing.assert_close(pc.load(pc.save(model, tmp_path / "model"))(points), model(points))


def test_without_it_earlier_outputs_are_freed():
    """Outputs of earlier blocks are freed in evaluation."""
    transformer, seen = pc.LatentTransformer(12, depth=3, num_heads=2), []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(weakref.ref(out)))
    with torch.no_grad():
        out = transformer(torch.randn(1, 5, 12))
    alive = [there() for there in seen]
    assert len(alive) == 3
    assert alive[:2] == [None, None]
    assert alive[2] is out


@pytest.mark.refusal
@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 7, "rank": 0}])
def test_invalid_sizes_raise(sizes):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        pc.AttentionResidual(**sizes)
