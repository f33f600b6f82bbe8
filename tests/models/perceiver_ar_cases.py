"""Small Perceiver AR models with random weights, and their inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

import perceiver_core as pc

VOCABULARY, DIM, LATENTS, HEADS = 19, 28, 5, 7
EXACT = {"rtol": 0, "atol": 1e-12}  # float64
few_examples = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
GOOGLE = pc.positions.Rotary(2, base=97, exponents=pc.positions.inclusive_exponents)


def rotary_options(rotary):
    attention = partial(pc.MultiHeadAttention, rotary=rotary)
    return {
        "cross_attention": partial(pc.CrossAttend, num_heads=2, attention=attention),
        "latent_transformer": partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=attention)),
    }


POSITIONS = {
    "rotary": {},
    "google's rotary": rotary_options(GOOGLE),
    "learned": rotary_options(None)
    | {"embedding": pc.adapters.TokenEmbedding(VOCABULARY, DIM, positions=pc.positions.LearnedEmbedding(101, DIM))},
}
each_position_embedding = pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS)


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return model.eval()


def model_of(*, embedding=None, latents=LATENTS, depth=2, **options):
    torch.manual_seed(0)
    embedding = (
        pc.adapters.TokenEmbedding(VOCABULARY, DIM)
        if embedding is None
        else pc.registry.from_config(pc.registry.to_config(embedding))
    )
    return randomized(pc.PerceiverAR(embedding, num_latents=latents, depth=depth, num_heads=HEADS, **options))


def ids_of(b=2, n=13, seed=0):
    return torch.randint(VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))


def padding(*lengths, n=13):
    return torch.arange(n) >= n - torch.tensor(lengths)[:, None]
