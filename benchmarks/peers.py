"""Models of other libraries, and ours with the same weights."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
from perceiver_core.checkpoints.published import TRANSFORMERS
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core.checkpoints import of_transformers

Weights = dict[str, Tensor]


def there(module: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(module) is not None


def perceiver_pytorch(sizes: dict[str, Any]) -> dict[str, nn.Module]:
    """lucidrains/perceiver-pytorch's Perceiver of these sizes, its arguments by name; pictures `b h w c`."""
    theirs = importlib.import_module("perceiver_pytorch").Perceiver(**sizes)
    ours = pc.interop.load_perceiver_pytorch(theirs.state_dict(), **sizes)  # its weights are theirs, the very tensors
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
    ours.load_state_dict(_of_trunk(theirs, sizes["depth"]), assign=True)
    return {"transformers": theirs, "ours": ours}


def like_transformers(sizes: dict[str, Any]) -> pc.Perceiver:
    """Our parts, put together as theirs are."""
    where = pc.positions.Fourier(num_axes=2, num_bands=sizes["bands"], max_resolution=sizes["side"])
    adapter = pc.adapters.Image(3, positions=where)
    mlp = partial(pc.MLP, activation=nn.GELU())
    encoder = pc.Encoder(
        adapter.dim,
        num_latents=sizes["latents"],
        dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        cross_attention=partial(pc.CrossAttend, mlp=mlp),
        latent_transformer=partial(
            pc.LatentTransformer, num_repeats=sizes["blocks"], block=partial(pc.SelfAttend, mlp=mlp)
        ),
    )
    return pc.Perceiver(adapter, encoder, pc.heads.Identity())


def _of_trunk(model: nn.Module, depth: int) -> Weights:
    """Their weights under our names, up to the latents."""
    told = {"architectures": ["PerceiverForImageClassificationFourier"], "num_self_attends_per_block": depth}
    weights, places = model.state_dict(), of_transformers.names(told)
    trunk = ("perceiver.embeddings.", "perceiver.encoder.")
    return {place: weights[name.removeprefix("perceiver.")] for name, place in places.items() if name.startswith(trunk)}


IMAGE = {
    "num_latents": 512,
    "d_latents": 1024,
    "num_blocks": 8,
    "num_self_attends_per_block": 6,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
    "num_labels": 1000,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "PerceiverForImageClassificationFourier": IMAGE,
    "PerceiverForMaskedLM": {"qk_channels": 256, "v_channels": 1280, "vocab_size": 262},
    "PerceiverForOpticalFlow": {
        "num_latents": 2048,
        "d_latents": 512,
        "num_self_attends_per_block": 24,
        "num_self_attention_heads": 16,
        "num_cross_attention_heads": 1,
        "train_size": [368, 496],
    },
}
LITTLE = {"num_latents": 5, "d_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 2}
LITTLE |= {"num_cross_attention_heads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "PerceiverForImageClassificationFourier": LITTLE | {"num_labels": 3},
    "PerceiverForMaskedLM": LITTLE | {"vocab_size": 11, "max_position_embeddings": 12, "d_model": 16},
    "PerceiverForOpticalFlow": LITTLE | {"train_size": [6, 8]},
}


def published(kind: str, sizes: dict[str, Any]) -> dict[str, nn.Module]:
    """One of transformers' Perceiver classes end to end, and ours with its weights."""
    library = importlib.import_module("transformers")
    modeling = importlib.import_module("transformers.models.perceiver.modeling_perceiver")
    theirs = getattr(modeling, kind)(library.PerceiverConfig(**sizes, attention_probs_dropout_prob=0.0))
    told = {**sizes, "attention_probs_dropout_prob": 0.0, "architectures": [kind]}
    with torch.device("meta"):
        ours = of_transformers.build(told)
    of_transformers.fill(ours, theirs.state_dict(), told, TRANSFORMERS)
    return {"transformers": Theirs(theirs, flow="Flow" in kind), "ours": ours}


class Theirs(nn.Module):
    """A model of transformers that takes what ours takes and gives what ours gives."""

    def __init__(self, model: nn.Module, *, flow: bool) -> None:
        super().__init__()
        self.model, self.flow = model, flow

    def forward(self, given: Tensor) -> Tensor:
        """Its logits; of flow, of the frames' patches, and channels first."""
        if not self.flow:
            return self.model(inputs=given).logits  # type: ignore[no-any-return]
        patches = _PAIR.patches(given).unflatten(-1, (2, 27)).permute(0, 3, 4, 1, 2)
        return self.model(inputs=patches).logits.movedim(-1, 1)  # type: ignore[no-any-return]


_PAIR = pc.adapters.FramePair(positions=None)


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
