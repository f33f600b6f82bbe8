"""Hierarchical Perceiver: independent groups, consecutive levels, saving, compilation, export."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import (
    CrossAttend,
    Encoder,
    GroupedRead,
    HierarchicalPerceiver,
    LatentTransformer,
    Level,
    SelfAttend,
    Tokens,
    positions,
)
from perceiver_core.blocks.grouped_read import grouped
from perceiver_core.models import HierarchicalAutoencoder, presets
from perceiver_core.models.hierarchical import token_positions

BATCH, N, WIDTH, PLACES = 2, 35, 3, 11
LEVELS = [
    Level(5, num_latents=3, dim=14, depth=1, num_heads=7),
    Level(2, 7, 10, 1, 5),
    Level(1, num_latents=4, dim=6, num_heads=3),
]
DECODE = [Level(2, num_latents=7, dim=10, depth=1, num_heads=2), Level(5, num_latents=3, dim=8, depth=2, num_heads=4)]
EXACT = {"rtol": 0, "atol": 1e-12}


def randomized(make):
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def perceiver(levels=LEVELS, decoder_levels=DECODE, **options):
    options = {"positions": positions.LearnedGrid((N,), PLACES)} | options
    return randomized(lambda: HierarchicalPerceiver(WIDTH, levels=levels, decoder_levels=decoder_levels, **options))


def autoencoder(output_dim=None, **options):
    inner = perceiver(**options)
    return randomized(lambda: HierarchicalAutoencoder(inner, output_dim))


def array(n=N, width=WIDTH, seed=1, batch=BATCH):
    return torch.randn(batch, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(n=N, batch=BATCH):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(2)) < 0.6


class TestGroupedRead:
    LEVEL = Level(5, num_latents=3, dim=14, depth=1, num_heads=7)

    def block(self, level=LEVEL, **options):
        return randomized(lambda: GroupedRead(WIDTH, level, **options))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("n", [35, 33, 31, 17, 6, 5, 3, 1])
    def test_each_group_is_read_independently(self, n, masked):
        block, x, mask = self.block(), array(n), some(n) if masked else torch.ones(BATCH, n, dtype=torch.bool)
        size = -(-n // 5)
        out = block(x, mask=mask if masked else None)
        assert out.shape == (BATCH, 5 * 3, 14)
        for sample in range(BATCH):
            for group in range(5):
                stretch = slice(group * size, (group + 1) * size)
                tokens = x[sample, stretch][mask[sample, stretch]][None]
                latents = block.latents[group][None]
                read = (
                    block.cross_attention(latents, tokens)
                    if tokens.numel()
                    else self.without_tokens(block.cross_attention, latents)
                )
                actual = out[sample, 3 * group : 3 * (group + 1)]
                torch.testing.assert_close(actual, block.latent_transformer(read)[0], **EXACT)

    def without_tokens(self, read, x):
        x = x + read.attention.output.bias
        return x + read.mlp(read.mlp_norm(x))

    def test_one_group_equals_an_encoder(self):
        block = self.block(Level(1, num_latents=5, dim=14, depth=2, num_heads=7), latent_transformer=LatentTransformer)
        encoder = Encoder(WIDTH, num_latents=5, dim=14, num_reads=1, depth=2, num_heads=7).double()
        encoder.latents = nn.Parameter(block.latents[0])
        encoder.reads[0].load_state_dict(block.cross_attention.state_dict())
        encoder.transformers[0].load_state_dict(block.latent_transformer.state_dict())
        torch.testing.assert_close(block(array()), encoder(array()), **EXACT)
        torch.testing.assert_close(block(array(), mask=some()), encoder(array(), mask=some()), **EXACT)

    @pytest.mark.parametrize("width", [14, 9])
    def test_a_skip_is_added_to_the_latents(self, width):
        block, skip = self.block(skip_dim=width), array(15, width)
        out = block(array(), skip=skip)
        added = skip if width == 14 else nn.functional.linear(skip, block.skip.weight, block.skip.bias)
        for sample in range(BATCH):
            alone = self.block(skip_dim=width)
            with torch.no_grad():
                alone.latents += added[sample].unflatten(0, (5, 3))
            torch.testing.assert_close(out[sample], alone(array())[sample], **EXACT)

    def test_groups_are_filled_from_the_front(self):
        assert grouped(torch.arange(1.0, 8)[None, :, None], 3)[..., 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
        assert grouped(torch.arange(1.0, 7)[None, :, None], 3)[..., 0].tolist() == [[1, 2], [3, 4], [5, 6]]

    @pytest.mark.refusal
    def test_invalid_sizes_raise(self):
        for name in ("num_groups", "num_latents", "dim", "num_heads"):
            sizes = {"num_groups": 2, "num_latents": 3, "dim": 14, "num_heads": 7} | {name: 0}
            with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1; got 0"):
                Level(**sizes)


class TestLevels:
    def by_hand(self, model, x, mask):
        x = nn.functional.linear(x, model.embedding.weight, model.embedding.bias) + model.positions.vectors
        first = model.encoding[0](x, mask=mask)
        second = model.encoding[1](first)
        third = model.encoding[2](second)
        fourth = model.decoding[0](third, skip=second)
        return third, fourth, model.decoding[1](fourth, skip=first)

    @pytest.mark.parametrize("masked", [False, True])
    def test_levels_run_in_order_with_skips_between_opposite_levels(self, masked):
        mask = some() if masked else None
        model = perceiver()
        for number in (0, 1, 2):
            out = self.by_hand(model, array(), mask)[number]
            part = perceiver(decoder_levels=DECODE[:number])
            part.load_state_dict({name: w for name, w in model.state_dict().items() if name in part.state_dict()})
            torch.testing.assert_close(part(array(), mask=mask), out, **EXACT)
            last = [LEVELS[-1], *DECODE][number]
            assert out.shape == (BATCH, last.num_groups * last.num_latents, last.dim)
            assert (part.dim, part.input_dim, part.level) == (last.dim, WIDTH, last)

    def test_groups_are_independent_until_they_merge(self):
        model = perceiver(levels=LEVELS[:1], decoder_levels=())
        x = array()
        changed = x.clone()
        changed[:, 7:14] += 1  # the second of five groups
        difference = (model(x) - model(changed)).unflatten(1, (5, 3)).abs().amax((0, 2, 3))
        assert difference[[0, 2, 3, 4]].eq(0).all()
        assert difference[1] > 1e-3
        whole = (perceiver()(x) - perceiver()(changed)).unflatten(1, (5, 3)).abs().amax((0, 2, 3))
        assert whole.gt(1e-6).all()

    @pytest.mark.parametrize("fill", [0.0, 7.0, float("nan"), float("inf")])
    def test_masked_tokens_have_no_effect(self, fill):
        model, mask = autoencoder(), some()
        x = array().masked_fill(~mask[..., None], fill).requires_grad_()
        out = model(x, mask=mask)
        torch.testing.assert_close(out, model(array().masked_fill(~mask[..., None], -5.0), mask=mask), **EXACT)
        out.square().sum().backward()
        assert x.grad[~mask].eq(0).all()
        assert x.grad[mask].ne(0).any(-1).all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_samples_are_independent(self):
        model, x, mask = autoencoder(), array(batch=3), some(batch=3)
        torch.testing.assert_close(model(x, mask=mask)[1:2], model(x[1:2], mask=mask[1:2]), **EXACT)

    def test_the_grid_and_mask_of_tokens_are_used(self):
        embedding = positions.LearnedGrid((5, 7), PLACES)
        model, x, mask = perceiver(positions=embedding), array(), some()
        content, valid = x.unflatten(1, (5, 7)), mask.unflatten(1, (5, 7))
        out = model(Tokens(content, mask=valid))
        flat = perceiver()
        state = model.state_dict()
        flat.load_state_dict(state | {"positions.vectors": state["positions.vectors"].flatten(0, 1)})
        torch.testing.assert_close(out, flat(x, mask=mask), **EXACT)
        other = some(N + 1)[:, 1:]
        torch.testing.assert_close(model(Tokens(content, mask=valid), mask=other), flat(x, mask=mask & other), **EXACT)

    def test_positions_of_separate_tables(self):
        embedding = positions.Fourier(num_axes=2, num_bands=2, max_resolution=7)
        model = perceiver(positions=embedding)
        tokens = Tokens(array().unflatten(1, (5, 7)))
        expected = embedding.tables((5, 7), like=tokens.content)
        torch.testing.assert_close(token_positions(embedding, tokens), sum(expected).flatten(0, 1), **EXACT)
        assert model(tokens).shape == (BATCH, 15, 8)

    def test_it_is_an_encoder(self):
        head = pc.heads.Classification(6, 11)
        model = pc.Perceiver(nn.Identity(), perceiver(decoder_levels=()).float(), head)
        assert model(array().float()).shape == (BATCH, 11)

    @pytest.mark.parametrize("n", [35, 31, 17])
    def test_every_weight_gets_a_gradient(self, n):
        model = autoencoder(positions=positions.LearnedGrid((n,), PLACES))
        model(array(n)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.eq(0).all()] == []

    def test_factories_build_the_parts(self):
        model = perceiver(
            cross_attention=partial(CrossAttend, dropout=0.2),
            latent_transformer=partial(LatentTransformer, block=partial(SelfAttend, dropout=0.1)),
        )
        for level in (*model.encoding, *model.decoding):
            assert level.cross_attention.dropout.p == 0.2
            assert {block.dropout.p for block in level.latent_transformer.blocks} == {0.1}


class TestAutoencoder:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("n", [35, 31, 6])
    def test_positions_attend_to_the_latents_of_their_group(self, n, masked):
        model = autoencoder(13, positions=positions.LearnedGrid((n,), PLACES))
        x, mask = array(n), some(n) if masked else None
        latents = model.perceiver(x, mask=mask).unflatten(1, (5, 3))
        out, size = model(x, mask=mask), -(-n // 5)
        assert out.shape == (BATCH, n, 13)
        for token in (0, 5, n // 2, n - 1):
            query = model.perceiver.positions.vectors[token].expand(BATCH, 1, -1)
            expected = model.output(model.cross_attention(query, latents[:, token // size]))
            torch.testing.assert_close(out[:, token], expected[:, 0], **EXACT)

    def test_it_reconstructs_masked_tokens(self):
        torch.manual_seed(0)
        model = HierarchicalAutoencoder(
            HierarchicalPerceiver(
                1,
                levels=[Level(4, 4, 16, 1, 4), Level(1, 4, 16, 1, 4)],
                decoder_levels=[Level(4, 4, 16, 1, 4)],
                positions=positions.LearnedGrid((16,), dim=16),
            )
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(150):
            x = torch.randn(32, 1, 1).expand(-1, 16, -1)  # all tokens are equal: any of them is sufficient
            mask = torch.rand(32, 16) < 0.5
            loss = (model(x, mask=mask) - x)[~mask].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.refusal
class TestErrors:
    def test_invalid_levels_raise(self):
        with pytest.raises(ValueError, match="levels must have at least one level; got none"):
            perceiver(levels=[], decoder_levels=())
        with pytest.raises(ValueError, match="decoder_levels must have at most 2 levels, one less than levels; got 3"):
            perceiver(decoder_levels=[*DECODE, DECODE[0]])
        with pytest.raises(ValueError, match=r"decoder_levels\[1\] must have .* opposite level, 5 x 3; got 5 x 7"):
            perceiver(decoder_levels=[DECODE[0], Level(5, num_latents=7, dim=8)])
        with pytest.raises(TypeError, match="positions must be an object with dim, num_axes and tables"):
            perceiver(positions=None)

    def test_invalid_inputs_raise(self):
        model = perceiver().float()
        x = array().float()
        with pytest.raises(ValueError, match=r"inputs must have 3 axes \(b n c\); got shape \(35, 3\); add a batch"):
            model(x[0])
        with pytest.raises(ValueError, match="inputs must have 3 features in its last axis"):
            model(x[..., :2])
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 35\), one value a token; got \(2, 31\)"):
            model(x, mask=some(31))
        with pytest.raises(TypeError, match=r"inputs is torch\.float64, the model torch\.float32"):
            model(x.double())


class TestIntegration:
    def test_it_is_saved_and_loaded(self, tmp_path):
        model = autoencoder(13).float()
        pc.save(model, tmp_path / "model")
        x, mask = array().float(), some()
        again = pc.load(tmp_path / "model").eval()
        torch.testing.assert_close(again(x, mask=mask), model.eval()(x, mask=mask), rtol=0, atol=0)
        assert again.perceiver.level == DECODE[-1]

    def test_it_runs_on_the_meta_device(self):
        with torch.device("meta"):
            out = autoencoder()(torch.empty(BATCH, N, WIDTH, dtype=torch.float64))
        assert (out.shape, out.device.type) == ((BATCH, N, WIDTH), "meta")

    def test_the_number_of_parameters_is_that_of_the_paper(self):
        with torch.device("meta"):
            model = presets.hip16(num_tokens=50_176)
        levels = [part.level for part in (*model.encoding, *model.decoding)]
        assert [level.num_groups for level in levels] == [16, 4, 1, 1, 1, 4, 16]
        assert [level.num_latents for level in levels] == [128, 256, 256, 64, 256, 256, 128]
        assert [level.dim for level in levels] == [128, 256, 512, 1024, 512, 256, 128]
        assert [len(part.latent_transformer.blocks) for part in (*model.encoding, *model.decoding)] == [
            2,
            2,
            18,
            2,
            1,
            1,
            1,
        ]
        assert model.positions.dim == model.encoding[0].cross_attention.attention.key.out_features == 32

    def test_reads_can_be_explained_and_checkpointed(self):
        model = autoencoder()
        assert len(pc.explain_reads(model, array())) == len(LEVELS) + len(DECODE) + 1
        expected = torch.autograd.grad(model(array()).square().sum(), list(model.parameters()))
        again = pc.checkpoint_activations(model)
        actual = torch.autograd.grad(again(array()).square().sum(), list(again.parameters()))
        torch.testing.assert_close(actual, expected, **EXACT)

    def small(self):
        embedding = positions.LearnedEmbedding(N, PLACES)
        return autoencoder(
            levels=[LEVELS[0], LEVELS[2]], decoder_levels=[Level(5, 3, 8, depth=1, num_heads=4)], positions=embedding
        )

    @pytest.mark.compile
    @pytest.mark.usefixtures("fresh")
    def test_it_compiles_without_graph_breaks(self):
        model = self.small()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for n, mask in ((35, None), (31, some(31))):
            torch.testing.assert_close(compiled(array(n), mask=mask), model(array(n), mask=mask), rtol=1e-9, atol=1e-10)
