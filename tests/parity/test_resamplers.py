"""Resampler against Idefics2, Idefics1 and Flamingo: outputs and all gradients with the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from perceiver_core import MLP, JointAttend, MultiHeadAttention, Resampler, SwiGLU, positions
from perceiver_core.models import AllFrames, EachFrame, presets

BATCH, N, LATENTS, DEPTH = 3, 17, 5, 2


def randomized(module):
    """Randomizes all weights: norms start at 1 and latents are small or equal, where a test could not detect them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double()


def agree(our, their, renamed, inputs):
    """Checks that outputs and the gradients of all weights and inputs are equal.

    `our` and `their` are functions of the inputs; `renamed(value)` maps the value of each of their parameters to
    our names.
    """
    model, call = our
    given = [inputs.clone().requires_grad_() for _ in range(2)]
    outs = call(given[0]), their(given[1])
    torch.testing.assert_close(*outs, rtol=0, atol=1e-9)
    toward = torch.randn_like(outs[0])
    for out in outs:
        (out * toward).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0, atol=1e-8)
    expected, actual = renamed(lambda p: p.grad), {name: p.grad for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def features(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestIdefics2:
    @pytest.fixture
    def theirs(self, monkeypatch):
        pytest.importorskip("transformers")
        module = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")

        def wide(norm, x):  # theirs rounds to float32 for every input dtype
            return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

        monkeypatch.setattr(module.Idefics2RMSNorm, "forward", wide)
        return module

    def configured(self, theirs, *, heads, kv_heads, head_dim, dim):
        config = theirs.Idefics2PerceiverConfig(
            hidden_size=dim,
            resampler_n_latents=LATENTS,
            resampler_depth=DEPTH,
            resampler_n_heads=heads,
            resampler_head_dim=head_dim,
            num_key_value_heads=kv_heads,
        )
        config._attn_implementation = "sdpa"
        return randomized(theirs.Idefics2PerceiverResampler(config))

    def ours(self, *, heads, kv_heads, head_dim, dim, input_dim=None, hidden=None):
        norm = partial(nn.RMSNorm, eps=1e-6)
        gated = partial(MLP, activation=SwiGLU(), bias=False)
        attention = partial(
            MultiHeadAttention, qk_dim=heads * head_dim, num_kv_heads=kv_heads, bias=False, out_bias=False
        )
        return Resampler(
            dim if input_dim is None else input_dim,
            num_latents=LATENTS,
            dim=dim,
            depth=DEPTH,
            num_heads=heads,
            projection=None if hidden is None else partial(gated, hidden_dim=hidden),
            block=partial(JointAttend, norm=norm, attention=attention, mlp=partial(gated, widening_factor=4)),
            norm=norm,
        ).double()

    def gated(self, name, mlp, value):
        return {
            f"{name}.expand.weight": torch.cat([value(mlp.up_proj.weight), value(mlp.gate_proj.weight)]),
            f"{name}.contract.weight": value(mlp.down_proj.weight),
        }

    def renamed(self, their, value, projection=None):
        actual = {"latents": value(their.latents), "norm.weight": value(their.norm.weight)}
        for number, layer in enumerate(their.layers):
            name, attention = f"layers.{number}", layer.self_attn
            actual |= {
                f"{name}.norm.weight": value(layer.input_latents_norm.weight),
                f"{name}.input_norm.weight": value(layer.input_context_norm.weight),
                f"{name}.attention.query.weight": value(attention.q_proj.weight),
                f"{name}.attention.key.weight": value(attention.k_proj.weight),
                f"{name}.attention.value.weight": value(attention.v_proj.weight),
                f"{name}.attention.output.weight": value(attention.o_proj.weight),
                f"{name}.mlp_norm.weight": value(layer.post_attention_layernorm.weight),
                **self.gated(f"{name}.mlp", layer.mlp, value),
            }
        return actual | ({} if projection is None else self.gated("projection", projection, value))

    @pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
    @pytest.mark.parametrize("heads, kv_heads", [(6, 2), (6, 1), (3, 3), (16, 4)])
    def test_outputs_and_gradients_are_equal(self, theirs, heads, kv_heads, masked):
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": 7, "dim": 13}
        their, our = self.configured(theirs, **sizes), self.ours(**sizes)
        our.load_state_dict(self.renamed(their, lambda p: p.detach()))
        mask = torch.rand(BATCH, N, generator=torch.Generator().manual_seed(2)) < (0.6 if masked else 2.0)
        mask[1] = not masked  # a sample with only the latents
        agree(
            (our, lambda x: our(x, mask=mask if masked else None)),
            lambda x: their(x, mask.long()),
            lambda value: self.renamed(their, value),
            features(BATCH, N, 13),
        )

    def test_the_connector_projection_comes_first(self, theirs):
        sizes = {"heads": 6, "kv_heads": 2, "head_dim": 7, "dim": 13}
        their = self.configured(theirs, **sizes)
        projection = randomized(theirs.Idefics2MLP(11, 19, 13, "silu"))
        our = self.ours(**sizes, input_dim=11, hidden=19)
        our.load_state_dict(self.renamed(their, lambda p: p.detach(), projection))
        mask = torch.rand(BATCH, N, generator=torch.Generator().manual_seed(3)) < 0.6
        agree(
            (our, lambda x: our(x, mask=mask)),
            lambda x: their(projection(x), mask.long()),
            lambda value: self.renamed(their, value, projection),
            features(BATCH, N, 11),
        )

    def test_the_published_size_has_the_same_number_of_parameters(self, theirs):
        config = theirs.Idefics2Config(
            vision_config={"hidden_size": 1152},
            text_config={"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336},
        )
        config.perceiver_config.hidden_size = 4096
        with torch.device("meta"):
            their, our = theirs.Idefics2Connector(config), presets.idefics2_resampler()
        assert [sum(p.numel() for p in model.parameters()) for model in (their, our)] == [743_219_200] * 2


class TestIdefics1:
    def ours(self, *, heads, head_dim, dim, qk_norm):
        attention = partial(MultiHeadAttention, qk_dim=heads * head_dim, qk_norm=qk_norm, bias=False, out_bias=False)
        mlp = partial(MLP, widening_factor=4, activation=nn.ReLU(), bias=False)
        block = partial(JointAttend, attention=attention, mlp=mlp)
        return Resampler(dim, num_latents=LATENTS, depth=DEPTH, num_heads=heads, block=block).double()

    def renamed(self, their, value):
        actual = {"latents": value(their.latents)}

        def layer(name, module):
            actual.update({f"{name}.{kind}": value(parameter) for kind, parameter in module.named_parameters()})

        for number, (attention, feed_forward) in enumerate(their.blocks):
            name = f"layers.{number}"
            layer(f"{name}.norm", attention.latents_layer_norm)
            layer(f"{name}.input_norm", attention.context_layer_norm)
            layer(f"{name}.attention.query", attention.q_proj)
            layer(f"{name}.attention.key", attention.k_proj)
            layer(f"{name}.attention.value", attention.v_proj)
            layer(f"{name}.attention.output", attention.output_proj)
            if attention.qk_layer_norms:
                layer(f"{name}.attention.query_norm", attention.q_layer_norm)
                layer(f"{name}.attention.key_norm", attention.k_layer_norm)
            layer(f"{name}.mlp_norm", feed_forward.ln)
            layer(f"{name}.mlp.expand", feed_forward.fc)
            layer(f"{name}.mlp.contract", feed_forward.c_proj)
        layer("norm", their.layer_norm)
        return actual

    @pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
    def test_outputs_and_gradients_are_equal(self, normed):
        pytest.importorskip("transformers")
        theirs = pytest.importorskip("transformers.models.idefics.perceiver")
        config = theirs.IdeficsConfig(
            perceiver_config={"qk_layer_norms_perceiver": normed}, vision_config={"embed_dim": 13}
        )
        their = randomized(theirs.IdeficsPerceiverResampler(config, 13, DEPTH, 3, 7, LATENTS))
        our = self.ours(heads=3, head_dim=7, dim=13, qk_norm=nn.LayerNorm if normed else nn.Identity)
        our.load_state_dict(self.renamed(their, lambda p: p.detach()))
        agree((our, our), their, lambda value: self.renamed(their, value), features(BATCH, N, 13))


class TestFlamingo:
    """Against the pseudo-code of appendix A.1.1, with the norms of published code and no biases."""

    FRAMES, WIDTH, HEADS, HEAD_DIM = 4, 13, 3, 7

    def attention(self, layer, x, x_f):
        """q of the latents; k, v of features and latents: with a norm each, without biases."""
        x = F.layer_norm(x, (self.WIDTH,), layer.norm.weight, layer.norm.bias)
        x_f = F.layer_norm(x_f, (self.WIDTH,), layer.input_norm.weight, layer.input_norm.bias)
        read = torch.cat((x_f, x), dim=-2)
        q, k, v = (
            rearrange(given @ part.weight.T, "... n (h d) -> ... h n d", h=self.HEADS)
            for part, given in (
                (layer.attention.query, x),
                (layer.attention.key, read),
                (layer.attention.value, read),
            )
        )
        weights = (q @ k.transpose(-1, -2) * self.HEAD_DIM**-0.5).softmax(-1)
        return rearrange(weights @ v, "... h n d -> ... n (h d)") @ layer.attention.output.weight.T

    def feed_forward(self, layer, x):
        x = F.layer_norm(x, (self.WIDTH,), layer.mlp_norm.weight, layer.mlp_norm.bias)
        return F.gelu(x @ layer.mlp.expand.weight.T) @ layer.mlp.contract.weight.T

    def resampled(self, model, x_f):
        x = model.latents.expand(*x_f.shape[:-2], *model.latents.shape)
        for layer in model.layers:
            x = x + self.attention(layer, x, x_f)
            x = x + self.feed_forward(layer, x)
        return F.layer_norm(x, (self.WIDTH,), model.norm.weight, model.norm.bias)

    def model(self):
        attention = partial(MultiHeadAttention, qk_dim=self.HEADS * self.HEAD_DIM, bias=False, out_bias=False)
        mlp = partial(MLP, widening_factor=4, activation=nn.GELU(), bias=False)
        block = partial(JointAttend, attention=attention, mlp=mlp)
        return Resampler(self.WIDTH, num_latents=LATENTS, depth=DEPTH, num_heads=self.HEADS, block=block)

    def compare(self, ours, formula):
        x_f = features(BATCH, self.FRAMES, N, self.WIDTH)
        actual, expected = ours(x_f), formula(x_f)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
        toward = torch.randn_like(actual)
        wrt = list(ours.parameters())
        given = [
            torch.autograd.grad((out * toward).sum(), wrt, allow_unused=True, materialize_grads=True)
            for out in (actual, expected)
        ]
        torch.testing.assert_close(*given, rtol=0, atol=1e-8)

    def test_each_frame_equals_flamingo_pytorch(self):
        ours = randomized(EachFrame(self.model(), frame_positions=positions.LearnedEmbedding(7, self.WIDTH)))

        def formula(x_f):
            return self.resampled(ours.resampler, x_f + ours.frame_positions.vectors[: self.FRAMES, None])

        self.compare(ours, formula)

    def test_all_frames_equals_the_paper_and_open_flamingo(self):
        ours = randomized(AllFrames(self.model(), frame_positions=positions.LearnedEmbedding(7, self.WIDTH)))

        def formula(x_f):
            x_f = x_f + ours.frame_positions.vectors[: self.FRAMES, None]
            return self.resampled(ours.resampler, x_f.flatten(1, 2))

        self.compare(ours, formula)

    def test_frame_positions_are_interpolated_for_more_frames(self):
        ours = randomized(AllFrames(self.model(), frame_positions=positions.LearnedGrid((3,), self.WIDTH)))

        def formula(x_f):
            vectors = ours.frame_positions.vectors
            places = torch.linspace(0, len(vectors) - 1, self.FRAMES, dtype=torch.float64)
            below = places.floor().long().clamp(max=len(vectors) - 2)
            part = (places - below)[:, None]
            times = vectors[below] * (1 - part) + vectors[below + 1] * part
            return self.resampled(ours.resampler, (x_f + times[:, None]).flatten(1, 2))

        self.compare(ours, formula)
