"""Generation: with a cache and without, alone and in a batch, chosen in every way, and what is refused."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import perceiver_core as pc
from perceiver_core.models import sampling
from perceiver_core.models.generate import _cached, _recomputed, _Sequence, latent_schedule
from perceiver_core.models.perceiver_ar import LATENT_TRANSFORMER
from tests.memory import Kept
from tests.models.test_perceiver_ar import (
    EXACT,
    LATENTS,
    POSITIONS,
    VOCABULARY,
    each_kind,
    few,
    ids_of,
    model_of,
    padding,
    seeds,
    turning,
)


def logits_of(kind, model, prompt, steps, *, start=2, mask=None, seed=0, context=None):
    """The logits of so many new ids, the ids being drawn."""
    so_far, found, generator = _Sequence(model, prompt, mask, start, context), [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in islice(kind(so_far), steps):
            found.append(logits)
            so_far.append(torch.randint(VOCABULARY, (len(prompt),), generator=generator))
    return torch.stack(found, 1)


class TestPlan:
    def test_it_grows_and_drops_back(self):
        assert list(islice(latent_schedule(5, 2), 9)) == [2, 3, 4, 5, 2, 3, 4, 5, 2]
        assert list(islice(latent_schedule(3, 3), 3)) == [3, 3, 3]
        assert list(islice(latent_schedule(1, 1), 3)) == [1, 1, 1]

    @pytest.mark.parametrize("n", [1, 4, 13])
    def test_uncached_logits_are_those_of_the_model_by_the_latent_schedule(self, n):
        model, prompt = model_of(), ids_of(n=n)
        found = logits_of(_recomputed, model, prompt, 7)
        more = torch.randint(VOCABULARY, (7, 2), generator=torch.Generator().manual_seed(0)).T
        for step, latents in enumerate([2, 3, 4, 5, 2, 3, 4]):
            whole = torch.cat([prompt, more[:, :step]], 1)
            torch.testing.assert_close(found[:, step], model(whole, num_latents=latents)[:, -1], **EXACT)


class TestCache:
    @each_kind
    @few
    @given(n=st.integers(1, 13), start=st.integers(1, LATENTS), seed=seeds)
    def test_it_changes_nothing(self, options, n, start, seed):
        model, prompt = model_of(**options), ids_of(n=n, seed=seed)
        cached, wanted = (logits_of(kind, model, prompt, 11, start=start, seed=seed) for kind in (_cached, _recomputed))
        torch.testing.assert_close(cached, wanted, **EXACT)

    def test_it_changes_nothing_where_blocks_are_gone_through_again(self):
        model, prompt = model_of(latent_transformer=partial(LATENT_TRANSFORMER, num_repeats=3)), ids_of()
        cached, wanted = (logits_of(kind, model, prompt, 11) for kind in (_cached, _recomputed))
        torch.testing.assert_close(cached, wanted, **EXACT)

    @each_kind
    @few
    @given(lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3), start=st.integers(1, LATENTS), seed=seeds)
    def test_it_changes_nothing_where_prompts_are_padded(self, options, lengths, start, seed):
        model, prompt, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        cached, wanted = (
            logits_of(kind, model, prompt, 11, start=start, mask=mask, seed=seed) for kind in (_cached, _recomputed)
        )
        torch.testing.assert_close(cached, wanted, **EXACT)

    @pytest.mark.parametrize("latents", [1, 2, 23])
    @pytest.mark.parametrize("depth", [0, 1])
    def test_few_and_many_latents(self, latents, depth):
        model, prompt = model_of(latents=latents, depth=depth), ids_of(n=3)
        cached, wanted = (
            logits_of(kind, model, prompt, 29, start=max(1, latents // 2)) for kind in (_cached, _recomputed)
        )
        torch.testing.assert_close(cached, wanted, **EXACT)

    def test_tokens_are_read_once(self):
        model, made = model_of(), []
        model.cross_attention.attention.key.register_forward_hook(lambda _, given, __: made.append(given[0].shape[1]))
        pc.generate(model, ids_of(), max_new_tokens=9)
        assert made == [13, *[1] * 8]

    def test_latents_are_computed_once_a_window(self):
        model, made = model_of(), []
        model.latent_transformer.blocks[1].register_forward_hook(lambda *_: made.append("whole"))
        model.latent_transformer.blocks[1].attention.query.register_forward_hook(
            lambda _, x, __: made.append(x[0].shape[1])
        )
        pc.generate(model, ids_of(), max_new_tokens=9, num_initial_latents=2)
        assert made == [2, 1, 1, 1, 2, 1, 1, 1, 2]


def continued(model, ids, steps, *, context, start, mask=None):
    """The most likely ids, the model being given the last tokens alone, every time."""
    mask, prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, ids.shape[1]
    for latents in islice(latent_schedule(model.num_latents, start), steps):
        logits = model(ids[:, -context:], mask=mask[:, -context:], num_latents=latents)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, prompt:]


class TestContext:
    @each_kind
    @few
    @given(n=st.integers(1, 13), context=st.integers(1, 15), start=st.integers(1, LATENTS), seed=seeds)
    def test_logits_are_those_of_the_last_tokens_alone(self, options, n, context, start, seed):
        model, prompt = model_of(**options), ids_of(n=n, seed=seed)
        cached, recomputed = (
            logits_of(kind, model, prompt, 17, start=start, seed=seed, context=context)
            for kind in (_cached, _recomputed)
        )
        drawn, ids = torch.Generator().manual_seed(seed), prompt
        for step, latents in enumerate(islice(latent_schedule(LATENTS, start), 17)):
            wanted = model(ids[:, -context:], num_latents=latents)[:, -1]
            torch.testing.assert_close(recomputed[:, step], wanted, **EXACT)
            torch.testing.assert_close(cached[:, step], wanted, **EXACT)
            ids = torch.cat([ids, torch.randint(VOCABULARY, (2,), generator=drawn)[:, None]], 1)

    @each_kind
    @few
    @given(
        lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3),
        context=st.integers(1, 17),
        start=st.integers(1, LATENTS),
        seed=seeds,
    )
    def test_ids_of_padded_batches_are_those_of_each_prompt_alone(self, options, lengths, context, start, seed):
        model, prompt, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        wanted = continued(model, prompt, 11, context=context, start=start, mask=mask)
        for cache in (True, False):
            asked = {"max_new_tokens": 11, "context_length": context, "num_initial_latents": start, "use_cache": cache}
            assert torch.equal(pc.generate(model, prompt, mask=mask, **asked), wanted)
        for row, length, found in zip(prompt, lengths, wanted, strict=True):
            assert torch.equal(pc.generate(model, row[None, 13 - length :], **asked)[0], found)

    @pytest.mark.parametrize("n", [3, 8, 13])
    @pytest.mark.parametrize("cache", [True, False])
    def test_it_is_what_positions_allow_unless_given(self, n, cache):
        model = model_of(
            **turning(None),
            embedding=pc.adapters.TokenEmbedding(19, 28, positions=pc.positions.LearnedEmbedding(8, 28)),
        )
        found = pc.generate(model, ids_of(n=n), max_new_tokens=12, use_cache=cache)
        assert torch.equal(found, continued(model, ids_of(n=n), 12, context=8, start=2))

    @each_kind
    def test_one_that_is_not_reached_changes_nothing(self, options):
        model, prompt = model_of(**options), ids_of()
        found = pc.generate(model, prompt, max_new_tokens=9, context_length=21)
        assert torch.equal(found, pc.generate(model, prompt, max_new_tokens=9))

    def test_streams_and_stop_ids(self):
        model, prompt = model_of(), ids_of()
        free = pc.generate(model, prompt, max_new_tokens=15, context_length=7)
        assert torch.equal(
            torch.stack([*pc.models.stream(model, prompt, max_new_tokens=15, context_length=7)], 1), free
        )
        stop = int(free[0, 4])
        found = pc.generate(model, prompt, max_new_tokens=15, context_length=7, stop_ids=stop)
        for row, whole in zip(found, free, strict=True):
            until = (whole == stop).nonzero()
            end = int(until[0]) + 1 if len(until) else 15
            assert torch.equal(row[:end], whole[: min(end, len(row))]) and (row[end:] == stop).all()

    def test_nothing_is_read_again_before_it_is_reached(self):
        model, made = model_of(), []
        model.cross_attention.attention.key.register_forward_hook(lambda _, given, __: made.append(given[0].shape[1]))
        pc.generate(model, ids_of(), max_new_tokens=6, context_length=16)
        assert made == [13, 1, 1, 1, 16, 16]

    @each_kind
    @pytest.mark.parametrize("cache", [True, False])
    def test_memory_is_bounded(self, options, cache):
        model = model_of(**options)
        with Kept() as kept:
            steps = pc.models.stream(
                model, ids_of(), max_new_tokens=70, mask=padding(13, 4), context_length=17, use_cache=cache
            )
            after = [kept.bytes for _ in steps]
        assert max(after[-20:]) <= max(after[10:30])


class TestGenerate:
    @each_kind
    @pytest.mark.parametrize("cache", [True, False])
    def test_a_padded_batch_is_each_prompt_alone(self, options, cache):
        model, prompt, lengths = model_of(**options), ids_of(4), (13, 2, 1, 7)
        together = pc.generate(model, prompt, max_new_tokens=17, mask=padding(*lengths), use_cache=cache)
        assert together.shape == (4, 17) and together.dtype == torch.long
        for row, length, found in zip(prompt, lengths, together, strict=True):
            alone = pc.generate(model, row[None, 13 - length :], max_new_tokens=17, use_cache=cache)[0]
            assert torch.equal(found, alone)

    def test_greedy_is_the_most_likely_id_every_time(self):
        model, ids = model_of(), ids_of(1, 3)
        found = pc.generate(model, ids, max_new_tokens=4, num_initial_latents=LATENTS)
        for step in range(4):
            assert found[0, step] == model(ids)[0, -1].argmax()
            ids = torch.cat([ids, found[:, step : step + 1]], 1)

    def test_a_stream_is_the_same_one_by_one(self):
        model, prompt = model_of(), ids_of()
        whole = pc.generate(model, prompt, max_new_tokens=6)
        steps = pc.models.stream(model, prompt, max_new_tokens=6)
        torch.testing.assert_close(next(steps), whole[:, 0])
        torch.testing.assert_close(torch.stack(list(steps), 1), whole[:, 1:])

    def test_a_stream_computes_no_more_than_it_is_asked_for(self):
        model, calls = model_of(), []
        model.cross_attention.register_forward_hook(lambda *_: calls.append(1))
        steps = pc.models.stream(model, ids_of(), max_new_tokens=6)
        assert not calls
        next(steps), next(steps)
        assert len(calls) == 2

    def test_nothing_is_recorded_for_gradients_and_grad_mode_comes_back(self):
        model = model_of()
        steps = pc.models.stream(
            model, ids_of(), max_new_tokens=3, sampler=lambda x, _: x.argmax(-1) + int(x.requires_grad)
        )
        for ids in steps:
            assert torch.is_grad_enabled() and not ids.requires_grad

    def test_seeds(self):
        model, prompt = model_of(), ids_of()
        one, same, other = (
            pc.generate(
                model,
                prompt,
                max_new_tokens=12,
                sampler=sampling.Sample(),
                generator=torch.Generator().manual_seed(seed),
                use_cache=cache,
            )
            for seed, cache in ((1, True), (1, False), (2, True))
        )
        assert torch.equal(one, same) and not torch.equal(one, other)

    def test_samples_end_at_a_stop_id_and_repeat_it(self):
        script = torch.tensor([[3, 5, 1, 1, 1], [2, 2, 2, 7, 1]])
        steps = iter(range(99))

        def choose(logits, generator):
            return script[:, next(steps)]

        found = pc.generate(model_of(), ids_of(), max_new_tokens=5, sampler=choose, stop_ids=[5, 7])
        assert found.tolist() == [[3, 5, 5, 5], [2, 2, 2, 7]]

    def test_a_sample_that_goes_on_does_not_mind_one_that_ended(self):
        model, prompt = model_of(), ids_of(2)
        free = pc.generate(model, prompt, max_new_tokens=9)
        stop = int(free[0, 1])
        found = pc.generate(model, prompt, max_new_tokens=9, stop_ids=[stop])
        until = (free[1] == stop).nonzero()
        end = int(until[0]) + 1 if len(until) else 9
        assert torch.equal(found[1, :end], free[1, :end])
        assert (found[0, 1:] == stop).all()

    def test_a_stop_id_in_the_prompt_ends_nothing(self):
        prompt = ids_of()
        found = pc.generate(
            model_of(), prompt, max_new_tokens=5, stop_ids=[int(prompt[0, -1])], sampler=lambda x, _: x.argmin(-1)
        )
        assert found.shape[1] >= 1

    def test_up_to_the_last_position(self):
        model = model_of(**POSITIONS["learned"])
        assert pc.generate(model, ids_of(n=98), max_new_tokens=4).shape == (2, 4)

    @pytest.mark.parametrize("stop", [5, [5], (5, 7), {5, 7}, range(5, 8), b"\x05"])
    def test_stop_is_an_id_or_several(self, stop):
        found = pc.generate(
            model_of(),
            ids_of(),
            max_new_tokens=5,
            stop_ids=stop,
            sampler=lambda x, _: torch.tensor([5, 5], dtype=torch.int32),
        )
        assert found.tolist() == [[5], [5]] and found.dtype == torch.long

    @pytest.mark.compile
    def test_a_compiled_model(self):
        model, prompt = model_of(), ids_of()
        found = pc.generate(torch.compile(model, backend="eager"), prompt, max_new_tokens=7)
        assert torch.equal(found, pc.generate(model, prompt, max_new_tokens=7))

    def test_half_precision_and_small_integers(self):
        found = pc.generate(
            model_of().bfloat16(), ids_of().to(torch.uint8), max_new_tokens=7, sampler=sampling.Sample(0.5)
        )
        assert found.shape == (2, 7)


class TestSampling:
    LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)

    def test_temperature(self):
        for temperature in (0.3, 1.0, 4.0):
            found = sampling.Sample(temperature).probabilities(self.LOGITS)
            torch.testing.assert_close(found, (self.LOGITS / temperature).softmax(-1), **EXACT)
        assert (sampling.Sample(1e-4).probabilities(self.LOGITS)[0] == torch.tensor([0, 1, 0, 0, 0])).all()

    @pytest.mark.parametrize("temperature", [1e-4, 1e-39, 1e-60, 5e-324])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_towards_temperature_zero_the_most_likely_ids_win(self, temperature, dtype):
        logits = torch.cat([self.LOGITS, -1e4 * self.LOGITS, self.LOGITS.log()]).to(dtype)  # also with -inf
        logits = logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        wanted = (logits == logits.amax(-1, keepdim=True)).to(dtype if dtype == torch.float64 else torch.float32)
        wanted = wanted / wanted.sum(-1, keepdim=True)
        for options in ({}, {"top_p": 0.999}, {"top_k": 5}):
            choose = sampling.Sample(temperature, **options)
            torch.testing.assert_close(choose.probabilities(logits), wanted)
            drawn = choose(logits, torch.Generator().manual_seed(0))
            assert (wanted.gather(1, drawn[:, None]) > 0).all()

    def test_top_k(self):
        found = sampling.Sample(top_k=2).probabilities(self.LOGITS)
        assert (found > 0).sum(-1).tolist() == [2, 2]  # of equals too
        torch.testing.assert_close(found[0, [1, 3]], torch.tensor([3.0, 2.0], dtype=torch.float64).softmax(-1), **EXACT)
        everything = sampling.Sample(top_k=99).probabilities(self.LOGITS)
        torch.testing.assert_close(everything, self.LOGITS.softmax(-1), **EXACT)

    @few
    @given(seed=seeds, top_p=st.floats(0.01, 1.0), temperature=st.floats(0.2, 3.0))
    def test_top_p_is_the_smallest_set_that_has_it(self, seed, top_p, temperature):
        logits = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = sampling.Sample(temperature, top_p=top_p).probabilities(logits)
        for row, shares in zip(found, (logits / temperature).softmax(-1), strict=True):
            ranked, kept = shares.sort(descending=True).values, int((row > 0).sum())
            assert ranked[:kept].sum() >= top_p - 1e-9
            assert kept == 1 or ranked[: kept - 1].sum() < top_p + 1e-9
            torch.testing.assert_close(row[row > 0], shares[row > 0] / shares[row > 0].sum(), **EXACT)

    def test_draws_have_these_probabilities(self):
        choose, generator = sampling.Sample(1.5, top_k=4, top_p=0.9), torch.Generator().manual_seed(0)
        drawn = choose(self.LOGITS[:1].expand(20_000, -1), generator)
        found = torch.bincount(drawn, minlength=5) / 20_000
        torch.testing.assert_close(found.double(), choose.probabilities(self.LOGITS)[0], rtol=0, atol=0.015)

    def test_half_precision_is_chosen_from_in_float32(self):
        assert sampling.Sample(top_p=0.5).probabilities(self.LOGITS.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"temperature": 0.0},
                r"temperature must be above 0 and finite; got 0\.0\. For the most likely id use greedy",
            ),
            ({"temperature": -1.0}, r"temperature must be above 0 and finite; got -1\.0"),
            ({"temperature": float("nan")}, r"temperature must be above 0 and finite; got nan"),
            ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0\.0"),
            ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]; got 1\.1"),
            ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            sampling.Sample(**options)

    def test_errors_of_what_is_no_number(self):
        for name in ("temperature", "top_p"):
            for wrong in ("1", None):
                with pytest.raises(TypeError, match=f"{name} must be a number; got {wrong!r}"):
                    sampling.Sample(**{name: wrong})


class TestErrors:
    @pytest.mark.parametrize(
        "options, error, message",
        [
            (
                {"prompt": torch.zeros(2, 0, dtype=torch.long)},
                ValueError,
                r"prompt must not be empty; got shape \(2, 0\)",
            ),
            ({"prompt": torch.zeros(2, 3)}, TypeError, r"prompt must be whole numbers; got torch\.float32"),
            ({"prompt": torch.tensor([[19]])}, ValueError, r"prompt must lie in 0 \.\.\. 18; got 19"),
            ({"prompt": torch.tensor([1, 2])}, ValueError, r"prompt must have 2 axes \(b n\).*add a batch axis"),
            (
                {"mask": padding(3, n=12)},
                ValueError,
                r"mask must have shape \(2, 13\), one value a token; got \(1, 12\)",
            ),
            ({"mask": padding(3, 4).flip(1)}, ValueError, "mask must be False for padding on the left"),
            ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number of at least 1; got 0"),
            ({"num_initial_latents": 0}, ValueError, "num_initial_latents must be a whole number of at least 1; got 0"),
            ({"num_initial_latents": 6}, ValueError, "num_initial_latents must be at most 5; got 6"),
            ({"stop_ids": [3, 19]}, ValueError, r"stop_ids must be ids of the vocabulary, 0 \.\.\. 18; got 19"),
            ({"stop_ids": [-1]}, ValueError, r"stop_ids must be ids of the vocabulary, 0 \.\.\. 18; got -1"),
            ({"stop_ids": ["end"]}, ValueError, r"stop_ids must be ids of the vocabulary, 0 \.\.\. 18; got 'end'"),
            ({"stop_ids": 19}, ValueError, r"stop_ids must be ids of the vocabulary, 0 \.\.\. 18; got 19"),
            ({"stop_ids": True}, ValueError, r"stop_ids must be ids of the vocabulary, 0 \.\.\. 18; got True"),
            ({"stop_ids": "end"}, TypeError, "stop_ids must be an id or a collection of ids; got 'end'"),
            ({"stop_ids": None}, TypeError, "stop_ids must be an id or a collection of ids; got None"),
            ({"stop_ids": 3.0}, TypeError, r"stop_ids must be an id or a collection of ids; got 3\.0"),
            ({"context_length": 0}, ValueError, "context_length must be a whole number of at least 1; got 0"),
            ({"context_length": "8"}, ValueError, "context_length must be a whole number of at least 1; got '8'"),
            (
                {"sampler": sampling.Sample},
                TypeError,
                r"sampler must be a function of logits.*; got the class Sample\. Build it: Sample\(\)",
            ),
            ({"sampler": "greedy"}, TypeError, "sampler must be a function of logits and a generator.*; got 'greedy'"),
            ({"sampler": None}, TypeError, "sampler must be a function of logits and a generator.*; got NoneType"),
            ({"generator": 3}, TypeError, r"generator must be a torch\.Generator; got 3"),
        ],
    )
    def test_come_with_the_call(self, options, error, message):
        options = {"prompt": ids_of(), "max_new_tokens": 3} | options
        prompt = options.pop("prompt")
        for call in (pc.generate, pc.models.stream):
            with pytest.raises(error, match=message):
                call(model_of(), prompt, **options)

    @pytest.mark.parametrize(
        "choose, error, message",
        [
            (lambda x, _: x.argmax(-1, keepdim=True), ValueError, r"one id per sample, shape \(2,\); got \(2, 1\)"),
            (lambda x, _: x.argmax(), ValueError, r"one id per sample, shape \(2,\); got \(\)"),
            (lambda x, _: x.amax(-1), TypeError, r"integer ids; got torch\.float64"),
            (lambda x, _: x[:, 0] > 0, TypeError, r"integer ids; got torch\.bool"),
            (lambda x, _: x.argmax(-1).tolist(), TypeError, r"a torch\.Tensor of ids; got list"),
        ],
    )
    def test_of_what_choose_gives(self, choose, error, message):
        with pytest.raises(error, match=f"sampler must return {message}"):
            pc.generate(model_of(), ids_of(), max_new_tokens=1, sampler=choose)

    def test_of_chosen_ids_outside_the_vocabulary(self):
        for wrong in (19, -1):
            with pytest.raises(ValueError, match=rf"ids from the sampler must lie in 0 \.\.\. 18; got {wrong}"):
                pc.generate(model_of(), ids_of(), max_new_tokens=1, sampler=lambda x, _, w=wrong: torch.tensor([3, w]))

    def test_of_what_is_no_model(self):
        linear = nn.Linear(28, 19).eval()
        for model, message in (
            (linear, "got Linear without vocab_size, num_latents, embedding"),
            (pc.PerceiverAR, "got the class PerceiverAR without vocab_size"),
            ("model", "got 'model' without vocab_size"),
        ):
            with pytest.raises(TypeError, match=f"model must be a PerceiverAR, or have its attributes; {message}"):
                pc.generate(model, ids_of(), max_new_tokens=3)

    def test_of_training_mode(self):
        with pytest.raises(
            ValueError, match=r"model must be in evaluation mode, without dropout; call model\.eval\(\)"
        ):
            pc.generate(model_of().train(), ids_of(), max_new_tokens=3)

    def test_of_a_context_longer_than_positions(self):
        with pytest.raises(
            ValueError, match="context_length must be at most 101, the number of positions of the embedding; got 102"
        ):
            pc.generate(model_of(**POSITIONS["learned"]), ids_of(), max_new_tokens=5, context_length=102)
