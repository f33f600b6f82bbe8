"""Inputs of reads, caches that carry memories, captured weights, and the record of reads."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

import perceiver_core as pc
from perceiver_core import explain_reads, masks, reads
from perceiver_core.positions import Rotary
from perceiver_core.reads import Auto, Dense, Factored, KeysValuesCache, ReadContext, SharedMemory, Source, Structured
from perceiver_core.reads.strategy import listening
from tests.reads.cases import EXACT, images, memory_of, model_of, outcome, queries, read_of, tokens_of


@contextmanager
def recorded_reads():
    """The reads of this thread."""
    contexts = []
    with listening(contexts.append):
        yield contexts


STRATEGIES = {"dense": Dense(), "factored": Factored(), "structured": Structured()}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


class TestSource:
    @pytest.mark.parametrize("masked", [False, True])
    def test_normalized_tokens_and_the_whole_mask(self, masked):
        tokens = tokens_of((5, 13), masked=masked)
        norm, mask = nn.LayerNorm(tokens.dim).double(), torch.rand(2, 65) < 0.5
        source = Source(tokens, norm, Dense(), mask)
        torch.testing.assert_close(source.normalized(), norm(tokens.materialize()), **EXACT)
        dense = Source(tokens.materialize(), norm, Dense(), mask)
        torch.testing.assert_close(dense.normalized(), source.normalized(), **EXACT)
        allowed = masks.materialize(source.whole_mask(), queries=3, keys=65)
        expected = mask & tokens.flat_mask() if masked else mask
        assert torch.equal(allowed.expand(2, 1, 3, 65), expected[:, None, None].expand(2, 1, 3, 65))
        assert Source(tokens.materialize(), norm, Dense()).whole_mask() is None

    def test_the_strategy_prepares_the_memory_of_an_attention(self):
        seen = []

        class Recorded(Dense):
            def prepare(self, context):
                seen.append(context)
                return super().prepare(context)

        tokens, places = tokens_of((5, 13)), torch.arange(65)
        read = read_of(tokens, rotary=Rotary(2))
        source = Source(tokens, read.input_norm, Recorded(), masks.Causal(), places, 17)
        memory = source.memory(read.attention)
        expected = ReadContext(read.attention, source)
        assert seen == [expected] and seen[0].attention is read.attention and seen[0].source is source
        torch.testing.assert_close(memory.keys, Dense().prepare(expected).keys, **EXACT)


class TestMovedSource:
    @staticmethod
    def source():
        tokens, mask = tokens_of((5, 13), masked=True), masks.and_(masks.Padding(torch.rand(2, 65) < 2), masks.Causal())
        return Source(tokens, nn.LayerNorm(tokens.dim).double(), Dense(), mask, torch.arange(65), 17)

    def test_it_is_a_pytree_of_its_tensors_and_keeps_its_norm(self):
        source = self.source()
        leaves, spec = tree_flatten(source)
        again = tree_unflatten(leaves, spec)
        assert again.norm is source.norm and again.mask is source.mask and again.num_queries == 17
        torch.testing.assert_close(again.normalized(), source.normalized(), **EXACT)
        assert not any(isinstance(leaf, nn.Module) for leaf in leaves)

    def test_its_tensors_move_to_a_device_and_its_norm_does_not(self):
        source = self.source()
        moved = source.to("meta")
        assert moved.norm is source.norm and not moved.norm.weight.is_meta
        assert moved.tokens.content.is_meta and moved.positions.is_meta and moved.mask.masks[0].keys.is_meta
        assert moved.strategy == Dense() and moved.num_queries == 17


class TestSharedMemory:
    def test_it_stores_the_first_memory_and_returns_the_one_of_the_call(self):
        tokens, x = tokens_of((5, 13)), queries()
        read, cache = read_of(tokens), SharedMemory(num_queries=14)
        first, second = (memory_of(read, x, tokens_of((5, 13), seed=seed)) for seed in (0, 1))
        assert cache.memory is None and cache.num_queries == 14 and not cache.appends
        assert cache.update(first) is first and cache.memory is first
        assert cache.update(second) is second and cache.memory is first

    def test_its_number_of_queries_decides_the_strategy(self):
        tokens = tokens_of((113, 127))
        read, x = read_of(tokens, strategy=Auto(), qk_dim=128, v_dim=128), queries(m=2)
        for count, expected in ((None, 2), (512, 512)):
            with recorded_reads() as contexts:
                memory_of(read, x, tokens, num_queries=count)
            assert [context.source.num_queries for context in contexts] == [expected]

    @each_strategy
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients_of_checkpointed_reads_are_equal_to_the_bit(self, strategy, masked):
        """The first read stores its memory again when it is computed again, and later reads keep their input."""
        tokens, x = tokens_of((5, 13), masked=masked), queries()
        read = read_of(tokens, strategy=strategy)

        def result(call):
            content = tokens.content.clone().requires_grad_()
            given = pc.Tokens(content, tokens.position_tables, tokens.mask)
            cache = SharedMemory(num_queries=21)
            out = call(read, x, given, cache=cache)
            for _ in range(2):
                out = call(read, out, cache.memory)
            return [out, *torch.autograd.grad(out.square().sum(), [x, content, *read.parameters()])]

        expected = result(lambda read, *args, **options: read(*args, **options))
        actual = result(partial(checkpoint, use_reentrant=False))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @each_strategy
    @pytest.mark.parametrize("share", [True, pc.sharing.all_, pc.sharing.all_but_first])
    def test_gradients_of_checkpointed_models_are_equal_to_the_bit(self, strategy, share):
        def result(change, call=lambda model, x: model(x)):
            model = change(model_of(strategy, share, num_reads=4))
            out = call(model, images())
            return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]

        expected = result(lambda model: model)
        whole = partial(checkpoint, use_reentrant=False)
        each = pc.checkpoint_activations
        for actual in (result(each), result(lambda model: model, whole), result(each, whole)):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_a_graph_can_be_used_twice(self):
        model = pc.checkpoint_activations(model_of(Dense(), pc.sharing.all_))
        parameters = list(model.parameters())
        loss = model(images()).square().sum()
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


class TestKeysValuesCache:
    def test_each_call_appends(self):
        tokens, x = tokens_of((65,)), queries()
        read, cache = read_of(tokens), KeysValuesCache()
        assert cache.appends and cache.num_queries is None and cache.memory is None
        first, second = (memory_of(read, x, tokens_of((n,), seed=n)) for n in (11, 3))
        assert cache.update(first) is first
        both = cache.update(second)
        assert cache.memory is both
        torch.testing.assert_close(both.keys, torch.cat([first.keys, second.keys], 2), rtol=0, atol=0)
        torch.testing.assert_close(both.values, torch.cat([first.values, second.values], 2), rtol=0, atol=0)

    @pytest.mark.refusal
    def test_factored_keys_and_values_raise(self):
        tokens = tokens_of((5, 13))
        read = read_of(tokens, strategy=Structured())
        with pytest.raises(TypeError, match=r"got FactoredKeysValues\. Use strategy=reads\.Dense\(\)"):
            read(queries(), tokens, cache=KeysValuesCache())


class TestRecord:
    def test_it_is_the_record_of_this_thread(self):
        """Reads of other threads are neither recorded nor disturbed."""
        ours, theirs = (read_of(tokens_of((5, 13)), strategy=strategy) for strategy in (Dense(), Factored()))
        tokens, x = tokens_of((5, 13)), queries()
        entered, done, results = threading.Event(), threading.Event(), []

        def other() -> None:
            entered.wait()
            results.append(theirs(x, tokens))
            done.set()

        thread = threading.Thread(target=other)
        thread.start()
        with recorded_reads() as contexts:
            entered.set()
            assert done.wait(60)
            ours(x, tokens)
        thread.join()
        assert [(context.attention, context.source.strategy) for context in contexts] == [(ours.attention, Dense())]
        torch.testing.assert_close(results[0], theirs(x, tokens), **EXACT)

    def test_a_report_has_the_reads_of_its_thread(self):
        model, theirs = model_of(), read_of(tokens_of((5, 13)))
        tokens, x = tokens_of((5, 13)), queries()

        def interrupt(*_: object) -> None:
            thread = threading.Thread(target=theirs, args=(x, tokens))
            thread.start()
            thread.join()

        model.encoder.register_forward_pre_hook(interrupt)
        assert [read.read for read in explain_reads(model, images())] == ["encoder.reads.0", "encoder.reads.1"]

    def test_records_nest(self):
        tokens, x = tokens_of((5, 13)), queries()
        read = read_of(tokens)
        with recorded_reads() as outer:
            read(x, tokens)
            with recorded_reads() as inner:
                read(x, tokens)
            read(x, tokens)
        assert (len(outer), len(inner)) == (2, 1)
        read(x, tokens)
        assert (len(outer), len(inner)) == (2, 1)

    def test_nothing_is_recorded_after_a_failure(self):
        tokens, x = tokens_of((5, 13)), queries()
        read = read_of(tokens)
        with pytest.raises(RuntimeError, match="stop"), recorded_reads() as contexts:
            raise RuntimeError("stop")
        outcome(read, x, tokens)
        assert contexts == []

    def test_a_record_keeps_nothing_alive(self):
        model, pictures = model_of(), images()
        report = explain_reads(model, pictures)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None and len(report) == 2
        assert not any(vars(reads.strategy._thread).values())
