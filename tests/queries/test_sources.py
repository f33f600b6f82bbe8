"""Sources of queries: what each asks, and that asking some is a part of asking all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import Tokens, queries
from perceiver_core.positions import Fourier, LearnedEmbedding, LearnedGrid, Projected
from perceiver_core.queries import Coordinates, FromInputs, Grid, Multimodal

EXACT = {"rtol": 0, "atol": 1e-12}


def fourier(axes: int) -> Fourier:
    return Fourier(num_axes=axes, num_bands=3, max_resolution=11)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check_some(source: nn.Module, tokens: Tokens | None, count: int) -> None:
    """`at` gives the same rows as all of them, for all samples or each its own."""
    asked = source(tokens)
    assert asked.shape[1:] == (count, source.dim)
    one = torch.tensor([count - 1, 0, count // 2, 0])
    torch.testing.assert_close(source(tokens, query_indices=one), asked[:, one], **EXACT)
    each = torch.stack([one, (one + 1) % count])
    rows = asked.expand(2, -1, -1)
    wanted = torch.stack([row[a] for row, a in zip(rows, each, strict=True)])
    torch.testing.assert_close(source(tokens, query_indices=each), wanted, **EXACT)


class TestLearned:
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_its_vectors(self, count):
        source = queries.Learned(count, dim=5)
        assert torch.equal(source()[0], source.vectors) and source().shape == (1, count, 5)
        check_some(source, None, count)

    def test_gradients_reach_those_that_are_asked(self):
        source = queries.Learned(7, dim=5)
        source(query_indices=torch.tensor([[1, 1], [1, 4]])).sum().backward()
        assert source.vectors.grad[:, 0].tolist() == [0, 3, 0, 0, 1, 0, 0]


GRIDS = {
    "line": ((7,), fourier(1)),
    "picture": ((5, 7), fourier(2)),
    "film": ((2, 5, 3), fourier(3)),
    "one point": ((1, 1), fourier(2)),
    "one row": ((1, 7), fourier(2)),
    "learned line": ((7,), LearnedGrid((7,), dim=4)),
    "learned picture": ((5, 7), LearnedGrid((5, 7), dim=4)),
    "learned film, resampled": ((2, 5, 3), LearnedGrid((3, 2, 2), dim=4)),
    "up to": ((7,), LearnedEmbedding(11, dim=4)),
    "projected": ((5, 7), Projected(fourier(2), dim=4)),
}


class TestOnGrid:
    @pytest.mark.parametrize("grid, where", GRIDS.values(), ids=GRIDS)
    @pytest.mark.parametrize("own", [True, False])
    def test_the_positions_of_the_grid_the_last_axis_fastest(self, grid, where, own):
        source = Grid(grid if own else None, where)
        tokens = Tokens(drawn(2, *(grid if not own else (2,) * len(grid)), 3))
        like = tokens.content
        wanted = Tokens(torch.zeros(1, *grid, 1), position_tables=where.tables(grid, like)).materialize()[..., 1:]
        torch.testing.assert_close(source(tokens), wanted, **EXACT)
        check_some(source, tokens, torch.Size(grid).numel())

    @pytest.mark.parametrize("grid", [(7,), (5, 7), (2, 5, 3), (1, 1)])
    def test_points_at_the_left_of_their_cells(self, grid):
        where = fourier(len(grid))
        source, count = Grid(grid, where, endpoint=False), torch.Size(grid).numel()
        at = torch.randint(count, (2, 11), generator=torch.Generator().manual_seed(0))
        indices = torch.stack(torch.unravel_index(at, grid), -1)
        wanted = where(2 * indices / torch.tensor(grid) - 1)
        torch.testing.assert_close(source(query_indices=at), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(source(query_indices=at[0]), wanted[:1], rtol=0, atol=1e-6)
        torch.testing.assert_close(source(), Grid(grid, where)(), **EXACT)  # all of them stand on the grid

    def test_it_takes_the_dtype_of_the_tokens(self):
        tokens = Tokens(torch.zeros(1, 5, 3, dtype=torch.float64))
        assert Grid(None, fourier(1))(tokens).dtype == torch.float64
        assert Grid((5,), fourier(1))(tokens, query_indices=torch.tensor([2])).dtype == torch.float64
        assert Grid((5,), fourier(1), endpoint=False)(tokens, query_indices=torch.tensor([2])).dtype == torch.float64

    def test_gradients_reach_a_learned_grid(self):
        where = LearnedGrid((5, 7), dim=3)
        Grid((5, 7), where)(query_indices=torch.tensor([[8, 8, 34]])).sum().backward()
        assert where.vectors.grad[..., 0].nonzero().tolist() == [[1, 1], [4, 6]]
        assert where.vectors.grad[1, 1, 0] == 2

    def test_a_short_text_is_asked_at_its_own_places(self):
        where = LearnedEmbedding(11, dim=3)
        tokens = pc.adapters.TokenEmbedding(13, dim=5)(torch.zeros(2, 4, dtype=torch.long))
        assert torch.equal(Grid(None, where)(tokens)[0], where.vectors[:4])


class TestCoordinates:
    def test_features_of_any_points(self):
        source, points = Coordinates(fourier(2)), drawn(3, 7, 2).clamp(-1, 1)
        assert source.dim == fourier(2).dim
        torch.testing.assert_close(source(points=points), fourier(2)(points), **EXACT)
        torch.testing.assert_close(source(points=points[0]), fourier(2)(points[:1]), **EXACT)

    def test_on_the_points_of_a_grid_they_are_those_of_the_grid(self):
        points = pc.positions.grid_points((5, 7), torch.zeros(())).flatten(0, 1)
        torch.testing.assert_close(
            Coordinates(fourier(2))(points=points), Grid((5, 7), fourier(2))(), rtol=0, atol=1e-6
        )

    def test_gradients_reach_the_points(self):
        points = drawn(1, 3, 1).double().clamp(-0.9, 0.9).requires_grad_()
        assert torch.autograd.gradcheck(lambda at: Coordinates(fourier(1))(points=at), points)


class TestFromInputs:
    def test_tokens_written_out(self):
        where = fourier(2)
        tokens = Tokens(drawn(2, 5, 7, 3), position_tables=where.tables((5, 7), torch.zeros(())))
        source = FromInputs(tokens.dim)
        torch.testing.assert_close(source(tokens), tokens.materialize(), **EXACT)
        torch.testing.assert_close(source(tokens.materialize()), tokens.materialize(), **EXACT)
        at = torch.tensor([[34, 0, 3], [1, 1, 2]])
        wanted = torch.stack([x[a] for x, a in zip(tokens.materialize(), at, strict=True)])
        torch.testing.assert_close(source(tokens, query_indices=at), wanted, **EXACT)
        torch.testing.assert_close(source(tokens, query_indices=at[0]), tokens.materialize()[:, at[0]], **EXACT)


class TestMultimodal:
    def test_each_kind_is_padded_by_its_own_vector(self):
        source = Multimodal(
            {"label": queries.Learned(1, 5), "places": Grid((5, 7), fourier(2))}, min_modality_channels=3
        )
        asked = source()
        width = fourier(2).dim
        assert source.dim == width + 3 and list(asked) == ["label", "places"]
        assert asked["label"].shape == (1, 1, source.dim) and asked["places"].shape == (1, 35, source.dim)
        torch.testing.assert_close(asked["label"][0, :, :5], source.sources["label"].vectors, **EXACT)
        for name, own in (("label", 5), ("places", width)):
            padding = asked[name][..., own:]
            torch.testing.assert_close(padding, source.padding[name].expand_as(padding), **EXACT)

    def test_some_of_a_kind_and_all_of_the_others(self):
        source = Multimodal({"label": queries.Learned(3, 5), "places": Grid((5, 7), fourier(2))})
        at = torch.tensor([[34, 2], [0, 1]])
        asked, whole = source(query_indices={"places": at}), source()
        torch.testing.assert_close(asked["label"], whole["label"], **EXACT)
        torch.testing.assert_close(asked["places"], whole["places"][0][at], **EXACT)

    @pytest.mark.parametrize("empty", [[], (), torch.zeros(0).long(), torch.zeros(2, 0).long()], ids=repr)
    def test_nothing_is_asked_of_a_kind_that_is_given_nothing(self, empty):
        source = Multimodal({"label": queries.Learned(3, 5), "places": Grid((5, 7), fourier(2))})
        asked = source(query_indices={"places": empty})
        assert list(asked) == ["label"]
        torch.testing.assert_close(asked["label"], source()["label"], **EXACT)
        assert list(source(query_indices={"places": None})) == ["label", "places"]
        with pytest.raises(ValueError, match=r"query_indices must leave some queries; .* all of \['label', 'places'\]"):
            source(query_indices={"places": empty, "label": empty})

    def test_a_source_of_the_name_of_a_kind_looks_at_this_kind(self):
        picture, text = Tokens(drawn(2, 5, 7, 3)), Tokens(drawn(2, 9, 4))
        both = Tokens(drawn(2, 44, 6), modalities={"picture": picture, "text": text, "sound": None})
        source = Multimodal(
            {
                "picture": Grid(None, fourier(2)),
                "text": FromInputs(4),
                "sound": queries.Learned(2, 3),
                "all": FromInputs(6),
            }
        )
        asked = source(both, query_indices={"picture": torch.tensor([34])})
        torch.testing.assert_close(asked["picture"][..., : fourier(2).dim], Grid((5, 7), fourier(2))()[:, 34:])
        torch.testing.assert_close(asked["text"][..., :4], text.materialize(), **EXACT)
        torch.testing.assert_close(asked["all"][..., :6], both.materialize(), **EXACT)

    @pytest.mark.parametrize("source", [Grid(None, fourier(1)), FromInputs(3)], ids=lambda one: type(one).__name__)
    def test_places_of_a_kind_that_is_not_there_cannot_be_asked_for(self, source):
        tokens = Tokens(drawn(2, 5, 3), modalities={"sound": None, "text": Tokens(drawn(2, 5, 3))})
        both = Multimodal({"sound": source, "text": FromInputs(3)})
        with pytest.raises(ValueError, match=r"queries\['sound'\] need the tokens of an absent input"):
            both(tokens)
        assert list(both(tokens, query_indices={"sound": []})) == ["text"]

    def test_batches_must_meet(self):
        source = Multimodal({"a": queries.External(3), "b": queries.External(3), "c": queries.External(3)})
        at = {"a": drawn(1, 5, 3), "b": drawn(2, 5, 3), "c": drawn(2, 4, 3)}
        assert {name: len(asked) for name, asked in source(query_indices=at).items()} == {"a": 1, "b": 2, "c": 2}
        with pytest.raises(ValueError, match=r"queries must have one batch size, .*; got {'a': 1, 'b': 2, 'c': 3}"):
            source(query_indices=at | {"c": drawn(3, 4, 3)})


AT = torch.tensor([0])
REFUSED = {
    "too far": (
        queries.Learned(3, 2),
        torch.tensor([0, 3]),
        ValueError,
        r"query_indices must lie in 0 \.\.\. 2; got 3",
    ),
    "negative": (queries.Learned(3, 2), torch.tensor([-1]), ValueError, "got -1"),
    "fractions": (
        queries.Learned(3, 2),
        torch.tensor([0.5]),
        TypeError,
        "query_indices must be indices, an integer tensor",
    ),
    "a mask": (queries.Learned(3, 2), torch.ones(3).bool(), TypeError, "query_indices must be indices"),
    "a list": (queries.Learned(3, 2), [0, 1], TypeError, "got list"),
    "none": (
        queries.Learned(3, 2),
        torch.zeros(0).long(),
        ValueError,
        "query_indices must be q or b q indices, one at least",
    ),
    "a scalar": (queries.Learned(3, 2), torch.tensor(1), ValueError, "query_indices must be q or b q"),
    "off the grid": (Grid((5, 7), fourier(2)), torch.tensor([35]), ValueError, r"0 \.\.\. 34; got 35"),
    "left of the grid": (Grid((5, 7), fourier(2), endpoint=False), torch.tensor([35]), ValueError, r"0 \.\.\. 34"),
    "no grid": (Grid(None, fourier(2)), AT, ValueError, "tokens must be Tokens, whose grid is used"),
    "no points": (Coordinates(fourier(2)), None, ValueError, "points must be points in"),
    "points of three": (Coordinates(fourier(2)), torch.zeros(5, 3), ValueError, "points must be q 2 or b q 2"),
    "whole points": (Coordinates(fourier(2)), torch.zeros(5, 2).long(), TypeError, "points must be floating point"),
    "no dictionary": (Multimodal({"a": queries.Learned(3, 2)}), AT, TypeError, r"by modality, of \['a'\]; got Tensor"),
    "an empty tensor": (
        Multimodal({"a": queries.Learned(3, 2)}),
        AT[:0],
        TypeError,
        "query_indices must be a dictionary by modality",
    ),
    "far in a kind": (
        Multimodal({"a": queries.Learned(3, 2)}),
        {"a": AT + 3},
        ValueError,
        r"queries\['a'\]: query_indices must",
    ),
    "another kind": (Multimodal({"a": queries.Learned(3, 2)}), {"b": AT}, ValueError, r"query_indices names \['b'\]"),
}


@pytest.mark.parametrize("source, at, kind, message", REFUSED.values(), ids=REFUSED)
def test_refused_questions(source, at, kind, message):
    with pytest.raises(kind, match=message):
        source(None, at)


def test_refused_settings():
    with pytest.raises(ValueError, match="grid must have 2 axes of at least one token"):
        Grid((5,), fourier(2))
    with pytest.raises(TypeError, match="positions must have dim and num_axes and take points"):
        Coordinates(nn.Identity())
    with pytest.raises(TypeError, match=r"take points, as .*; got LearnedGrid"):
        Coordinates(LearnedGrid((5,), 3))
    with pytest.raises(TypeError, match=r"take points, as .*; got LearnedEmbedding"):
        Coordinates(LearnedEmbedding(5, 3))
    with pytest.raises(ValueError, match="num_queries must be a whole number of at least 1; got 0"):
        queries.Learned(0, 3)
    with pytest.raises(ValueError, match="tokens must have 3 features"):
        FromInputs(3)(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="sources must name a source of queries at least"):
        Multimodal({})
    with pytest.raises(TypeError, match="positions must have dim and num_axes and take points"):
        Grid((5,), LearnedGrid((5,), 3), endpoint=False)


@pytest.mark.parametrize(
    "source",
    [
        queries.Learned(3, 2),
        Grid((5, 7), LearnedGrid((5, 7), 3)),
        Grid(None, fourier(2), endpoint=False),
        Coordinates(fourier(2)),
        FromInputs(3),
        Multimodal({"a": queries.Learned(3, 2), "b": Grid((5, 7), fourier(2))}, min_modality_channels=3),
    ],
    ids=lambda source: type(source).__name__,
)
def test_they_are_saved_and_loaded(source, tmp_path):
    again, tokens = pc.load(pc.save(source, tmp_path)), Tokens(drawn(2, 5, 7, 3))
    at = torch.zeros(1, 4, 2) if isinstance(source, Coordinates) else None
    torch.testing.assert_close(again(tokens, at), source(tokens, at), **EXACT)
