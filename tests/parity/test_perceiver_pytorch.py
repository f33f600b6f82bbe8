"""Our Perceiver is lucidrains/perceiver-pytorch's: outputs and all gradients, by the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from perceiver_core import (
    GEGLU,
    MLP,
    CrossAttend,
    Encoder,
    LatentTransformer,
    MultiHeadAttention,
    Perceiver,
    SelfAttend,
    heads,
    sharing,
)
from perceiver_core.adapters import Grid
from perceiver_core.positions import FourierPerAxis

theirs = pytest.importorskip("perceiver_pytorch")

GRIDS = {1: (17,), 2: (5, 7), 3: (2, 3, 5)}
BASE = {
    "num_freq_bands": 3,
    "depth": 2,
    "max_freq": 7.0,
    "input_channels": 3,
    "input_axis": 2,
    "num_latents": 5,
    "latent_dim": 14,
    "cross_heads": 1,
    "latent_heads": 2,
    "cross_dim_head": 11,
    "latent_dim_head": 6,
    "num_classes": 13,
    "weight_tie_layers": False,
    "fourier_encode_data": True,
    "self_per_cross_attn": 1,
}
CASES = {
    "base": {},
    "one layer": {"depth": 1},
    "three tied": {"depth": 3, "weight_tie_layers": True},
    "three untied": {"depth": 3},
    "two self-attends, tied": {"self_per_cross_attn": 2, "weight_tie_layers": True, "depth": 3},
    "heads": {"cross_heads": 3, "latent_heads": 5},
    "widths": {"cross_dim_head": 4, "latent_dim_head": 9, "latent_dim": 22, "num_latents": 7},
    "bands": {"num_freq_bands": 5, "max_freq": 23.0},
    "sequence": {"input_axis": 1, "input_channels": 2},
    "video": {"input_axis": 3, "input_channels": 1, "self_per_cross_attn": 2},
    "no positions": {"fourier_encode_data": False, "input_channels": 11},
}


def ours(config):
    axes, width = config["input_axis"], config["latent_dim"]
    bands, highest = config["num_freq_bands"], config["max_freq"]
    where = FourierPerAxis(axes, bands, max_frequency=highest) if config["fourier_encode_data"] else None
    adapter = Grid(config["input_channels"], positions=where)
    mlp = partial(MLP, widening=4, activation=GEGLU())
    # Their heads have a width of their own, and q, k, v no bias.
    cross = partial(MultiHeadAttention, qk_dim=config["cross_heads"] * config["cross_dim_head"], bias=False)
    latent = partial(MultiHeadAttention, qk_dim=config["latent_heads"] * config["latent_dim_head"], bias=False)
    encoder = Encoder(
        adapter.dim,
        latents=config["num_latents"],
        dim=width,
        reads=config["depth"],
        depth=config["self_per_cross_attn"],
        heads=config["latent_heads"],
        share=sharing.all_but_first if config["weight_tie_layers"] else sharing.none,
        read=partial(CrossAttend, heads=config["cross_heads"], attention=cross, mlp=mlp),
        process=partial(LatentTransformer, block=partial(SelfAttend, attention=latent, mlp=mlp)),
    )
    return Perceiver(adapter, encoder, heads.Classify(encoder.dim, config["num_classes"]))


def renamed(model, plan, value):
    """`value` of each of their parameters under our names."""
    found = {"encoder.latents": value(model.latents)}

    def layer(name, module):
        found.update({f"{name}.{kind}": value(parameter) for kind, parameter in module.named_parameters()})

    def attention(name, module):
        layer(f"{name}.query", module.to_q)
        keys_values = value(module.to_kv.weight)  # one matrix for both
        found[f"{name}.key.weight"], found[f"{name}.value.weight"] = keys_values.chunk(2)
        layer(f"{name}.output", module.to_out)

    def mlp(name, prenorm):
        layer(f"{name}.mlp_norm", prenorm.norm)
        layer(f"{name}.mlp.expand", prenorm.fn.net[0])
        layer(f"{name}.mlp.contract", prenorm.fn.net[2])

    for block, number in zip(model.layers, plan, strict=True):  # tied layers stand there once a step
        read = f"encoder.reads.{number}"
        layer(f"{read}.query_norm", block.cross_attn.norm)
        layer(f"{read}.input_norm", block.cross_attn.norm_context)
        attention(f"{read}.attention", block.cross_attn.fn)
        mlp(read, block.cross_ff)
        for index, (self_attention, feed_forward) in enumerate(block.self_attns):
            own = f"encoder.transformers.{number}.blocks.{index}"
            layer(f"{own}.norm", self_attention.norm)
            attention(f"{own}.attention", self_attention.fn)
            mlp(own, feed_forward)
    layer("head.norm", model.to_logits[1])
    layer("head.logits", model.to_logits[2])
    return found


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_theirs(changes, masked):
    config = BASE | changes
    torch.manual_seed(0)
    their = theirs.Perceiver(**config).double()
    with torch.no_grad():
        for parameter in their.parameters():  # norms start at 1, biases at 0: make all matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    our = ours(config).double()
    our.load_state_dict(renamed(their, our.encoder.sharing.reads, lambda p: p.detach().clone()))

    data = torch.randn(2, *GRIDS[config["input_axis"]], config["input_channels"], dtype=torch.float64)
    mask = torch.rand(data.shape[:-1]) < 0.6 if masked else None
    given = [data.clone().requires_grad_() for _ in range(2)]
    outs = our(given[0], mask=mask), their(given[1], mask=mask)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)

    toward = torch.randn_like(outs[0])
    for out in outs:
        (out * toward).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0, atol=1e-10)
    wanted = renamed(their, our.encoder.sharing.reads, lambda p: p.grad)
    found = {name: parameter.grad for name, parameter in our.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
