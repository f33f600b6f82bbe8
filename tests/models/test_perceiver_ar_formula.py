"""Perceiver AR against its formula, with each kind of positions, and its loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.models.perceiver_ar import next_token_loss
from tests.models.perceiver_ar_cases import (
    EXACT,
    HEADS,
    LATENTS,
    POSITIONS,
    VOCABULARY,
    each_position_embedding,
    ids_of,
    model_of,
    padding,
    rotary_options,
)


def rotated(heads, positions, exponents, base, dim):
    """Rotates pairs of channels as complex numbers."""
    numbers = torch.view_as_complex(heads[..., :dim].unflatten(-1, (-1, 2)).contiguous())
    numbers = numbers * torch.exp(1j * positions[:, None] * base ** -torch.tensor(exponents, dtype=torch.float64))
    return torch.cat([torch.view_as_real(numbers).flatten(-2), heads[..., dim:]], -1)


def attention(part, q, k, v, heads, rotate):
    """Dense causal attention of the last queries."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (part.query(q), part.key(k), part.value(v)))
    m, n = q.shape[2], k.shape[2]
    positions = torch.arange(n, dtype=torch.float64)
    q, k = rotate(q, positions[n - m :]), rotate(k, positions)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~torch.ones(m, n).bool().tril(n - m), -torch.inf)
    return part.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def by_hand(model, ids, rotate, read_heads):
    x = model.embedding.vectors[ids]
    if model.embedding.positions is not None:
        x = x + model.embedding.positions.vectors[: ids.shape[1]]
    read, z = model.cross_attention, x[:, -model.num_latents :]
    z = z + attention(read.attention, read.query_norm(z), read.input_norm(x), read.input_norm(x), read_heads, rotate)
    z = z + read.mlp(read.mlp_norm(z))
    for block in model.latent_transformer.blocks:
        normed = block.norm(z)
        z = z + attention(block.attention, normed, normed, normed, HEADS, rotate)
        z = z + block.mlp(block.mlp_norm(z))
    return model.norm(z) @ model.embedding.vectors.T + model.head.bias


class TestFormula:
    @pytest.mark.parametrize("n", [1, 2, LATENTS, LATENTS + 1, 13])
    def test_rotary_positions_of_roformer(self, n):
        def rotate(heads, positions):
            width = heads.shape[-1]
            return rotated(heads, positions, [2 * i / width for i in range(width // 2)], 10_000, width)

        model, ids = model_of(), ids_of(n=n)
        assert model(ids).shape == (2, min(n, LATENTS), VOCABULARY)
        torch.testing.assert_close(model(ids), by_hand(model, ids, rotate, 1), **EXACT)

    @pytest.mark.parametrize("n", [1, 13])
    def test_rotary_positions_of_perceiver_ar_code(self, n):
        rotary = pc.positions.Rotary(4, base=97, exponents=pc.positions.inclusive_exponents)
        model, ids = model_of(**rotary_options(rotary)), ids_of(n=n)
        expected = by_hand(model, ids, lambda heads, positions: rotated(heads, positions, [0, 1], 97, 4), 2)
        torch.testing.assert_close(model(ids), expected, **EXACT)

    @pytest.mark.parametrize("n", [1, 13])
    def test_learned_positions(self, n):
        model, ids = model_of(**POSITIONS["learned"]), ids_of(n=n)
        torch.testing.assert_close(model(ids), by_hand(model, ids, lambda heads, positions: heads, 2), **EXACT)

    def test_the_loss_is_the_mean_over_the_last_ids(self):
        model, ids = model_of(), ids_of()
        shares = model(ids[:, :-1]).softmax(-1)
        expected = -torch.stack([shares[b, i, ids[b, 8 + i]].log() for b in range(2) for i in range(LATENTS)]).mean()
        torch.testing.assert_close(model.loss(ids), expected, **EXACT)

    def test_the_loss_ignores_padding_and_first_ids(self):
        model, ids = model_of(), ids_of(3)
        mask = padding(13, 4, 2)
        alone = [model(row[valid][None, :-1])[0] for row, valid in zip(ids, mask, strict=True)]
        costs = [
            F.cross_entropy(actual, row[-len(actual) :], reduction="none")
            for actual, row in zip(alone, ids, strict=True)
        ]
        assert [len(cost) for cost in costs] == [LATENTS, 3, 1]
        torch.testing.assert_close(model.loss(ids, mask=mask), torch.cat(costs).mean(), **EXACT)

    @each_position_embedding
    def test_the_loss_ignores_samples_of_one_id(self, options):
        model, ids, lengths = model_of(**options), ids_of(4), torch.tensor([13, 1, 4, 1])
        valid, more = padding(*lengths), lengths > 1
        torch.testing.assert_close(model.loss(ids, mask=valid), model.loss(ids[more], mask=valid[more]), **EXACT)

    def test_loss_with_samples_of_one_id_and_prefix_dropout(self):
        model, ids, valid = model_of(prefix_dropout=0.5, latents=2).train(), ids_of(3), padding(1, 13, 1)
        model.loss(ids, mask=valid).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_samples_of_one_id_have_no_gradient(self):
        ids, valid, gradients = ids_of(3), padding(1, 6, 1), []
        for given_ids in (ids, ids.where(torch.tensor([[False], [True], [False]]), (ids + 1) % VOCABULARY)):
            model = model_of(head=pc.heads.Logits)
            model.loss(given_ids, mask=valid).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    def test_the_loss_without_targets_is_zero(self):
        actual = next_token_loss(torch.randn(2, 3, 7), torch.zeros(2, 5, dtype=torch.long), mask=padding(1, 1, n=5))
        assert actual == 0

    def test_more_or_fewer_latents(self):
        model, ids = model_of(), ids_of()
        assert [model(ids, num_latents=m).shape[1] for m in (1, 3, 7, 13, 23)] == [1, 3, 7, 13, 13]
        torch.testing.assert_close(model(ids, num_latents=LATENTS), model(ids), rtol=0, atol=0)
        other = model_of(latents=3)
        torch.testing.assert_close(model(ids, num_latents=3), other(ids), **EXACT)

    def test_every_integer_dtype(self):
        model, ids = model_of(), ids_of()
        for dtype in (torch.uint8, torch.int16, torch.int32):
            torch.testing.assert_close(model(ids.to(dtype)), model(ids), rtol=0, atol=0)
            torch.testing.assert_close(model.loss(ids.to(dtype)), model.loss(ids), rtol=0, atol=0)
