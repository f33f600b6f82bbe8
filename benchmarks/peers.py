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
    ours = pc.checkpoints.lucidrains(theirs.state_dict(), **sizes)  # its weights are theirs, the very tensors
    return {"perceiver-pytorch": theirs, "ours": ours}


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
