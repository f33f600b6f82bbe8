"""Whole models: inference, and a training step (forward, mean of squares, backward, norm of the gradients)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import perceiver_core as pc
from benchmarks import flops, peers, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from examples.akoa.model import knee_model

Models = dict[str, nn.Module]
State = dict[str, tuple[nn.Module, Tensor]]  # models and what each is given, by the candidate's name


class Entry(NamedTuple):
    """Models with the same weights, the first of which is what the others are held against."""

    name: str
    models: Callable[[], Models]
    shape: tuple[int, ...]  # of what they are given
    candidates: tuple[str, ...]
    tasks: tuple[str, ...] = ("inference", "training")
    needs: str = "torch"  # a library
    vocabulary: int | None = None  # of ids, where these are given


README = {  # the sizes in perceiver-pytorch's README, with 64 bands and tied weights
    "num_freq_bands": 64,
    "max_freq": 10.0,
    "depth": 6,
    "num_latents": 256,
    "latent_dim": 512,
    "cross_heads": 1,
    "cross_dim_head": 64,
    "latent_heads": 8,
    "latent_dim_head": 64,
    "num_classes": 1000,
    "weight_tie_layers": True,
    "self_per_cross_attn": 1,
}
IMAGENET = README | {
    "depth": 8,
    "num_latents": 512,
    "latent_dim": 1024,
    "cross_dim_head": 261,
    "latent_dim_head": 128,
    "self_per_cross_attn": 6,
}
TOY = README | {"num_freq_bands": 4, "depth": 3, "num_latents": 8, "latent_dim": 32, "latent_dim_head": 4}
TRUNK = {"latents": 512, "dim": 1024, "blocks": 8, "depth": 6, "heads": 8, "side": 224, "bands": 64}
TOY_TRUNK = {"latents": 8, "dim": 32, "blocks": 2, "depth": 3, "heads": 4, "side": 20, "bands": 4}


def entries(*, toy: bool) -> list[Entry]:
    """All models, small ones for a toy."""
    side = 20 if toy else 224
    pictures, pixels = (1, 3, side, side), (1, side, side, 3)
    names = ("perceiver-pytorch", "ours", "ours bfloat16")
    lucid = [
        Entry(name, partial(peers.perceiver_pytorch, TOY if toy else sizes), pixels, names, needs="perceiver_pytorch")
        for name, sizes in (("perceiver-pytorch README", README), ("perceiver-pytorch ImageNet", IMAGENET))
    ]
    return [
        *(lucid[:1] if toy else lucid),
        Entry(
            "transformers trunk",
            partial(peers.transformers, TOY_TRUNK if toy else TRUNK),
            pictures,
            candidates=("transformers", "ours", "ours bfloat16"),
            needs="transformers",
        ),
        *published(toy=toy),
        Entry("latent transformer", partial(thinking, toy=toy), (1, 3, 4, 5), ("ours", "ours bfloat16")),
        Entry("ImageNet", partial(imagenet, toy=toy), pictures, ("ours", "ours recomputing"), tasks=("training",)),
        Entry("AKOA", akoa, (2 if toy else 32, 1, 64, 64), ("ours", "ours bfloat16")),
    ]


def published(*, toy: bool) -> list[Entry]:
    """Three models of transformers end to end, at their published sizes."""
    sizes = peers.SMALL if toy else peers.PUBLISHED
    shapes = {
        "PerceiverForImageClassificationFourier": (1, 3, 20, 20) if toy else (1, 3, 224, 224),
        "PerceiverForMaskedLM": (1, 12) if toy else (1, 2048),
        "PerceiverForOpticalFlow": (1, 2, 3, 6, 8) if toy else (1, 2, 3, 368, 496),
    }
    names = {
        "PerceiverForImageClassificationFourier": "transformers Fourier classifier",
        "PerceiverForMaskedLM": "transformers masked LM",
        "PerceiverForOpticalFlow": "transformers optical flow",
    }
    return [
        Entry(
            names[kind],
            partial(peers.published, kind, sizes[kind]),
            shape,
            candidates=("transformers", "ours", "ours bfloat16"),
            # A training step of their flow would need more than 50 GB.
            tasks=("inference",) if "Flow" in kind else ("inference", "training"),
            needs="transformers",
            vocabulary=sizes[kind].get("vocab_size"),
        )
        for kind, shape in shapes.items()
    ]


def imagenet(*, toy: bool) -> Models:
    """The paper's model, plain and with its activations computed again in the backward pass."""
    if toy:
        adapter = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=20))
        encoder = pc.Encoder(adapter.dim, num_latents=8, dim=32, num_reads=3, depth=2, num_heads=4)
        model = pc.Perceiver(adapter, encoder, pc.heads.Classification(encoder.dim, num_classes=10))
    else:
        model = pc.models.presets.imagenet()
    return {"ours": model, "ours recomputing": pc.checkpoint_activations(copy.deepcopy(model))}


def thinking(*, toy: bool) -> Models:
    """The paper's latents with next to nothing to read: 8 times 6 self-attends."""
    adapter = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=1, max_resolution=4))
    latents, dim = (8, 32) if toy else (512, 1024)
    encoder = pc.Encoder(adapter.dim, num_latents=latents, dim=dim, num_reads=2 if toy else 8, depth=6, num_heads=8)
    return {"ours": pc.Perceiver(adapter, encoder, pc.heads.Classification(dim, num_classes=10))}


def akoa() -> Models:
    """The model of examples/akoa."""
    return {"ours": knee_model((64, 64))}


def run(setting: Setting) -> Results:
    """Every model and task, those of libraries that are there."""
    there, notes = able(entries(toy=setting.toy))
    return Results(compete_all((contest(entry, task) for entry in there for task in entry.tasks), setting), notes)


def able(those: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Entries whose libraries are there, and notes on the others."""
    notes = [f"{each.name}: left out, {each.needs} is not installed" for each in those if not peers.there(each.needs)]
    return [each for each in those if peers.there(each.needs)], notes


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="Whole models")


def contest(entry: Entry, task: str) -> Contest:
    """One model and task."""
    step = {"inference": inference, "training": training}[task]
    return Contest(
        sizes={"model": entry.name, "batch": entry.shape[0], "task": task},
        setup=partial(state, entry),
        candidates={
            name: Candidate(partial(step, name), "bfloat16" if name.endswith("bfloat16") else "float32")
            for name in entry.candidates
        },
        work=partial(_work, flops.BACKWARD if task == "training" else 1),
    )


def state(entry: Entry, device: str) -> State:
    """The models that an entry names, and what they are given."""
    torch.manual_seed(0)
    models = entry.models()
    given = torch.randn(entry.shape) if entry.vocabulary is None else torch.randint(entry.vocabulary, entry.shape)
    for name in entry.candidates:
        if name.endswith(" bfloat16"):
            models[name] = copy.deepcopy(models[name.removesuffix(" bfloat16")]).bfloat16()
    dtypes = {
        name: peers.latents(model).dtype if given.is_floating_point() else given.dtype for name, model in models.items()
    }
    return {name: (model.to(device), given.to(device, dtypes[name])) for name, model in models.items()}


@torch.no_grad()
def inference(name: str, models: State) -> Tensors:
    """What a model gives."""
    model, given = models[name]
    return (peers.output(model.eval(), given),)


def training(name: str, models: State, *, autocast: bool = False) -> Tensors:
    """What a model gives, the gradient of its latents, which went through all of it, and the norm of all gradients.

    With `autocast` the forward pass is under torch.autocast in bfloat16, and weights and gradients are in float32.
    """
    model, given = models[name]
    with torch.autocast(given.device.type, torch.bfloat16, enabled=autocast):
        out = peers.output(model.train(), given)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(out.float().square().mean(), list(parameters.values()))
    of_latents = next(g for p, g in zip(parameters.values(), gradients, strict=True) if p is peers.latents(model))
    return out.detach(), of_latents, peers.gradient_norm(list(gradients))


def _work(passes: int, models: State) -> Work:
    """Of encoder and decoder; adapters and heads do little."""
    model: Any
    model, given = models["ours"]
    with torch.no_grad():
        tokens = model.adapter(given[:1])
        total = flops.encoder(model.encoder, tokens=tokens.num_tokens)
        if isinstance(model, pc.PerceiverIO):
            latents, queries = model.encoder.latents.shape[0], model.queries(tokens).shape[1]
            total += flops.decoder(model.decoder, queries=queries, latents=latents)
    return Work(flops=passes * len(given) * total)
