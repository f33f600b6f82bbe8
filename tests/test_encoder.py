"""Encoder: weight sharing, cached keys and values, inputs per read, attention maps."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import CrossAttend, Encoder, MultiHeadAttention, SelfAttend, Tokens, masks, sharing
from perceiver_core.blocks import LatentTransformer
from perceiver_core.kernels import fastest, reference
from perceiver_core.reads.caches import OpaqueMemory
from perceiver_core.sharing import Sharing

BATCH, N, INPUT_DIM, LATENTS, DIM, HEADS = 2, 17, 11, 5, 14, 7
EXACT = {"rtol": 0, "atol": 1e-12}


def custom(steps):
    return Sharing(tuple(i % 2 for i in range(steps)), tuple(i // 2 for i in range(steps)))


SCHEMES = {
    "none": sharing.none,
    "all": sharing.all_,
    "all but first": sharing.all_but_first,
    "paper": sharing.paper,
    "custom": custom,
}
each_scheme = pytest.mark.parametrize("share", SCHEMES.values(), ids=SCHEMES.keys())


def encoder(input_dim=INPUT_DIM, *, reads=4, depth=1, **options):
    torch.manual_seed(0)
    made = Encoder(
        input_dim, num_latents=LATENTS, dim=DIM, num_reads=reads, depth=depth, num_heads=HEADS, **options
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():  # biases start at zero, where tests could not see them
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def array(seed=0, width=INPUT_DIM, n=N):
    return torch.randn(BATCH, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(mask=None):
    generator = torch.Generator().manual_seed(5)
    content = torch.randn(BATCH, 3, 7, 9, dtype=torch.float64, generator=generator)
    tables = (
        torch.randn(3, 1, 2, dtype=torch.float64, generator=generator),
        torch.randn(1, 7, 2, dtype=torch.float64, generator=generator),
    )
    return Tokens(content, tables, mask)


def unshared(shared, *widths):
    """Returns an encoder without weight sharing; the weights of each step are copies of those in `shared`."""
    alone = encoder(list(widths) or INPUT_DIM, reads=shared.sharing.steps, share=False)
    alone.latents = shared.latents
    for step, (read, transformer) in enumerate(zip(shared.sharing.reads, shared.sharing.transformers, strict=True)):
        alone.reads[step].load_state_dict(shared.reads[read].state_dict())
        alone.transformers[step].load_state_dict(shared.transformers[transformer].state_dict())
    return alone


def calls_of_keys(made):
    """Returns a list that records each computation of keys while the encoder runs."""
    return calls_of(made, "attention.key")


def calls_of(made, part):
    """Returns a list that records the number of the read each time when a part of it runs."""
    calls = []
    for number, read in enumerate(made.reads):
        read.get_submodule(part).register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


class TestSharing:
    @each_scheme
    def test_steps_that_share_use_one_module(self, share):
        made, used = encoder(share=share), []
        for kind in (made.reads, made.transformers):
            for module in kind:
                module.register_forward_hook(lambda module, *_: used.append(module))
        made(array())
        plan = share(4)
        expected = [made.reads[i] for i in plan.reads], [made.transformers[i] for i in plan.transformers]
        assert used[0::2] == expected[0]
        assert used[1::2] == expected[1]

    @each_scheme
    def test_each_set_of_weights_has_one_entry_in_the_state(self, share):
        plan = share(4)
        layers = [f"{layer}.{kind}" for layer in ("query", "key", "value", "output") for kind in ("weight", "bias")]
        attention = [f"attention.{name}" for name in layers]
        mlp = [f"{name}.{kind}" for name in ("mlp.expand", "mlp.contract", "mlp_norm") for kind in ("weight", "bias")]
        norms = [f"{name}.{kind}" for name in ("query_norm", "input_norm") for kind in ("weight", "bias")]
        expected = {"latents"}
        expected |= {f"reads.{i}.{name}" for i in set(plan.reads) for name in [*attention, *mlp, *norms]}
        expected |= {
            f"transformers.{i}.blocks.0.{name}"
            for i in set(plan.transformers)
            for name in [*attention, *mlp, "norm.weight", "norm.bias"]
        }
        assert encoder(share=share).state_dict().keys() == expected

    def test_true_is_the_scheme_of_the_paper_and_false_is_none(self):
        assert encoder(share=True).sharing == encoder().sharing == sharing.paper(4)
        assert encoder(share=False).sharing == sharing.none(4)

    @each_scheme
    @pytest.mark.parametrize("form", ["tensor", "tokens", "masked tokens"])
    def test_it_equals_an_unshared_encoder_with_copied_weights(self, share, form):
        made = encoder(share=share)
        mask = torch.rand(BATCH, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        inputs = {"tensor": array(), "tokens": grid(), "masked tokens": grid(mask)}[form]
        torch.testing.assert_close(made(inputs), unshared(made)(inputs), **EXACT)

    @each_scheme
    def test_gradients_of_shared_weights_are_summed_over_steps(self, share):
        made = encoder(share=share)
        alone = unshared(made)
        made(array()).square().sum().backward()
        alone(array()).square().sum().backward()
        for kind in ("reads", "transformers"):
            plan = getattr(made.sharing, kind)
            for number, module in enumerate(getattr(made, kind)):
                steps = [step for step, used in enumerate(plan) if used == number]
                for name, parameter in module.named_parameters():
                    parts = [getattr(alone, kind)[step].get_parameter(name).grad for step in steps]
                    torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-9, atol=1e-9)

    @each_scheme
    def test_keys_are_computed_once_for_each_set_of_weights(self, share):
        made = encoder(share=share)
        calls = calls_of_keys(made)
        made(array())
        assert sorted(calls) == sorted(set(share(4).reads))
        made(grid())
        assert len(calls) == 2 * len(set(share(4).reads))

    @pytest.mark.refusal
    def test_invalid_schemes_raise(self):
        message = r"share must be True, False or a function such as sharing\.all_; got 'all'"
        with pytest.raises(TypeError, match=message):
            encoder(share="all")
        with pytest.raises(ValueError, match="share must plan num_reads=4 steps; it planned 3"):
            encoder(share=lambda steps: sharing.all_(3))


class TestInputsPerRead:
    def test_each_read_uses_its_input(self):
        made = encoder([3, 11, 13], reads=3, share=False)
        inputs = [array(1, 3), array(2, 11, n=7), array(3, 13, n=23)]
        x = made.latents.expand(BATCH, -1, -1)
        for read, transformer, given in zip(made.reads, made.transformers, inputs, strict=True):
            x = transformer(read(x, given))
        torch.testing.assert_close(made(inputs), x, **EXACT)

    @pytest.mark.parametrize(
        "order, computed", [("aba", 2), ("aaa", 1), ("abc", 3), ("abb", 2)], ids=["aba", "aaa", "abc", "abb"]
    )
    def test_keys_of_a_repeated_input_are_computed_once(self, order, computed):
        made = encoder([INPUT_DIM] * 3, reads=3, share=sharing.all_)
        named = {"a": array(1), "b": array(2, n=7), "c": array(3)}
        inputs = [named[letter] for letter in order]
        calls = calls_of_keys(made)
        out = made(inputs)
        assert len(calls) == computed
        torch.testing.assert_close(out, unshared(made, *[INPUT_DIM] * 3)(inputs), **EXACT)

    def test_equal_tensors_are_not_treated_as_one_input(self):
        made = encoder([INPUT_DIM] * 2, reads=2, share=sharing.all_)
        calls = calls_of_keys(made)
        torch.testing.assert_close(made([array(), array()]), made([given := array(), given]), **EXACT)
        assert len(calls) == 3

    def test_tokens_with_positions(self):
        made = encoder([INPUT_DIM] * 3, reads=3)
        inputs = [grid(), array(), grid()]
        dense = [grid().materialize(), array(), grid().materialize()]
        torch.testing.assert_close(made(inputs), made(dense), **EXACT)

    @pytest.mark.refusal
    def test_invalid_inputs_per_read_raise(self):
        with pytest.raises(ValueError, match=r"read 1 reads 13, an earlier one 11\. Choose share=sharing\.none"):
            encoder([11, 13], reads=2, share=sharing.all_)
        with pytest.raises(
            ValueError, match=r"input_dim must be one width, or one for each of 4 reads; got \[11, 11\]"
        ):
            encoder([11, 11])
        with pytest.raises(ValueError, match="inputs must be one for each of 3 reads; got 2"):
            encoder([11, 11, 11], reads=3)([array(), array()])
        with pytest.raises(ValueError, match="inputs must be one for each of 3 reads; got 1"):
            encoder([11, 11, 11], reads=3)(array())
        with pytest.raises(ValueError, match="inputs must be one for all reads; got 2"):
            encoder()([array(), array()])
        with pytest.raises(ValueError, match="inputs must be one for all reads; got 0"):
            encoder()([])
        with pytest.raises(ValueError, match=r"inputs of all reads must have one batch size; got \[2, 1\]"):
            encoder([11, 11], reads=2)([array(), array()[:1]])


@each_scheme
def test_the_mask_applies_to_every_read(share):
    made = encoder(share=share)
    present = torch.ones(BATCH, N, dtype=torch.bool)
    present[:, 12:] = False
    torch.testing.assert_close(made(array(), mask=masks.Padding(present)), made(array()[:, :12]), **EXACT)


def test_the_mask_is_combined_with_that_of_the_tokens():
    made = encoder()
    generator = torch.Generator().manual_seed(3)
    one, two = (torch.rand(BATCH, 3, 7, generator=generator) < 0.7 for _ in range(2))
    both = made(grid(one), mask=masks.Padding(two.flatten(1)))
    torch.testing.assert_close(both, made(grid(one & two)), **EXACT)


def test_initial_latents_broadcast_over_samples():
    made = encoder(depth=0, reads=1)
    with torch.no_grad():
        for parameter in made.reads.parameters():
            parameter.zero_()
    torch.testing.assert_close(made(array()), made.latents.expand(BATCH, LATENTS, DIM), **EXACT)


def test_factories_build_the_parts():
    made = encoder(
        cross_attention=partial(CrossAttend, num_heads=3, attention=partial(MultiHeadAttention, qk_dim=9)),
        latent_transformer=partial(LatentTransformer, block=partial(SelfAttend, dropout=0.1)),
        depth=2,
    )
    assert {read.attention.num_heads for read in made.reads} == {3}
    assert [block.dropout.p for block in made.transformers[0].blocks] == [0.1, 0.1]
    assert [block.attention.num_heads for block in made.transformers[0].blocks] == [HEADS, HEADS]


class Counting:
    """A kernel that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, *, mask):
        self.calls += 1
        return reference(q, k, v, mask=mask)


class TestAttentionMap:
    @each_scheme
    @pytest.mark.parametrize("read", [0, 1, 2, 3, -1, -4])
    def test_it_equals_the_formula_at_that_read(self, share, read):
        made = encoder(share=share)
        x = made.latents.expand(BATCH, -1, -1)
        steps = zip(made.sharing.reads, made.sharing.transformers, strict=True)
        for number, transformer in list(steps)[: read % 4]:
            x = made.transformers[transformer](made.reads[number](x, array()))
        block = made.reads[made.sharing.reads[read]]
        q = block.attention.query(block.query_norm(x))
        k = block.attention.key(block.input_norm(array()))
        expected = (q @ k.mT / INPUT_DIM**0.5).softmax(-1)[:, None]
        torch.testing.assert_close(made.attention_map(array(), read=read), expected, **EXACT)

    def test_selected_queries(self):
        made = encoder(cross_attention=partial(CrossAttend, num_heads=11))
        whole = made.attention_map(array())
        assert whole.shape == (BATCH, 11, LATENTS, N)
        for queries in ([4, 0], torch.tensor([4, 0])):
            torch.testing.assert_close(made.attention_map(array(), queries=queries), whole[:, :, [4, 0]], **EXACT)

    @pytest.mark.parametrize("read", [0, 2, -1])
    def test_other_reads_keep_their_kernel(self, read):
        kernel, latent_kernel = Counting(), Counting()
        made = encoder(
            cross_attention=partial(CrossAttend, attention=partial(MultiHeadAttention, kernel=kernel)),
            latent_transformer=partial(
                LatentTransformer,
                block=partial(SelfAttend, attention=partial(MultiHeadAttention, kernel=latent_kernel)),
            ),
        )
        made.attention_map(array(), read=read)
        assert kernel.calls == read % 4 + 2  # of the captured read, once for the weights and once for its output
        assert latent_kernel.calls == read % 4

    def test_masked_tokens_get_no_attention(self):
        mask = torch.rand(BATCH, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        weights = encoder().attention_map(grid(mask), read=1)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
        assert ((weights > 0) == mask.flatten(1)[:, None, None]).all()

    def test_the_mask_of_a_call(self):
        mask = masks.Padding(torch.arange(N).expand(BATCH, N) < 12)
        weights = encoder().attention_map(array(), mask=mask)
        torch.testing.assert_close(weights[..., :12], encoder().attention_map(array()[:, :12]), **EXACT)

    def test_inputs_per_read(self):
        made = encoder([3, 11], reads=2, share=False)
        assert made.attention_map([array(1, 3), array(2, 11, n=7)], read=0).shape == (BATCH, 1, LATENTS, N)
        assert made.attention_map([array(1, 3), array(2, 11, n=7)], read=1).shape == (BATCH, 1, LATENTS, 7)

    @pytest.mark.refusal
    @pytest.mark.parametrize("read", [4, -5])
    def test_reads_out_of_range_raise(self, read):
        with pytest.raises(ValueError, match=rf"read must lie in -4 \.\.\. 3; got {read}"):
            encoder().attention_map(array(), read=read)


def test_the_default_kernel_is_the_fastest():
    assert {read.attention.kernel for read in encoder().reads} == {fastest}


@pytest.mark.refusal
def test_invalid_sizes_raise():
    with pytest.raises(ValueError, match="num_latents must be a whole number of at least 1; got 0"):
        Encoder(3, num_latents=0, dim=DIM)
    with pytest.raises(ValueError, match="num_reads must be at most 10000; got 10001"):
        Encoder(3, num_latents=5, dim=DIM, num_reads=10_001)
    with pytest.raises(ValueError, match=r"depth must lie in 0 \.\.\. 10,000; got -1"):
        Encoder(3, num_latents=5, dim=DIM, depth=-1, num_heads=7)


def small(**options: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(6, num_latents=5, dim=14, depth=1, num_heads=2, **options)


@pytest.mark.parametrize("reads", [1, 3])
def test_all_forms_of_a_token_mask_are_equivalent(reads: int) -> None:
    model, x = (
        small(num_reads=reads),
        torch.rand(5, 11, 6),
    )  # 5 samples, 5 latents: shapes are ambiguous
    mask = torch.rand(5, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 0] = True
    expected = model(pc.Tokens(x, mask=mask))
    for given in (mask, masks.Padding(mask), mask[:, None, None, :]):
        torch.testing.assert_close(model(x, mask=given), expected)
        torch.testing.assert_close(model.attention_map(x, mask=given), model.attention_map(pc.Tokens(x, mask=mask)))


@pytest.mark.refusal
def test_inputs_of_another_type_raise() -> None:
    with pytest.raises(TypeError, match="inputs must be Tokens, a tensor b n c, or a list of these; got ndarray"):
        small()(np.zeros((2, 11, 6)))


def test_blocks_do_not_share_activation_weights() -> None:
    block = partial(pc.SelfAttend, mlp=partial(pc.MLP, activation=nn.PReLU()))
    model = small(latent_transformer=partial(pc.LatentTransformer, block=block), num_reads=2, share=False)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.PReLU)]
    assert len({id(weight) for weight in weights}) == 2


def test_a_single_query_index() -> None:
    model, x = small(), torch.rand(2, 11, 6)
    torch.testing.assert_close(model.attention_map(x, queries=3), model.attention_map(x)[:, :, [3]])


class Mean(nn.Module):
    """A read by a user, which takes no cache."""

    def __init__(self, dim: int, input_dim: int) -> None:
        super().__init__()
        self.project, self.calls = nn.Linear(input_dim, dim), 0

    def forward(self, x: torch.Tensor, tokens: Tokens, *, mask: masks.Mask | None = None) -> torch.Tensor:
        assert isinstance(tokens, Tokens)
        self.calls += 1
        return x + self.project(tokens.materialize().mean(1, keepdim=True))


def test_user_defined_reads_that_share_weights() -> None:
    made = encoder(reads=3, share=sharing.all_, cross_attention=Mean)
    assert made(grid()).shape == (BATCH, LATENTS, DIM)
    assert len(made.reads) == 1 and made.reads[0].calls == 3
    [transformer], [read], x = made.transformers, made.reads, made.latents.expand(BATCH, -1, -1)
    for _ in range(3):
        x = transformer(read(x, grid()))
    torch.testing.assert_close(made(grid()), x, **EXACT)


class OnlyForward(nn.Module):
    """A child whose methods and attributes raise, except for its forward and the word that it takes a cache."""

    accepts_cache = True

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        if name == "inner":
            return super().__getattr__(name)
        raise AssertionError(f"the encoder asked for {name}")


@each_scheme
@pytest.mark.parametrize("options", [{}, {"aggregate": pc.AttentionResidual}], ids=["last", "aggregate"])
def test_children_need_nothing_but_a_forward(share, options) -> None:
    made = encoder(share=share, latent_dropout=pc.DropLatents(0.5), **options).eval()
    expected = made(array()), made.attention_map(array(), read=2, queries=[3])
    made.latent_dropout = OnlyForward(made.latent_dropout)
    for children in (made.reads, made.transformers, made.aggregates or []):
        for number, child in enumerate(children):
            children[number] = OnlyForward(child)
    calls = calls_of(made, "inner.attention.key")
    assert torch.equal(made(array()), expected[0])
    assert sorted(calls) == sorted(set(share(4).reads))  # the cache is used
    assert torch.equal(made.attention_map(array(), read=2, queries=[3]), expected[1])


class TestMemories:
    def caches(self, made: Encoder) -> list[tuple[int, bool, bool]]:
        """Returns for each read: the number of its weights, whether it fills a cache, and whether it gets a memory."""
        calls = []

        def look(read: nn.Module, args: tuple, options: dict, number: int) -> None:
            calls.append((number, "cache" in options, isinstance(args[1], OpaqueMemory)))

        for number, read in enumerate(made.reads):
            read.register_forward_pre_hook(partial(look, number=number), with_kwargs=True)
        made(array())
        return calls

    def test_inputs_used_once_are_not_cached(self):
        assert self.caches(encoder(share=False)) == [(number, False, False) for number in range(4)]
        assert self.caches(encoder()) == [(0, False, False), (1, True, False), (1, False, True), (1, False, True)]
        assert self.caches(encoder(share=custom)) == [
            *((0, True, False), (1, True, False)),
            *((0, False, True), (1, False, True)),
        ]

    @torch.no_grad()
    def test_a_memory_is_freed_with_the_last_read_that_needs_it(self):
        made, memories, alive = encoder(share=custom), {}, []

        def read_hook(read, args, options, out, number):
            if "cache" in options:
                memories[number] = weakref.ref(options["cache"].memory.keys)

        for number, read in enumerate(made.reads):
            read.register_forward_hook(partial(read_hook, number=number), with_kwargs=True)
        for transformer in made.transformers:
            transformer.register_forward_hook(
                lambda *_: alive.append([n for n, memory in memories.items() if memory() is not None])
            )
        made(array())
        assert alive == [[0], [0, 1], [1], []]

    @pytest.mark.parametrize(("share", "expected"), [(sharing.all_, [4]), (sharing.paper, [1, 3]), (custom, [2, 2])])
    def test_the_strategy_is_chosen_for_all_queries_of_a_memory(self, share, expected):
        made = encoder(share=share)
        read = pc.explain_reads(made, grid())
        assert [each.sizes.num_queries for each in read] == [LATENTS * count for count in expected]

    def test_dropped_latents_are_no_queries(self):
        made = encoder(share=sharing.all_, latent_dropout=pc.DropLatents(0.5)).train()
        assert [each.sizes.num_queries for each in pc.explain_reads(made, grid())] == [2 * 4]


class TestCapture:
    @each_scheme
    @pytest.mark.parametrize("read", [0, 2, -1])
    def test_the_latents_after_the_read_are_returned(self, share, read):
        made, capture = encoder(share=share), pc.reads.AttentionCapture(read, queries=[4, 0])
        out = made(array(), capture=capture)
        x = made.latents.expand(BATCH, -1, -1)
        for step in range(read % 4 + 1):
            x = x if step == 0 else made.transformers[made.sharing.transformers[step - 1]](x)
            x = made.reads[made.sharing.reads[step]](x, array())
        torch.testing.assert_close(out, x, **EXACT)
        assert capture.weights.shape == (BATCH, 1, 2, N)
        assert capture.grid is None

    @pytest.mark.parametrize("read", [0, 1, 2, -1])
    def test_the_grid_of_the_tokens_is_captured(self, read):
        made, capture = encoder(), pc.reads.AttentionCapture(read)
        made(grid(), capture=capture)
        assert capture.grid == (3, 7)
        made(array(), capture=capture)
        assert capture.grid is None

    @pytest.mark.refusal
    def test_a_capture_that_nothing_filled_raises(self):
        with pytest.raises(RuntimeError, match="no attention weights were captured"):
            pc.reads.AttentionCapture().result()
