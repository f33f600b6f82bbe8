"""Models of other libraries, and ours with the same weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import perceiver_core as pc

Weights = dict[str, Tensor]


def there(module: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(module) is not None


def perceiver_pytorch(sizes: dict[str, Any]) -> dict[str, nn.Module]:
    """lucidrains/perceiver-pytorch's Perceiver of these sizes, its arguments by name; pictures `b h w c`."""
    theirs = importlib.import_module("perceiver_pytorch").Perceiver(**sizes)
    with torch.device("meta"):  # its weights are theirs, the very tensors
        ours = like_perceiver_pytorch(sizes)
    encoder: Any = ours.encoder
    ours.load_state_dict(_of_perceiver_pytorch(theirs, encoder.sharing.reads), assign=True)
    return {"perceiver-pytorch": theirs, "ours": ours}


def like_perceiver_pytorch(sizes: dict[str, Any]) -> pc.Perceiver:
    """Our parts, put together as theirs are."""
    where = pc.positions.FourierPerAxis(2, sizes["num_freq_bands"], max_frequency=sizes["max_freq"])
    adapter = pc.adapters.Grid(3, positions=where)
    mlp = partial(pc.MLP, widening=4, activation=pc.GEGLU())
    # Their heads have a width of their own, and q, k, v no bias.
    cross = partial(pc.MultiHeadAttention, qk_dim=sizes["cross_heads"] * sizes["cross_dim_head"], bias=False)
    latent = partial(pc.MultiHeadAttention, qk_dim=sizes["latent_heads"] * sizes["latent_dim_head"], bias=False)
    encoder = pc.Encoder(
        adapter.dim,
        latents=sizes["num_latents"],
        dim=sizes["latent_dim"],
        reads=sizes["depth"],
        depth=sizes["self_per_cross_attn"],
        heads=sizes["latent_heads"],
        share=pc.sharing.all_but_first if sizes["weight_tie_layers"] else pc.sharing.none,
        read=partial(pc.CrossAttend, heads=sizes["cross_heads"], attention=cross, mlp=mlp),
        process=partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=latent, mlp=mlp)),
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Classify(encoder.dim, sizes["num_classes"]))


def _of_perceiver_pytorch(model: Any, plan: tuple[int, ...]) -> Weights:
    """Their weights under our names."""
    found: Weights = {"encoder.latents": model.latents.detach()}

    def attention(name: str, module: Any) -> None:
        keys, values = module.to_kv.weight.detach().chunk(2)  # one matrix for both
        found.update({f"{name}.key.weight": keys, f"{name}.value.weight": values})
        found.update(_named(name, query=module.to_q, output=module.to_out))

    def mlp(name: str, prenorm: Any) -> None:
        found.update(_named(name, mlp_norm=prenorm.norm))
        found.update(_named(f"{name}.mlp", expand=prenorm.fn.net[0], contract=prenorm.fn.net[2]))

    for block, number in zip(model.layers, plan, strict=True):  # tied layers stand there once a step
        read = f"encoder.reads.{number}"
        found.update(_named(read, query_norm=block.cross_attn.norm, input_norm=block.cross_attn.norm_context))
        attention(f"{read}.attention", block.cross_attn.fn)
        mlp(read, block.cross_ff)
        for index, (self_attention, feed_forward) in enumerate(block.self_attns):
            own = f"encoder.transformers.{number}.blocks.{index}"
            found.update(_named(own, norm=self_attention.norm))
            attention(f"{own}.attention", self_attention.fn)
            mlp(own, feed_forward)
    found.update(_named("head", norm=model.to_logits[1], logits=model.to_logits[2]))
    return found


def transformers(sizes: dict[str, Any]) -> dict[str, nn.Module]:
    """Hugging Face's trunk of these sizes with pixels and Fourier features, up to its latents; pictures `b c h w`."""
    library = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.perceiver.modeling_perceiver")
    side, bands = sizes["side"], sizes["bands"]
    config = library.PerceiverConfig(
        num_latents=sizes["latents"],
        d_latents=sizes["dim"],
        num_blocks=sizes["blocks"],
        num_self_attends_per_block=sizes["depth"],
        num_self_attention_heads=sizes["heads"],
        num_cross_attention_heads=1,
        attention_probs_dropout_prob=0.0,
    )
    fourier = {"num_bands": bands, "max_resolution": (side, side), "concat_pos": True, "sine_only": False}
    pixels = modeling.PerceiverImagePreprocessor(
        config, prep_type="pixels", spatial_downsample=1, fourier_position_encoding_kwargs=fourier
    )
    theirs = modeling.PerceiverModel(config, input_preprocessor=pixels)
    with torch.device("meta"):
        ours = like_transformers(sizes)
    ours.load_state_dict(_of_transformers(theirs, sizes["depth"] * sizes["blocks"]), assign=True)
    return {"transformers": theirs, "ours": ours}


def like_transformers(sizes: dict[str, Any]) -> pc.Perceiver:
    """Our parts, put together as theirs are."""
    where = pc.positions.Fourier(axes=2, bands=sizes["bands"], max_resolution=sizes["side"])
    adapter = pc.adapters.Image(3, positions=where)
    mlp = partial(pc.MLP, activation=nn.GELU())
    encoder = pc.Encoder(
        adapter.dim,
        latents=sizes["latents"],
        dim=sizes["dim"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        read=partial(pc.CrossAttend, mlp=mlp),
        process=partial(_again, sizes["blocks"], block=partial(pc.SelfAttend, mlp=mlp)),
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Latents())


def _again(times: int, dim: int, *, depth: int, heads: int, block: Callable[..., nn.Module]) -> nn.Module:
    """A latent transformer whose blocks are run several times over."""
    transformer = pc.LatentTransformer(dim, depth=depth, heads=heads, block=block)
    transformer.blocks = nn.ModuleList([*transformer.blocks] * times)
    return transformer


def _of_transformers(model: Any, blocks: int) -> Weights:
    """Their weights under our names."""
    found: Weights = {"encoder.latents": model.embeddings.latents.detach()}

    def layer(name: str, module: Any, **norms: nn.Module) -> None:
        attention = module.attention.self
        found.update(_named(name, mlp_norm=module.layernorm, **norms))
        found.update(_named(f"{name}.mlp", expand=module.mlp.dense1, contract=module.mlp.dense2))
        places = {"query": attention.query, "key": attention.key, "value": attention.value}
        found.update(_named(f"{name}.attention", output=module.attention.output.dense, **places))

    read, selves = model.encoder.cross_attention, model.encoder.self_attends
    norms = read.attention.self
    layer("encoder.reads.0", read, query_norm=norms.layernorm1, input_norm=norms.layernorm2)
    for index in range(blocks):
        module = selves[index % len(selves)]
        layer(f"encoder.transformers.0.blocks.{index}", module, norm=module.attention.self.layernorm1)
    return found


def _named(name: str, **modules: nn.Module) -> Weights:
    return {
        f"{name}.{place}.{kind}": parameter.detach()
        for place, module in modules.items()
        for kind, parameter in module.named_parameters()
    }


def output(model: nn.Module, pictures: Tensor) -> Tensor:
    """What a model gives: of transformers, its latents."""
    out = model(pictures)
    tensor: Tensor = getattr(out, "last_hidden_state", out)
    return tensor


def latents(model: nn.Module) -> Tensor:
    """A model's latent array, which every library calls so."""
    return next(p for name, p in model.named_parameters() if name.split(".")[-1] == "latents")


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, which does not depend on how a library cuts its weights."""
    return torch.nn.utils.get_total_norm(gradients)
