"""Perceiver IO: its parts one after the other, some of the answers, masks, chunks, refusals, saving, graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import Decoder, Encoder, PerceiverIO, adapters, heads, positions, queries

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GRID = (5, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(**options) -> PerceiverIO:
    torch.manual_seed(0)
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=GRID))
    encoder = Encoder(image.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    ask = queries.Grid(None, image.positions)
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out_dim=2, **options)
    return PerceiverIO(image, encoder, ask, decoder).double()


def several(**options) -> PerceiverIO:
    torch.manual_seed(0)
    sound = adapters.Audio(patch_size=3, positions=positions.Fourier(num_axes=1, num_bands=2, max_resolution=7))
    both = adapters.Multimodal({"sound": sound, "label": adapters.OneHotLabel(11)}, **options)
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    ask = queries.Multimodal({"sound": queries.Grid((7,), sound.positions), "label": queries.Learned(1, 3)})
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out_dim=13)
    each = {"sound": heads.Waveform(13, patch_size=3), "label": heads.SingleQuery(heads.Linear(13, 11))}
    return PerceiverIO(both, encoder, ask, decoder, heads.Multimodal(each)).double()


def captions(**options) -> PerceiverIO:
    """Both kinds are asked at the places of the input."""
    torch.manual_seed(0)
    text = adapters.TokenEmbedding(13, dim=6, positions=positions.LearnedEmbedding(11, dim=6))
    picture = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=GRID))
    both = adapters.Multimodal({"text": text, "picture": picture}, **options)
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    ask = queries.Multimodal(
        {"picture": queries.FromInputs(picture.dim), "text": queries.Grid(None, positions.LearnedEmbedding(11, dim=7))}
    )
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out_dim=6)
    each = {"text": heads.TiedLogits(text), "picture": heads.Linear(6, 3)}
    return PerceiverIO(both, encoder, ask, decoder, heads.Multimodal(each)).double()


def words(most: int = 11, **options) -> PerceiverIO:
    torch.manual_seed(0)
    text = adapters.TokenEmbedding(13, dim=6, positions=positions.LearnedEmbedding(most, dim=6))
    encoder = Encoder(text.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    ask = queries.Grid(None, positions.LearnedEmbedding(most, dim=7))
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out_dim=6)
    return PerceiverIO(text, encoder, ask, decoder, heads.TiedLogits).double()


def test_it_is_its_parts_one_after_the_other():
    model, x = pictures(), drawn(2, 3, *GRID)
    tokens = model.adapter(x)
    wanted = model.decoder(model.encoder(tokens), model.queries(tokens))
    torch.testing.assert_close(model(x), wanted, **EXACT)
    assert model(x).shape == (2, 35, 2) and isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_it_answers_at_the_size_of_the_input(size):
    assert pictures()(drawn(1, 3, *size)).shape == (1, size[0] * size[1], 2)


def test_some_answers_are_rows_of_all():
    model, x = pictures(), drawn(3, 3, *GRID)
    whole, at = model(x), torch.tensor([34, 0, 3, 3])
    torch.testing.assert_close(model(x, query_inputs=at), whole[:, at], **EXACT)
    each = torch.stack([at, at.flip(0), at // 2])
    torch.testing.assert_close(
        model(x, query_inputs=each), torch.stack([y[a] for y, a in zip(whole, each, strict=True)]), **EXACT
    )


def test_a_loss_on_some_points_has_the_gradient_of_these():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    found = torch.autograd.grad(model(x, query_inputs=at).square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(x)[:, at].square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("chunk", [1, 11, 35])
def test_chunks_change_nothing(chunk):
    x = drawn(2, 3, *GRID)
    found = []
    for model in (pictures(), pictures(chunk_size=chunk)):
        answers = model(x)
        found.append([answers, *torch.autograd.grad(answers.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*found, **EXACT)


class TestAnswersOnAGrid:
    @staticmethod
    def model(head, *, ask=None):
        flat = pictures()
        return PerceiverIO(flat.adapter, flat.encoder, ask or flat.queries, flat.decoder, head).double()

    @pytest.mark.parametrize("size", [(5, 7), (7, 5), (1, 1), (2, 11)])
    def test_the_grid_of_the_input(self, size):
        x, flat = drawn(2, 3, *size), pictures()
        found = self.model(heads.Grid(None))(x)
        torch.testing.assert_close(found, flat(x).mT.unflatten(2, size), **EXACT)

    def test_all_points_in_another_order_stay_a_list(self):
        x, at = drawn(2, 3, *GRID), torch.randperm(35, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(self.model(heads.Grid(GRID))(x, query_inputs=at), pictures()(x)[:, at], **EXACT)

    def test_another_orientation_is_refused(self):
        with pytest.raises(ValueError, match=r"answers are on a grid \(7, 5\), and this head makes \(5, 7\)"):
            self.model(heads.Grid(GRID))(drawn(1, 3, 7, 5))
        image = pictures().adapter
        copying = PerceiverIO(
            image,
            pictures().encoder,
            queries.FromInputs(image.dim),
            Decoder(14, query_dim=image.dim, out_dim=2),
            heads.Grid(GRID),
        ).double()
        assert copying(drawn(1, 3, *GRID)).shape == (1, 2, 5, 7)
        with pytest.raises(ValueError, match="answers are on a grid"):
            copying(drawn(1, 3, 7, 5))

    def test_pictures_are_made_of_patches(self):
        flat = pictures()
        head = heads.Unpatchify(2, grid=None, patch_size=(2, 3), num_channels=1)
        model, x = self.model(head), drawn(2, 3, *GRID)
        assert model(x).shape == (2, 1, 10, 21)
        at = torch.tensor([3, 11])
        torch.testing.assert_close(model(x, query_inputs=at), head.cut(model(x))[:, at], **EXACT)
        torch.testing.assert_close(head.cut(model(x)), head.patches.head(flat(x)), **EXACT)

    def test_each_kind_has_its_grid(self):
        made = several()
        ask = queries.Multimodal(
            {"map": queries.Grid((2, 3), positions.LearnedGrid((2, 3), 4)), "label": queries.Learned(1, 3)}
        )
        decoder = Decoder(14, query_dim=ask.dim, out_dim=2)
        each = heads.Multimodal({"map": heads.Grid((2, 3)), "label": heads.SingleQuery()})
        model = PerceiverIO(made.adapter, made.encoder, ask, decoder, each).double()
        given = {"sound": drawn(2, 21)}
        whole, some = model(given), model(given, query_inputs={"map": torch.arange(6).flip(0)})
        assert whole["map"].shape == (2, 2, 2, 3)
        torch.testing.assert_close(some["map"].flip(1), whole["map"].flatten(2).mT, **EXACT)
        assert model(given, query_mask={"map": torch.ones(2, 6).bool()})["label"].shape == (2, 2)


def test_each_kind_is_laid_out_on_its_own_grid():
    torch.manual_seed(0)
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
    both = adapters.Multimodal(
        {"image": image, "depth": adapters.Grid(2, positions=positions.Fourier(num_axes=2, num_bands=1))}
    )
    ask = queries.Multimodal({"image": queries.Grid(None, image.positions), "depth": queries.FromInputs(8)})
    each = {
        "image": heads.Grid(None, head=heads.Linear(13, 3)),
        "depth": heads.Grid(None, head=heads.Linear(13, 1)),
    }
    decoder = Decoder(14, query_dim=ask.dim, out_dim=13)
    model = PerceiverIO(
        both, Encoder(both.dim, num_latents=5, dim=14, num_heads=2), ask, decoder, heads.Multimodal(each)
    ).double()
    found = model({"image": drawn(2, 3, 5, 7), "depth": drawn(2, 3, 2, 2)})
    assert {name: tuple(x.shape) for name, x in found.items()} == {"image": (2, 3, 5, 7), "depth": (2, 1, 3, 2)}
    alone = model({"image": drawn(2, 3, 5, 7)}, query_inputs={"depth": []})
    assert {name: tuple(x.shape) for name, x in alone.items()} == {"image": (2, 3, 5, 7)}


def test_masked_pixels_have_no_effect():
    model, x = pictures(), drawn(2, 3, *GRID)
    mask = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = model(x, mask=mask)
    torch.testing.assert_close(model(x.masked_fill(~mask[:, None], torch.nan), mask=mask), wanted, **EXACT)
    assert (model(x) - wanted).abs().max() > 1e-6


def test_query_masks_are_the_decoders():
    model, x = pictures(cross_attention=partial(pc.CrossAttend, residual=False, mlp=None)), drawn(2, 3, *GRID)
    asked = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) < 0.5
    found = model(x, query_mask=asked)
    torch.testing.assert_close(found[asked], model(x)[asked], **EXACT)
    nothing = model.decoder.output(model.decoder.cross_attention.attention.output.bias)
    torch.testing.assert_close(found[~asked], nothing.expand_as(found[~asked]), **EXACT)


def test_samples_are_independent_and_one_question_serves_all():
    model, x = pictures(), drawn(3, 3, *GRID)
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]), **EXACT)


def test_every_parameter_gets_a_gradient():
    for model, x in ((pictures(), drawn(2, 3, *GRID)), (words(), torch.arange(8).view(2, 4))):
        (model(x) * drawn(*model(x).shape)).sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name


class TestSeveralKinds:
    def given(self) -> dict[str, Tensor]:
        return {"sound": drawn(3, 21), "label": torch.tensor([3, 0, 10])}

    def test_an_output_for_each_kind(self):
        found = several()(self.given())
        assert {name: tuple(x.shape) for name, x in found.items()} == {"sound": (3, 21), "label": (3, 11)}

    def test_some_of_a_kind(self):
        model, at = several(), torch.tensor([6, 1])
        wanted = model(self.given())["sound"].view(3, 7, 3)[:, at].flatten(1)
        torch.testing.assert_close(model(self.given(), query_inputs={"sound": at})["sound"], wanted, **EXACT)

    @pytest.mark.parametrize("absent", ["sound", "label"])
    def test_a_kind_that_is_not_there_is_answered_all_the_same(self, absent):
        model, there = several(), torch.tensor([True, False, True])
        found = model(self.given(), mask={absent: there})
        given = self.given()
        given.pop(absent)
        without, whole = model(given), model(self.given())
        for name in ("sound", "label"):
            torch.testing.assert_close(found[name][~there], without[name][~there], **EXACT)
            torch.testing.assert_close(found[name][there], whole[name][there], **EXACT)

    def test_a_hidden_label_is_foretold_from_the_others(self):
        model, given = several(token_mask_rate={"label": 1.0}), self.given()
        wanted = model(given)["label"]
        torch.testing.assert_close(model(given | {"label": torch.tensor([1, 2, 4])})["label"], wanted, **EXACT)

    @pytest.mark.parametrize("unasked", ["sound", "label"])
    def test_a_kind_that_is_not_asked_for_has_no_output(self, unasked):
        model = several()
        found, wanted = model(self.given(), query_inputs={unasked: []}), model(self.given())
        wanted.pop(unasked)
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found, wanted, **EXACT)

    def test_at_must_be_by_kind(self):
        with pytest.raises(
            TypeError, match=r"query_indices must be a dictionary by modality, of \['sound', 'label'\]; got Tensor"
        ):
            several()(self.given(), query_inputs=torch.tensor([0]))


class TestPlacesOfTheInputs:
    """A text and a picture of any size, each answered at its own places."""

    def given(self, words: int = 9) -> dict[str, Tensor]:
        return {"text": torch.arange(2 * words).view(2, words) % 13, "picture": drawn(2, 3, 5, 7)}

    def test_an_answer_for_each_place_of_each_kind(self):
        for words, size in ((9, (5, 7)), (4, (3, 1))):
            found = captions()({"text": self.given(words)["text"], "picture": drawn(2, 3, *size)})
            assert found["text"].shape == (2, words, 13) and found["picture"].shape == (2, size[0] * size[1], 3)

    def test_queries_are_those_of_a_model_of_the_text_alone(self):
        model, alone, given = captions(), words(), self.given()
        mask = torch.arange(9) < torch.tensor([[9], [4]])
        with torch.no_grad():
            model.queries.sources["text"].positions.vectors.copy_(alone.queries.positions.vectors)
        asked = model.queries(model.adapter(given, mask={"text": mask}))["text"]
        wanted = alone.queries(alone.adapter(given["text"], mask=mask))
        torch.testing.assert_close(asked[..., :7], wanted, **EXACT)
        padding = model.queries.padding["text"]
        torch.testing.assert_close(asked[..., 7:], padding.expand_as(asked[..., 7:]), **EXACT)

    def test_the_picture_is_asked_by_what_it_holds(self):
        model, given = captions(), self.given()
        asked = model.queries(model.adapter(given))["picture"]
        width = model.adapter.adapters["picture"].dim
        torch.testing.assert_close(
            asked[..., :width], model.adapter.adapters["picture"](given["picture"]).materialize()
        )

    def test_padding_behind_the_text_changes_nothing(self):
        model, given = captions(), self.given()
        mask = torch.arange(9) < torch.tensor([[4], [4]])
        found = model(given, mask={"text": mask})
        wanted = model(given | {"text": given["text"][:, :4]})
        torch.testing.assert_close(found["text"][:, :4], wanted["text"], **EXACT)
        torch.testing.assert_close(found["picture"], wanted["picture"], **EXACT)

    def test_a_hidden_picture_is_not_told_by_its_queries(self):
        model, given = captions(token_mask_rate={"picture": 1.0}), self.given()
        wanted = model(given)
        torch.testing.assert_close(model(given | {"picture": drawn(2, 3, 5, 7, seed=3)}), wanted, **EXACT)

    def test_a_kind_that_is_not_there_must_be_left_unasked(self):
        model, given = captions(), self.given()
        given.pop("text")
        with pytest.raises(ValueError, match=r"queries\['text'\] ask at the places of an input that is not there"):
            model(given)
        assert list(model(given, query_inputs={"text": []})) == ["picture"]

    def test_gradients_are_those_of_finite_differences(self):
        model, x = captions(), drawn(2, 3, 1, 2).requires_grad_()
        text = torch.tensor([[1, 2, 3], [4, 5, 6]])
        assert torch.autograd.gradcheck(lambda x: tuple(model({"text": text, "picture": x}).values()), x)


class TestWords:
    def test_shorter_texts_than_the_longest_and_labels_that_are_left_out(self):
        model = words()
        for length in (1, 4, 11):
            ids = torch.arange(2 * length).view(2, length) % 13
            logits = model(ids)
            assert logits.shape == (2, length, 13)
            labels = ids.clone()
            labels[:, 1:] = -100
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], ids[:, 0]), **EXACT)
            at = torch.arange(length)
            torch.testing.assert_close(model(ids, query_inputs=at), logits, **EXACT)

    def test_padding_behind_a_text_changes_nothing(self):
        model, ids = words(), torch.tensor([[3, 1, 4, 0, 0, 0]])
        mask = torch.tensor([[True] * 3 + [False] * 3])
        torch.testing.assert_close(model(ids, mask=mask)[:, :3], model(ids[:, :3]), **EXACT)

    def test_texts_that_are_too_long_are_refused(self):
        with pytest.raises(ValueError, match="ids must be at most 11 long"):
            words()(torch.zeros(1, 12, dtype=torch.long))


def test_450_points_in_and_as_many_labels_out():
    torch.manual_seed(0)
    cloud = adapters.PointCloud(positions=positions.Fourier(num_axes=3, num_bands=4, max_resolution=64))
    encoder = Encoder(cloud.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    model = PerceiverIO(
        cloud, encoder, queries.FromInputs(cloud.dim), Decoder(14, query_dim=cloud.dim, out_dim=3)
    ).double()
    points = drawn(2, 450, 3).clamp(-1, 1)
    order = torch.randperm(450)
    torch.testing.assert_close(model(points[:, order]), model(points)[:, order], **EXACT)
    mask = torch.arange(450) < torch.tensor([[450], [77]])
    torch.testing.assert_close(model(points, mask=mask)[1:, :77], model(points[1:, :77]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_half_precision_is_finite(dtype):
    model, x = pictures().float(), drawn(2, 3, *GRID).float()
    wanted = torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)[:, None].expand(-1, 35, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(15):
        with torch.autocast("cpu", dtype=dtype):
            loss = F.mse_loss(model(x).float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", [pictures, several, captions, words])
def test_it_is_saved_and_loaded(make, tmp_path):
    model = make().float()
    again = pc.load(pc.save(model, tmp_path))
    x = {
        pictures: drawn(2, 3, *GRID).float(),
        several: {"sound": drawn(2, 21).float(), "label": torch.tensor([1, 2])},
        captions: {"text": torch.tensor([[1, 2, 3]]), "picture": drawn(1, 3, *GRID).float()},
        words: torch.tensor([[1, 2, 3]]),
    }[make]
    torch.testing.assert_close(again(x), model(x))


class TestRefusals:
    def parts(self) -> dict[str, nn.Module]:
        return {
            "adapter": adapters.Grid(3, positions=None),
            "encoder": Encoder(3, num_latents=2, dim=8),
            "queries": queries.Learned(2, 4),
            "decoder": Decoder(8, query_dim=4, out_dim=5),
            "head": heads.Linear(5, 2),
        }

    @pytest.mark.parametrize(
        ("name", "part", "message"),
        [
            ("adapter", adapters.Grid(5, positions=None), "encoder must accept the output width of adapter, 5; got 3"),
            (
                "encoder",
                Encoder(3, num_latents=2, dim=16),
                "decoder must accept the output width of encoder, 16; got 8",
            ),
            ("queries", queries.Learned(2, 7), "decoder must accept the output width of queries, 7; got 4"),
            ("decoder", Decoder(8, query_dim=4), "head must accept the output width of decoder, 4; got 5"),
            ("head", heads.Linear(7, 2), "head must accept the output width of decoder, 5; got 7"),
        ],
    )
    def test_refused_widths(self, name, part, message):
        with pytest.raises(ValueError, match=message):
            PerceiverIO(**{**self.parts(), name: part})

    @pytest.mark.parametrize("name", ["adapter", "encoder", "queries", "decoder"])
    def test_refused_parts(self, name):
        with pytest.raises(TypeError, match=f"{name} must be a module; got function. Build it first"):
            PerceiverIO(**{**self.parts(), name: lambda x: x})

    @pytest.mark.parametrize("embed", [heads.Logits, heads.TiedLogits])
    def test_refused_widths_of_logits(self, embed):
        text = adapters.TokenEmbedding(13, dim=3)
        with pytest.raises(ValueError, match="head must accept the output width of decoder, 5; got 3"):
            PerceiverIO(**{**self.parts(), "adapter": text, "head": embed})

    def test_refused_widths_of_a_head_of_several(self):
        for head in (
            heads.SingleQuery(heads.Linear(7, 2)),
            heads.Multimodal({"a": heads.SingleQuery(heads.Linear(7, 2))}),
        ):
            with pytest.raises(ValueError, match="head must accept the output width of decoder, 5; got 7"):
                PerceiverIO(**{**self.parts(), "head": head})

    @pytest.mark.parametrize(
        "head", [heads.SingleQuery, heads.Identity, heads.Linear, heads.Grid, heads.Multimodal, nn.Identity, "logits"]
    )
    def test_refused_classes_of_heads(self, head):
        with pytest.raises(TypeError, match="head must be a module, or a factory of one from the adapter"):
            PerceiverIO(**{**self.parts(), "head": head})

    def test_heads_are_named_as_queries_are(self):
        two = queries.Multimodal({"a": queries.Learned(2, 2), "b": queries.Learned(1, 2)})
        given = {**self.parts(), "queries": two}
        each = {name: heads.Linear(5, 2) for name in ("a", "b", "c")}
        model = PerceiverIO(**{**given, "head": heads.Multimodal(each)})
        assert list(model(torch.zeros(1, 2, 3))) == ["a", "b"]
        each.pop("b")
        with pytest.raises(ValueError, match=r"a head for each modality of the queries; it has none for \['b'\]"):
            PerceiverIO(**{**given, "head": heads.Multimodal(each)})

    def test_refused_masks_of_queries(self):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 35\)"):
            pictures()(drawn(2, 3, *GRID), query_mask=torch.ones(2, 34, dtype=torch.bool))


@pytest.mark.compile
def test_it_compiles():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), **EXACT)
    torch.testing.assert_close(compiled(x, query_inputs=at), model(x, query_inputs=at), **EXACT)


@pytest.mark.compile
def test_several_kinds_compile_as_dictionaries():
    model, given = several(), {"sound": drawn(2, 21), "label": torch.tensor([1, 2])}
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(given), model(given), **EXACT)


@pytest.mark.compile
def test_it_is_exported():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    program = torch.export.export(model, (x,), {"at": at})
    torch.testing.assert_close(program.module()(x, query_inputs=at), model(x, query_inputs=at), **EXACT)


@pytest.mark.compile
def test_places_of_several_inputs_compile():
    model, given = captions(), {"text": torch.arange(8).view(2, 4), "picture": drawn(2, 3, *GRID)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), model(given), **EXACT)
    at = {"text": [], "picture": torch.tensor([3, 11])}
    torch.testing.assert_close(compiled(given, query_inputs=at), model(given, query_inputs=at), **EXACT)


def varying(batch: int) -> dict[str, dict[str, Tensor]]:
    """Inputs of a batch for each model that is exported."""
    rows = {"numbers": drawn(batch, 2), "categories": torch.arange(2 * batch).view(batch, 2) % 3}
    return {
        "several": {"sound": drawn(batch, 21), "label": torch.arange(batch) % 11},
        "captions": {"text": torch.arange(4 * batch).view(batch, 4) % 13, "picture": drawn(batch, 3, *GRID)},
        "rows": {"rows": rows, "label": torch.arange(batch) % 11},
    }


def rows() -> PerceiverIO:
    torch.manual_seed(0)
    both = adapters.Multimodal({"rows": adapters.Table(2, (3, 4), dim=7), "label": adapters.OneHotLabel(11)})
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    ask = queries.Learned(3, 6)
    return PerceiverIO(both, encoder, ask, Decoder(encoder.dim, query_dim=ask.dim, out_dim=13)).double()


@pytest.mark.compile
@pytest.mark.parametrize("make", [several, captions, rows])
def test_several_kinds_are_exported_for_any_batch(make):
    model, batch = make().eval(), torch.export.Dim("batch")

    def first_axis(x):
        return {name: first_axis(value) for name, value in x.items()} if isinstance(x, dict) else {0: batch}

    given = varying(3)[make.__name__]
    program = torch.export.export(model, (given,), dynamic_shapes={"inputs": first_axis(given)})
    for size in (2, 3, 7):
        given = varying(size)[make.__name__]
        torch.testing.assert_close(program.module()(given), model(given), **EXACT)


@pytest.mark.compile
def test_masks_and_points_of_several_kinds_are_exported_for_any_batch():
    model, batch = captions().eval(), torch.export.Dim("batch")

    def arguments(size: int) -> tuple[Tensor, ...]:
        text = torch.arange(4) < torch.arange(size)[:, None]
        return (
            varying(size)["captions"],
            {"text": text, "picture": torch.arange(size) % 2 == 0},
            {"picture": torch.arange(2 * size).view(size, 2)},
        )

    kinds = {"text": {0: batch}, "picture": {0: batch}}
    shapes = {"inputs": kinds, "mask": kinds, "at": {"picture": {0: batch}}}
    given, mask, at = arguments(3)
    program = torch.export.export(model, (given,), {"mask": mask, "at": at}, dynamic_shapes=shapes)
    for size in (2, 3, 7):
        given, mask, at = arguments(size)
        torch.testing.assert_close(
            program.module()(given, mask=mask, query_inputs=at), model(given, mask=mask, query_inputs=at), **EXACT
        )


@pytest.mark.compile
def test_queries_of_each_sample_are_exported_for_any_batch():
    model, batch = pictures().eval(), torch.export.Dim("batch")
    at = torch.tensor([[3, 11], [0, 1], [2, 5]])
    shapes = {"inputs": {0: batch}, "at": {0: batch}}
    program = torch.export.export(model, (drawn(3, 3, *GRID),), {"at": at}, dynamic_shapes=shapes)
    for size in (2, 5):
        x, at = drawn(size, 3, *GRID), torch.arange(2 * size).view(size, 2)
        torch.testing.assert_close(program.module()(x, query_inputs=at), model(x, query_inputs=at), **EXACT)
