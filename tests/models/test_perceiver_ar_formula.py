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


class TestLabels:
    def test_hooks_see_the_loss(self):
        model, outputs = model_of(), []
        model.register_forward_hook(lambda module, args, options, output: outputs.append(output), with_kwargs=True)
        loss = model.loss(ids_of())
        assert len(outputs) == 1
        assert outputs[0] is loss and loss.shape == ()

    @pytest.mark.parametrize("m", [1, 3, 12])
    def test_labels_are_predicted_from_the_ids_before_them(self, m):
        model, ids, labels = model_of(), ids_of(), ids_of(seed=1)
        labels[0, -1] = labels[1, 3] = -100
        logits = model(ids[:, :-1], num_latents=m)
        expected = F.cross_entropy(logits.flatten(0, 1), labels[:, -m:].flatten())
        torch.testing.assert_close(model(ids, labels=labels, num_latents=m), expected, **EXACT)

    def test_ignored_labels_and_padding_together(self):
        model, ids, mask = model_of(), ids_of(), padding(13, 6)
        labels = ids.clone()
        labels[:, -2] = -100
        each = [(row[valid][None], row[valid][1:].tolist()) for row, valid in zip(ids, mask, strict=True)]
        costs = []
        for row, following in each:
            logits = model(row[:, :-1])[0]
            cost = F.cross_entropy(logits, torch.tensor(following[-len(logits) :]), reduction="none")
            costs += [cost[:-2], cost[-1:]]
        torch.testing.assert_close(model(ids, mask=mask, labels=labels), torch.cat(costs).mean(), **EXACT)

    def test_gradients_are_those_of_the_logits(self):
        ids, gradients = ids_of(), []
        for loss in (
            lambda model: model(ids, labels=ids),
            lambda model: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, -LATENTS:].flatten()),
        ):
            model = model_of()
            loss(model).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    def test_all_labels_ignored_is_zero(self):
        model, ids = model_of(), ids_of()
        loss = model(ids, labels=torch.full_like(ids, -100))
        loss.backward()
        assert loss == 0
        assert all((parameter.grad == 0).all() for parameter in model.parameters())

    def test_half_precision_is_summed_in_float32(self):
        logits, ids = torch.full((100, 200, 3), 0.0, dtype=torch.float16), torch.zeros(100, 201, dtype=torch.long)
        logits[..., 1] = 30  # 20,000 losses of 30 overflow float16
        assert next_token_loss(logits, ids).item() == pytest.approx(30)

    def test_a_data_parallel_wrapper_synchronizes_the_loss(self, tmp_path):
        model, ids, buckets = model_of(), ids_of(), []
        expected = model.loss(ids)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            wrapped.register_comm_hook(buckets, count_buckets)
            loss = wrapped(ids, labels=ids)
            torch.testing.assert_close(loss, expected, **EXACT)
            loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        assert buckets

    @pytest.mark.refusal
    def test_invalid_labels_raise(self):
        model, ids = model_of(), ids_of()
        for labels, error, message in (
            (ids[:, :-1], ValueError, r"labels must have the shape of ids, \(2, 13\); got \(2, 12\)"),
            (torch.full_like(ids, 19), ValueError, r"labels must lie in 0 \.\.\. 18; got 19"),
            (torch.full_like(ids, -1), ValueError, r"labels must lie in 0 \.\.\. 18; got -1"),
            (ids.double(), TypeError, r"labels must be whole numbers; got torch\.float64"),
        ):
            with pytest.raises(error, match=message):
                model(ids, labels=labels)


def count_buckets(buckets, bucket):
    buckets.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
