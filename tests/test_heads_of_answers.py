"""Heads of answers against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.heads import Multimodal, OnGrid, Only, Patches, Samples, Values

EXACT = {"rtol": 0, "atol": 1e-12}
DIM = 13


def answers(queries: int, dim: int = DIM) -> Tensor:
    return torch.randn(2, queries, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("queries", [1, 7])
def test_values_are_a_linear_layer(queries):
    head = Values(DIM, values=3).double()
    wanted = F.linear(answers(queries), head.values.weight, head.values.bias)
    torch.testing.assert_close(head(answers(queries)), wanted, **EXACT)


def test_the_only_answer_has_no_axis_of_queries():
    torch.testing.assert_close(Only()(answers(1)), answers(1)[:, 0], **EXACT)
    head = Values(DIM, values=3).double()
    torch.testing.assert_close(Only(head)(answers(1)), head(answers(1))[:, 0], **EXACT)


@pytest.mark.parametrize(("queries", "patch"), [(7, 5), (1, 3), (11, 1)])
def test_samples_are_pieces_one_after_the_other(queries, patch):
    head = Samples(DIM, patch=patch).double()
    sound = head(answers(queries))
    assert sound.shape == (2, queries * patch)
    for q in (0, queries // 2, queries - 1):
        piece = F.linear(answers(queries)[:, q], head.samples.weight, head.samples.bias)
        torch.testing.assert_close(sound[:, q * patch : (q + 1) * patch], piece, **EXACT)


def test_samples_undo_the_patches_of_sound():
    sound = torch.randn(2, 35, dtype=torch.float64)
    head = Samples(5, patch=5).double()
    with torch.no_grad():
        head.samples.weight.copy_(torch.eye(5))
    torch.testing.assert_close(head(pc.adapters.Audio(patch=5, positions=None)(sound).dense()), sound, **EXACT)


@pytest.mark.parametrize("grid", [(7,), (5, 7), (2, 5, 3), (1, 1)])
def test_an_answer_stands_at_its_point(grid):
    count = torch.Size(grid).numel()
    found = OnGrid(grid, scale=0.5)(answers(count, 3))
    assert found.shape == (2, 3, *grid)
    torch.testing.assert_close(found.flatten(2).mT, answers(count, 3) * 0.5, **EXACT)


@pytest.mark.parametrize("count", [1, 11, 35])
def test_some_of_the_points_stay_a_list_however_many(count):
    found = OnGrid((5, 7), scale=2.0)(answers(count, 3), at=torch.randint(35, (count,)))
    torch.testing.assert_close(found, 2 * answers(count, 3), **EXACT)


@pytest.mark.parametrize(("channels", "shape"), [(1, (2, 3, 4, 5, 7)), (2, (2, 4, 3, 5, 7)), (-1, (2, 4, 5, 7, 3))])
def test_values_stand_on_an_axis_of_choice(channels, shape):
    head = OnGrid((4, 5, 7), head=Values(DIM, 3), channels=channels).double()
    found = head(answers(140))
    assert found.shape == shape
    torch.testing.assert_close(found.movedim(channels, -1).flatten(1, 3), head.head(answers(140)), **EXACT)


def test_a_grid_may_come_with_the_answers():
    head = OnGrid(None)
    for grid in ((5, 7), (7, 5), (35,)):
        torch.testing.assert_close(head(answers(35, 3), grid=grid), OnGrid(grid)(answers(35, 3)), **EXACT)
    with pytest.raises(ValueError, match="grid must be given, to OnGrid or with the answers"):
        head(answers(35, 3))


def test_answers_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"answers are on a grid \(7, 5\), and this head makes \(5, 7\)"):
        OnGrid((5, 7))(answers(35, 3), grid=(7, 5))
    with pytest.raises(ValueError, match=r"answers must be b 35 c, one for each point of \(5, 7\)"):
        OnGrid((5, 7))(answers(34, 3))
    with pytest.raises(ValueError, match="channels must be an axis"):
        OnGrid((5, 7), channels=4)


PICTURES = {"pictures": ((4, 5), (2, 3), (2, 3, 8, 15)), "films": ((2, 4, 5), (3, 1, 2), (2, 6, 3, 4, 10))}


@pytest.mark.parametrize(("grid", "size", "shape"), PICTURES.values(), ids=PICTURES)
def test_patches_are_put_where_they_were_cut(grid, size, shape):
    pixels = torch.randn(shape, dtype=torch.float64)
    width = 3 * torch.Size(size).numel()
    head = Patches(width, grid=grid, size=size).double()
    with torch.no_grad():
        head.patches.head.values.weight.copy_(torch.eye(width))
    torch.testing.assert_close(head(head.cut(pixels)), pixels, **EXACT)
    some = torch.tensor([3, 0, 17])
    torch.testing.assert_close(head(head.cut(pixels)[:, some], at=some), head.cut(pixels)[:, some], **EXACT)
    torch.testing.assert_close(Patches.forward(head, head.cut(pixels), grid=grid), pixels, **EXACT)


def test_a_patch_is_what_a_slice_of_the_picture_is():
    picture = torch.arange(2 * 6 * 4.0).view(1, 2, 6, 4)
    cut = Patches(1, grid=None, size=(3, 2), channels=2).cut(picture)
    torch.testing.assert_close(cut[0, 3], picture[0, :, 3:, 2:].permute(1, 2, 0).flatten())


def test_refused_patches():
    with pytest.raises(ValueError, match="size must have two axes, of pictures, or three, of films"):
        Patches(3, grid=None, size=(2,))
    with pytest.raises(ValueError, match="grid must have as many axes as size, 2"):
        Patches(3, grid=(2,), size=(2, 2))
    with pytest.raises(ValueError, match=r"pixels must be b c h w of 3 channels and whole patches \(2, 2\)"):
        Patches(3, grid=None, size=(2, 2)).cut(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="of 3 channels"):
        Patches(3, grid=None, size=(2, 2)).cut(torch.zeros(1, 1, 4, 4))


def test_stereo_is_two_waveforms():
    head = Samples(DIM, patch=5, channels=2).double()
    found, flat = head(answers(7)), head.samples(answers(7))
    assert found.shape == (2, 2, 35)
    torch.testing.assert_close(found[:, 1, 10:15], flat[:, 2, 1::2], **EXACT)
    sound = torch.randn(2, 2, 35, dtype=torch.float64)
    undone = Samples(10, patch=5, channels=2).double()
    with torch.no_grad():
        undone.samples.weight.copy_(torch.eye(10))
    tokens = pc.adapters.Audio(patch=5, channels=2, positions=None)(sound).dense()
    torch.testing.assert_close(undone(tokens), sound, **EXACT)


def test_each_kind_has_its_head():
    torch.manual_seed(0)
    head = Multimodal({"sound": Samples(DIM, patch=3), "label": Only(Values(DIM, 5)), "flow": OnGrid((5, 7))}).double()
    given = {"flow": answers(35), "sound": answers(7), "label": answers(1)}
    found = head(given)
    assert list(found) == list(given)
    for name, answer in given.items():
        torch.testing.assert_close(found[name], head.heads[name](answer), **EXACT)
    assert list(head({"label": answers(1)})) == ["label"]


def test_they_say_how_wide_an_answer_is():
    assert Multimodal({"a": Only(Values(DIM, 3)), "b": OnGrid((5, 7)), "c": Samples(DIM, 3)}).dim == DIM
    assert Only(Values(DIM, 3)).dim == DIM and Only().dim is None and Multimodal({"a": Only()}).dim is None
    text = pc.adapters.Ids(vocabulary=11, dim=DIM)
    assert pc.heads.Logits(text).dim == pc.heads.TiedLogits(text).dim == DIM


@pytest.mark.parametrize(
    "head", [Values(DIM, 3), Only(), Only(Values(DIM, 3)), Samples(DIM, 3), OnGrid((1, 1), scale=2.0)], ids=repr
)
def test_they_are_saved_and_loaded(head, tmp_path):
    given = answers(1).float()
    for one in (head, Multimodal({"one": head})):
        asked = {"one": given} if isinstance(one, Multimodal) else given
        again = pc.load(pc.save(one, tmp_path / type(one).__name__))
        torch.testing.assert_close(again(asked), one(asked), **EXACT)


def test_refused_answers_and_sizes():
    with pytest.raises(ValueError, match=r"answers must be one a sample, b 1 d; got shape \(2, 3, 13\)"):
        Only()(answers(3))
    with pytest.raises(ValueError, match=r"answers name \['smell'\]; there are heads for \['label'\]"):
        Multimodal({"label": Only()})({"smell": answers(1)})
    with pytest.raises(ValueError, match=r"answers\['label'\]: answers must be one a sample"):
        Multimodal({"label": Only()})({"label": answers(3)})
    with pytest.raises(ValueError, match="heads must name a head at least; got none"):
        Multimodal({})
    with pytest.raises(ValueError, match=r"heads must take answers of one width.*; they take {'a': 13, 'b': 5}"):
        Multimodal({"a": Values(DIM, 3), "b": Only(Values(5, 3)), "c": Only()})
    with pytest.raises(ValueError, match="values must be a whole number of at least 1; got 0"):
        Values(DIM, 0)
    with pytest.raises(ValueError, match="patch must be a whole number of at least 1; got 0"):
        Samples(DIM, 0)
    with pytest.raises(ValueError, match=r"grid\[1\] must be a whole number of at least 1; got 0"):
        OnGrid((5, 0))
