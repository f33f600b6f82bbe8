"""The decoder: each query is answered by itself, in chunks as at once; masks, dictionaries, refusals."""

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


def test_it_is_a_read_and_a_linear_layer():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    torch.testing.assert_close(made(latents, queries), made.output(made.cross_attention(queries, latents)), **EXACT)
    assert made.cross_attention.residual is False and made.out_dim == 3


def test_without_a_width_of_its_own_an_answer_is_as_wide_as_a_query():
    made = decoder(out_dim=None)
    assert made.out_dim == 11 and made(drawn(2, 7, 13), drawn(2, 5, 11)).shape == (2, 5, 11)


@pytest.mark.parametrize("mlp", [pc.MLP, None], ids=["mlp", "no mlp"])
@pytest.mark.parametrize("residual", [False, True])
def test_residual_and_mlp_are_the_reads(residual, mlp):
    made = decoder(cross_attention=partial(CrossAttend, residual=residual, mlp=mlp))
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    read = made.cross_attention
    wanted = read.attention(read.query_norm(queries), read.keys_values(latents, queries=5))
    wanted = wanted + queries if residual else wanted
    wanted = wanted if mlp is None else wanted + read.mlp(read.mlp_norm(wanted))
    torch.testing.assert_close(made(latents, queries), made.output(wanted), **EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_chunks_change_nothing(chunk):
    latents, queries, mask = drawn(2, 7, 13), drawn(2, 11, 11, seed=1), torch.rand(2, 11) < 0.6
    for named in ({}, {"mask": mask}):
        whole, pieces = (outcome(decoder(chunk_size=size), latents, queries, **named) for size in (None, chunk))
        torch.testing.assert_close(pieces, whole, **EXACT)


def test_chunks_keep_no_more_than_their_answers():
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


def test_each_query_is_answered_by_itself():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    whole = made(latents, queries)
    for i in range(5):
        torch.testing.assert_close(made(latents, queries[:, i : i + 1]), whole[:, i : i + 1], **EXACT)


def test_one_set_of_queries_serves_all_samples():
    made, latents, queries = decoder(), drawn(3, 7, 13), drawn(1, 5, 11, seed=1)
    wanted = made(latents, queries.expand(3, -1, -1))
    torch.testing.assert_close(made(latents, queries), wanted, **EXACT)
    torch.testing.assert_close(made(latents, queries[0]), wanted, **EXACT)
    mask = torch.rand(3, 5) < 0.6
    torch.testing.assert_close(made(latents, queries[0], mask=mask), made(latents, queries, mask=mask), **EXACT)


def test_a_query_that_is_not_there_reads_nothing():
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None)
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    answers = made(latents, queries, mask=mask)
    torch.testing.assert_close(answers[mask], made(latents, queries)[mask], **EXACT)
    torch.testing.assert_close(answers[~mask], made.cross_attention.attention.output.bias.expand(4, -1), **EXACT)


def test_a_dictionary_of_queries_gives_one_of_answers():
    made, latents = decoder(), drawn(2, 7, 13)
    asked = {"flow": drawn(2, 5, 11, seed=1), "label": drawn(1, 1, 11, seed=2), "sound": drawn(3, 11, seed=3)}
    answers = made(latents, asked)
    assert list(answers) == ["flow", "label", "sound"]
    for name, queries in asked.items():
        torch.testing.assert_close(answers[name], made(latents, queries), **EXACT)


@pytest.mark.parametrize("chunk", [None, 4])
def test_masks_of_each_kind(chunk):
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None, chunk_size=chunk)
    latents, asked = drawn(2, 7, 13), {"flow": drawn(2, 5, 11, seed=1), "label": drawn(1, 1, 11, seed=2)}
    there = torch.tensor([[True, False, True, True, False], [False] * 5])
    answers = made(latents, asked, mask={"flow": there})
    for name, mask in (("flow", there), ("label", None)):
        torch.testing.assert_close(answers[name], made(latents, asked[name], mask=mask), **EXACT)
    with pytest.raises(ValueError, match=r"mask names \['film'\]; the queries are \['flow', 'label'\]"):
        made(latents, asked, mask={"film": there})
    with pytest.raises(ValueError, match=r"mask\['flow'\] must have shape \(2, 5\)"):
        made(latents, asked, mask={"flow": there[:, :4]})
    with pytest.raises(TypeError, match="mask must be a dictionary by kind, as the queries are"):
        made(latents, asked, mask=there)


def test_one_question_for_all_samples_and_masks_of_each():
    made, latents, asked = decoder(), drawn(2, 7, 13), {"flow": drawn(5, 11, seed=1)}
    there = torch.tensor([[True, False, True, True, False], [True] * 5])
    found = made(latents, asked, mask={"flow": there})["flow"]
    torch.testing.assert_close(found, made(latents, asked["flow"], mask=there), **EXACT)


def test_queries_that_compete_are_asked_at_once():
    slots = partial(CrossAttend, attention=partial(MultiHeadAttention, kernel=partial(inverted)))
    assert Decoder(13, query_dim=11, cross_attention=slots).chunk_size is None
    with pytest.raises(ValueError, match="chunk_size must be None where queries compete for what they read; got 3"):
        Decoder(13, query_dim=11, cross_attention=slots, chunk_size=3)


@pytest.mark.parametrize("heads", [1, 13])
def test_attention_maps_are_those_of_the_read(heads):
    made, latents, queries = decoder(num_heads=heads), drawn(2, 7, 13), drawn(5, 11, seed=1)
    read = made.cross_attention
    keys = read.attention.key(read.input_norm(latents)).unflatten(-1, (heads, -1)).transpose(1, 2)
    asked = read.attention.query(read.query_norm(queries)).unflatten(-1, (heads, -1)).transpose(0, 1)
    wanted = (asked @ keys.mT / (13 // heads) ** 0.5).softmax(-1)
    found = made.attention_map(latents, queries)
    assert found.shape == (2, heads, 5, 7)
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(made.attention_map(latents, queries[3:4]), wanted[:, :, 3:4], **EXACT)
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    found = made.attention_map(latents, queries, mask=mask)
    torch.testing.assert_close(found, wanted * mask[:, None, :, None], **EXACT)


def test_maps_and_values_make_the_answer():
    made = decoder(cross_attention=partial(CrossAttend, residual=False, mlp=None), out_dim=None)
    latents, queries = drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    values = made.cross_attention.attention.value(made.cross_attention.input_norm(latents))
    wanted = made.cross_attention.attention.output(made.attention_map(latents, queries)[:, 0] @ values)
    torch.testing.assert_close(made(latents, queries), wanted, **EXACT)


def test_refused_maps():
    with pytest.raises(TypeError, match=r"queries must be a torch\.Tensor; got dict"):
        decoder().attention_map(drawn(2, 7, 13), {"a": drawn(5, 11)})
    with pytest.raises(ValueError, match="11 features"):
        decoder().attention_map(drawn(2, 7, 13), drawn(5, 12))


def test_it_is_saved_and_loaded(tmp_path):
    made = Decoder(13, query_dim=11, out_dim=3, num_heads=1, cross_attention=partial(CrossAttend, mlp=None), chunk_size=7)
    again = pc.load(pc.save(made, tmp_path))
    latents, queries = torch.randn(2, 7, 13), torch.randn(2, 9, 11)
    torch.testing.assert_close(again(latents, queries), made(latents, queries))
    assert again.chunk_size == 7


@pytest.mark.compile
def test_it_compiles():
    made, latents, queries = decoder(), drawn(2, 7, 13), drawn(2, 5, 11, seed=1)
    torch.testing.assert_close(torch.compile(made, fullgraph=True)(latents, queries), made(latents, queries))


class TestRefusals:
    @pytest.mark.parametrize(
        ("queries", "kind", "message"),
        [
            (torch.zeros(2, 5, 12).double(), ValueError, "11 features"),
            (torch.zeros(11).double(), ValueError, r"3 axes \(b q e\); got shape \(11,\)"),
            (torch.zeros(2, 2, 5, 11).double(), ValueError, r"3 axes \(b q e\)"),
            (torch.zeros(3, 5, 11).double(), ValueError, "batch of 1 or that of the latents, 2; got 3"),
            (torch.zeros(2, 5, 11).long(), TypeError, "floating point"),
            (torch.zeros(2, 5, 11), TypeError, "convert one"),
            ({}, ValueError, "empty dictionary"),
            ({"a": None}, TypeError, r"queries\['a'\] must be"),
            ({"a": torch.zeros(3, 5, 11).double()}, ValueError, r"queries\['a'\] must have a batch of 1 or"),
        ],
    )
    def test_refused_queries(self, queries, kind, message):
        with pytest.raises(kind, match=message):
            decoder()(drawn(2, 7, 13), queries)

    @pytest.mark.parametrize("shape", [(7, 13), (2, 7, 12)])
    def test_refused_latents(self, shape):
        with pytest.raises(ValueError, match="latents must have"):
            decoder()(drawn(*shape), drawn(5, 11))

    def test_refused_masks(self):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
            decoder()(drawn(2, 7, 13), drawn(2, 5, 11), mask=torch.ones(2, 4, dtype=torch.bool))

    @pytest.mark.parametrize("sizes", [{"dim": 0}, {"query_dim": 0}, {"chunk_size": 0}])
    def test_refused_sizes(self, sizes):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a whole number"):
            Decoder(**{"dim": 3, "query_dim": 4, **sizes})


def test_a_head_of_identity_by_default():
    assert isinstance(
        pc.PerceiverIO(
            nn.Identity(), pc.Encoder(3, num_latents=2, dim=8), pc.queries.Learned(2, 4), Decoder(8, query_dim=4)
        ).head,
        nn.Identity,
    )
