"""Perceiver IO: its parts, selected outputs, masks, chunks, errors, saving, compilation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import Decoder, Encoder, PerceiverIO, adapters, heads, positions, queries
from tests.models.perceiver_io_cases import EXACT, GRID, captions, drawn, images, several, words


def test_the_parts_run_in_order():
    model, x = images(), drawn(2, 3, *GRID)
    tokens = model.adapter(x)
    expected = model.decoder(model.encoder(tokens), model.queries(tokens))
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert model(x).shape == (2, 35, 2) and isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_the_output_has_the_size_of_the_input(size):
    assert images()(drawn(1, 3, *size)).shape == (1, size[0] * size[1], 2)


def test_selected_outputs_are_rows_of_all_outputs():
    model, x = images(), drawn(3, 3, *GRID)
    whole, indices = model(x), torch.tensor([34, 0, 3, 3])
    torch.testing.assert_close(model(x, query_inputs=indices), whole[:, indices], **EXACT)
    each = torch.stack([indices, indices.flip(0), indices // 2])
    torch.testing.assert_close(
        model(x, query_inputs=each), torch.stack([y[a] for y, a in zip(whole, each, strict=True)]), **EXACT
    )


def test_a_loss_on_selected_outputs_has_their_gradient():
    model, x, indices = images(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    actual = torch.autograd.grad(model(x, query_inputs=indices).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x)[:, indices].square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("chunk", [1, 11, 35])
def test_chunks_have_no_effect(chunk):
    x = drawn(2, 3, *GRID)
    actual = []
    for model in (images(), images(chunk_size=chunk)):
        outputs = model(x)
        actual.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*actual, **EXACT)


class TestGridOutputs:
    @staticmethod
    def model(head, *, output_queries=None):
        flat = images()
        return PerceiverIO(flat.adapter, flat.encoder, output_queries or flat.queries, flat.decoder, head).double()

    @pytest.mark.parametrize("size", [(5, 7), (7, 5), (1, 1), (2, 11)])
    def test_outputs_are_placed_on_the_grid_of_the_input(self, size):
        x, flat = drawn(2, 3, *size), images()
        actual = self.model(heads.Grid(None))(x)
        torch.testing.assert_close(actual, flat(x).mT.unflatten(2, size), **EXACT)

    def test_selected_points_stay_a_list(self):
        x, indices = drawn(2, 3, *GRID), torch.randperm(35, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            self.model(heads.Grid(GRID))(x, query_inputs=indices), images()(x)[:, indices], **EXACT
        )

    @pytest.mark.refusal
    def test_another_orientation_raises(self):
        with pytest.raises(ValueError, match=r"outputs are on a grid \(7, 5\), and this head makes \(5, 7\)"):
            self.model(heads.Grid(GRID))(drawn(1, 3, 7, 5))
        image = images().adapter
        copying = PerceiverIO(
            image,
            images().encoder,
            queries.FromInputs(image.dim),
            Decoder(14, query_dim=image.dim, out_dim=2),
            heads.Grid(GRID),
        ).double()
        assert copying(drawn(1, 3, *GRID)).shape == (1, 2, 5, 7)
        with pytest.raises(ValueError, match="outputs are on a grid"):
            copying(drawn(1, 3, 7, 5))

    def test_images_are_assembled_from_patches(self):
        flat = images()
        head = heads.Unpatchify(2, grid=None, patch_size=(2, 3), num_channels=1)
        model, x = self.model(head), drawn(2, 3, *GRID)
        assert model(x).shape == (2, 1, 10, 21)
        indices = torch.tensor([3, 11])
        torch.testing.assert_close(model(x, query_inputs=indices), head.cut(model(x))[:, indices], **EXACT)
        torch.testing.assert_close(head.cut(model(x)), head.patches.head(flat(x)), **EXACT)

    def test_each_modality_has_its_grid(self):
        base = several()
        output_queries = queries.Multimodal(
            {"map": queries.Grid((2, 3), positions.LearnedGrid((2, 3), 4)), "label": queries.Learned(1, 3)}
        )
        decoder = Decoder(14, query_dim=output_queries.dim, out_dim=2)
        each = heads.Multimodal({"map": heads.Grid((2, 3)), "label": heads.SingleQuery()})
        model = PerceiverIO(base.adapter, base.encoder, output_queries, decoder, each).double()
        inputs = {"audio": drawn(2, 21)}
        whole, some = model(inputs), model(inputs, query_inputs={"map": torch.arange(6).flip(0)})
        assert whole["map"].shape == (2, 2, 2, 3)
        torch.testing.assert_close(some["map"].flip(1), whole["map"].flatten(2).mT, **EXACT)
        assert model(inputs, query_mask={"map": torch.ones(2, 6).bool()})["label"].shape == (2, 2)


def test_masked_pixels_have_no_effect():
    model, x = images(), drawn(2, 3, *GRID)
    mask = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = model(x, mask=mask)
    torch.testing.assert_close(model(x.masked_fill(~mask[:, None], torch.nan), mask=mask), expected, **EXACT)
    assert (model(x) - expected).abs().max() > 1e-6


def test_query_masks_reach_the_decoder():
    model, x = images(cross_attention=partial(pc.CrossAttend, residual=False, mlp=None)), drawn(2, 3, *GRID)
    queried = torch.rand(2, 35, generator=torch.Generator().manual_seed(0)) < 0.5
    actual = model(x, query_mask=queried)
    torch.testing.assert_close(actual[queried], model(x)[queried], **EXACT)
    nothing = model.decoder.output(model.decoder.cross_attention.attention.output.bias)
    torch.testing.assert_close(actual[~queried], nothing.expand_as(actual[~queried]), **EXACT)


def test_samples_are_independent_and_queries_broadcast():
    model, x = images(), drawn(3, 3, *GRID)
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]), **EXACT)


def test_every_parameter_gets_a_gradient():
    for model, x in ((images(), drawn(2, 3, *GRID)), (words(), torch.arange(8).view(2, 4))):
        (model(x) * drawn(*model(x).shape)).sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name


class TestText:
    def test_shorter_texts_and_ignored_labels(self):
        model = words()
        for length in (1, 4, 11):
            ids = torch.arange(2 * length).view(2, length) % 13
            logits = model(ids)
            assert logits.shape == (2, length, 13)
            labels = ids.clone()
            labels[:, 1:] = -100
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], ids[:, 0]), **EXACT)
            indices = torch.arange(length)
            torch.testing.assert_close(model(ids, query_inputs=indices), logits, **EXACT)

    def test_padding_has_no_effect(self):
        model, ids = words(), torch.tensor([[3, 1, 4, 0, 0, 0]])
        mask = torch.tensor([[True] * 3 + [False] * 3])
        torch.testing.assert_close(model(ids, mask=mask)[:, :3], model(ids[:, :3]), **EXACT)

    @pytest.mark.refusal
    def test_texts_that_are_too_long_raise(self):
        with pytest.raises(ValueError, match="ids must be at most 11 long"):
            words()(torch.zeros(1, 12, dtype=torch.long))


def test_segmentation_of_a_point_cloud():
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
    model, x = images().float(), drawn(2, 3, *GRID).float()
    expected = torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)[:, None].expand(-1, 35, -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(15):
        with torch.autocast("cpu", dtype=dtype):
            loss = F.mse_loss(model(x).float(), expected)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", [images, several, captions, words])
def test_it_is_saved_and_loaded(make, tmp_path):
    model = make().float()
    again = pc.load(pc.save(model, tmp_path))
    x = {
        images: drawn(2, 3, *GRID).float(),
        several: {"audio": drawn(2, 21).float(), "label": torch.tensor([1, 2])},
        captions: {"text": torch.tensor([[1, 2, 3]]), "image": drawn(1, 3, *GRID).float()},
        words: torch.tensor([[1, 2, 3]]),
    }[make]
    torch.testing.assert_close(again(x), model(x))


class TestErrors:
    def parts(self) -> dict[str, nn.Module]:
        return {
            "adapter": adapters.Grid(3, positions=None),
            "encoder": Encoder(3, num_latents=2, dim=8),
            "queries": queries.Learned(2, 4),
            "decoder": Decoder(8, query_dim=4, out_dim=5),
            "head": heads.Linear(5, 2),
        }

    @pytest.mark.refusal
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
    def test_invalid_widths_raise(self, name, part, message):
        with pytest.raises(ValueError, match=message):
            PerceiverIO(**{**self.parts(), name: part})

    @pytest.mark.refusal
    @pytest.mark.parametrize("name", ["adapter", "encoder", "queries", "decoder"])
    def test_invalid_parts_raise(self, name):
        with pytest.raises(TypeError, match=f"{name} must be a module; got the function"):
            PerceiverIO(**{**self.parts(), name: lambda x: x})

    @pytest.mark.refusal
    @pytest.mark.parametrize("factory", [heads.Logits, heads.TiedLogits])
    def test_invalid_widths_of_logits_raise(self, factory):
        text = adapters.TokenEmbedding(13, dim=3)
        with pytest.raises(ValueError, match="head must accept the output width of decoder, 5; got 3"):
            PerceiverIO(**{**self.parts(), "adapter": text, "head": factory})

    @pytest.mark.refusal
    def test_invalid_widths_of_multimodal_heads_raise(self):
        for head in (
            heads.SingleQuery(heads.Linear(7, 2)),
            heads.Multimodal({"a": heads.SingleQuery(heads.Linear(7, 2))}),
        ):
            with pytest.raises(ValueError, match="head must accept the output width of decoder, 5; got 7"):
                PerceiverIO(**{**self.parts(), "head": head})

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        "head", [heads.SingleQuery, heads.Identity, heads.Linear, heads.Grid, heads.Multimodal, nn.Identity, "logits"]
    )
    def test_invalid_classes_of_heads_raise(self, head):
        with pytest.raises(
            TypeError, match=r"head must be a module(, or a factory of one from the adapter|, a factory of modules)"
        ):
            PerceiverIO(**{**self.parts(), "head": head})

    def test_heads_and_queries_have_the_same_names(self):
        two = queries.Multimodal({"a": queries.Learned(2, 2), "b": queries.Learned(1, 2)})
        parts = {**self.parts(), "queries": two}
        each = {name: heads.Linear(5, 2) for name in ("a", "b", "c")}
        model = PerceiverIO(**{**parts, "head": heads.Multimodal(each)})
        assert list(model(torch.zeros(1, 2, 3))) == ["a", "b"]
        each.pop("b")
        with pytest.raises(ValueError, match=r"a head for each modality of the queries; it has none for \['b'\]"):
            PerceiverIO(**{**parts, "head": heads.Multimodal(each)})

    @pytest.mark.refusal
    def test_invalid_masks_of_queries_raise(self):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 35\)"):
            images()(drawn(2, 3, *GRID), query_mask=torch.ones(2, 34, dtype=torch.bool))


@pytest.mark.compile
def test_it_compiles():
    model, x, indices = images(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), **EXACT)
    torch.testing.assert_close(compiled(x, query_inputs=indices), model(x, query_inputs=indices), **EXACT)


@pytest.mark.compile
def test_it_is_exported():
    model, x, indices = images(), drawn(2, 3, *GRID), torch.tensor([3, 11])
    program = torch.export.export(model, (x,), {"query_inputs": indices})
    torch.testing.assert_close(program.module()(x, query_inputs=indices), model(x, query_inputs=indices), **EXACT)


@pytest.mark.compile
def test_queries_per_sample_are_exported_for_any_batch():
    model, batch = images().eval(), torch.export.Dim("batch")
    indices = torch.tensor([[3, 11], [0, 1], [2, 5]])
    shapes = {"inputs": {0: batch}, "query_inputs": {0: batch}}
    program = torch.export.export(model, (drawn(3, 3, *GRID),), {"query_inputs": indices}, dynamic_shapes=shapes)
    for size in (2, 5):
        x, indices = drawn(size, 3, *GRID), torch.arange(2 * size).view(size, 2)
        torch.testing.assert_close(program.module()(x, query_inputs=indices), model(x, query_inputs=indices), **EXACT)
