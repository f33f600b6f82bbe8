"""Heads of decoder outputs against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.heads import Grid, Linear, Multimodal, SingleQuery, Unpatchify, Waveform

EXACT = {"rtol": 0, "atol": 1e-12}
DIM = 13


def answers(queries: int, dim: int = DIM) -> Tensor:
    return torch.randn(2, queries, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("queries", [1, 7])
def test_values_are_a_linear_layer(queries):
    head = Linear(DIM, out_dim=3).double()
    expected = F.linear(answers(queries), head.values.weight, head.values.bias)
    torch.testing.assert_close(head(answers(queries)), expected, **EXACT)


def test_a_single_query_has_no_query_axis():
    torch.testing.assert_close(SingleQuery()(answers(1)), answers(1)[:, 0], **EXACT)
    head = Linear(DIM, out_dim=3).double()
    torch.testing.assert_close(SingleQuery(head)(answers(1)), head(answers(1))[:, 0], **EXACT)


@pytest.mark.parametrize(("queries", "patch"), [(7, 5), (1, 3), (11, 1)])
def test_samples_are_concatenated_patches(queries, patch):
    head = Waveform(DIM, patch_size=patch).double()
    sound = head(answers(queries))
    assert sound.shape == (2, queries * patch)
    for q in (0, queries // 2, queries - 1):
        piece = F.linear(answers(queries)[:, q], head.samples.weight, head.samples.bias)
        torch.testing.assert_close(sound[:, q * patch : (q + 1) * patch], piece, **EXACT)


def test_samples_invert_audio_patches():
    sound = torch.randn(2, 35, dtype=torch.float64)
    head = Waveform(5, patch_size=5).double()
    with torch.no_grad():
        head.samples.weight.copy_(torch.eye(5))
    torch.testing.assert_close(
        head(pc.adapters.Audio(patch_size=5, positions=None)(sound).materialize()), sound, **EXACT
    )


@pytest.mark.parametrize("grid", [(7,), (5, 7), (2, 5, 3), (1, 1)])
def test_outputs_are_placed_on_the_grid(grid):
    count = torch.Size(grid).numel()
    actual = Grid(grid, scale=0.5)(answers(count, 3))
    assert actual.shape == (2, 3, *grid)
    torch.testing.assert_close(actual.flatten(2).mT, answers(count, 3) * 0.5, **EXACT)


@pytest.mark.parametrize("count", [1, 11, 35])
def test_selected_points_stay_a_list(count):
    actual = Grid((5, 7), scale=2.0)(answers(count, 3), query_inputs=torch.randint(35, (count,)))
    torch.testing.assert_close(actual, 2 * answers(count, 3), **EXACT)


@pytest.mark.parametrize(("channels", "shape"), [(1, (2, 3, 4, 5, 7)), (2, (2, 4, 3, 5, 7)), (-1, (2, 4, 5, 7, 3))])
def test_the_channel_axis_can_be_chosen(channels, shape):
    head = Grid((4, 5, 7), head=Linear(DIM, 3), channel_axis=channels).double()
    actual = head(answers(140))
    assert actual.shape == shape
    torch.testing.assert_close(actual.movedim(channels, -1).flatten(1, 3), head.head(answers(140)), **EXACT)


def test_the_grid_may_come_with_the_outputs():
    head = Grid(None)
    for grid in ((5, 7), (7, 5), (35,)):
        torch.testing.assert_close(head(answers(35, 3), grid=grid), Grid(grid)(answers(35, 3)), **EXACT)
    with pytest.raises(ValueError, match="grid must be passed to Grid or with the outputs"):
        head(answers(35, 3))


@pytest.mark.refusal
def test_outputs_of_another_grid_raise():
    with pytest.raises(ValueError, match=r"outputs are on a grid \(7, 5\), and this head makes \(5, 7\)"):
        Grid((5, 7))(answers(35, 3), grid=(7, 5))
    with pytest.raises(ValueError, match=r"outputs must be b 35 c, one for each point of \(5, 7\)"):
        Grid((5, 7))(answers(34, 3))
    with pytest.raises(ValueError, match="channel_axis must be an axis"):
        Grid((5, 7), channel_axis=4)


PICTURES = {"pictures": ((4, 5), (2, 3), (2, 3, 8, 15)), "films": ((2, 4, 5), (3, 1, 2), (2, 6, 3, 4, 10))}


@pytest.mark.parametrize(("grid", "size", "shape"), PICTURES.values(), ids=PICTURES)
def test_patches_return_to_their_positions(grid, size, shape):
    pixels = torch.randn(shape, dtype=torch.float64)
    width = 3 * torch.Size(size).numel()
    head = Unpatchify(width, grid=grid, patch_size=size).double()
    with torch.no_grad():
        head.patches.head.values.weight.copy_(torch.eye(width))
    torch.testing.assert_close(head(head.cut(pixels)), pixels, **EXACT)
    some = torch.tensor([3, 0, 17])
    torch.testing.assert_close(head(head.cut(pixels)[:, some], query_inputs=some), head.cut(pixels)[:, some], **EXACT)
    torch.testing.assert_close(Unpatchify.forward(head, head.cut(pixels), grid=grid), pixels, **EXACT)


def test_a_patch_equals_a_slice_of_the_image():
    picture = torch.arange(2 * 6 * 4.0).view(1, 2, 6, 4)
    cut = Unpatchify(1, grid=None, patch_size=(3, 2), num_channels=2).cut(picture)
    torch.testing.assert_close(cut[0, 3], picture[0, :, 3:, 2:].permute(1, 2, 0).flatten())


@pytest.mark.refusal
def test_invalid_patches_raise():
    with pytest.raises(ValueError, match="size must have two axes, for images, or three, for videos"):
        Unpatchify(3, grid=None, patch_size=(2,))
    with pytest.raises(ValueError, match="grid must have the number of axes of patch_size, 2"):
        Unpatchify(3, grid=(2,), patch_size=(2, 2))
    with pytest.raises(ValueError, match=r"pixels must be b c h w of 3 channels and whole patches \(2, 2\)"):
        Unpatchify(3, grid=None, patch_size=(2, 2)).cut(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="of 3 channels"):
        Unpatchify(3, grid=None, patch_size=(2, 2)).cut(torch.zeros(1, 1, 4, 4))


def test_stereo_is_two_waveforms():
    head = Waveform(DIM, patch_size=5, num_channels=2).double()
    actual, flat = head(answers(7)), head.samples(answers(7))
    assert actual.shape == (2, 2, 35)
    torch.testing.assert_close(actual[:, 1, 10:15], flat[:, 2, 1::2], **EXACT)
    sound = torch.randn(2, 2, 35, dtype=torch.float64)
    undone = Waveform(10, patch_size=5, num_channels=2).double()
    with torch.no_grad():
        undone.samples.weight.copy_(torch.eye(10))
    tokens = pc.adapters.Audio(patch_size=5, num_channels=2, positions=None)(sound).materialize()
    torch.testing.assert_close(undone(tokens), sound, **EXACT)


def test_each_modality_has_its_head():
    torch.manual_seed(0)
    head = Multimodal(
        {"sound": Waveform(DIM, patch_size=3), "label": SingleQuery(Linear(DIM, 5)), "flow": Grid((5, 7))}
    ).double()
    given = {"flow": answers(35), "sound": answers(7), "label": answers(1)}
    actual = head(given)
    assert list(actual) == list(given)
    for name, answer in given.items():
        torch.testing.assert_close(actual[name], head.heads[name](answer), **EXACT)
    assert list(head({"label": answers(1)})) == ["label"]


def test_heads_know_their_input_width():
    assert Multimodal({"a": SingleQuery(Linear(DIM, 3)), "b": Grid((5, 7)), "c": Waveform(DIM, 3)}).dim == DIM
    assert (
        SingleQuery(Linear(DIM, 3)).dim == DIM
        and SingleQuery().dim is None
        and Multimodal({"a": SingleQuery()}).dim is None
    )
    text = pc.adapters.TokenEmbedding(vocab_size=11, dim=DIM)
    assert pc.heads.Logits(text).dim == pc.heads.TiedLogits(text).dim == DIM


@pytest.mark.parametrize(
    "head",
    [Linear(DIM, 3), SingleQuery(), SingleQuery(Linear(DIM, 3)), Waveform(DIM, 3), Grid((1, 1), scale=2.0)],
    ids=repr,
)
def test_heads_are_saved_and_loaded(head, tmp_path):
    given = answers(1).float()
    for one in (head, Multimodal({"one": head})):
        queried = {"one": given} if isinstance(one, Multimodal) else given
        again = pc.load(pc.save(one, tmp_path / type(one).__name__))
        torch.testing.assert_close(again(queried), one(queried), **EXACT)


@pytest.mark.refusal
def test_invalid_outputs_and_sizes_raise():
    with pytest.raises(ValueError, match=r"outputs must be one per sample, b 1 d; got shape \(2, 3, 13\)"):
        SingleQuery()(answers(3))
    with pytest.raises(ValueError, match=r"outputs names \['smell'\]; the modalities are \['label'\]"):
        Multimodal({"label": SingleQuery()})({"smell": answers(1)})
    with pytest.raises(ValueError, match=r"outputs\['label'\]: outputs must be one per sample"):
        Multimodal({"label": SingleQuery()})({"label": answers(3)})
    with pytest.raises(ValueError, match="heads must hold a head at least; got none"):
        Multimodal({})
    with pytest.raises(ValueError, match=r"heads must take outputs of one width.*; they take {'a': 13, 'b': 5}"):
        Multimodal({"a": Linear(DIM, 3), "b": SingleQuery(Linear(5, 3)), "c": SingleQuery()})
    with pytest.raises(ValueError, match="out_dim must be a whole number of at least 1; got 0"):
        Linear(DIM, 0)
    with pytest.raises(ValueError, match="patch_size must be a whole number of at least 1; got 0"):
        Waveform(DIM, 0)
    with pytest.raises(ValueError, match=r"grid\[1\] must be a whole number of at least 1; got 0"):
        Grid((5, 0))
