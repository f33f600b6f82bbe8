"""The ways to read give one answer; the choice between them is made by cost, can be forced, and explains itself."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import partial

import pytest
import torch
from perceiver_core.reads.costs import Machine, Sizes
from perceiver_core.reads.keys_values import KeysValues
from torch import nn

import perceiver_core as pc
from perceiver_core import CrossAttend, Encoder, MultiHeadAttention, Tokens, explain_reads, masks, positions, reads
from perceiver_core.__main__ import main as command
from perceiver_core.kernels import chunked, reference, sdpa
from perceiver_core.reads import Auto, Dense, Factored, Structured, measure
from perceiver_core.reads.factored import FactoredKeysValues

ALL = (Structured(), Factored(), Dense())
EXACT = {"rtol": 1e-10, "atol": 1e-10}
GRIDS = {"line": (23,), "picture": (5, 13), "film": (3, 7, 5), "pixel": (1, 1), "row": (1, 17), "column": (17, 1)}
NORMS = {
    "layer": nn.LayerNorm,
    "plain": partial(nn.LayerNorm, elementwise_affine=False),
    "unbiased": partial(nn.LayerNorm, bias=False),
    "rms": nn.RMSNorm,
    "none": nn.Identity,
}


def tokens_of(grid, channels=3, *, batch=2, masked=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, *grid, channels, dtype=torch.float64, generator=generator)
    where = positions.Fourier(num_axes=len(grid), num_bands=2, max_resolution=11)
    mask = torch.rand(batch, *grid, generator=generator) < 0.7 if masked else None
    return Tokens(content, where.tables(grid, like=content), mask)


def read_of(tokens, *, path=Dense(), heads=2, norm=nn.LayerNorm, **options):  # noqa: B008 (a constant)
    torch.manual_seed(0)
    attention = partial(MultiHeadAttention, **{"qk_dim": 14, "v_dim": 22, **options})
    read = CrossAttend(19, tokens.dim, num_heads=heads, norm=norm, attention=attention, strategy=path).double()
    with torch.no_grad():
        for weight in read.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return read


def queries(batch=2, m=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, m, 19, dtype=torch.float64, generator=generator).requires_grad_()


def outcome(read, x, tokens, **options):
    """The output, and the gradients by queries, content and every weight."""
    content = tokens.content.detach().clone().requires_grad_()
    out = read(x, Tokens(content, tokens.position_tables, tokens.mask), **options)
    weights = dict(read.named_parameters())
    found = torch.autograd.grad(out.square().sum(), [x, content, *weights.values()])
    return out.detach(), dict(zip(["x", "content", *weights], found, strict=True))


EVERY = [Factored(), Structured(), Auto(), Auto(machine=Machine(start=0.0, pair=1e-9, channel=0.0))]


@pytest.mark.parametrize("path", EVERY, ids=["factored", "structured", "cheapest", "structure is cheap"])
class TestOneAnswer:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
    def test_over_grids(self, path, grid, masked):
        tokens, x = tokens_of(grid, masked=masked), queries()
        read = read_of(tokens)
        wanted = outcome(read, x, tokens)
        reads.set_strategy(read, path)
        torch.testing.assert_close(outcome(read, x, tokens), wanted, **EXACT)

    @pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"out_bias": False}], ids=repr)
    def test_over_norms_and_biases(self, path, norm, options):
        tokens, x = tokens_of((5, 13)), queries()
        read = read_of(tokens, norm=norm, **options)
        wanted = outcome(read, x, tokens)
        reads.set_strategy(read, path)
        torch.testing.assert_close(outcome(read, x, tokens), wanted, **EXACT)

    @pytest.mark.parametrize("masked", [False, True])
    def test_grouped_queries_and_norms_of_queries_and_keys(self, path, masked, monkeypatch):
        if isinstance(path, Structured):
            pytest.skip("it refuses them")
        monkeypatch.setattr("perceiver_core.reads.factored.SLAB", 7)  # many tokens: others would be read in slabs
        tokens, x = tokens_of((5, 13), masked=masked), queries()
        read = read_of(tokens, heads=6, qk_dim=12, v_dim=18, num_kv_heads=2, qk_norm=nn.LayerNorm)
        wanted = outcome(read, x, tokens)
        weights = read.attention_map(x, tokens)
        reads.set_strategy(read, path)
        torch.testing.assert_close(outcome(read, x, tokens), wanted, **EXACT)
        torch.testing.assert_close(read.attention_map(x, tokens), weights, **EXACT)

    def test_queries_that_all_samples_share(self, path):
        tokens, x = tokens_of((5, 13), batch=3), queries(batch=1)
        read = read_of(tokens)
        wanted = outcome(read, x, tokens)
        assert wanted[0].shape[0] == 3
        each = read(x.expand(3, -1, -1), tokens)
        torch.testing.assert_close(each, wanted[0], **EXACT)
        reads.set_strategy(read, path)
        torch.testing.assert_close(outcome(read, x, tokens), wanted, **EXACT)

    def test_one_sample_for_several_batches_of_queries(self, path):
        tokens, x = tokens_of((5, 13), batch=1, masked=True), queries(batch=3)
        read = read_of(tokens)
        wanted = torch.cat([read(x[i : i + 1], tokens) for i in range(3)])
        torch.testing.assert_close(read(x, tokens), wanted, **EXACT)
        reads.set_strategy(read, path)
        torch.testing.assert_close(read(x, tokens), wanted, **EXACT)

    def test_learned_positions(self, path):
        learned = positions.LearnedGrid((5, 13), dim=6).double()
        content, x = torch.randn(2, 5, 13, 3, dtype=torch.float64), queries()
        tokens = Tokens(content, learned.tables((5, 13), like=content))
        read = read_of(tokens)
        wanted = torch.autograd.grad(read(x, tokens).square().sum(), list(learned.parameters()))
        reads.set_strategy(read, path)
        found = torch.autograd.grad(read(x, tokens).square().sum(), list(learned.parameters()))
        torch.testing.assert_close(found, wanted, **EXACT)

    def test_nothing_to_attend_to(self, path):
        tokens = tokens_of((5, 13))
        mask = torch.ones(2, 5, 13, dtype=torch.bool)
        mask[1] = False
        tokens, x = Tokens(tokens.content, tokens.position_tables, mask), queries()
        read = read_of(tokens)
        wanted = outcome(read, x, tokens)
        reads.set_strategy(read, path)
        found = outcome(read, x, tokens)
        torch.testing.assert_close(found, wanted, **EXACT)
        assert found[1]["content"][1].abs().max() == 0

    def test_what_masked_tokens_hold(self, path):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens, path=path)
        wanted = outcome(read, x, tokens)
        spoiled = tokens.content.masked_fill(~tokens.mask.unsqueeze(-1), torch.nan)
        torch.testing.assert_close(
            outcome(read, x, Tokens(spoiled, tokens.position_tables, tokens.mask)), wanted, **EXACT
        )

    @pytest.mark.parametrize(
        "mask",
        [
            torch.arange(65).expand(2, -1) < 29,
            (torch.arange(65) < 29).reshape(1, 1, 1, 65),
            masks.Padding(torch.arange(65).expand(2, -1) < 29),
            masks.Causal(),
            (torch.arange(7)[:, None] * 5 >= torch.arange(65)).reshape(1, 1, 7, 65),
        ],
        ids=["b n", "1 1 1 n", "padding", "causal", "1 1 q n"],
    )
    def test_masks_of_a_call(self, path, mask):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        wanted = outcome(read, x, tokens, mask=mask)
        if path.why_not(read.request(tokens, mask=mask)):
            assert path == Structured()
            return
        reads.set_strategy(read, path)
        torch.testing.assert_close(outcome(read, x, tokens, mask=mask), wanted, **EXACT)

    def test_kept_for_several_reads(self, path):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        other = masks.Window(before=40, after=3)
        wanted = read(x, tokens), read(x, tokens, mask=other)
        reads.set_strategy(read, path)
        kept = read.keys_values(tokens, queries=14)
        torch.testing.assert_close((read(x, kept), read(x, kept, mask=other)), wanted, **EXACT)

    def test_attention_maps(self, path):
        tokens, x = tokens_of((5, 13), masked=True), queries()
        read = read_of(tokens)
        wanted = read.attention_map(x, tokens, queries=[0, 3])
        reads.set_strategy(read, path)
        torch.testing.assert_close(read.attention_map(x, tokens, queries=[0, 3]), wanted, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", [Factored(), Structured()], ids=repr)
def test_half_precision_is_no_worse_than_written_out(path, dtype):
    tokens, x = tokens_of((17, 13)), queries()
    read = read_of(tokens)
    truth = read(x, tokens).detach()
    half, y = copy.deepcopy(read).to(dtype), x.detach().to(dtype)
    rounded = Tokens(tokens.content.to(dtype), tuple(table.to(dtype) for table in tokens.position_tables))

    def off(path):
        reads.set_strategy(half, path)
        return float((half(y, rounded).detach() - truth).norm() / truth.norm())

    assert off(path) < 1.5 * off(Dense())


@pytest.mark.parametrize("path", [Factored(), Structured(), Auto()], ids=repr)
def test_autocast(path):
    tokens, x = tokens_of((17, 13)), queries()
    read = read_of(tokens, path=path)
    truth = read(x, tokens).detach()
    single = Tokens(tokens.content.float(), tuple(table.float() for table in tokens.position_tables))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read.float()(x.detach().float(), single)
    assert (found.detach() - truth).norm() / truth.norm() < 2e-2


class TestChoice:
    """What `Auto` takes."""

    def choice(self, tokens, of=ALL):
        read = read_of(tokens, qk_dim=128, v_dim=128)
        return Auto(strategies=of).choose(read.request(tokens, queries=512))

    def test_a_large_picture_is_read_by_structure(self):
        assert self.choice(tokens_of((113, 127))) == Structured()

    def test_a_line_is_not(self):
        assert self.choice(tokens_of((9973,))) != Structured()

    def test_what_would_fill_the_memory_is_not_written_out(self, monkeypatch):
        tokens = tokens_of((9973,))
        assert self.choice(tokens) == Dense()
        monkeypatch.setattr(reads, "MOST", 2**20)
        assert self.choice(tokens) == Factored()
        assert self.choice(tokens, of=[Dense()]) == Dense()

    def test_a_tensor_is_written_out(self):
        read = read_of(tokens_of((5, 13)))
        assert Auto().choose(read.request(torch.randn(2, 65, read.input_dim, dtype=torch.float64))) == Dense()

    def test_what_is_left_out_is_forbidden(self):
        assert self.choice(tokens_of((113, 127)), of=(Factored(), Dense())) != Structured()

    def test_costs_decide(self):
        tokens = tokens_of((113, 127))
        request = read_of(tokens).request(tokens, queries=512)
        assert Auto(machine=Machine(pair=1e6)).choose(request) != Structured()
        assert Auto(machine=Machine(attention=1e-9)).choose(request) == Structured()

    @pytest.mark.parametrize(
        "options, reason",
        [
            ({"kernel": sdpa}, "the kernel sdpa was chosen"),
            ({"kernel": partial(chunked, chunk_size=3)}, "was chosen"),
            ({"kernel": reference}, "the kernel reference was chosen"),
            ({"rotary": positions.Rotary(2)}, "rotary positions turn the keys"),
            ({"qk_norm": nn.LayerNorm}, "the keys of each head are normalized"),
            ({"num_kv_heads": 1}, "several heads share their keys and values"),
            ({"dropout": 0.5}, "attention weights are dropped in training"),
            ({"mask": masks.Causal()}, "the mask differs between queries"),
        ],
        ids=["sdpa", "chunked", "reference", "rotary", "norm", "grouped", "dropout", "causal"],
    )
    def test_what_only_a_kernel_does(self, options, reason):
        tokens, mask = tokens_of((5, 13)), options.pop("mask", None)
        read = read_of(tokens, **options)
        assert reason in Structured().why_not(read.request(tokens, mask=mask))
        assert Factored().why_not(read.request(tokens, mask=mask)) == ""
        with pytest.raises(ValueError, match="cannot serve this read"):
            Structured().read(read.request(tokens, mask=mask))

    def test_dropout_keeps_nothing_from_a_model_in_evaluation(self):
        tokens = tokens_of((5, 13))
        assert Structured().why_not(read_of(tokens, dropout=0.5).eval().request(tokens)) == ""

    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda read: setattr(read, "input_norm", nn.Sequential()), "the norm is a Sequential"),
            (lambda read: setattr(read.attention, "key", nn.Sequential(read.attention.key)), "not a plain nn.Linear"),
            (lambda read: read.attention.value.register_forward_hook(lambda *_: None), "a hook waits"),
            (lambda read: read.input_norm.register_forward_pre_hook(lambda *_: None), "a hook waits"),
            (lambda read: read.attention.key.register_full_backward_pre_hook(lambda *_: None), "a hook waits"),
            (lambda read: setattr(read.attention.key, "forward", read.attention.key.forward), "was replaced"),
            (lambda read: nn.utils.parametrizations.weight_norm(read.attention.key), "not a plain nn.Linear"),
            (lambda read: setattr(read, "attention", Own(read.attention)), "the attention is a Own"),
        ],
        ids=["norm", "projection", "hook", "pre-hook", "backward hook", "patched", "parametrization", "attention"],
    )
    def test_what_cannot_be_taken_apart(self, change, reason):
        tokens, x = tokens_of((5, 13)), queries()
        read = read_of(tokens)
        change(read)
        assert reason in Factored().why_not(read.request(tokens))
        assert reason in Structured().why_not(read.request(tokens))
        wanted = read(x, tokens)  # written out
        read.strategy = Auto()
        torch.testing.assert_close(read(x, tokens), wanted, **EXACT)

    def test_a_hook_sees_what_it_waits_for(self):
        tokens, seen = tokens_of((113, 127)), []
        read = read_of(tokens, path=Auto())
        read.attention.key.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        read(queries(), tokens)
        assert seen == [(2, 113 * 127, 14)]

    def test_on_other_devices_nothing_was_measured(self):
        tokens = tokens_of((113, 127))
        read = read_of(tokens, qk_dim=128, v_dim=128).to("meta")
        away = Tokens(tokens.content.to("meta"), tuple(table.to("meta") for table in tokens.position_tables))
        request = read.request(away, queries=512)
        assert Auto().choose(request) == Dense()
        assert Auto(strategies=[Structured(), Factored()]).choose(request) == Factored()

    def test_no_path_left(self):
        read = read_of(tokens_of((5, 13)), path=Auto(strategies=[Structured()]))
        with pytest.raises(ValueError, match=r"can serve this read: the input is a tensor.*Add paths\.Dense"):
            read(queries(), torch.randn(2, 65, read.input_dim, dtype=torch.float64))


class Own(nn.Module):
    """Somebody's attention."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def keys_values(self, inputs, *, mask=None):
        return self.inner.keys_values(inputs, mask=mask)

    def forward(self, x, read, *, mask=None):
        return self.inner(x, read, mask=mask)


def test_what_each_path_makes():
    tokens = tokens_of((5, 13))
    request = read_of(tokens).request(tokens)
    assert [type(path.read(request)) for path in (Dense(), Factored(), Structured())] == [
        KeysValues,
        KeysValues,
        FactoredKeysValues,
    ]


def test_many_tokens_are_taken_a_slab_at_a_time(monkeypatch):
    tokens, x = tokens_of((5, 13), masked=True), queries()
    read = read_of(tokens)
    wanted = outcome(read, x, tokens)
    monkeypatch.setattr("perceiver_core.reads.factored.SLAB", 31)
    for path in (Factored(), Structured()):
        reads.set_strategy(read, path)
        assert isinstance(read.keys_values(tokens), FactoredKeysValues)
        torch.testing.assert_close(outcome(read, x, tokens), wanted, **EXACT)


def model_of(path=None, share=True):
    torch.manual_seed(0)
    image = pc.adapters.Image(num_channels=3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=19))
    read = partial(CrossAttend, **({} if path is None else {"path": path}))
    encoder = Encoder(
        image.dim, num_latents=11, dim=14, num_reads=3, depth=1, num_heads=2, share=share, cross_attention=read
    )
    return pc.Perceiver(image, encoder, pc.heads.Classification(14, 5)).double()


@pytest.mark.parametrize("share", [True, False, pc.sharing.all_])
def test_whole_models(share):
    model, pictures = model_of(Dense(), share), torch.rand(2, 3, 19, 23, dtype=torch.float64)

    def run():
        out = model(pictures)
        return out.detach(), torch.autograd.grad(out.square().sum(), list(model.parameters()))

    wanted = run()
    for path in (Factored(), Structured(), Auto()):
        reads.set_strategy(model, path)
        torch.testing.assert_close(run(), wanted, **EXACT)


def test_a_model_in_float64_inside_autocast():
    tokens, x = tokens_of((5, 13)), queries()
    read = read_of(tokens)
    wanted = read(x, tokens)
    for path in ALL:
        reads.set_strategy(read, path)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(read(x, tokens), wanted, **EXACT)


@pytest.mark.compile  # traced sizes are tensors, which checked shapes refuse
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:torch.jit.TracerWarning")
def test_a_trace_can_be_saved(tmp_path):
    model, pictures = model_of(Structured()).float().eval(), torch.rand(2, 3, 19, 23)
    torch.jit.trace(model, (pictures,), check_trace=False).save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(pictures), model(pictures))


class Mean(nn.Module):
    """A read that knows nothing of how many will read."""

    def __init__(self, dim, input_dim):
        super().__init__()
        self.project = nn.Linear(input_dim, dim)

    def keys_values(self, tokens, *, mask=None):
        return self.project(tokens.materialize().mean(1, keepdim=True))

    def forward(self, x, tokens, *, mask=None):
        return x + (tokens if isinstance(tokens, torch.Tensor) else self.keys_values(tokens))


def test_shared_reads_of_ones_own():
    encoder = Encoder(
        17, num_latents=7, dim=14, num_reads=3, depth=1, num_heads=2, share=pc.sharing.all_, cross_attention=Mean
    )
    assert encoder(Tokens(torch.rand(5, 3, 11, 17))).shape == (5, 7, 14)


def test_a_path_is_saved_with_the_model(tmp_path):
    path = Auto(strategies=[Factored(), Dense()], machine=Machine(matmul=3.0))
    pc.save(model_of(path), tmp_path)
    assert pc.load(tmp_path).encoder.reads[0].path == path


def test_a_path_that_was_set_later_does_not_stand_in_the_way_of_saving(tmp_path):
    """It is not of the model: a loaded one takes the path that its constructor was given."""
    model = model_of()
    reads.set_strategy(model, Dense())
    again = pc.load(pc.save(model, tmp_path))
    assert again.encoder.reads[0].path == Auto()
    pictures = torch.rand(2, 3, 19, 23, dtype=torch.float64)
    torch.testing.assert_close(again.double()(pictures), model(pictures))


@pytest.mark.parametrize("path", [Dense, "dense", None], ids=str)
def test_errors_of_what_is_no_path(path):
    for take in (
        lambda: reads.set_strategy(model_of(), path),
        lambda: Auto(strategies=[path]),
        lambda: CrossAttend(8, 8, strategy=path),
    ):
        with pytest.raises(TypeError, match=r"path must be an object such as paths\.Dense\(\)"):
            take()
    with pytest.raises(ValueError, match="of must name a path"):
        Auto(strategies=[])


def test_a_module_without_reads():
    with pytest.raises(ValueError, match="must have reads"):
        reads.set_strategy(nn.Linear(2, 3), Dense())
    with pytest.raises(ValueError, match="must have reads"):
        explain_reads(nn.Linear(2, 3), torch.rand(5, 2))


class TestExplain:
    def test_reads_that_share_are_one(self):
        model, pictures = model_of(), torch.rand(2, 3, 19, 23, dtype=torch.float64)
        first, rest = explain_reads(model, pictures)
        assert (first.read, first.sizes.queries) == ("encoder.reads.0", 11)
        assert (rest.read, rest.sizes.queries) == ("encoder.reads.1", 22)
        assert first.sizes.axes == (19, 23)
        assert (first.sizes.batch, first.sizes.n, first.sizes.channels, first.sizes.width) == (2, 437, 3, 17)

    @pytest.mark.parametrize("path", [Dense(), Factored(), Structured()], ids=repr)
    def test_says_the_path_that_is_taken(self, path):
        model, pictures = model_of(path), torch.rand(2, 3, 19, 23, dtype=torch.float64)
        [read, _] = explain_reads(model, pictures)
        assert read.strategy == path
        assert read.why.startswith("forced; ")
        assert model.encoder.reads[0].path == path

    def test_says_why_not(self):
        model = model_of()
        model.encoder.reads[0].attention.kernel = sdpa
        [read, _] = explain_reads(model, torch.rand(2, 3, 19, 23, dtype=torch.float64))
        assert "Structured cannot: the kernel sdpa was chosen" in read.why

    def test_says_what_is_not_allowed(self):
        model = model_of(Auto(strategies=[Dense()]))
        [read, _] = explain_reads(model, torch.rand(2, 3, 19, 23, dtype=torch.float64))
        assert read.strategy == Dense()
        assert "(not allowed)" in read.why

    def test_says_what_a_structured_read_lacks(self, monkeypatch):
        monkeypatch.setattr("perceiver_core.kernels.grid.native.available", lambda: False)
        [read, _] = explain_reads(model_of(), torch.rand(2, 3, 19, 23, dtype=torch.float64))
        assert read.strategy != Structured()
        assert "Structured is not fast here: it would need a C++ compiler" in read.why
        [read, _] = explain_reads(model_of().to("meta"), torch.rand(2, 3, 19, 23, dtype=torch.float64, device="meta"))
        assert read.strategy == Dense()
        assert "Structured is not fast here: there is no compiled loop for meta" in read.why

    def test_leaves_no_trace(self):
        model = model_of().train()
        model.adapter = pc.adapters.Image(
            3,
            positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=19),
            stem=partial(pc.adapters.ConvStem, dim=3),
        ).double()
        before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        explain_reads(model, torch.rand(2, 3, 57, 59, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), seed)
        assert all(module.training for module in model.modules())
        assert model.encoder.reads[0].path == Auto()

    def test_a_failure_leaves_none_either(self):
        model = model_of()
        with pytest.raises(ValueError, match="channels"):
            explain_reads(model, torch.rand(2, 5, 19, 23, dtype=torch.float64))
        assert model.encoder.reads[0].path == Auto()

    def test_printed(self):
        text = str(explain_reads(model_of(), torch.rand(2, 3, 19, 23, dtype=torch.float64)))
        head, first, second = text.splitlines()
        assert head.split() == ["read", "queries", "tokens", "path", "GFLOP", "MB", "ms", "why"]
        assert first.startswith("encoder.reads.0  11")
        assert "2 x 19 x 23 x (3 + 14)" in first
        assert second.startswith("encoder.reads.1  22")

    def test_flops_of_reads_written_out(self):
        """Two projections of 437 tokens 17 wide to 17 each, and 11 queries against them, for 2 samples."""
        [read, _] = explain_reads(model_of(Dense()), torch.rand(2, 3, 19, 23, dtype=torch.float64))
        assert read.cost.flops == 2 * 2 * 437 * 17 * 34 + 2 * 2 * 437 * 11 * 34


def test_sizes_of_a_film_with_a_learned_table():
    frames, learned = torch.randn(5, 1, 1, 6), torch.randn(1, 7, 3, 6)
    tokens = Tokens(torch.randn(2, 5, 7, 3, 4), position_tables=(frames, learned))
    read = CrossAttend(19, 10)
    assert Sizes.of(read.request(tokens)).axes == (5, 21)


def test_grouped_queries_save_projections_and_not_the_kernel():
    tokens = tokens_of((5, 13))
    cost = {}
    for kv_heads in (6, 2):
        request = read_of(tokens, heads=6, qk_dim=12, v_dim=18, num_kv_heads=kv_heads).request(tokens, queries=7)
        assert (Sizes.of(request).made, Sizes.of(request).grouped) == (5 * kv_heads, 6 // kv_heads)
        cost[kv_heads] = Dense().cost(request, Machine()).flops - 2 * 2 * 65 * tokens.dim * 5 * kv_heads
    assert cost[6] == cost[2] == 2 * 2 * 7 * 65 * 30


def test_the_command_prints_costs_that_can_be_used(monkeypatch, capsys):
    """Run in a hurry: a model then reads by what was measured."""
    measured = partial(measure.costs, seconds=0.0)
    monkeypatch.setattr(measure, "costs", measured)
    monkeypatch.setattr("sys.argv", ["perceiver_core", "costs"])
    command()
    *table, _, call = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in table[1:]]
    assert names == [field.name for field in dataclasses.fields(Machine)]
    values = dict(re.findall(r"(\w+)=([-\d.e+]+)", call))
    assert list(values) == names
    found = Machine(**{name: float(value) for name, value in values.items()})
    assert all(value > 0 for name, value in dataclasses.asdict(found).items() if name not in ("softmax", "channel"))
    model = model_of(Auto(machine=found))
    [read, _] = explain_reads(model, torch.rand(2, 3, 19, 23, dtype=torch.float64))
    assert read.cost.seconds > 0
