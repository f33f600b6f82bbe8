"""Whole models: inference, and a training step (forward, mean of squares, backward, norm of the gradients).

Models of other libraries stand beside ours with the same weights. On the CPU models compute in float32, and ours also
in bfloat16. On a GPU it is a training step of the ImageNet models with weights in float32 and the forward pass under
torch.autocast in bfloat16, eager and compiled.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import perceiver_core as pc
from benchmarks.comparison import Candidate, Comparison, Row, Setting, Tensors, Work, compare_all, count_flops
from examples.akoa.model import knee_model

TITLE = "Whole models"
BFLOAT16, AUTOCAST, COMPILED = ", bfloat16", ", autocast", ", compiled"  # endings of the names of candidates
BATCHES_ON_CUDA = (8, 32)

# perceiver-pytorch: the sizes in its README, with 64 bands and tied weights, and those of the ImageNet Perceiver.
README = {"num_freq_bands": 64, "max_freq": 10.0, "depth": 6, "num_latents": 256, "latent_dim": 512, "cross_heads": 1}
README |= {"cross_dim_head": 64, "latent_heads": 8, "latent_dim_head": 64, "num_classes": 1000}
README |= {"weight_tie_layers": True, "self_per_cross_attn": 1}
IMAGENET = README | {"depth": 8, "num_latents": 512, "latent_dim": 1024, "cross_dim_head": 261, "latent_dim_head": 128}
IMAGENET |= {"self_per_cross_attn": 6}
TOY = README | {"num_freq_bands": 4, "depth": 3, "num_latents": 8, "latent_dim": 32, "latent_dim_head": 4}

# transformers: the published sizes, with drawn weights.
FOURIER, LANGUAGE, FLOW = "ImageClassificationFourier", "MaskedLM", "OpticalFlow"
IMAGE_SIZES = {"num_latents": 512, "d_latents": 1024, "num_self_attends_per_block": 6, "num_labels": 1000}
FLOW_SIZES = {"num_latents": 2048, "d_latents": 512, "num_self_attends_per_block": 24, "num_self_attention_heads": 16}
ONE_HEAD = {"num_cross_attention_heads": 1}
TINY = {"num_latents": 5, "d_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 2} | ONE_HEAD
PUBLISHED: dict[str, dict[str, Any]] = {
    FOURIER: IMAGE_SIZES | ONE_HEAD | {"num_blocks": 8},
    LANGUAGE: {"qk_channels": 256, "v_channels": 1280, "vocab_size": 262},
    FLOW: FLOW_SIZES | ONE_HEAD | {"train_size": [368, 496]},
}
PUBLISHED_TOY: dict[str, dict[str, Any]] = {
    FOURIER: TINY | {"num_labels": 3},
    LANGUAGE: TINY | {"vocab_size": 11, "max_position_embeddings": 12, "d_model": 16},
    FLOW: TINY | {"train_size": [6, 8]},
}

Models = dict[str, nn.Module]
State = dict[str, tuple[nn.Module, Tensor]]  # models and their inputs, by the candidate's name


class Entry(NamedTuple):
    """Models with the same weights; the first candidate is the one that others are compared with."""

    name: str
    models: Callable[[], Models]
    shape: tuple[int, ...]  # of the input
    candidates: tuple[str, ...] = ("ours", "ours" + BFLOAT16)
    tasks: tuple[str, ...] = ("inference", "training")
    library: str = "torch"  # that has to be installed
    vocab_size: int | None = None  # if the input consists of ids


def entries(platform: str, *, toy: bool) -> list[Entry]:
    """Return all models of a platform, most telling first, since the last ones may find no time."""
    side, sizes = (20, PUBLISHED_TOY) if toy else (224, PUBLISHED)
    images, channels_last = (1, 3, side, side), (1, side, side, 3)
    ours = Entry("ImageNet", partial(imagenet, toy=toy), images, ("ours", "ours recomputing"), ("training",))
    ids, frames = (1, 12 if toy else 2048), (1, 2, 3, *sizes[FLOW]["train_size"])
    named = {FOURIER: ("Fourier classifier", images), LANGUAGE: ("masked LM", ids), FLOW: ("optical flow", frames)}
    lucidrains = {
        name: _beside("perceiver-pytorch", name, partial(perceiver_pytorch, TOY if toy else arguments), channels_last)
        for name, arguments in (("README", README), ("ImageNet", IMAGENET))
    }
    published = {
        each: _beside("transformers", name, partial(transformers, each, sizes[each]), shape)
        for each, (name, shape) in named.items()
    }
    if platform == "cuda":
        these = (ours, lucidrains["ImageNet"], published[FOURIER])
        return [_autocast(entry, batch) for batch in ((2,) if toy else BATCHES_ON_CUDA) for entry in these]
    return [
        *(lucidrains.values() if not toy else [lucidrains["README"]]),
        ours,
        Entry("latent transformer", partial(latent_transformer, toy=toy), (1, 3, 4, 5)),
        Entry("AKOA", akoa, (2 if toy else 32, 1, 64, 64)),
        published[FOURIER],
        published[LANGUAGE]._replace(vocab_size=sizes[LANGUAGE]["vocab_size"]),
        published[FLOW]._replace(tasks=("inference",)),  # a training step of transformers' would need more than 50 GB
    ]


def _beside(peer: str, name: str, models: Callable[[], Models], shape: tuple[int, ...]) -> Entry:
    entry = Entry(f"{peer} {name}", models, shape, library=peer.replace("-", "_"))
    return entry._replace(candidates=(peer, *entry.candidates))


def _autocast(entry: Entry, batch: int) -> Entry:
    """Return an entry for a GPU; only at the smaller batch its first candidate is in float32."""
    names = [name for name in entry.candidates if BFLOAT16 not in name]
    exact = names[:1] if batch != BATCHES_ON_CUDA[-1] else []
    autocast = [name + AUTOCAST for name in names]
    graphs = [name + COMPILED for name in autocast if "recomputing" not in name]
    shape = (batch, *entry.shape[1:])
    return entry._replace(candidates=(*exact, *autocast, *graphs), shape=shape, tasks=("training",))


def perceiver_pytorch(arguments: dict[str, Any]) -> Models:
    """Make lucidrains/perceiver-pytorch's Perceiver, whose images are `b h w c`, and ours, which holds its tensors."""
    theirs = importlib.import_module("perceiver_pytorch").Perceiver(**arguments)
    return {"perceiver-pytorch": theirs, "ours": pc.interop.load_perceiver_pytorch(theirs.state_dict(), **arguments)}


def transformers(architecture: str, sizes: dict[str, Any]) -> Models:
    """Make one of transformers' Perceiver classes from its configuration, and ours from its saved weights."""
    library = importlib.import_module("transformers")
    config = library.PerceiverConfig(**sizes, attention_probs_dropout_prob=0.0)
    library.logging.disable_progress_bar()
    theirs = getattr(library, f"PerceiverFor{architecture}")(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = copy.deepcopy(pc.interop.load_transformers(folder))  # pages of a file count as memory later
    return {"transformers": Adapted(theirs, flow=architecture == FLOW), "ours": ours}


class Adapted(nn.Module):
    """Model of transformers with the inputs and outputs of ours."""

    def __init__(self, model: nn.Module, *, flow: bool) -> None:
        super().__init__()
        self.model, self.pair = model, pc.adapters.FramePair(positions=None) if flow else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits; for optical flow, made from the frames' patches, with channels first."""
        if self.pair is None:
            return self.model(inputs=inputs).logits
        patches = self.pair.patches(inputs).unflatten(-1, (2, -1)).permute(0, 3, 4, 1, 2)
        return self.model(inputs=patches).logits.movedim(-1, 1)


def imagenet(*, toy: bool) -> Models:
    """Make the paper's model, and the same with recomputation of its activations in the backward pass."""
    encoder = partial(pc.Encoder, num_latents=8, dim=32, num_reads=3, depth=2, num_heads=4)
    model = perceiver(encoder, bands=4) if toy else pc.models.presets.imagenet()
    return {"ours": model, "ours recomputing": pc.checkpoint_activations(copy.deepcopy(model))}


def latent_transformer(*, toy: bool) -> Models:
    """Make the paper's latent transformer with a tiny input: 8 times 6 self-attention blocks."""
    encoder = partial(pc.Encoder, num_latents=512, dim=1024, num_reads=8, depth=6, num_heads=8)
    return {"ours": perceiver(partial(encoder, num_latents=8, dim=32, num_reads=2) if toy else encoder, bands=1)}


def perceiver(encoder: Callable[[int], pc.Encoder], *, bands: int) -> pc.Perceiver:
    """Make an image classifier."""
    adapter = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=bands, max_resolution=224))
    made = encoder(adapter.dim)
    return pc.Perceiver(adapter, made, pc.heads.Classification(made.dim, num_classes=10))


def akoa() -> Models:
    """Make the model of examples/akoa."""
    return {"ours": knee_model((64, 64))}


def run(setting: Setting) -> Iterator[Row | str]:
    """Compare models for each task; libraries that are not installed have a note."""
    for entry in entries(setting.platform, toy=setting.toy):
        if importlib.util.find_spec(entry.library):
            yield from compare_all((comparison(entry, task) for task in entry.tasks), setting)
        else:
            yield f"{entry.name}: left out, {entry.library} is not installed"


def comparison(entry: Entry, task: str) -> Comparison:
    """Compare the candidates of an entry for one task."""
    step = {"inference": inference, "training": training}[task]
    columns, candidates = {"model": entry.name, "batch": entry.shape[0], "task": task}, {}
    for name in entry.candidates:
        dtype = "bfloat16" if BFLOAT16 in name or AUTOCAST in name else "float32"
        candidates[name] = Candidate(partial(step, name), dtype, may_refuse=not name.startswith("ours"))
    return Comparison(columns, partial(setup, entry), candidates, partial(_work, step), rotates=False)


def setup(entry: Entry, device: str) -> State:
    """Make the models of all candidates, and their inputs."""
    torch.manual_seed(0)
    models = {name: model.to(device) for name, model in entry.models().items()}
    shape, vocab_size = entry.shape, entry.vocab_size
    inputs = (torch.randn(shape) if vocab_size is None else torch.randint(vocab_size, shape)).to(device)
    state: State = {}
    for name in entry.candidates:
        model: Any = models[name.split(",")[0]]
        if BFLOAT16 in name:
            model = copy.deepcopy(model).bfloat16()
        dtype = latents(model).dtype if inputs.is_floating_point() else inputs.dtype
        state[name] = torch.compile(model, dynamic=False) if COMPILED in name else model, inputs.to(dtype)
    return state


@torch.no_grad()
def inference(name: str, state: State) -> Tensors:
    """Return a model's output."""
    model, inputs = state[name]
    return (model.eval()(inputs),)


def training(name: str, state: State) -> Tensors:
    """Return a model's output, the gradient of its latents, which passed all layers, and the norm of all gradients.

    That norm does not depend on how a library cuts its weights. Under autocast weights and gradients are in float32.
    """
    model, inputs = state[name]
    with torch.autocast(inputs.device.type, torch.bfloat16) if AUTOCAST in name else contextlib.nullcontext():
        out = model.train()(inputs)
    parameters, array = list(model.parameters()), latents(model)
    gradients = torch.autograd.grad(out.float().square().mean(), parameters)
    of_latents = next(g for p, g in zip(parameters, gradients, strict=True) if p is array)
    return out.detach(), of_latents, torch.nn.utils.get_total_norm(gradients)


def latents(model: nn.Module) -> nn.Parameter:
    """Return a model's latent array, which has this name in every library."""
    return next(p for name, p in model.named_parameters() if name.split(".")[-1] == "latents")


def _work(step: Callable[..., Tensors], state: State) -> Work:
    """Count perceiver-pytorch if it takes part, and else ours: transformers needs values to make its masks."""
    name = next(name for name in state if name.startswith(("perceiver-pytorch", "ours")) and COMPILED not in name)
    model, inputs = state[name]
    return Work(count_flops(step, "", {"": (copy.deepcopy(model).to("meta"), inputs.to("meta"))}))
