"""Resampler: masked features, frames, errors, saving, compilation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import MLP, JointAttend, MultiHeadAttention, Resampler, SwiGLU, Tokens, positions
from perceiver_core.models import AllFrames, EachFrame

BATCH, FRAMES, N, WIDTH, LATENTS, DIM, HEADS = 2, 3, 17, 11, 5, 14, 7
EXACT = {"rtol": 0, "atol": 1e-12}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NORM = partial(nn.RMSNorm, eps=1e-6)
GATED = partial(MLP, activation=SwiGLU(), bias=False)
GROUPED = partial(MultiHeadAttention, qk_dim=6, v_dim=18, num_kv_heads=2, qk_norm=nn.LayerNorm, bias=False)
VARIANTS = {
    "paper": {},
    "grouped": {
        "num_heads": 6,
        "projection": partial(GATED, hidden_dim=13),
        "block": partial(JointAttend, attention=GROUPED, mlp=partial(GATED, widening_factor=3), norm=NORM),
        "norm": NORM,
    },
    "as wide as the features": {"dim": WIDTH, "num_heads": 11, "norm": nn.Identity},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def randomized(module):
    """Randomizes all weights: biases start at zero and norms at one, where a test could not detect them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def resampler(**options):
    torch.manual_seed(0)
    options = {"num_latents": LATENTS, "dim": DIM, "depth": 2, "num_heads": HEADS} | options
    return randomized(Resampler(WIDTH, **options))


def video(**options):
    return randomized(AllFrames(resampler(**options), frame_positions=positions.LearnedEmbedding(4, WIDTH)))


def features(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*(shape or (BATCH, N)), WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def valid(*shape):
    mask = torch.rand(*(shape or (BATCH, N)), generator=torch.Generator().manual_seed(2)) < 0.6
    mask[0].view(-1)[0] = True
    return mask


class TestCrossAttention:
    @each_variant
    @pytest.mark.parametrize("hidden", [0.0, 7.0, float("nan"), float("inf")])
    def test_masked_features_have_no_effect(self, options, hidden):
        model, mask = resampler(**options).double(), valid()
        x = features().masked_fill(~mask[..., None], hidden).requires_grad_()
        out = model(x, mask=mask)
        for sample in range(BATCH):
            alone = model(x.detach()[sample, mask[sample]][None])[0]
            torch.testing.assert_close(out[sample], alone, **EXACT)
        out.square().sum().backward()
        assert x.grad[~mask].eq(0).all()
        assert x.grad[mask].ne(0).any(-1).all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @each_variant
    def test_a_sample_without_features_returns_its_latents(self, options):
        model, mask = resampler(**options).double(), valid()
        mask[1] = False
        out = model(features(), mask=mask)
        x = model.latents[None]
        for layer in model.layers:
            x = layer(x, x.new_empty(1, 0, x.shape[-1]))
        torch.testing.assert_close(out[1], model.norm(x)[0], **EXACT)
        torch.testing.assert_close(out[1], model(features(seed=5), mask=mask)[1], **EXACT)

    def test_a_layer_without_features_equals_a_self_attend(self):
        block = randomized(JointAttend(DIM, num_heads=HEADS)).double()
        alone = pc.SelfAttend(DIM, num_heads=HEADS).double()
        alone.load_state_dict({name: w for name, w in block.state_dict().items() if "input_norm" not in name})
        x = torch.randn(BATCH, LATENTS, DIM, dtype=torch.float64)
        torch.testing.assert_close(block(x, x.new_empty(BATCH, 0, DIM)), alone(x), **EXACT)

    def test_the_order_of_features_has_no_effect(self):
        model, x = resampler().double(), features()
        torch.testing.assert_close(model(x.flip(1)), model(x), **EXACT)
        assert (model(x)[:, 0] - model(x)[:, 1]).abs().max() > 1e-3

    @each_variant
    def test_every_weight_and_feature_gets_a_gradient(self, options):
        model, x = resampler(**options), features(dtype=torch.float32).requires_grad_()
        model(x).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.eq(0).all()] == []
        assert x.grad.ne(0).any(-1).all()

    def test_the_mask_of_tokens_is_used(self):
        model, mask = resampler().double(), valid()
        x = features()
        torch.testing.assert_close(model(Tokens(x, mask=mask)), model(x, mask=mask), **EXACT)

    def test_it_is_an_encoder(self):
        adapter = pc.adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
        model = pc.Perceiver(
            adapter, Resampler(adapter.dim, num_latents=5, dim=14, num_heads=7), pc.heads.Classification(14, 11)
        )
        assert model(torch.rand(BATCH, 3, 7, 5)).shape == (BATCH, 11)

    @pytest.mark.parametrize("layer", [0, 1, -1])
    def test_the_attention_map_covers_features_and_latents(self, layer):
        model, mask = resampler().double(), valid()
        weights = model.attention_map(features(), mask=mask, layer=layer, queries=[4, 0])
        assert weights.shape == (BATCH, HEADS, 2, N + LATENTS)
        torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, 2, dtype=torch.float64), **EXACT)
        assert weights[..., :N].masked_select(~mask[:, None, None]).eq(0).all()
        assert weights[..., N:].gt(0).all()
        assert (model.attention_map(features(), layer=0) - model.attention_map(features(), layer=1)).abs().max() > 1e-3

    def test_variants_are_not_shared_between_layers(self):
        model = resampler()
        assert model.layers[0].mlp.activation is not model.layers[1].mlp.activation


class TestFrames:
    @pytest.mark.parametrize("masked", [False, True])
    def test_each_frame_is_read_independently(self, masked):
        model = randomized(EachFrame(resampler(), frame_positions=positions.LearnedEmbedding(4, WIDTH))).double()
        x, mask = features(BATCH, FRAMES, N), valid(BATCH, FRAMES, N) if masked else None
        out = model(x, mask=mask)
        for t in range(FRAMES):
            seen = None if mask is None else mask[:, t]
            torch.testing.assert_close(
                out[:, t], model.resampler(x[:, t] + model.frame_positions.vectors[t], mask=seen), **EXACT
            )

    @pytest.mark.parametrize("masked", [False, True])
    def test_all_frames_are_read_together(self, masked):
        model = video().double()
        x, mask = features(BATCH, FRAMES, N), valid(BATCH, FRAMES, N) if masked else None
        timed = torch.cat([x[:, t] + model.frame_positions.vectors[t] for t in range(FRAMES)], 1)
        expected = model.resampler(timed, mask=None if mask is None else mask.flatten(1))
        torch.testing.assert_close(model(x, mask=mask), expected, **EXACT)

    def test_a_shorter_video_equals_a_masked_one(self):
        model, x = video().double(), features(BATCH, FRAMES, N)
        mask = torch.ones(BATCH, FRAMES, N, dtype=torch.bool)
        mask[1, 2:] = False
        torch.testing.assert_close(model(x, mask=mask)[1:], model(x[1:, :2]), **EXACT)

    def test_without_frame_positions_the_order_has_no_effect(self):
        x = features(BATCH, FRAMES, N)
        alike = AllFrames(resampler(), frame_positions=None).double()
        torch.testing.assert_close(alike(x.flip(1)), alike(x), **EXACT)
        assert (video().double()(x.flip(1)) - video().double()(x)).abs().max() > 1e-3
        torch.testing.assert_close(
            EachFrame(resampler()).double()(x.flip(1)), EachFrame(resampler()).double()(x).flip(1), **EXACT
        )

    @pytest.mark.parametrize("wrapper", [EachFrame, AllFrames])
    def test_every_weight_gets_a_gradient_and_widths_are_known(self, wrapper):
        model = wrapper(resampler(), frame_positions=positions.LearnedEmbedding(FRAMES, WIDTH)).double()
        assert (model.input_dim, model.dim) == (WIDTH, DIM)
        model(features(BATCH, FRAMES, N)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.eq(0).all()] == []

    @pytest.mark.refusal
    def test_invalid_frames_raise(self):
        with pytest.raises(TypeError, match="frame_positions must be an object with dim, num_axes and tables"):
            EachFrame(resampler(), frame_positions=positions.LearnedEmbedding)
        with pytest.raises(
            ValueError, match=r"frame_positions must have one axis and the width of the features, 11, .* 13 wide"
        ):
            EachFrame(resampler(), frame_positions=positions.LearnedEmbedding(4, 13))
        with pytest.raises(ValueError, match="got 2 axes, 11 wide"):
            AllFrames(resampler(), frame_positions=positions.LearnedGrid((3, 5), WIDTH))
        with pytest.raises(
            ValueError, match=r"grid must have at most length=4 tokens; got 5\. Build LearnedEmbedding with"
        ):
            video()(features(BATCH, 5, N, dtype=torch.float32))
        for wrapped in (video(), EachFrame(resampler())):
            with pytest.raises(ValueError, match=r"features must have 4 axes \(b t n c\).*features\.unsqueeze\(0\)"):
                wrapped(features(dtype=torch.float32))
            with pytest.raises(
                ValueError, match=r"mask must have shape \(2, 3, 17\), one value a token; got \(2, 51\)"
            ):
                wrapped(features(BATCH, FRAMES, N, dtype=torch.float32), mask=valid(BATCH, FRAMES * N))


@pytest.mark.refusal
class TestErrors:
    def test_invalid_features_raise(self):
        model, x = resampler(), features(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"features must have 3 axes \(b n c\); got shape \(17, 11\); add a batch"):
            model(x[0])
        with pytest.raises(ValueError, match=r"features must have 11 features in its last axis.*\(2, 17, 7\)"):
            model(x[..., :7])
        with pytest.raises(ValueError, match=r"features must not be empty; got shape \(2, 0, 11\)"):
            model(x[:, :0])
        with pytest.raises(TypeError, match=r"features is torch\.float64, the model torch\.float32"):
            model(x.double())
        with pytest.raises(TypeError, match=r"features must be floating point; got torch\.int64"):
            model(x.long())

    def test_invalid_masks_raise(self):
        model, x = resampler(), features(dtype=torch.float32)
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 17\), one value a token; got \(2, 16\)"):
            model(x, mask=valid()[:, :16])
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 17\)"):
            model(x, mask=valid()[:, None, None])
        with pytest.raises(TypeError, match=r"mask must be a boolean tensor, True = attend; got torch\.float32"):
            model(x, mask=valid().float())
        with pytest.raises(ValueError, match="mask must be None if features are Tokens"):
            model(Tokens(x), mask=valid())

    def test_invalid_sizes_raise(self):
        with pytest.raises(ValueError, match="depth must be a whole number of at least 1; got 0"):
            resampler(depth=0)
        with pytest.raises(ValueError, match="latents must be a whole number of at least 1; got 0"):
            resampler(num_latents=0)
        with pytest.raises(ValueError, match="num_heads must divide qk_dim; got num_heads=3, qk_dim=14"):
            resampler(num_heads=3)
        with pytest.raises(ValueError, match=r"layer must lie in -2 \.\.\. 1; got 2"):
            resampler().attention_map(features(dtype=torch.float32), layer=2)


class TestIntegration:
    @each_variant
    def test_it_is_saved_and_loaded(self, options, tmp_path):
        for model, x in (
            (resampler(**options), features(dtype=torch.float32)),
            (video(**options), features(BATCH, FRAMES, N, dtype=torch.float32)),
        ):
            folder = tmp_path / type(model).__name__
            pc.save(model, folder)
            torch.testing.assert_close(pc.load(folder).eval()(x), model.eval()(x), rtol=0, atol=0)

    def test_it_runs_on_the_meta_device(self):
        with torch.device("meta"):
            model = video()
            out = model(torch.empty(BATCH, FRAMES, N, WIDTH), mask=torch.empty(BATCH, FRAMES, N, dtype=torch.bool))
        assert (out.shape, out.device.type) == ((BATCH, LATENTS, DIM), "meta")

    def test_activation_checkpointing(self):
        model, x = resampler().double(), features()
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        again = pc.checkpoint_activations(model)
        actual = torch.autograd.grad(again(x).square().sum(), list(again.parameters()))
        assert all("forward" in vars(layer) for layer in again.layers)
        torch.testing.assert_close(actual, expected, **EXACT)

    def test_under_autocast(self):
        model, x = resampler(), features(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x, mask=valid())
        torch.testing.assert_close(half.float(), model(x, mask=valid()), rtol=0.1, atol=0.1)

    @pytest.mark.compile
    @pytest.mark.usefixtures("fresh")
    @each_variant
    def test_it_compiles_for_any_number_of_features(self, options):
        model = resampler(**options).double()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (17, 23, 7):
            for mask in (None, valid(BATCH, n)):
                x = features(BATCH, n)
                torch.testing.assert_close(compiled(x, mask=mask), model(x, mask=mask), rtol=1e-9, atol=1e-10)
