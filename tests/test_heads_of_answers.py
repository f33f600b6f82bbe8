"""Heads of answers against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core.heads import Multimodal, OnGrid, Only, Samples, Values

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


def test_some_of_the_points_stay_a_list():
    torch.testing.assert_close(OnGrid((5, 7), scale=2.0)(answers(11, 3)), 2 * answers(11, 3), **EXACT)


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
    "head", [Values(DIM, 3), Only(), Only(Values(DIM, 3)), Samples(DIM, 3), OnGrid((5, 7), scale=2.0)], ids=repr
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
