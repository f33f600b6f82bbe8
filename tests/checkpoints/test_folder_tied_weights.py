"""Tensors with two names: tied weights, and parts that are used twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import perceiver_core as pc
from perceiver_core import adapters, positions, registry
from tests.checkpoints.folders import PICTURES, Blend, Learner, assert_comes_back, encoder, perceiver

pytestmark = pytest.mark.no_shape_checks


def test_a_part_that_is_used_twice_is_one_part_again(tmp_path):
    where = positions.LearnedGrid((5, 7), 3)
    image = adapters.Image(positions=where, stem=partial(adapters.ConvStem, dim=5))
    model = perceiver(adapters.PerRead([image, adapters.Image(5, positions=where), image]), num_reads=3, share=False)
    again = assert_comes_back(model, (PICTURES, torch.rand(2, 5, 7, 3), PICTURES), tmp_path)
    one, two, three = again.adapter.adapters
    assert one is three and one.positions is two.positions and one is not two
    assert len(list(again.parameters())) == len(list(model.parameters()))
    names = load_file(tmp_path / "model.safetensors")
    assert [name for name in names if "vectors" in name] == ["adapter.adapters.0.positions.vectors"]


@pytest.mark.parametrize("shared, count", [(True, 1), (False, 4)], ids=["shared", "copied"])
def test_a_module_in_a_partial_is_shared_by_all_blocks_only_where_it_was(shared, count, tmp_path):
    rotary = pc.sharing.Shared(Learner()) if shared else Learner()
    block = partial(pc.SelfAttend, attention=partial(pc.MultiHeadAttention, rotary=rotary))
    model = encoder(num_reads=2, depth=2, share=False, latent_transformer=partial(pc.LatentTransformer, block=block))
    again = assert_comes_back(model, torch.rand(2, 17, 11), tmp_path)
    for encoder_ in (model, again):
        assert len({id(m) for m in encoder_.modules() if isinstance(m, Learner)}) == count
        named = [*encoder_.named_parameters(remove_duplicate=False), *encoder_.named_buffers(remove_duplicate=False)]
        for tensor in ("slope", "steps"):
            assert len([name for name, _ in named if tensor in name]) == 4
            assert len({id(x) for name, x in named if tensor in name}) == count


def test_two_partials_share_a_module(tmp_path):
    shared = pc.sharing.Shared(Learner())
    attention = partial(pc.MultiHeadAttention, rotary=shared)
    process = partial(pc.LatentTransformer, block=partial(pc.SelfAttend, attention=attention))
    read = partial(pc.CrossAttend, attention=partial(pc.MultiHeadAttention, rotary=shared))
    again = assert_comes_back(
        encoder(cross_attention=read, latent_transformer=process), torch.rand(2, 17, 11), tmp_path
    )
    assert again.reads[0].attention.rotary is again.transformers[0].blocks[0].attention.rotary
    assert [name for name in load_file(tmp_path / "model.safetensors") if "slope" in name] == [
        "reads.0.attention.rotary.slope"
    ]


def test_weights_that_a_constructor_ties_stay_tied(tmp_path):
    again = assert_comes_back(Blend(5, tied=True), torch.rand(2, 5), tmp_path)
    assert again.a.weight is again.b.weight
    assert len(list(again.parameters())) == 3


def test_weights_that_are_untied_or_tied_by_hand_are_refused(tmp_path):
    untied, tied, shared = Blend(5, tied=True), Blend(5), Blend(5)
    untied.b.weight = nn.Parameter(untied.b.weight.detach().clone())
    tied.b.weight = tied.a.weight
    shared.b.weight = nn.Parameter(shared.a.weight.detach().t())
    for model, message in [
        (untied, r"b\.weight and a\.weight are two tensors, not one"),
        (tied, r"b\.weight and a\.weight are one tensor, not two"),
        (shared, r"[ab]\.weight and [ab]\.weight share memory but are two tensors, so their tie would be lost"),
    ]:
        with pytest.raises(ValueError, match=message):
            pc.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_empty_tensors_share_nothing(tmp_path):
    model = Blend(5)
    model.inner.register_buffer("nothing", torch.zeros(0))
    with pytest.raises(ValueError, match=r"unknown \['inner\.nothing'\]"):
        pc.save(model, tmp_path)
    assert_comes_back(Blend(5, inner=Empty()), torch.rand(2, 5), tmp_path)


@registry.register
class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("nothing", torch.zeros(0, 3))

    def forward(self, x):
        return x


def test_neighbors_in_one_memory_are_not_tied(tmp_path):
    model = Blend(5)
    flat = torch.rand(50)
    model.a.weight = nn.Parameter(flat[:25].unflatten(0, (5, 5)))
    model.b.weight = nn.Parameter(flat[25:].unflatten(0, (5, 5)))
    assert_comes_back(model, torch.rand(2, 5), tmp_path)
