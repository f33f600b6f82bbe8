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
    image = adapters.Image(3, positions=positions.Fourier(axes=2, bands=3, max_resolution=GRID))
    encoder = Encoder(image.dim, latents=5, dim=14, depth=1, heads=2)
    ask = queries.OnGrid(None, image.positions)
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out=2, **options)
    return PerceiverIO(image, encoder, ask, decoder).double()


def several(**options) -> PerceiverIO:
    torch.manual_seed(0)
    sound = adapters.Audio(patch=3, positions=positions.Fourier(axes=1, bands=2, max_resolution=7))
    both = adapters.Multimodal({"sound": sound, "label": adapters.Label(11)}, **options)
    encoder = Encoder(both.dim, latents=5, dim=14, depth=1, heads=2)
    ask = queries.Multimodal({"sound": queries.OnGrid((7,), sound.positions), "label": queries.Learned(1, 3)})
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out=13)
    each = {"sound": heads.Samples(13, patch=3), "label": heads.Only(heads.Values(13, 11))}
    return PerceiverIO(both, encoder, ask, decoder, heads.Multimodal(each)).double()


def words(most: int = 11, **options) -> PerceiverIO:
    torch.manual_seed(0)
    text = adapters.Ids(13, dim=6, positions=positions.Indexed(most, dim=6))
    encoder = Encoder(text.dim, latents=5, dim=14, depth=1, heads=2)
    ask = queries.OnGrid(None, positions.Indexed(most, dim=7))
    decoder = Decoder(encoder.dim, query_dim=ask.dim, out=6)
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
    torch.testing.assert_close(model(x, at=at), whole[:, at], **EXACT)
    each = torch.stack([at, at.flip(0), at // 2])
    torch.testing.assert_close(
        model(x, at=each), torch.stack([y[a] for y, a in zip(whole, each, strict=True)]), **EXACT
    )


def test_a_loss_on_some_points_has_the_gradient_of_these():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    found = torch.autograd.grad(model(x, at=at).square().sum(), list(model.parameters()))
    wanted = torch.autograd.grad(model(x)[:, at].square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("chunk", [1, 11, 35])
def test_chunks_change_nothing(chunk):
    x = drawn(2, 3, *GRID)
    found = []
    for model in (pictures(), pictures(chunk=chunk)):
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
        found = self.model(heads.OnGrid(None))(x)
        torch.testing.assert_close(found, flat(x).mT.unflatten(2, size), **EXACT)

    def test_all_points_in_another_order_stay_a_list(self):
        x, at = drawn(2, 3, *GRID), torch.randperm(35, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(self.model(heads.OnGrid(GRID))(x, at=at), pictures()(x)[:, at], **EXACT)

    def test_another_orientation_is_refused(self):
        with pytest.raises(ValueError, match=r"answers are on a grid \(7, 5\), and this head makes \(5, 7\)"):
            self.model(heads.OnGrid(GRID))(drawn(1, 3, 7, 5))
        image = pictures().adapter
        copying = PerceiverIO(
            image,
            pictures().encoder,
            queries.FromInputs(image.dim),
            Decoder(14, query_dim=image.dim, out=2),
            heads.OnGrid(GRID),
        ).double()
        assert copying(drawn(1, 3, *GRID)).shape == (1, 2, 5, 7)
        with pytest.raises(ValueError, match="answers are on a grid"):
            copying(drawn(1, 3, 7, 5))

    def test_pictures_are_made_of_patches(self):
        flat = pictures()
        head = heads.Patches(2, grid=None, size=(2, 3), channels=1)
        model, x = self.model(head), drawn(2, 3, *GRID)
        assert model(x).shape == (2, 1, 10, 21)
        at = torch.tensor([3, 11])
        torch.testing.assert_close(model(x, at=at), head.cut(model(x))[:, at], **EXACT)
        torch.testing.assert_close(head.cut(model(x)), head.patches.head(flat(x)), **EXACT)

    def test_each_kind_has_its_grid(self):
        made = several()
        ask = queries.Multimodal(
            {"map": queries.OnGrid((2, 3), positions.Learned((2, 3), 4)), "label": queries.Learned(1, 3)}
        )
        decoder = Decoder(14, query_dim=ask.dim, out=2)
        each = heads.Multimodal({"map": heads.OnGrid((2, 3)), "label": heads.Only()})
        model = PerceiverIO(made.adapter, made.encoder, ask, decoder, each).double()
        given = {"sound": drawn(2, 21)}
        whole, some = model(given), model(given, at={"map": torch.arange(6).flip(0)})
        assert whole["map"].shape == (2, 2, 2, 3)
        torch.testing.assert_close(some["map"].flip(1), whole["map"].flatten(2).mT, **EXACT)
        assert model(given, query_mask={"map": torch.ones(2, 6).bool()})["label"].shape == (2, 2)


def test_masked_pixels_have_no_effect():
    model, x = pictures(), drawn(2, 3, *GRID)
    mask = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = model(x, mask=mask)
    torch.testing.assert_close(model(x.masked_fill(~mask[:, None], torch.nan), mask=mask), wanted, **EXACT)
    assert (model(x) - wanted).abs().max() > 1e-6


def test_query_masks_are_the_decoders():
    model, x = pictures(read=partial(pc.CrossAttend, residual=False, mlp=None)), drawn(2, 3, *GRID)
    asked = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) < 0.5
    found = model(x, query_mask=asked)
    torch.testing.assert_close(found[asked], model(x)[asked], **EXACT)
    nothing = model.decoder.output(model.decoder.read.attention.output.bias)
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
        torch.testing.assert_close(model(self.given(), at={"sound": at})["sound"], wanted, **EXACT)

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
        model, given = several(hide={"label": 1.0}), self.given()
        wanted = model(given)["label"]
        torch.testing.assert_close(model(given | {"label": torch.tensor([1, 2, 4])})["label"], wanted, **EXACT)


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
            torch.testing.assert_close(model(ids, at=at), logits, **EXACT)

    def test_padding_behind_a_text_changes_nothing(self):
        model, ids = words(), torch.tensor([[3, 1, 4, 0, 0, 0]])
        mask = torch.tensor([[True] * 3 + [False] * 3])
        torch.testing.assert_close(model(ids, mask=mask)[:, :3], model(ids[:, :3]), **EXACT)

    def test_texts_that_are_too_long_are_refused(self):
        with pytest.raises(ValueError, match="ids must be at most 11 long"):
            words()(torch.zeros(1, 12, dtype=torch.long))


def test_450_points_in_and_as_many_labels_out():
    torch.manual_seed(0)
    cloud = adapters.Points(positions=positions.Fourier(axes=3, bands=4, max_resolution=64))
    encoder = Encoder(cloud.dim, latents=5, dim=14, depth=1, heads=2)
    model = PerceiverIO(cloud, encoder, queries.FromInputs(cloud.dim), Decoder(14, query_dim=cloud.dim, out=3)).double()
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


@pytest.mark.parametrize("make", [pictures, several, words])
def test_it_is_saved_and_loaded(make, tmp_path):
    model = make().float()
    again = pc.load(pc.save(model, tmp_path))
    x = {
        pictures: drawn(2, 3, *GRID).float(),
        several: {"sound": drawn(2, 21).float(), "label": torch.tensor([1, 2])},
        words: torch.tensor([[1, 2, 3]]),
    }[make]
    torch.testing.assert_close(again(x), model(x))


class TestRefusals:
    def parts(self) -> dict[str, nn.Module]:
        return {
            "adapter": adapters.Grid(3, positions=None),
            "encoder": Encoder(3, latents=2, dim=8),
            "queries": queries.Learned(2, 4),
            "decoder": Decoder(8, query_dim=4, out=5),
            "head": heads.Values(5, 2),
        }

    @pytest.mark.parametrize(
        ("name", "part", "message"),
        [
            ("adapter", adapters.Grid(5, positions=None), "encoder must take what adapter gives: 5 wide; it takes 3"),
            ("encoder", Encoder(3, latents=2, dim=16), "decoder must take what encoder gives: 16 wide; it takes 8"),
            ("queries", queries.Learned(2, 7), "decoder must take what queries gives: 7 wide; it takes 4"),
            ("decoder", Decoder(8, query_dim=4), "head must take what decoder gives: 4 wide; it takes 5"),
            ("head", heads.Values(7, 2), "head must take what decoder gives: 5 wide; it takes 7"),
        ],
    )
    def test_refused_widths(self, name, part, message):
        with pytest.raises(ValueError, match=message):
            PerceiverIO(**{**self.parts(), name: part})

    @pytest.mark.parametrize("name", ["adapter", "encoder", "queries", "decoder"])
    def test_refused_parts(self, name):
        with pytest.raises(TypeError, match=f"{name} must be a module; got function. Build it first"):
            PerceiverIO(**{**self.parts(), name: lambda x: x})

    def test_refused_masks_of_queries(self):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 35\)"):
            pictures()(drawn(2, 3, *GRID), query_mask=torch.ones(2, 34, dtype=torch.bool))


@pytest.mark.compile
def test_it_compiles():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), **EXACT)
    torch.testing.assert_close(compiled(x, at=at), model(x, at=at), **EXACT)


@pytest.mark.compile
def test_several_kinds_compile_as_dictionaries():
    model, given = several(), {"sound": drawn(2, 21), "label": torch.tensor([1, 2])}
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(given), model(given), **EXACT)


@pytest.mark.compile
def test_it_is_exported():
    model, x, at = pictures(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    program = torch.export.export(model, (x,), {"at": at})
    torch.testing.assert_close(program.module()(x, at=at), model(x, at=at), **EXACT)
