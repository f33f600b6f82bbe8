"""Queries of several modalities."""

from __future__ import annotations

import pytest
import torch

from perceiver_core import Tokens, queries
from perceiver_core.queries import FromInputs, Grid, Multimodal
from tests.queries.cases import EXACT, drawn, fourier


class TestMultimodal:
    def test_each_modality_is_padded_by_its_own_vector(self):
        source = Multimodal(
            {"label": queries.Learned(1, 5), "places": Grid((5, 7), fourier(2))}, min_modality_channels=3
        )
        queried = source()
        width = fourier(2).dim
        assert source.dim == width + 3 and list(queried) == ["label", "places"]
        assert queried["label"].shape == (1, 1, source.dim) and queried["places"].shape == (1, 35, source.dim)
        torch.testing.assert_close(queried["label"][0, :, :5], source.sources["label"].vectors, **EXACT)
        for name, own in (("label", 5), ("places", width)):
            padding = queried[name][..., own:]
            torch.testing.assert_close(padding, source.padding[name].expand_as(padding), **EXACT)

    def test_indices_select_queries_of_one_modality(self):
        source = Multimodal({"label": queries.Learned(3, 5), "places": Grid((5, 7), fourier(2))})
        at = torch.tensor([[34, 2], [0, 1]])
        queried, whole = source(query_indices={"places": at}), source()
        torch.testing.assert_close(queried["label"], whole["label"], **EXACT)
        torch.testing.assert_close(queried["places"], whole["places"][0][at], **EXACT)

    @pytest.mark.parametrize("empty", [[], (), torch.zeros(0).long(), torch.zeros(2, 0).long()], ids=repr)
    def test_a_modality_without_indices_is_not_queried(self, empty):
        source = Multimodal({"label": queries.Learned(3, 5), "places": Grid((5, 7), fourier(2))})
        queried = source(query_indices={"places": empty})
        assert list(queried) == ["label"]
        torch.testing.assert_close(queried["label"], source()["label"], **EXACT)
        assert list(source(query_indices={"places": None})) == ["label", "places"]
        with pytest.raises(ValueError, match=r"query_indices must leave some.*;.* all of \['label', 'places'\]"):
            source(query_indices={"places": empty, "label": empty})

    def test_a_batch_of_no_samples_keeps_all_modalities(self):
        source = Multimodal({"vectors": queries.External(4), "places": Grid((5,), fourier(1))})
        given = {"vectors": torch.zeros(0, 3, 4), "places": torch.zeros(0, 2).long()}
        assert {name: tuple(x.shape[:2]) for name, x in source(query_indices=given).items()} == {
            "vectors": (0, 3),
            "places": (0, 2),
        }
        given = {"vectors": torch.zeros(2, 0, 4)}
        assert list(source(query_indices=given)) == ["places"]

    def test_queries_named_like_a_modality_use_its_tokens(self):
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
        queried = source(both, query_indices={"picture": torch.tensor([34])})
        torch.testing.assert_close(queried["picture"][..., : fourier(2).dim], Grid((5, 7), fourier(2))()[:, 34:])
        torch.testing.assert_close(queried["text"][..., :4], text.materialize(), **EXACT)
        torch.testing.assert_close(queried["all"][..., :6], both.materialize(), **EXACT)

    @pytest.mark.parametrize("source", [Grid(None, fourier(1)), FromInputs(3)], ids=lambda one: type(one).__name__)
    def test_querying_an_absent_modality_raises(self, source):
        tokens = Tokens(drawn(2, 5, 3), modalities={"sound": None, "text": Tokens(drawn(2, 5, 3))})
        both = Multimodal({"sound": source, "text": FromInputs(3)})
        with pytest.raises(ValueError, match=r"queries\['sound'\] need the tokens of an absent input"):
            both(tokens)
        assert list(both(tokens, query_indices={"sound": []})) == ["text"]

    @pytest.mark.refusal
    def test_different_batch_sizes_raise(self):
        source = Multimodal({"a": queries.External(3), "b": queries.External(3), "c": queries.External(3)})
        at = {"a": drawn(1, 5, 3), "b": drawn(2, 5, 3), "c": drawn(2, 4, 3)}
        assert {name: len(queried) for name, queried in source(query_indices=at).items()} == {"a": 1, "b": 2, "c": 2}
        with pytest.raises(ValueError, match=r"queries must have one batch size, .*; got {'a': 1, 'b': 2, 'c': 3}"):
            source(query_indices=at | {"c": drawn(3, 4, 3)})
