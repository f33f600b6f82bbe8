"""Published sizes, with parameters counted by hand."""

from __future__ import annotations

import pytest
import torch

from perceiver_core.models import presets


def parameters_of(*, input_dim, classes, reads):
    """512 latents of 1024; reads of one head at the input's width, 6 self-attends of 8 heads, MLPs of widening 1."""
    dim, latents, depth = 1024, 512, 6

    def linear(a, b):
        return a * b + b

    def norm(a):
        return 2 * a

    mlp = norm(dim) + 2 * linear(dim, dim)
    attention = linear(dim, input_dim) + 2 * linear(input_dim, input_dim) + linear(input_dim, dim)
    read = norm(dim) + norm(input_dim) + attention + mlp
    self_attend = norm(dim) + 4 * linear(dim, dim) + mlp
    different_reads = min(reads, 2)  # the first, and one for all others
    return latents * dim + different_reads * read + depth * self_attend + linear(dim, classes)


PAPERS = {
    # channels, then a coordinate and two features a band for each axis
    "imagenet": (presets.imagenet, 3 + 2 * (1 + 2 * 64), 1000, 8, (2, 3, 13, 11)),
    "audioset": (presets.audioset, 128 + 1 * (1 + 2 * 192), 527, 8, (2, 1400)),
    "modelnet40": (presets.modelnet40, 3 * (1 + 2 * 64), 40, 2, (2, 23, 3)),
}
each_paper = pytest.mark.parametrize("make, input_dim, classes, reads, shape", PAPERS.values(), ids=PAPERS.keys())


def on_no_device(make, *args):
    with torch.device("meta"):
        return make(*args)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@each_paper
def test_parameter_counts(make, input_dim, classes, reads, shape):
    model = on_no_device(make)
    assert model.adapter.dim == input_dim
    assert count(model) == parameters_of(input_dim=input_dim, classes=classes, reads=reads)
    assert model.encoder.sharing.steps == reads


def test_perceiver_ar_has_equal_numbers_of_cross_and_self_attention_heads():
    """`get_config` of its published code: num_cross_attend_heads and num_transformer_heads are 16."""
    model = on_no_device(presets.perceiver_ar, 11)
    assert [part.attention.num_heads for part in (model.cross_attention, *model.latent_transformer.blocks)] == [16] * 13


def test_the_imagenet_model_has_the_size_stated_in_the_paper():
    assert count(on_no_device(presets.imagenet)) == 44_912_254  # "44.9 million"


@each_paper
def test_other_numbers_of_classes(make, input_dim, classes, reads, shape):
    few = on_no_device(make, 7)
    assert count(few) == count(on_no_device(make)) - (classes - 7) * 1025


@each_paper
def test_forward_at_small_size(make, input_dim, classes, reads, shape):
    torch.manual_seed(0)
    model = on_no_device(make).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():  # the library's own truncated normals would take seconds
            parameter.uniform_(-0.05, 0.05)
        model.encoder.latents = torch.nn.Parameter(model.encoder.latents[:7])  # fewer, for speed
        logits = model(torch.rand(shape) * 2 - 1)
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()
    assert logits.std() > 1e-3
