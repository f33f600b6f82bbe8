"""Generation: with and without a cache, one by one and in batches, every sampler, errors."""

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
from tests.models.perceiver_ar_cases import (
    EXACT,
    LATENTS,
    POSITIONS,
    VOCABULARY,
    each_position_embedding,
    few_examples,
    ids_of,
    model_of,
    padding,
    rotary_options,
    seeds,
)


def logits_of(method, model, prompt, steps, *, start=2, mask=None, seed=0, context=None):
    """Returns the logits of `steps` new ids, which are sampled."""
    sequence, actual = _Sequence(model, prompt, mask, start, context), []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in islice(method(sequence), steps):
            actual.append(logits)
            sequence.append(torch.randint(VOCABULARY, (len(prompt),), generator=generator))
    return torch.stack(actual, 1)


class TestLatentSchedule:
    def test_the_number_of_latents_grows_and_resets(self):
        assert list(islice(latent_schedule(5, 2), 9)) == [2, 3, 4, 5, 2, 3, 4, 5, 2]
        assert list(islice(latent_schedule(3, 3), 3)) == [3, 3, 3]
        assert list(islice(latent_schedule(1, 1), 3)) == [1, 1, 1]

    @pytest.mark.parametrize("n", [1, 4, 13])
    def test_uncached_logits_equal_the_model_called_by_the_schedule(self, n):
        model, prompt = model_of(), ids_of(n=n)
        actual = logits_of(_recomputed, model, prompt, 7)
        more = torch.randint(VOCABULARY, (7, 2), generator=torch.Generator().manual_seed(0)).T
        for step, latents in enumerate([2, 3, 4, 5, 2, 3, 4]):
            whole = torch.cat([prompt, more[:, :step]], 1)
            torch.testing.assert_close(actual[:, step], model(whole, num_latents=latents)[:, -1], **EXACT)


class TestCache:
    @each_position_embedding
    @few_examples
    @given(n=st.integers(1, 13), start=st.integers(1, LATENTS), seed=seeds)
    def test_the_cache_has_no_effect_on_the_logits(self, options, n, start, seed):
        model, prompt = model_of(**options), ids_of(n=n, seed=seed)
        cached, expected = (
            logits_of(method, model, prompt, 11, start=start, seed=seed) for method in (_cached, _recomputed)
        )
        torch.testing.assert_close(cached, expected, **EXACT)

    def test_the_cache_has_no_effect_with_repeated_blocks(self):
        model, prompt = model_of(latent_transformer=partial(LATENT_TRANSFORMER, num_repeats=3)), ids_of()
        cached, expected = (logits_of(method, model, prompt, 11) for method in (_cached, _recomputed))
        torch.testing.assert_close(cached, expected, **EXACT)

    @each_position_embedding
    @few_examples
    @given(lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3), start=st.integers(1, LATENTS), seed=seeds)
    def test_the_cache_has_no_effect_on_padded_prompts(self, options, lengths, start, seed):
        model, prompt, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        cached, expected = (
            logits_of(method, model, prompt, 11, start=start, mask=mask, seed=seed) for method in (_cached, _recomputed)
        )
        torch.testing.assert_close(cached, expected, **EXACT)

    @pytest.mark.parametrize("latents", [1, 2, 23])
    @pytest.mark.parametrize("depth", [0, 1])
    def test_few_and_many_latents(self, latents, depth):
        model, prompt = model_of(latents=latents, depth=depth), ids_of(n=3)
        cached, expected = (
            logits_of(method, model, prompt, 29, start=max(1, latents // 2)) for method in (_cached, _recomputed)
        )
        torch.testing.assert_close(cached, expected, **EXACT)

    def test_tokens_are_read_once(self):
        model, computed = model_of(), []
        key = model.cross_attention.attention.key
        key.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
        pc.generate(model, ids_of(), max_new_tokens=9)
        assert computed == [13, *[1] * 8]

    def test_latents_are_computed_once_per_window(self):
        model, block_inputs, query_inputs = model_of(), [], []
        block = model.latent_transformer.blocks[1]
        block.register_forward_hook(lambda _, inputs, __: block_inputs.append(inputs[0].shape[1]))
        block.attention.query.register_forward_hook(lambda _, inputs, __: query_inputs.append(inputs[0].shape[1]))
        pc.generate(model, ids_of(), max_new_tokens=9, num_initial_latents=2)
        assert block_inputs == query_inputs == [2, 1, 1, 1, 2, 1, 1, 1, 2]

    def test_the_cache_has_no_effect_where_positions_include_padding(self):
        torch.manual_seed(0)
        where = pc.positions.LearnedEmbedding(13, dim=8)
        embedding = pc.adapters.TokenEmbedding(11, dim=8, positions=where, positions_include_padding=True)
        model = pc.PerceiverAR(embedding, num_latents=5, depth=1, num_heads=2).double().eval()
        prompt, mask = torch.randint(11, (2, 7)), torch.arange(7) >= torch.tensor([[2], [5]])
        logits = {True: [], False: []}
        for cached, each in logits.items():

            def sampler(scores, generator, each=each):
                each.append(scores)
                return torch.full((2,), len(each) % 11)

            pc.generate(model, prompt, mask=mask, max_new_tokens=9, sampler=sampler, use_cache=cached)
        torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=1e-12)


def continued(model, ids, steps, *, context, start, mask=None):
    """Returns the most likely ids if the model sees only the last tokens at each step."""
    mask, prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, ids.shape[1]
    for latents in islice(latent_schedule(model.num_latents, start), steps):
        logits = model(ids[:, -context:], mask=mask[:, -context:], num_latents=latents)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, prompt:]


class TestContext:
    @each_position_embedding
    @few_examples
    @given(n=st.integers(1, 13), context=st.integers(1, 15), start=st.integers(1, LATENTS), seed=seeds)
    def test_logits_depend_only_on_the_last_tokens(self, options, n, context, start, seed):
        model, prompt = model_of(**options), ids_of(n=n, seed=seed)
        cached, recomputed = (
            logits_of(method, model, prompt, 17, start=start, seed=seed, context=context)
            for method in (_cached, _recomputed)
        )
        drawn, ids = torch.Generator().manual_seed(seed), prompt
        for step, latents in enumerate(islice(latent_schedule(LATENTS, start), 17)):
            expected = model(ids[:, -context:], num_latents=latents)[:, -1]
            torch.testing.assert_close(recomputed[:, step], expected, **EXACT)
            torch.testing.assert_close(cached[:, step], expected, **EXACT)
            ids = torch.cat([ids, torch.randint(VOCABULARY, (2,), generator=drawn)[:, None]], 1)

    @each_position_embedding
    @few_examples
    @given(
        lengths=st.lists(st.integers(1, 13), min_size=2, max_size=3),
        context=st.integers(1, 17),
        start=st.integers(1, LATENTS),
        seed=seeds,
    )
    def test_padded_batches_equal_prompts_one_by_one(self, options, lengths, context, start, seed):
        model, prompt, mask = model_of(**options), ids_of(len(lengths), seed=seed), padding(*lengths)
        expected = continued(model, prompt, 11, context=context, start=start, mask=mask)
        for cache in (True, False):
            queried = {
                "max_new_tokens": 11,
                "context_length": context,
                "num_initial_latents": start,
                "use_cache": cache,
            }
            assert torch.equal(pc.generate(model, prompt, mask=mask, **queried), expected)
        for row, length, actual in zip(prompt, lengths, expected, strict=True):
            assert torch.equal(pc.generate(model, row[None, 13 - length :], **queried)[0], actual)

    @pytest.mark.parametrize("n", [3, 8, 13])
    @pytest.mark.parametrize("cache", [True, False])
    def test_it_defaults_to_the_number_of_positions(self, n, cache):
        embedding = pc.adapters.TokenEmbedding(19, 28, positions=pc.positions.LearnedEmbedding(8, 28))
        model = model_of(**rotary_options(None), embedding=embedding)
        actual = pc.generate(model, ids_of(n=n), max_new_tokens=12, use_cache=cache)
        assert torch.equal(actual, continued(model, ids_of(n=n), 12, context=8, start=2))

    @each_position_embedding
    def test_a_context_length_that_is_not_reached_has_no_effect(self, options):
        model, prompt = model_of(**options), ids_of()
        actual = pc.generate(model, prompt, max_new_tokens=9, context_length=21)
        assert torch.equal(actual, pc.generate(model, prompt, max_new_tokens=9))

    def test_streams_and_stop_ids(self):
        model, prompt = model_of(), ids_of()
        free = pc.generate(model, prompt, max_new_tokens=15, context_length=7)
        assert torch.equal(
            torch.stack([*pc.models.stream(model, prompt, max_new_tokens=15, context_length=7)], 1), free
        )
        stop = int(free[0, 4])
        actual = pc.generate(model, prompt, max_new_tokens=15, context_length=7, stop_ids=stop)
        for row, whole in zip(actual, free, strict=True):
            until = (whole == stop).nonzero()
            end = int(until[0]) + 1 if len(until) else 15
            assert torch.equal(row[:end], whole[: min(end, len(row))]) and (row[end:] == stop).all()

    def test_nothing_is_recomputed_before_it_is_reached(self):
        model, computed = model_of(), []
        key = model.cross_attention.attention.key
        key.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].shape[1]))
        pc.generate(model, ids_of(), max_new_tokens=6, context_length=16)
        assert computed == [13, 1, 1, 1, 16, 16]

    @each_position_embedding
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
    @each_position_embedding
    @pytest.mark.parametrize("cache", [True, False])
    def test_a_padded_batch_equals_prompts_one_by_one(self, options, cache):
        model, prompt, lengths = model_of(**options), ids_of(4), (13, 2, 1, 7)
        together = pc.generate(model, prompt, max_new_tokens=17, mask=padding(*lengths), use_cache=cache)
        assert together.shape == (4, 17) and together.dtype == torch.long
        for row, length, actual in zip(prompt, lengths, together, strict=True):
            alone = pc.generate(model, row[None, 13 - length :], max_new_tokens=17, use_cache=cache)[0]
            assert torch.equal(actual, alone)

    def test_greedy_takes_the_most_likely_id(self):
        model, ids = model_of(), ids_of(1, 3)
        actual = pc.generate(model, ids, max_new_tokens=4, num_initial_latents=LATENTS)
        for step in range(4):
            assert actual[0, step] == model(ids)[0, -1].argmax()
            ids = torch.cat([ids, actual[:, step : step + 1]], 1)

    def test_a_stream_yields_the_same_ids(self):
        model, prompt = model_of(), ids_of()
        whole = pc.generate(model, prompt, max_new_tokens=6)
        steps = pc.models.stream(model, prompt, max_new_tokens=6)
        torch.testing.assert_close(next(steps), whole[:, 0])
        torch.testing.assert_close(torch.stack(list(steps), 1), whole[:, 1:])

    def test_a_stream_is_lazy(self):
        model, calls = model_of(), []
        model.cross_attention.register_forward_hook(lambda *_: calls.append(1))
        steps = pc.models.stream(model, ids_of(), max_new_tokens=6)
        assert not calls
        next(steps), next(steps)
        assert len(calls) == 2

    def test_gradients_are_off_and_grad_mode_is_restored(self):
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

        actual = pc.generate(model_of(), ids_of(), max_new_tokens=5, sampler=choose, stop_ids=[5, 7])
        assert actual.tolist() == [[3, 5, 5, 5], [2, 2, 2, 7]]

    def test_ended_samples_do_not_affect_the_others(self):
        model, prompt = model_of(), ids_of(2)
        free = pc.generate(model, prompt, max_new_tokens=9)
        stop = int(free[0, 1])
        actual = pc.generate(model, prompt, max_new_tokens=9, stop_ids=[stop])
        until = (free[1] == stop).nonzero()
        end = int(until[0]) + 1 if len(until) else 9
        assert torch.equal(actual[1, :end], free[1, :end])
        assert (actual[0, 1:] == stop).all()

    def test_a_stop_id_in_the_prompt_is_ignored(self):
        prompt = ids_of()
        actual = pc.generate(
            model_of(), prompt, max_new_tokens=5, stop_ids=[int(prompt[0, -1])], sampler=lambda x, _: x.argmin(-1)
        )
        assert actual.shape[1] >= 1

    def test_up_to_the_last_position(self):
        model = model_of(**POSITIONS["learned"])
        assert pc.generate(model, ids_of(n=98), max_new_tokens=4).shape == (2, 4)

    @pytest.mark.parametrize("stop", [5, [5], (5, 7), {5, 7}, range(5, 8), b"\x05"])
    def test_stop_is_an_id_or_several(self, stop):
        actual = pc.generate(
            model_of(),
            ids_of(),
            max_new_tokens=5,
            stop_ids=stop,
            sampler=lambda x, _: torch.tensor([5, 5], dtype=torch.int32),
        )
        assert actual.tolist() == [[5], [5]] and actual.dtype == torch.long

    @pytest.mark.compile
    def test_a_compiled_model(self):
        model, prompt = model_of(), ids_of()
        actual = pc.generate(torch.compile(model, backend="eager"), prompt, max_new_tokens=7)
        assert torch.equal(actual, pc.generate(model, prompt, max_new_tokens=7))

    def test_half_precision_and_small_integers(self):
        actual = pc.generate(
            model_of().bfloat16(), ids_of().to(torch.uint8), max_new_tokens=7, sampler=sampling.Sample(0.5)
        )
        assert actual.shape == (2, 7)


@pytest.mark.refusal
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
                r"sampler must be a function of logits.*; got the class Sample",
            ),
            ({"sampler": "greedy"}, TypeError, "sampler must be a function of logits and a generator.*; got 'greedy'"),
            ({"sampler": None}, TypeError, "sampler must be a function of logits and a generator.*; got None"),
            ({"generator": 3}, TypeError, r"generator must be a torch\.Generator; got 3"),
        ],
    )
    def test_invalid_arguments_raise_at_the_call(self, options, error, message):
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
            (lambda x, _: x.argmax(-1).tolist(), TypeError, r"a torch\.Tensor of ids; got \[\d+, \d+\]"),
        ],
    )
    def test_invalid_results_of_the_sampler_raise(self, choose, error, message):
        with pytest.raises(error, match=f"sampler must return {message}"):
            pc.generate(model_of(), ids_of(), max_new_tokens=1, sampler=choose)

    def test_sampled_ids_outside_the_vocabulary_raise(self):
        for wrong in (19, -1):
            with pytest.raises(ValueError, match=rf"ids from the sampler must lie in 0 \.\.\. 18; got {wrong}"):
                pc.generate(model_of(), ids_of(), max_new_tokens=1, sampler=lambda x, _, w=wrong: torch.tensor([3, w]))

    def test_objects_other_than_models_raise(self):
        linear = nn.Linear(28, 19).eval()
        for model, message in (
            (linear, "vocab_size, num_latents, embedding, latent_transformer.*; got a built Linear"),
            (pc.PerceiverAR, "vocab_size.*; got the class PerceiverAR"),
            ("model", "vocab_size.*; got 'model'"),
        ):
            with pytest.raises(TypeError, match=f"model must be a PerceiverAR, or have its attributes {message}"):
                pc.generate(model, ids_of(), max_new_tokens=3)

    def test_training_mode_raises(self):
        with pytest.raises(
            ValueError, match=r"model must be in evaluation mode, without dropout; call model\.eval\(\)"
        ):
            pc.generate(model_of().train(), ids_of(), max_new_tokens=3)

    def test_a_context_longer_than_the_positions_raises(self):
        with pytest.raises(
            ValueError, match="context_length must be at most 101, the number of positions of the embedding; got 102"
        ):
            pc.generate(model_of(**POSITIONS["learned"]), ids_of(), max_new_tokens=5, context_length=102)
