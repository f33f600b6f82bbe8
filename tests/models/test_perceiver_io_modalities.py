"""Perceiver IO of several modalities: outputs, absent and masked modalities, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perceiver_core import Decoder, Encoder, PerceiverIO, adapters, heads, positions, queries
from tests.models.perceiver_io_cases import EXACT, GRID, captions, drawn, several, words


def test_each_modality_has_its_own_grid():
    torch.manual_seed(0)
    image = adapters.Image(3, positions=positions.Fourier(num_axes=2, num_bands=2, max_resolution=7))
    both = adapters.Multimodal(
        {"image": image, "depth": adapters.Grid(2, positions=positions.Fourier(num_axes=2, num_bands=1))}
    )
    output_queries = queries.Multimodal({"image": queries.Grid(None, image.positions), "depth": queries.FromInputs(8)})
    each = {
        "image": heads.Grid(None, head=heads.Linear(13, 3)),
        "depth": heads.Grid(None, head=heads.Linear(13, 1)),
    }
    decoder = Decoder(14, query_dim=output_queries.dim, out_dim=13)
    model = PerceiverIO(
        both, Encoder(both.dim, num_latents=5, dim=14, num_heads=2), output_queries, decoder, heads.Multimodal(each)
    ).double()
    actual = model({"image": drawn(2, 3, 5, 7), "depth": drawn(2, 3, 2, 2)})
    assert {name: tuple(x.shape) for name, x in actual.items()} == {"image": (2, 3, 5, 7), "depth": (2, 1, 3, 2)}
    alone = model({"image": drawn(2, 3, 5, 7)}, query_inputs={"depth": []})
    assert {name: tuple(x.shape) for name, x in alone.items()} == {"image": (2, 3, 5, 7)}


class TestModalities:
    def inputs(self) -> dict[str, Tensor]:
        return {"audio": drawn(3, 21), "label": torch.tensor([3, 0, 10])}

    def test_each_modality_has_an_output(self):
        actual = several()(self.inputs())
        assert {name: tuple(x.shape) for name, x in actual.items()} == {"audio": (3, 21), "label": (3, 11)}

    def test_selected_outputs_of_one_modality(self):
        model, indices = several(), torch.tensor([6, 1])
        expected = model(self.inputs())["audio"].view(3, 7, 3)[:, indices].flatten(1)
        torch.testing.assert_close(model(self.inputs(), query_inputs={"audio": indices})["audio"], expected, **EXACT)

    @pytest.mark.parametrize("absent", ["audio", "label"])
    def test_absent_modalities_have_outputs(self, absent):
        model, valid = several(), torch.tensor([True, False, True])
        actual = model(self.inputs(), mask={absent: valid})
        inputs = self.inputs()
        inputs.pop(absent)
        without, whole = model(inputs), model(self.inputs())
        for name in ("audio", "label"):
            torch.testing.assert_close(actual[name][~valid], without[name][~valid], **EXACT)
            torch.testing.assert_close(actual[name][valid], whole[name][valid], **EXACT)

    def test_a_masked_label_does_not_reach_its_output(self):
        model, inputs = several(token_mask_rate={"label": 1.0}), self.inputs()
        expected = model(inputs)["label"]
        torch.testing.assert_close(model(inputs | {"label": torch.tensor([1, 2, 4])})["label"], expected, **EXACT)

    @pytest.mark.parametrize("excluded", ["audio", "label"])
    def test_modalities_that_are_not_queried_have_no_output(self, excluded):
        model = several()
        actual, expected = model(self.inputs(), query_inputs={excluded: []}), model(self.inputs())
        expected.pop(excluded)
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual, expected, **EXACT)

    @pytest.mark.refusal
    def test_query_inputs_that_are_no_dictionary_raise(self):
        with pytest.raises(
            TypeError, match=r"query_indices must be a dictionary by modality, of \['audio', 'label'\]; got Tensor"
        ):
            several()(self.inputs(), query_inputs=torch.tensor([0]))


class TestQueriesFromInputs:
    """A text and an image of any size, each queried at its own positions."""

    def inputs(self, words: int = 9) -> dict[str, Tensor]:
        return {"text": torch.arange(2 * words).view(2, words) % 13, "image": drawn(2, 3, 5, 7)}

    def test_each_input_token_has_an_output(self):
        for length, size in ((9, (5, 7)), (4, (3, 1))):
            actual = captions()({"text": self.inputs(length)["text"], "image": drawn(2, 3, *size)})
            assert actual["text"].shape == (2, length, 13) and actual["image"].shape == (2, size[0] * size[1], 3)

    def test_queries_are_those_of_a_model_of_the_text_alone(self):
        model, alone, inputs = captions(), words(), self.inputs()
        mask = torch.arange(9) < torch.tensor([[9], [4]])
        with torch.no_grad():
            model.queries.sources["text"].positions.vectors.copy_(alone.queries.positions.vectors)
        queried = model.queries(model.adapter(inputs, mask={"text": mask}))["text"]
        expected = alone.queries(alone.adapter(inputs["text"], mask=mask))
        torch.testing.assert_close(queried[..., :7], expected, **EXACT)
        padding = model.queries.padding["text"]
        torch.testing.assert_close(queried[..., 7:], padding.expand_as(queried[..., 7:]), **EXACT)

    def test_image_queries_are_the_image_tokens(self):
        model, inputs = captions(), self.inputs()
        queried = model.queries(model.adapter(inputs))["image"]
        width = model.adapter.adapters["image"].dim
        torch.testing.assert_close(queried[..., :width], model.adapter.adapters["image"](inputs["image"]).materialize())

    def test_padding_of_the_text_has_no_effect(self):
        model, inputs = captions(), self.inputs()
        mask = torch.arange(9) < torch.tensor([[4], [4]])
        actual = model(inputs, mask={"text": mask})
        expected = model(inputs | {"text": inputs["text"][:, :4]})
        torch.testing.assert_close(actual["text"][:, :4], expected["text"], **EXACT)
        torch.testing.assert_close(actual["image"], expected["image"], **EXACT)

    def test_queries_do_not_reveal_a_masked_image(self):
        model, inputs = captions(token_mask_rate={"image": 1.0}), self.inputs()
        expected = model(inputs)
        torch.testing.assert_close(model(inputs | {"image": drawn(2, 3, 5, 7, seed=3)}), expected, **EXACT)

    @pytest.mark.refusal
    def test_querying_an_absent_modality_raises(self):
        model, inputs = captions(), self.inputs()
        inputs.pop("text")
        with pytest.raises(ValueError, match=r"queries\['text'\] need the tokens of an absent input"):
            model(inputs)
        assert list(model(inputs, query_inputs={"text": []})) == ["image"]

    def test_gradients_are_those_of_finite_differences(self):
        model, x = captions(), drawn(2, 3, 1, 2).requires_grad_()
        text = torch.tensor([[1, 2, 3], [4, 5, 6]])
        assert torch.autograd.gradcheck(lambda x: tuple(model({"text": text, "image": x}).values()), x)


@pytest.mark.compile
def test_several_modalities_compile():
    model, inputs = several(), {"audio": drawn(2, 21), "label": torch.tensor([1, 2])}
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(inputs), model(inputs), **EXACT
    )


@pytest.mark.compile
def test_queries_from_several_inputs_compile():
    model, inputs = captions(), {"text": torch.arange(8).view(2, 4), "image": drawn(2, 3, *GRID)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs), **EXACT)
    indices = {"text": [], "image": torch.tensor([3, 11])}
    torch.testing.assert_close(compiled(inputs, query_inputs=indices), model(inputs, query_inputs=indices), **EXACT)


def varying(batch: int) -> dict[str, dict[str, Tensor]]:
    """Inputs of a batch, for each exported model."""
    rows = {"numbers": drawn(batch, 2), "categories": torch.arange(2 * batch).view(batch, 2) % 3}
    return {
        "several": {"audio": drawn(batch, 21), "label": torch.arange(batch) % 11},
        "captions": {"text": torch.arange(4 * batch).view(batch, 4) % 13, "image": drawn(batch, 3, *GRID)},
        "rows": {"rows": rows, "label": torch.arange(batch) % 11},
    }


def rows() -> PerceiverIO:
    torch.manual_seed(0)
    both = adapters.Multimodal({"rows": adapters.Table(2, (3, 4), dim=7), "label": adapters.OneHotLabel(11)})
    encoder = Encoder(both.dim, num_latents=5, dim=14, depth=1, num_heads=2)
    output_queries = queries.Learned(3, 6)
    return PerceiverIO(
        both, encoder, output_queries, Decoder(encoder.dim, query_dim=output_queries.dim, out_dim=13)
    ).double()


@pytest.mark.compile
@pytest.mark.parametrize("make", [several, captions, rows])
def test_several_modalities_are_exported_for_any_batch(make):
    model, batch = make().eval(), torch.export.Dim("batch", max=2**31)

    def first_axis(x):
        return {name: first_axis(value) for name, value in x.items()} if isinstance(x, dict) else {0: batch}

    inputs = varying(3)[make.__name__]
    program = torch.export.export(model, (inputs,), dynamic_shapes={"inputs": first_axis(inputs)})
    for size in (2, 3, 7):
        inputs = varying(size)[make.__name__]
        torch.testing.assert_close(program.module()(inputs), model(inputs), **EXACT)


@pytest.mark.compile
def test_masks_and_query_indices_are_exported_for_any_batch():
    model, batch = captions().eval(), torch.export.Dim("batch", max=2**31)

    def arguments(size: int) -> tuple[Tensor, ...]:
        text = torch.arange(4) < torch.arange(size)[:, None]
        return (
            varying(size)["captions"],
            {"text": text, "image": torch.arange(size) % 2 == 0},
            {"image": torch.arange(2 * size).view(size, 2)},
        )

    batched = {"text": {0: batch}, "image": {0: batch}}
    shapes = {"inputs": batched, "mask": batched, "query_inputs": {"image": {0: batch}}}
    inputs, mask, indices = arguments(3)
    program = torch.export.export(model, (inputs,), {"mask": mask, "query_inputs": indices}, dynamic_shapes=shapes)
    for size in (2, 3, 7):
        inputs, mask, indices = arguments(size)
        torch.testing.assert_close(
            program.module()(inputs, mask=mask, query_inputs=indices),
            model(inputs, mask=mask, query_inputs=indices),
            **EXACT,
        )
