"""Perceiver AR: what it computes, what it may not see, what it leaves out, and what it refuses."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import masks
from perceiver_core.kernels import reference
from perceiver_core.models.perceiver_ar import kept_prefix, next_token_loss

VOCABULARY, DIM, LATENTS, HEADS = 19, 28, 5, 7
EXACT = {"rtol": 0, "atol": 1e-12}  # float64
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)

GOOGLE = pc.positions.Rotary(2, base=97, exponents=pc.positions.inclusive_exponents)


def turning(rotary):
    attention = partial(pc.MultiHeadAttention, rotary=rotary)
    return {
        "cross_attention": partial(pc.CrossAttend, num_heads=2, attention=attention),
        "latent_transformer": partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=attention)),
    }


POSITIONS = {
    "rotary": {},
    "google's rotary": turning(GOOGLE),
    "learned": turning(None)
    | {"embedding": pc.adapters.TokenEmbedding(VOCABULARY, DIM, positions=pc.positions.LearnedEmbedding(101, DIM))},
}
each_kind = pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS)


def shaken(model, seed=0):
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
    return shaken(pc.PerceiverAR(embedding, num_latents=latents, depth=depth, num_heads=HEADS, **options))


def ids_of(b=2, n=13, seed=0):
    return torch.randint(VOCABULARY, (b, n), generator=torch.Generator().manual_seed(seed))


def padding(*lengths, n=13):
    return torch.arange(n) >= n - torch.tensor(lengths)[:, None]


def turned(heads, positions, exponents, base, dim):
    """Pairs of channels as complex numbers, turned."""
    numbers = torch.view_as_complex(heads[..., :dim].unflatten(-1, (-1, 2)).contiguous())
    numbers = numbers * torch.exp(1j * positions[:, None] * base ** -torch.tensor(exponents, dtype=torch.float64))
    return torch.cat([torch.view_as_real(numbers).flatten(-2), heads[..., dim:]], -1)


def attended(part, q, k, v, heads, turn):
    """Dense causal attention of the last queries."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (part.query(q), part.key(k), part.value(v)))
    m, n = q.shape[2], k.shape[2]
    where = torch.arange(n, dtype=torch.float64)
    q, k = turn(q, where[n - m :]), turn(k, where)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~torch.ones(m, n).bool().tril(n - m), -torch.inf)
    return part.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def by_hand(model, ids, turn, read_heads):
    x = model.embedding.vectors[ids]
    if model.embedding.positions is not None:
        x = x + model.embedding.positions.vectors[: ids.shape[1]]
    read, z = model.cross_attention, x[:, -model.num_latents :]
    z = z + attended(read.attention, read.query_norm(z), read.input_norm(x), read.input_norm(x), read_heads, turn)
    z = z + read.mlp(read.mlp_norm(z))
    for block in model.latent_transformer.blocks:
        normed = block.norm(z)
        z = z + attended(block.attention, normed, normed, normed, HEADS, turn)
        z = z + block.mlp(block.mlp_norm(z))
    return model.norm(z) @ model.embedding.vectors.T + model.head.bias


class TestMathematics:
    @pytest.mark.parametrize("n", [1, 2, LATENTS, LATENTS + 1, 13])
    def test_rotary_as_roformers(self, n):
        def turn(heads, where):
            width = heads.shape[-1]
            return turned(heads, where, [2 * i / width for i in range(width // 2)], 10_000, width)

        model, ids = model_of(), ids_of(n=n)
        assert model(ids).shape == (2, min(n, LATENTS), VOCABULARY)
        torch.testing.assert_close(model(ids), by_hand(model, ids, turn, 1), **EXACT)

    @pytest.mark.parametrize("n", [1, 13])
    def test_rotary_as_googles(self, n):
        rotary = pc.positions.Rotary(4, base=97, exponents=pc.positions.inclusive_exponents)
        model, ids = model_of(**turning(rotary)), ids_of(n=n)
        wanted = by_hand(model, ids, lambda heads, where: turned(heads, where, [0, 1], 97, 4), 2)
        torch.testing.assert_close(model(ids), wanted, **EXACT)

    @pytest.mark.parametrize("n", [1, 13])
    def test_learned_positions(self, n):
        model, ids = model_of(**POSITIONS["learned"]), ids_of(n=n)
        torch.testing.assert_close(model(ids), by_hand(model, ids, lambda heads, where: heads, 2), **EXACT)

    def test_loss_is_the_mean_of_what_the_last_ids_cost(self):
        model, ids = model_of(), ids_of()
        shares = model(ids[:, :-1]).softmax(-1)
        wanted = -torch.stack([shares[b, i, ids[b, 8 + i]].log() for b in range(2) for i in range(LATENTS)]).mean()
        torch.testing.assert_close(model.loss(ids), wanted, **EXACT)

    def test_loss_counts_no_padding_and_no_first_id(self):
        model, ids = model_of(), ids_of(3)
        given = padding(13, 4, 2)
        alone = [model(row[there][None, :-1])[0] for row, there in zip(ids, given, strict=True)]
        costs = [
            F.cross_entropy(found, row[-len(found) :], reduction="none") for found, row in zip(alone, ids, strict=True)
        ]
        assert [len(cost) for cost in costs] == [LATENTS, 3, 1]
        torch.testing.assert_close(model.loss(ids, mask=given), torch.cat(costs).mean(), **EXACT)

    @each_kind
    def test_loss_counts_no_sample_of_one_id(self, options):
        model, ids, lengths = model_of(**options), ids_of(4), torch.tensor([13, 1, 4, 1])
        there, more = padding(*lengths), lengths > 1
        torch.testing.assert_close(model.loss(ids, mask=there), model.loss(ids[more], mask=there[more]), **EXACT)

    def test_loss_with_samples_of_one_id_and_prefix_dropout(self):
        model, ids, there = model_of(prefix_dropout=0.5, latents=2).train(), ids_of(3), padding(1, 13, 1)
        model.loss(ids, mask=there).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_loss_of_samples_of_one_id_has_no_gradient_in_what_they_hold(self):
        ids, there, gradients = ids_of(3), padding(1, 6, 1), []
        for given_ids in (ids, ids.where(torch.tensor([[False], [True], [False]]), (ids + 1) % VOCABULARY)):
            model = model_of(head=pc.heads.Logits)
            model.loss(given_ids, mask=there).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    def test_loss_where_nothing_counts_is_zero(self):
        found = next_token_loss(torch.randn(2, 3, 7), torch.zeros(2, 5, dtype=torch.long), mask=padding(1, 1, n=5))
        assert found == 0

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


class TestCausality:
    @few
    @given(seed=seeds, n=st.integers(2, 17), data=st.data())
    def test_a_later_token_changes_no_earlier_logit(self, seed, n, data):
        at = data.draw(st.integers(0, n - 1))
        for options in POSITIONS.values():
            model, ids = model_of(**options), ids_of(n=n, seed=seed)
            changed = ids.clone()
            changed[:, at] = (changed[:, at] + 1) % VOCABULARY
            m = min(n, LATENTS)
            before = max(0, at - (n - m))
            old, new = model(ids), model(changed)
            torch.testing.assert_close(new[:, :before], old[:, :before], **EXACT)
            assert ((new - old)[:, before:].abs().amax(-1) > 1e-9).all()  # every later one sees it

    def test_gradients_reach_the_prefix(self):
        model = model_of()
        seen = []
        model.embedding.register_forward_hook(
            lambda _, __, tokens: (tokens.content.retain_grad(), seen.append(tokens.content))[1]
        )
        model(ids_of())[:, 1].square().sum().backward()
        reached = seen[0].grad.abs().amax((0, 2)) > 0
        assert reached.tolist() == [True] * 10 + [False] * 3  # up to the second of the last five

    def test_every_parameter_gets_a_gradient(self):
        for options in POSITIONS.values():
            model = model_of(**options)
            model.loss(ids_of(n=101)).backward()
            for name, parameter in model.named_parameters():
                # q . b is the same for every key, unless keys are turned.
                invisible = name.endswith("key.bias") and options is POSITIONS["learned"]
                assert (parameter.grad.abs().max() < 1e-10) == invisible, name


class TestPadding:
    @each_kind
    @few
    @given(seed=seeds, lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3))
    def test_it_is_inert(self, options, seed, lengths):
        model, ids, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        found = model(ids, mask=mask)
        assert found.isfinite().all()
        torch.testing.assert_close(
            model(ids.where(mask, (ids + 1) % VOCABULARY), mask=mask)[mask[:, -5:]], found[mask[:, -5:]], **EXACT
        )
        for row, length, logits in zip(ids, lengths, found, strict=True):
            alone = model(row[None, 13 - length :])[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, **EXACT)

    def test_it_is_inert_in_gradients(self):
        ids, mask, gradients = ids_of(), padding(4, 9), []
        for given_ids in (ids, ids.where(mask, (ids + 1) % VOCABULARY)):
            model = model_of(head=pc.heads.Logits)
            model.loss(given_ids, mask=mask).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    def test_a_mask_that_is_all_true_is_no_mask(self):
        model, ids = model_of(prefix_dropout=0.5), ids_of()
        there = torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(model(ids, mask=there), model(ids), **EXACT)
        torch.testing.assert_close(model.loss(ids, mask=there), model.loss(ids), **EXACT)
        model.train()
        one, two = (model(ids, mask=m, generator=torch.Generator().manual_seed(1)) for m in (there, None))
        torch.testing.assert_close(one, two, **EXACT)


class TestPrefixDropout:
    @pytest.mark.parametrize("rate, left", [(0.0, 23), (0.1, 21), (0.5, 12), (0.75, 6), (0.99, 1)])
    def test_so_many_are_left_in_order(self, rate, left):
        kept = kept_prefix(7, 23, rate, generator=torch.Generator().manual_seed(0))
        assert kept.shape == (7, left)
        assert (kept.diff(dim=1) > 0).all()
        assert kept.min() >= 0 and kept.max() < 23

    def test_every_token_is_as_likely_and_samples_are_independent(self):
        kept = kept_prefix(20_000, 10, 0.4, generator=torch.Generator().manual_seed(0))
        there = torch.zeros(20_000, 10).scatter(1, kept, 1.0)
        torch.testing.assert_close(there.mean(0), torch.full((10,), 0.6), rtol=0, atol=0.02)
        together = (there.T @ there / 20_000)[~torch.eye(10, dtype=torch.bool)]
        torch.testing.assert_close(together, torch.full((90,), 0.6 * 5 / 9), rtol=0, atol=0.02)  # 6 of 10, two of them
        assert len(there.unique(dim=0)) == 210

    @each_kind
    def test_what_is_left_is_read_as_if_the_rest_were_masked(self, options):
        model, ids = model_of(prefix_dropout=0.6, **options).train(), ids_of(n=17)
        found = model(ids, generator=torch.Generator().manual_seed(3))
        kept = kept_prefix(2, 12, 0.6, generator=torch.Generator().manual_seed(3))
        there = torch.zeros(2, 12, dtype=torch.bool).scatter(1, kept, True)
        there = torch.cat([there, torch.ones(2, LATENTS, dtype=torch.bool)], 1)
        x = model.eval().tokens(ids)
        z = model.cross_attention(x[:, -LATENTS:], x, mask=masks.and_(masks.Causal(), masks.Padding(there)))
        wanted = model.answer(model.latent_transformer(z, mask=masks.Causal()))
        torch.testing.assert_close(found, wanted, **EXACT)
        assert (found - model(ids)).abs().max() > 1e-6

    def test_with_padding(self):
        model, ids, mask = model_of(prefix_dropout=0.5).train(), ids_of(), padding(4, 13)
        one, two = (
            model(given_ids, mask=mask, generator=torch.Generator().manual_seed(1))
            for given_ids in (ids, ids.where(mask, (ids + 1) % VOCABULARY))
        )
        torch.testing.assert_close(two[mask[:, -5:]], one[mask[:, -5:]], **EXACT)
        torch.testing.assert_close(one[0, 1:], model(ids[:1, -4:])[0], **EXACT)  # no prefix

    def test_a_seed_says_which(self):
        model, ids = model_of(prefix_dropout=0.5).train(), ids_of(n=23)
        losses = [model.loss(ids, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]

    def test_off_in_evaluation_at_rate_zero_and_without_a_prefix(self):
        ids = ids_of()
        for model, given_ids in (
            (model_of(prefix_dropout=0.9), ids),
            (model_of().train(), ids),
            (model_of(prefix_dropout=0.9).train(), ids[:, :LATENTS]),
        ):
            state = torch.get_rng_state()
            torch.testing.assert_close(model(given_ids), model_of()(given_ids), rtol=0, atol=0)
            assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


class TestParts:
    def test_logits_tied_or_not(self, tmp_path):
        for logits, tied in ((pc.heads.TiedLogits, True), (pc.heads.Logits, False)):
            model = model_of(head=logits)
            names = dict(model.named_parameters())
            assert ("head.logits.weight" in names) == (not tied)
            pc.save(model, tmp_path / str(tied))
            again = pc.load(tmp_path / str(tied))
            assert (getattr(again.head, "vectors", None) is again.embedding.vectors) == tied
            torch.testing.assert_close(again(ids_of()), model(ids_of()), rtol=0, atol=0)

    @each_kind
    def test_saved_and_loaded(self, options, tmp_path):
        model = model_of(prefix_dropout=0.25, norm=nn.RMSNorm, **options)
        pc.save(model, tmp_path)
        again = pc.load(tmp_path)
        assert pc.registry.to_config(again) == pc.registry.to_config(model)
        torch.testing.assert_close(again(ids_of()), model(ids_of()), rtol=0, atol=0)

    def test_every_argument_changes_something(self):
        changes = {
            "embedding": {"embedding": pc.adapters.TokenEmbedding(23, DIM)},
            "num_latents": {"num_latents": 3},
            "depth": {"depth": 1},
            "num_heads": {"num_heads": 14},
            "cross_attention": {"cross_attention": partial(pc.CrossAttend, num_heads=2)},
            "latent_transformer": {"latent_transformer": pc.LatentTransformer},
            "norm": {"norm": nn.Identity},
            "head": {"head": pc.heads.Logits},
            "prefix_dropout": {"prefix_dropout": 0.5},
        }
        assert changes.keys() == set(inspect.signature(pc.PerceiverAR).parameters)

        def made(**options):
            options = {
                "embedding": pc.adapters.TokenEmbedding(VOCABULARY, DIM),
                "num_latents": LATENTS,
                "num_heads": HEADS,
            } | options
            torch.manual_seed(0)
            embed = pc.registry.from_config(pc.registry.to_config(options.pop("embedding")))
            return shaken(pc.PerceiverAR(embed, **{"depth": 2} | options)).train()(ids_of())

        for change in changes.values():
            found = made(**change)
            assert found.shape != made().shape or not torch.allclose(found, made())

    def test_a_kernel_of_ones_own(self):
        attention = partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary(), kernel=reference)
        block = partial(pc.SelfAttend, attention=attention)
        options = {
            "cross_attention": partial(pc.CrossAttend, attention=attention),
            "latent_transformer": partial(pc.LatentTransformer, block=block),
        }
        torch.testing.assert_close(model_of(**options)(ids_of()), model_of()(ids_of()), **EXACT)

    def test_recomputed_activations_change_nothing(self):
        ids, found = ids_of(), []
        for recompute in (False, True):
            model = model_of(prefix_dropout=0.5).train()
            model = pc.checkpoint_activations(model) if recompute else model
            model.loss(ids, generator=torch.Generator().manual_seed(1)).backward()
            found.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*found, **EXACT)

    def test_it_is_explained(self):
        assert "16" in str(pc.explain_reads(model_of(latents=16).float(), ids_of(n=23)))

    def test_parts_of_an_array_are_the_whole(self):
        block = pc.SelfAttend(DIM, num_heads=HEADS, attention=partial(pc.MultiHeadAttention, rotary=GOOGLE))
        x, where = torch.randn(2, 11, DIM), torch.arange(11)
        first, known = block.extend(x[:, :4], None, mask=masks.Causal(), positions=where[:4])
        second, known = block.extend(x[:, 4:], known, mask=masks.Causal(), positions=where[4:])
        whole = block(x, mask=masks.Causal())
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        assert known.keys.shape[2] == 11

    def test_it_trains_out_of_the_box(self):
        """A repeated pair of ids, all of it foretold after a few steps."""
        torch.manual_seed(0)
        model = pc.PerceiverAR(
            pc.adapters.TokenEmbedding(7, 16), num_latents=4, depth=1, num_heads=2, prefix_dropout=0.2
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(120):
            pair = torch.randint(7, (16, 2))
            loss = model.loss(pair.repeat(1, 5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5  # 0.02 to 0.1; nothing learned is 1.9


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.compile
@pytest.mark.usefixtures("fresh")
class TestGraphs:
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    def test_compiled_once_for_every_length(self, masked):
        model, backend = model_of(depth=1), "eager" if masked else "aot_eager"
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for b, n in ((2, 13), (3, 17), (5, 11)):
                options = {"mask": padding(*range(3, 3 + b), n=n)} if masked else {}
                torch.testing.assert_close(compiled(ids_of(b, n), **options), model(ids_of(b, n), **options), **EXACT)

    def test_compiled_in_training_with_prefix_dropout(self):
        model = model_of(prefix_dropout=0.5, depth=1).train()
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for n in (13, 17, 18):
            torch.manual_seed(1)
            found = compiled(ids_of(n=n))
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(ids_of(n=n)), **EXACT)
        found.sum().backward()

    @pytest.mark.parametrize("kind, strict", [*((kind, False) for kind in POSITIONS), ("learned", True)])
    def test_exported_for_every_length(self, kind, strict):
        model = model_of(depth=1, **POSITIONS[kind])
        axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        program = torch.export.export(model, (ids_of(),), dynamic_shapes=(axes,), strict=strict)
        for b, n in ((3, 17), (5, 7), (2, 53)):
            torch.testing.assert_close(program.module()(ids_of(b, n)), model(ids_of(b, n)), **EXACT)


class TestErrors:
    @pytest.mark.parametrize(
        "ids, error, message",
        [
            (torch.zeros(2, 0, dtype=torch.long), ValueError, r"ids must not be empty; got shape \(2, 0\)"),
            (
                torch.zeros(2, 3),
                TypeError,
                r"ids must be whole numbers; got torch\.float32\. Convert it: ids\.long\(\)",
            ),
            (torch.zeros(2, 3, dtype=torch.bool), TypeError, r"ids must be whole numbers; got torch\.bool"),
            (torch.tensor([[3, 19, 0]]), ValueError, r"ids must lie in 0 \.\.\. 18; got 19"),
            (torch.tensor([[3, -1, 0]]), ValueError, r"ids must lie in 0 \.\.\. 18; got -1"),
            (torch.tensor([3, 1, 0]), ValueError, r"ids must have 2 axes \(b n\); got shape \(3,\); add a batch axis"),
            ([[1, 2]], TypeError, r"ids must be a torch\.Tensor; got list"),
        ],
    )
    def test_of_ids(self, ids, error, message):
        for call in (model_of(), model_of().loss):
            with pytest.raises(error, match=message):
                call(ids)

    def test_of_masks(self):
        model, ids = model_of(), ids_of()
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 13\), one value a token; got \(2, 12\)"):
            model(ids, mask=torch.ones(2, 12, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask must be a boolean tensor, True = attend; got torch\.int64"):
            model(ids, mask=torch.ones(2, 13, dtype=torch.long))
        for wrong in (padding(4, 9).flip(1), padding(4, 9) ^ padding(3, 0)):
            with pytest.raises(
                ValueError, match=r"mask must be False for padding on the left.*Move padding to the front"
            ):
                model(ids, mask=wrong)
        with pytest.raises(ValueError, match=r"mask leaves no token to attend to in samples \[1\]"):
            model(ids, mask=padding(4, 0))

    def test_of_loss_without_a_next_id(self):
        with pytest.raises(ValueError, match=r"ids must be at least 2 long, an input and a target; got \(2, 1\)"):
            model_of().loss(ids_of(n=1))

    def test_of_loss_without_a_next_id_in_any_sample(self):
        message = "mask must leave at least 2 tokens, an input and a target, in a sample; all have 1"
        for n in (2, 13):
            with pytest.raises(ValueError, match=message):
                model_of().loss(ids_of(n=n), mask=padding(1, 1, n=n))

    def test_of_masks_of_a_loss(self):
        for wrong in (padding(4, 9).flip(1), padding(4, 9) ^ padding(1, 0), padding(4, 0)):
            with pytest.raises(ValueError, match=r"mask must be False for padding on the left.*Move padding to the"):
                model_of().loss(ids_of(), mask=wrong)

    def test_of_sizes_and_rates(self):
        for options, message in (
            ({"latents": 0}, "latents must be a whole number of at least 1; got 0"),
            ({"prefix_dropout": 1.0}, r"prefix_dropout must lie in \[0, 1\); got 1\.0"),
            ({"heads": 3}, "num_heads must divide qk_dim; got num_heads=3, qk_dim=28"),
            ({"heads": 28}, r"heads must be of an even width, channels are turned in pairs; got 1"),
        ):
            with pytest.raises(ValueError, match=message):
                pc.PerceiverAR(pc.adapters.TokenEmbedding(19, 28), **{"num_latents": 5, "num_heads": 7} | options)(
                    ids_of()
                )
        with pytest.raises(ValueError, match="latents must be a whole number of at least 1; got 0"):
            model_of()(ids_of(), num_latents=0)

    def test_of_parts_that_do_not_fit(self):
        with pytest.raises(
            TypeError,
            match=r"embedding must have a dim and a vocab_size, as adapters\.TokenEmbedding has; got Identity",
        ):
            pc.PerceiverAR(nn.Identity(), num_latents=5)
        bare = nn.Identity()
        bare.dim, bare.vocab_size = 28, 19
        with pytest.raises(
            TypeError, match=r"embedding must have vectors to tie to; Identity has none\. Use heads\.Logits"
        ):
            pc.PerceiverAR(bare, num_latents=5)
        with pytest.raises(ValueError, match="positions must be dim=28 wide, they are added; got 12"):
            pc.adapters.TokenEmbedding(19, 28, positions=pc.positions.LearnedEmbedding(5, 12))

    def test_of_more_tokens_than_positions(self):
        with pytest.raises(ValueError, match="ids must be at most 101 long, as many as there are positions; got 102"):
            model_of(**POSITIONS["learned"])(ids_of(n=102))
