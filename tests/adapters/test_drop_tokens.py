"""DropTokens: the number of dropped tokens, which ones, and that the kept ones are unchanged."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc


def dropping(rate, *, axes=1):
    where = pc.positions.Fourier(num_axes=axes, num_bands=2, max_resolution=16)
    return pc.adapters.DropTokens(pc.adapters.Grid(3, positions=where), rate=rate)


@pytest.mark.parametrize("rate, left", [(0.0, 17), (0.25, 12), (0.5, 8), (0.99, 1)])
def test_the_rate_sets_the_number_of_kept_tokens(rate, left):
    adapter, x = dropping(rate), torch.randn(2, 17, 3)
    assert adapter(x).num_tokens == left and adapter.eval()(x).num_tokens == 17
    assert adapter.dim == adapter(x).dim == 3 + 5


def test_kept_tokens_are_a_subset_without_repetition():
    adapter, x = dropping(0.5, axes=2), torch.randn(3, 5, 7, 3)
    whole, some = adapter.eval()(x).materialize(), adapter.train()(x).materialize()
    same = (some[:, :, None] == whole[:, None]).all(-1)
    assert (same.sum(2) == 1).all() and (same.sum(1) <= 1).all()
    assert not torch.equal(same[0], same[1])


def test_each_sample_keeps_its_share_of_unmasked_tokens():
    adapter, x = dropping(0.5), torch.randn(3, 17, 3)
    there = torch.arange(17) < torch.tensor([[17], [9], [1]])
    tokens = adapter(x, mask=there)
    assert tokens.mask.sum(1).tolist() == [8, 5, 1]
    whole = adapter.eval()(x).materialize()
    for sample, present, tokens_of, mask in zip(whole, there, tokens.materialize(), tokens.mask, strict=True):
        same = (tokens_of[mask][:, None] == sample[None]).all(-1)
        assert same[:, present].any(1).all()


def test_every_token_is_equally_likely_to_be_kept():
    torch.manual_seed(0)
    adapter, x = dropping(0.75), torch.randn(1, 11, 3).expand(4000, -1, -1)
    kept = (adapter(x).materialize()[:, :, None] == adapter.eval()(x).materialize()[:1, None]).all(-1).any(1)
    torch.testing.assert_close(kept.double().mean(0), torch.full((11,), 2 / 11).double(), rtol=0, atol=0.03)


def test_gradients_reach_the_kept_tokens():
    x = torch.randn(2, 17, 3, requires_grad=True)
    dropping(0.5)(x).materialize().sum().backward()
    assert x.grad.any(2).sum(1).tolist() == [8, 8]


@pytest.mark.refusal
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_invalid_rates_raise(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)"):
        dropping(rate)


def test_the_seed_selects_the_kept_tokens():
    x, where = torch.randn(2, 17, 3), pc.adapters.Grid(3, positions=None)
    seeded = [
        pc.adapters.DropTokens(where, rate=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    actual = [adapter(x).content for adapter in seeded]
    assert torch.equal(actual[0], actual[1]) and not torch.equal(actual[0], actual[2])
    assert not torch.equal(seeded[0](x).content, actual[0])  # drawn anew
    state = torch.get_rng_state()
    seeded[0](x)
    assert torch.equal(torch.get_rng_state(), state)
    repeated = pc.adapters.DropTokens(where, rate=0.5, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(11)  # the default generator does not matter
        assert torch.equal(repeated(x).content, actual[0])


def test_the_generator_is_not_saved(tmp_path):
    grid = pc.adapters.Grid(3, positions=None)
    adapter = pc.adapters.DropTokens(grid, rate=0.5, generator=torch.Generator().manual_seed(0))
    again = pc.load(pc.save(adapter, tmp_path))
    assert again.rate == 0.5 and again.generator is None


@pytest.mark.compile
@pytest.mark.parametrize("seeded", [False, True])
def test_it_compiles_for_varying_sizes(seeded):
    generator = torch.Generator().manual_seed(0) if seeded else None
    adapter = pc.adapters.DropTokens(pc.adapters.Grid(3, positions=None), rate=0.5, generator=generator)
    compiled = torch.compile(adapter, dynamic=True, backend="aot_eager")
    for n in (17, 23):
        assert compiled(torch.randn(2, n, 3)).num_tokens == n // 2


@pytest.mark.parametrize("masked", [False, True])
def test_kept_tokens_stay_in_order(masked):
    adapter = pc.adapters.DropTokens(pc.adapters.Grid(num_channels=1, positions=None), rate=0.4).train()
    x, mask = torch.arange(50.0)[None, :, None].expand(3, -1, -1), torch.rand(3, 50) < 0.7 if masked else None
    left = adapter(x, mask=mask)
    assert (left.content[..., 0].diff() > 0).all()
