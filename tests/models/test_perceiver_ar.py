"""Perceiver AR: causality, padding, prefix dropout, parts, compilation, errors."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import perceiver_core as pc
from perceiver_core import masks
from perceiver_core.kernels import reference
from perceiver_core.layers.random_draws import RepeatableDraws
from perceiver_core.models.perceiver_ar import kept_prefix
from tests.models.perceiver_ar_cases import (
    DIM,
    EXACT,
    GOOGLE,
    HEADS,
    LATENTS,
    POSITIONS,
    VOCABULARY,
    each_position_embedding,
    few_examples,
    ids_of,
    model_of,
    padding,
    randomized,
    seeds,
)


class TestCausality:
    @few_examples
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
                # q . b is the same for every key, unless keys are rotated.
                invisible = name.endswith("key.bias") and options is POSITIONS["learned"]
                assert (parameter.grad.abs().max() < 1e-10) == invisible, name


class TestPadding:
    @each_position_embedding
    @few_examples
    @given(seed=seeds, lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3))
    def test_padding_has_no_effect(self, options, seed, lengths):
        model, ids, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        actual = model(ids, mask=mask)
        assert actual.isfinite().all()
        torch.testing.assert_close(
            model(ids.where(mask, (ids + 1) % VOCABULARY), mask=mask)[mask[:, -5:]], actual[mask[:, -5:]], **EXACT
        )
        for row, length, logits in zip(ids, lengths, actual, strict=True):
            alone = model(row[None, 13 - length :])[0]
            torch.testing.assert_close(logits[-len(alone) :], alone, **EXACT)

    def test_padding_has_no_effect_on_gradients(self):
        ids, mask, gradients = ids_of(), padding(4, 9), []
        for given_ids in (ids, ids.where(mask, (ids + 1) % VOCABULARY)):
            model = model_of(head=pc.heads.Logits)
            model.loss(given_ids, mask=mask).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, **EXACT)

    def test_a_mask_of_all_true_has_no_effect(self):
        model, ids = model_of(prefix_dropout=0.5), ids_of()
        valid = torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(model(ids, mask=valid), model(ids), **EXACT)
        torch.testing.assert_close(model.loss(ids, mask=valid), model.loss(ids), **EXACT)
        model.train()
        one, two = (model(ids, mask=m, generator=torch.Generator().manual_seed(1)) for m in (valid, None))
        torch.testing.assert_close(one, two, **EXACT)


class TestPrefixDropout:
    @pytest.mark.parametrize("rate, left", [(0.0, 23), (0.1, 21), (0.5, 12), (0.75, 6), (0.99, 1)])
    def test_the_rate_sets_the_number_of_kept_tokens_in_order(self, rate, left):
        kept = kept_prefix(7, 23, rate, generator=torch.Generator().manual_seed(0))
        assert kept.shape == (7, left)
        assert (kept.diff(dim=1) > 0).all()
        assert kept.min() >= 0 and kept.max() < 23

    def test_every_token_is_equally_likely_and_samples_are_independent(self):
        kept = kept_prefix(20_000, 10, 0.4, generator=torch.Generator().manual_seed(0))
        valid = torch.zeros(20_000, 10).scatter(1, kept, 1.0)
        torch.testing.assert_close(valid.mean(0), torch.full((10,), 0.6), rtol=0, atol=0.02)
        together = (valid.T @ valid / 20_000)[~torch.eye(10, dtype=torch.bool)]
        torch.testing.assert_close(together, torch.full((90,), 0.6 * 5 / 9), rtol=0, atol=0.02)  # 6 of 10, two of them
        assert len(valid.unique(dim=0)) == 210

    @each_position_embedding
    def test_dropping_equals_masking(self, options):
        model, ids = model_of(prefix_dropout=0.6, **options).train(), ids_of(n=17)
        actual = model(ids, generator=torch.Generator().manual_seed(3))
        draws = RepeatableDraws().generator(torch.Generator().manual_seed(3))
        kept = kept_prefix(2, 12, 0.6, generator=draws)
        valid = torch.zeros(2, 12, dtype=torch.bool).scatter(1, kept, True)
        valid = torch.cat([valid, torch.ones(2, LATENTS, dtype=torch.bool)], 1)
        x = model.eval().embedding(ids).materialize()
        z = model.cross_attention(x[:, -LATENTS:], x, mask=masks.and_(masks.Causal(), masks.Padding(valid)))
        expected = model.head(model.norm(model.latent_transformer(z, mask=masks.Causal())))
        torch.testing.assert_close(actual, expected, **EXACT)
        assert (actual - model(ids)).abs().max() > 1e-6

    def test_with_padding(self):
        model, ids, mask = model_of(prefix_dropout=0.5).train(), ids_of(), padding(4, 13)
        one, two = (
            model(given_ids, mask=mask, generator=torch.Generator().manual_seed(1))
            for given_ids in (ids, ids.where(mask, (ids + 1) % VOCABULARY))
        )
        torch.testing.assert_close(two[mask[:, -5:]], one[mask[:, -5:]], **EXACT)
        torch.testing.assert_close(one[0, 1:], model(ids[:1, -4:])[0], **EXACT)  # no prefix

    def test_the_seed_selects_the_kept_tokens(self):
        model, ids = model_of(prefix_dropout=0.5).train(), ids_of(n=23)
        losses = [model.loss(ids, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]

    def test_it_is_off_in_evaluation_at_rate_zero_and_without_a_prefix(self):
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

    @each_position_embedding
    def test_it_is_saved_and_loaded(self, options, tmp_path):
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

        def output(**options):
            options = {
                "embedding": pc.adapters.TokenEmbedding(VOCABULARY, DIM),
                "num_latents": LATENTS,
                "num_heads": HEADS,
            } | options
            torch.manual_seed(0)
            embedding = pc.registry.from_config(pc.registry.to_config(options.pop("embedding")))
            return randomized(pc.PerceiverAR(embedding, **{"depth": 2} | options)).train()(ids_of())

        for change in changes.values():
            actual = output(**change)
            assert actual.shape != output().shape or not torch.allclose(actual, output())

    def test_a_user_defined_kernel(self):
        attention = partial(pc.MultiHeadAttention, rotary=pc.positions.Rotary(), kernel=reference)
        block = partial(pc.SelfAttend, attention=attention)
        options = {
            "cross_attention": partial(pc.CrossAttend, attention=attention),
            "latent_transformer": partial(pc.LatentTransformer, block=block),
        }
        torch.testing.assert_close(model_of(**options)(ids_of()), model_of()(ids_of()), **EXACT)

    def test_activation_checkpointing_has_no_effect_on_outputs(self):
        ids, actual = ids_of(), []
        for recompute in (False, True):
            model = model_of(prefix_dropout=0.5).train()
            model = pc.checkpoint_activations(model) if recompute else model
            model.loss(ids, generator=torch.Generator().manual_seed(1)).backward()
            actual.append([parameter.grad for parameter in model.parameters()])
        torch.testing.assert_close(*actual, **EXACT)

    def test_reads_can_be_explained(self):
        assert "16" in str(pc.explain_reads(model_of(latents=16).float(), ids_of(n=23)))

    def test_parts_of_an_array_equal_the_whole(self):
        block = pc.SelfAttend(DIM, num_heads=HEADS, attention=partial(pc.MultiHeadAttention, rotary=GOOGLE))
        x, positions = torch.randn(2, 11, DIM), torch.arange(11)
        cache = pc.reads.KeysValuesCache()
        first = block(x[:, :4], mask=masks.Causal(), positions=positions[:4], cache=cache)
        second = block(x[:, 4:], mask=masks.Causal(), positions=positions[4:], cache=cache)
        whole = block(x, mask=masks.Causal())
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
        assert cache.memory.keys.shape[2] == 11

    def test_it_trains_with_default_settings(self):
        """A repeated pair of ids is predicted after a few steps."""
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
        assert loss < 0.5  # 0.02 to 0.1; 1.9 without learning


@pytest.mark.compile
@pytest.mark.usefixtures("fresh")
class TestCompilation:
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    def test_it_compiles_once_for_all_lengths(self, masked):
        model, backend = model_of(depth=1), "eager" if masked else "aot_eager"
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for b, n in ((2, 13), (3, 17), (5, 11)):
                options = {"mask": padding(*range(3, 3 + b), n=n)} if masked else {}
                torch.testing.assert_close(compiled(ids_of(b, n), **options), model(ids_of(b, n), **options), **EXACT)

    def test_it_compiles_in_training_with_prefix_dropout(self):
        model = model_of(prefix_dropout=0.5, depth=1).train()
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for n in (13, 17, 18):
            torch.manual_seed(1)
            actual = compiled(ids_of(n=n))
            torch.manual_seed(1)
            torch.testing.assert_close(actual, model(ids_of(n=n)), **EXACT)
        actual.sum().backward()


@pytest.mark.refusal
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
    def test_invalid_ids_raise(self, ids, error, message):
        for call in (model_of(), model_of().loss):
            with pytest.raises(error, match=message):
                call(ids)

    def test_invalid_masks_raise(self):
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

    def test_a_loss_without_a_next_id_raises(self):
        with pytest.raises(ValueError, match=r"ids must be at least 2 long, an input and a target; got \(2, 1\)"):
            model_of().loss(ids_of(n=1))

    def test_a_loss_without_a_next_id_in_any_sample_raises(self):
        message = "mask must leave at least 2 tokens, an input and a target, in one sample; all have fewer"
        for n in (2, 13):
            with pytest.raises(ValueError, match=message):
                model_of().loss(ids_of(n=n), mask=padding(1, 1, n=n))

    def test_invalid_masks_of_a_loss_raise(self):
        for wrong in (padding(4, 9).flip(1), padding(4, 9) ^ padding(1, 0), padding(4, 0)):
            with pytest.raises(ValueError, match=r"mask must be False for padding on the left.*Move padding to the"):
                model_of().loss(ids_of(), mask=wrong)

    def test_invalid_sizes_and_rates_raise(self):
        for options, message in (
            ({"num_latents": 0}, "num_latents must be a whole number of at least 1; got 0"),
            ({"prefix_dropout": 1.0}, r"prefix_dropout must lie in \[0, 1\); got 1\.0"),
            ({"num_heads": 3}, "num_heads must divide qk_dim; got num_heads=3, qk_dim=28"),
            (
                {"num_heads": 28},
                "num_heads=28 does not fit the rotary embedding: the heads must have an even width",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                pc.PerceiverAR(pc.adapters.TokenEmbedding(19, 28), **{"num_latents": 5, "num_heads": 7} | options)(
                    ids_of()
                )
        with pytest.raises(ValueError, match="num_latents must be a whole number of at least 1; got 0"):
            model_of()(ids_of(), num_latents=0)

    def test_parts_that_do_not_fit_raise(self):
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

    def test_more_tokens_than_positions_raise(self):
        with pytest.raises(ValueError, match="ids must be at most 101 long, the number of positions; got 102"):
            model_of(**POSITIONS["learned"])(ids_of(n=102))

    def test_rotary_positions_from_the_start_are_refused_in_cross_attention(self):
        rotary = pc.positions.Rotary(from_end=False)
        read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, rotary=rotary))
        with pytest.raises(ValueError, match=r"cross_attention must have Rotary\(from_end=True\)"):
            pc.PerceiverAR(pc.adapters.TokenEmbedding(11, dim=16), num_latents=5, cross_attention=read)

    @pytest.mark.parametrize("name", ["cross_attention", "latent_transformer"])
    @pytest.mark.parametrize("kernel", [pc.kernels.inverted, partial(pc.kernels.inverted, dropout=0.0)])
    def test_kernels_in_which_queries_compete_are_refused(self, name, kernel):
        attention = partial(pc.MultiHeadAttention, kernel=kernel)
        block = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=attention))
        factory = partial(pc.CrossAttend, attention=attention) if name == "cross_attention" else block
        with pytest.raises(ValueError, match=f"{name} must have a kernel with a softmax over the keys.*inverted"):
            pc.PerceiverAR(pc.adapters.TokenEmbedding(11, dim=16), num_latents=5, **{name: factory})
