"""DropLatents: the number of dropped latents, which ones, and that the kept ones equal a smaller model."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc
from perceiver_core import DropLatents, Encoder


def encoder(drop: DropLatents | None = None, **options) -> Encoder:
    torch.manual_seed(0)
    return Encoder(10, num_latents=7, dim=14, depth=1, num_heads=2, latent_dropout=drop, **options).double()


def seeded(rate: float, seed: int = 0) -> DropLatents:
    return DropLatents(rate, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    return torch.randn(2, 11, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rate", "left"), [(0.0, 7), (0.1, 6), (0.5, 3), (0.99, 1)])
def test_the_rate_sets_the_number_of_kept_latents_in_training(rate, left):
    made = encoder(DropLatents(rate))
    assert made.train()(tokens()).shape == (2, left, 14)
    torch.testing.assert_close(made.eval()(tokens()), encoder()(tokens()))


def test_kept_latents_equal_a_model_with_fewer_latents():
    made = encoder(seeded(0.5), num_reads=3)
    kept = seeded(0.5)(torch.arange(7.0).view(1, 7, 1)).flatten().long()
    assert (kept.diff() > 0).all()
    fewer = Encoder(10, num_latents=3, dim=14, depth=1, num_heads=2, num_reads=3).double()
    fewer.load_state_dict(made.state_dict() | {"latents": made.latents[kept].detach()})
    torch.testing.assert_close(made(tokens()), fewer(tokens()))


def test_gradients_reach_only_the_kept_latents():
    made = encoder(seeded(0.5))
    made(tokens()).square().sum().backward()
    assert made.latents.grad.any(1).sum() == 3
    assert all(weight.grad is not None for weight in made.parameters())


def test_every_latent_is_equally_likely_and_seeded():
    drop, latents = seeded(0.4), torch.arange(7.0).view(1, 7, 1)
    drawn = [drop(latents).flatten().tolist() for _ in range(3000)]
    counts = torch.tensor([kept for draw in drawn for kept in draw]).long().bincount(minlength=7)
    torch.testing.assert_close(counts / 3000, torch.full((7,), 4 / 7), rtol=0, atol=0.04)
    again, other = seeded(0.4), seeded(0.4, seed=1)
    assert [again(latents).flatten().tolist() for _ in range(20)] == drawn[:20]
    assert [other(latents).flatten().tolist() for _ in range(20)] != drawn[:20]


def test_a_model_is_saved_with_its_rate(tmp_path):
    again = pc.load(pc.save(encoder(seeded(0.5)).float(), tmp_path))
    assert again.latent_dropout.rate == 0.5 and again.latent_dropout.generator is None


def test_attention_maps_in_evaluation_cover_all_latents():
    assert encoder(DropLatents(0.5)).eval().attention_map(tokens()).shape == (2, 1, 7, 11)


@pytest.mark.refusal
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_invalid_rates_raise(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)"):
        DropLatents(rate)


def test_floats_slightly_below_an_integer_round_up():
    from fractions import Fraction

    from perceiver_core import checks

    for percent in range(100):
        for n in range(1, 513):
            expected = int(n * (1 - Fraction(percent, 100)))
            assert checks.part_of(n, 1 - percent / 100) == expected, (percent, n)
