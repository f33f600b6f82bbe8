"""Decoder: independent queries, chunks, masks, dictionaries, errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import CrossAttend, Decoder, MultiHeadAttention
from perceiver_core.kernels import inverted
from tests.memory import Kept

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def decoder(**options) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(13, query_dim=11, **{"out_dim": 3, **options}).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return made


def outcome(made: Decoder, latents: Tensor, queries: Tensor, **named) -> list[Tensor]:
    answers = made(latents, queries, **named)
    along = drawn(*answers.shape, seed=7).detach()
    return [answers.detach(), *torch.autograd.grad(answers, [latents, queries, *made.parameters()], along)]


def test_it_is_cross_attention_and_a_linear_layer():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    torch.testing.assert_close(made(latents, queries), made.output(made.cross_attention(queries, latents)), **EXACT)
    assert made.cross_attention.residual is False and made.out_dim == 3


def test_the_output_width_defaults_to_the_query_width():
    made = decoder(out_dim=None)
    assert made.out_dim == 11 and made(drawn(2, 7, 13), drawn(2, 5, 11)).shape == (2, 5, 11)


@pytest.mark.parametrize("mlp", [pc.MLP, None], ids=["mlp", "no mlp"])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_and_mlp_belong_to_the_cross_attention(residual, mlp):
    made = decoder(cross_attention=partial(CrossAttend, residual=residual, mlp=mlp))
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    read = made.cross_attention
    expected = read.attention(read.query_norm(queries), read.input_norm(latents))
    expected = expected + queries if residual else expected
    expected = expected if mlp is None else expected + read.mlp(read.mlp_norm(expected))
    torch.testing.assert_close(made(latents, queries), made.output(expected), **EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_chunks_have_no_effect(chunk):
    latents, queries, mask = drawn(2, 7, 13), drawn(2, 11, 11, seed=1), torch.rand(2, 11) < 0.6
    for named in ({}, {"mask": mask}):
        whole, pieces = (outcome(decoder(chunk_size=size), latents, queries, **named) for size in (None, chunk))
        torch.testing.assert_close(pieces, whole, **EXACT)


def test_chunks_keep_only_their_outputs():
    latents = drawn(1, 7, 13)
    kept = {}
    for chunk in (None, 50):
        made, queries = (
            decoder(chunk_size=chunk, cross_attention=partial(CrossAttend, mlp=partial(pc.MLP, widening_factor=8))),
            drawn(1, 2000, 11),
        )
        with Kept() as seen:
            answers = made(latents, queries)
            kept[chunk] = seen.bytes
        assert answers.requires_grad
    assert kept[50] < kept[None] / 10


def test_queries_are_independent():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    whole = made(latents, queries)
    for i in range(5):
        torch.testing.assert_close(made(latents, queries[:, i : i + 1]), whole[:, i : i + 1], **EXACT)


def test_one_set_of_queries_broadcasts_over_samples():
    made, latents, queries = decoder(), drawn(3, 7, 13), drawn(1, 5, 11, seed=1)
    expected = made(latents, queries.expand(3, -1, -1))
    torch.testing.assert_close(made(latents, queries), expected, **EXACT)
    torch.testing.assert_close(made(latents, queries[0]), expected, **EXACT)
    mask = torch.rand(3, 5) < 0.6
    torch.testing.assert_close(made(latents, queries[0], mask=mask), made(latents, queries, mask=mask), **EXACT)


def test_a_masked_query_reads_nothing():
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None)
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    answers = made(latents, queries, mask=mask)
    torch.testing.assert_close(answers[mask], made(latents, queries)[mask], **EXACT)
    torch.testing.assert_close(answers[~mask], made.cross_attention.attention.output.bias.expand(4, -1), **EXACT)


def test_a_dictionary_of_queries_gives_a_dictionary_of_outputs():
    made, latents = decoder(), drawn(2, 7, 13)
    queried = {"flow": drawn(2, 5, 11, seed=1), "label": drawn(1, 1, 11, seed=2), "sound": drawn(3, 11, seed=3)}
    answers = made(latents, queried)
    assert list(answers) == ["flow", "label", "sound"]
    for name, queries in queried.items():
        torch.testing.assert_close(answers[name], made(latents, queries), **EXACT)


@pytest.mark.parametrize("chunk", [None, 4])
def test_each_modality_has_its_mask(chunk):
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None, chunk_size=chunk)
    latents, queried = drawn(2, 7, 13), {"flow": drawn(2, 5, 11, seed=1), "label": drawn(1, 1, 11, seed=2)}
    there = torch.tensor([[True, False, True, True, False], [False] * 5])
    answers = made(latents, queried, mask={"flow": there})
    for name, mask in (("flow", there), ("label", None)):
        torch.testing.assert_close(answers[name], made(latents, queried[name], mask=mask), **EXACT)
    with pytest.raises(ValueError, match=r"mask names \['film'\]; the modalities are \['flow', 'label'\]"):
        made(latents, queried, mask={"film": there})
    with pytest.raises(ValueError, match=r"mask\['flow'\] must have shape \(2, 5\)"):
        made(latents, queried, mask={"flow": there[:, :4]})
    with pytest.raises(TypeError, match="mask must be a dictionary by modality, of"):
        made(latents, queried, mask=there)


def test_shared_queries_with_a_mask_per_sample():
    made, latents, queried = decoder(), drawn(2, 7, 13), {"flow": drawn(5, 11, seed=1)}
    there = torch.tensor([[True, False, True, True, False], [True] * 5])
    actual = made(latents, queried, mask={"flow": there})["flow"]
    torch.testing.assert_close(actual, made(latents, queried["flow"], mask=there), **EXACT)


def test_competing_queries_are_not_chunked():
    slots = partial(CrossAttend, attention=partial(MultiHeadAttention, kernel=partial(inverted)))
    assert Decoder(13, query_dim=11, cross_attention=slots).chunk_size is None
    with pytest.raises(ValueError, match="chunk_size must be None where queries compete for tokens; got 3"):
        Decoder(13, query_dim=11, cross_attention=slots, chunk_size=3)


@pytest.mark.parametrize("heads", [1, 13])
def test_attention_maps_are_those_of_the_cross_attention(heads):
    made, latents, queries = decoder(num_heads=heads), drawn(2, 7, 13), drawn(5, 11, seed=1)
    read = made.cross_attention
    keys = read.attention.key(read.input_norm(latents)).unflatten(-1, (heads, -1)).transpose(1, 2)
    queried = read.attention.query(read.query_norm(queries)).unflatten(-1, (heads, -1)).transpose(0, 1)
    expected = (queried @ keys.mT / (13 // heads) ** 0.5).softmax(-1)
    actual = made.attention_map(latents, queries)
    assert actual.shape == (2, heads, 5, 7)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(made.attention_map(latents, queries[3:4]), expected[:, :, 3:4], **EXACT)
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    actual = made.attention_map(latents, queries, mask=mask)
    torch.testing.assert_close(actual, expected * mask[:, None, :, None], **EXACT)


def test_attention_maps_times_values_are_the_output():
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None)
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    values = made.cross_attention.attention.value(made.cross_attention.input_norm(latents))
    expected = made.cross_attention.attention.output(made.attention_map(latents, queries)[:, 0] @ values)
    torch.testing.assert_close(made(latents, queries), expected, **EXACT)


@pytest.mark.parametrize("chunk", [None, 4])
def test_attention_maps_of_a_dictionary_of_queries(chunk):
    made, latents = decoder(num_heads=13, chunk_size=chunk), drawn(2, 7, 13)
    queried = {"flow": drawn(2, 5, 11, seed=1), "label": drawn(1, 1, 11, seed=2), "sound": drawn(3, 11, seed=3)}
    valid = torch.tensor([[True, False, True, True, False], [True] * 5])
    maps = made.attention_map(latents, queried, mask={"flow": valid})
    assert list(maps) == ["flow", "label", "sound"]
    for name, mask in (("flow", valid), ("label", None), ("sound", None)):
        torch.testing.assert_close(maps[name], made.attention_map(latents, queried[name], mask=mask), **EXACT)


@pytest.mark.refusal
def test_invalid_maps_raise():
    with pytest.raises(ValueError, match="11 features"):
        decoder().attention_map(drawn(2, 7, 13), {"a": drawn(5, 12)})
    with pytest.raises(TypeError, match="mask must be a dictionary by modality, of"):
        decoder().attention_map(drawn(2, 7, 13), {"a": drawn(5, 11)}, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="11 features"):
        decoder().attention_map(drawn(2, 7, 13), drawn(5, 12))


def test_it_is_saved_and_loaded(tmp_path):
    made = Decoder(
        13, query_dim=11, out_dim=3, num_heads=1, cross_attention=partial(CrossAttend, mlp=None), chunk_size=7
    )
    again = pc.load(pc.save(made, tmp_path))
    latents, queries = torch.randn(2, 7, 13), torch.randn(2, 9, 11)
    torch.testing.assert_close(again(latents, queries), made(latents, queries))
    assert again.chunk_size == 7


@pytest.mark.compile
def test_it_compiles():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    torch.testing.assert_close(torch.compile(made, fullgraph=True)(latents, queries), made(latents, queries))


@pytest.mark.refusal
class TestErrors:
    @pytest.mark.parametrize(
        ("queries", "kind", "message"),
        [
            (torch.zeros(2, 5, 12).double(), ValueError, "11 features"),
            (torch.zeros(11).double(), ValueError, r"3 axes \(b q e\); got shape \(11,\)"),
            (torch.zeros(2, 2, 5, 11).double(), ValueError, r"3 axes \(b q e\)"),
            (torch.zeros(3, 5, 11).double(), ValueError, "batch size 1 or that of the latents, 2; got 3"),
            (torch.zeros(2, 5, 11).long(), TypeError, "floating point"),
            (torch.zeros(2, 5, 11), TypeError, "convert one"),
            ({}, ValueError, "empty dictionary"),
            ({"a": None}, TypeError, r"queries\['a'\] must be"),
            ({"a": torch.zeros(3, 5, 11).double()}, ValueError, r"queries\['a'\] must have batch size 1 or"),
        ],
    )
    def test_invalid_queries_raise(self, queries, kind, message):
        with pytest.raises(kind, match=message):
            decoder()(drawn(2, 7, 13), queries)

    @pytest.mark.parametrize("shape", [(7, 13), (2, 7, 12)])
    def test_invalid_latents_raise(self, shape):
        with pytest.raises(ValueError, match="latents must have"):
            decoder()(drawn(*shape), drawn(5, 11))

    def test_invalid_masks_raise(self):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
            decoder()(drawn(2, 7, 13), drawn(2, 5, 11), mask=torch.ones(2, 4, dtype=torch.bool))

    @pytest.mark.parametrize("sizes", [{"dim": 0}, {"query_dim": 0}, {"chunk_size": 0}])
    def test_invalid_sizes_raise(self, sizes):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a whole number"):
            Decoder(**{"dim": 3, "query_dim": 4, **sizes})


def test_a_head_of_identity_by_default():
    assert isinstance(
        pc.PerceiverIO(
            nn.Identity(), pc.Encoder(3, num_latents=2, dim=8), pc.queries.Learned(2, 4), Decoder(8, query_dim=4)
        ).head,
        nn.Identity,
    )
