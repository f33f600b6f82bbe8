"""Several modalities: order and padding, absent modalities, token masking and modality dropout, errors."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core.adapters import Audio, Grid, Multimodal, OneHotLabel, Table

EXACT = {"rtol": 1e-11, "atol": 1e-11}
BATCH = 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters() -> dict[str, nn.Module]:
    sound = Audio(patch_size=3, positions=pc.positions.Fourier(num_axes=1, num_bands=2, max_resolution=7))
    return {"sound": sound, "set": Grid(5, positions=None), "label": OneHotLabel(13)}


def made(**options) -> Multimodal:
    torch.manual_seed(0)
    return Multimodal(adapters(), **options).double()


def inputs() -> dict[str, Tensor]:
    return {"label": torch.arange(BATCH), "sound": drawn(BATCH, 20), "set": drawn(BATCH, 11, 5, seed=1)}


def encoder(dim: int) -> nn.Module:
    torch.manual_seed(1)
    return pc.Encoder(dim, num_latents=3, dim=7, depth=1, num_heads=1).double()


def test_modalities_follow_the_order_of_the_adapters_and_are_padded():
    both, given = made(), inputs()
    tokens = both(given)
    assert both.dim == 13 + 4 and tokens.content.shape == (BATCH, 7 + 11 + 1, 17) and tokens.mask is None
    for name, part in zip(("sound", "set", "label"), tokens.content.split([7, 11, 1], dim=1), strict=True):
        dense = both.adapters[name](given[name]).materialize()
        torch.testing.assert_close(part[..., : dense.shape[-1]], dense.double(), **EXACT)
        torch.testing.assert_close(
            part[..., dense.shape[-1] :], both.padding[name].expand_as(part[..., dense.shape[-1] :])
        )


def test_the_widest_modality_has_the_minimum_of_modality_channels():
    both = made(min_modality_channels=1)
    assert both.dim == 14 and {name: len(vector) for name, vector in both.padding.named_parameters()} == {
        "sound": 14 - 8, "set": 9, "label": 1,
    }  # fmt: skip


def test_masks_are_concatenated():
    there = torch.arange(11) < torch.tensor([[11], [3], [1], [7], [2]])
    tokens = made()(inputs(), mask={"set": there})
    assert tokens.mask[:, :7].all() and tokens.mask[:, -1].all() and torch.equal(tokens.mask[:, 7:-1], there)


@pytest.mark.parametrize("name", ["sound", "set", "label"])
def test_a_modality_absent_in_some_samples_is_left_out_of_these(name):
    both, given, there = made(), inputs(), torch.tensor([True, False, True, False, False])
    read = encoder(both.dim)
    actual = read(both(given, mask={name: there}))
    torch.testing.assert_close(actual[there], read(both(given))[there], **EXACT)
    without = {kind: x for kind, x in given.items() if kind != name}
    torch.testing.assert_close(actual[~there], read(both(without))[~there], **EXACT)


def test_the_content_of_an_absent_modality_has_no_effect():
    both, given, there = made(), inputs(), torch.tensor([True, False, True, False, False])
    masks = {"sound": there, "label": there}
    expected = both(given, mask=masks)
    given["sound"][~there] = torch.nan
    given["label"][~there] = -1  # not a valid class
    torch.testing.assert_close(
        both(given, mask=masks).materialize()[expected.mask], expected.materialize()[expected.mask], **EXACT
    )
    assert both(given, mask=masks).content.isfinite().all() and given["sound"].isnan().any()


def test_a_table_may_be_absent_too():
    both = Multimodal({"row": Table(2, (3,), dim=5), "label": OneHotLabel(7)})
    rows = {"numbers": torch.full((2, 2), torch.nan), "categories": torch.tensor([[-1], [-1]])}
    tokens = both({"row": rows, "label": torch.tensor([1, 2])}, mask={"row": torch.tensor([True, False])})
    assert tokens.mask.tolist() == [[False] * 3 + [True]] * 2


@pytest.mark.parametrize("holds", [torch.nan, torch.inf])
def test_rows_of_an_absent_table_are_not_checked(holds):
    both = Multimodal({"row": Table(2, (3,), dim=5), "label": OneHotLabel(7)}).double()
    rows = {"numbers": drawn(2, 2), "categories": torch.tensor([[1], [2]])}
    labels, masks = torch.tensor([1, 2]), {"row": torch.tensor([True, False])}
    expected = both({"row": rows, "label": labels}, mask=masks)
    rows["numbers"][1], rows["categories"][1] = holds, 99
    actual = both({"row": rows, "label": labels}, mask=masks)
    assert actual.mask.tolist() == expected.mask.tolist() == [[True] * 4, [False] * 3 + [True]]
    torch.testing.assert_close(actual.materialize(), expected.materialize(), **EXACT)


def fourier(axes: int) -> pc.positions.Fourier:
    return pc.positions.Fourier(num_axes=axes, num_bands=2, max_resolution=7)


RAGGED = {
    "points": (lambda: pc.adapters.PointCloud(2, positions=fourier(3)), lambda: drawn(3, 7, 5), (3, 7)),
    "sound": (lambda: Audio(patch_size=3, positions=fourier(1)), lambda: drawn(3, 20), (3, 7)),
    "picture": (lambda: pc.adapters.Image(3, positions=fourier(2)), lambda: drawn(3, 3, 5, 7), (3, 5, 7)),
    "film": (
        lambda: pc.adapters.Video(3, positions=fourier(3), patch_size=(1, 2, 2)),
        lambda: drawn(3, 2, 3, 4, 6),
        (3, 2, 2, 3),
    ),
    "frames": (lambda: pc.adapters.FramePair(positions=fourier(2), dim=5), lambda: drawn(3, 2, 3, 5, 7), (3, 5, 7)),
    "text": (
        lambda: pc.adapters.TokenEmbedding(11, 5, positions=pc.positions.LearnedEmbedding(7, 5)),
        lambda: torch.arange(21).view(3, 7) % 11,
        (3, 7),
    ),
}


@pytest.mark.parametrize("kind", RAGGED)
def test_a_ragged_modality_may_be_absent_in_some_samples(kind):
    make, draw, shape = RAGGED[kind]
    torch.manual_seed(0)
    both, given, labels = Multimodal({kind: make(), "label": OneHotLabel(13)}).double(), draw(), torch.arange(3)
    read = encoder(both.dim)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    given[1] = 0 if kind == "text" else torch.nan
    tokens = both({kind: given, "label": labels}, mask={kind: mask})
    assert torch.equal(tokens.mask[:, :-1], mask.flatten(1)) and tokens.mask[:, -1].all()
    actual, there = read(tokens), torch.tensor([True, False, True])
    torch.testing.assert_close(actual[1:2], read(both({"label": labels[1:2]})), **EXACT)
    expected = read(both({kind: given[there], "label": labels[there]}, mask={kind: mask[there]}))
    torch.testing.assert_close(actual[there], expected, **EXACT)


@pytest.mark.refusal
def test_a_sample_without_any_modality_raises():
    both, there = made(modality_dropout={"sound": 0.5}), torch.tensor([True, False, True, True, True])
    masks = {"sound": there, "label": there, "set": there[:, None].expand(-1, 11)}
    with pytest.raises(ValueError, match=r"mask leaves no token to attend to in samples \[1\]"):
        both.train()(inputs(), mask=masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_modalities_take_the_dtype_of_the_model(dtype):
    both = made().to(dtype)
    assert both({"label": torch.tensor([3, 5])}).content.dtype == dtype
    assert both({"label": torch.tensor([3]), "set": torch.randn(1, 2, 5)}).content.dtype == dtype
    table = Multimodal({"row": Table(2, dim=5), "set": Grid(5, positions=None)}).to(dtype)
    tokens = table({"row": torch.randn(2, 2), "set": torch.randn(2, 3, 5).to(dtype)})
    assert tokens.content.dtype == tokens.modalities["row"].content.dtype == dtype
    assert encoder(table.dim).to(dtype)(tokens).isfinite().all()


def test_modalities_of_several_dtypes_are_concatenated_under_autocast():
    torch.manual_seed(0)
    picture = pc.adapters.Image(3, positions=None, stem=partial(pc.adapters.Patches, patch_size=2))
    text, row = pc.adapters.TokenEmbedding(11, 5), Table(2, dim=5)
    both = Multimodal({"text": text, "row": row, "label": OneHotLabel(3), "picture": picture})
    read = encoder(both.dim).float()
    given = {"text": torch.arange(6).view(2, 3), "row": torch.randn(2, 2), "label": torch.tensor([0, 2])}
    given["picture"] = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = read(both(given))
    torch.testing.assert_close(actual.float(), read(both(given)), rtol=0.05, atol=0.05)


class TestModalities:
    """The tokens of each modality before concatenation."""

    def both(self, **options) -> Multimodal:
        torch.manual_seed(0)
        picture = pc.adapters.Image(3, positions=fourier(2))
        text = pc.adapters.TokenEmbedding(11, 6, positions=pc.positions.LearnedEmbedding(9, 6))
        return Multimodal({"picture": picture, "text": text, "label": OneHotLabel(3)}, **options).double()

    def given(self) -> dict[str, Tensor]:
        return {"picture": drawn(2, 3, 5, 7), "text": torch.arange(18).view(2, 9) % 11}

    def test_they_keep_their_grids_masks_and_tables(self):
        both, given, mask = self.both(), self.given(), torch.arange(9) < torch.tensor([[9], [4]])
        tokens = both(given, mask={"text": mask})
        assert list(tokens.modalities) == ["picture", "text", "label"] and tokens.modalities["label"] is None
        picture, text = tokens.modalities["picture"], tokens.modalities["text"]
        assert picture.grid == (5, 7) and picture.mask is None and text.grid == (9,) and torch.equal(text.mask, mask)
        torch.testing.assert_close(
            picture.materialize(), both.adapters["picture"](given["picture"]).materialize(), **EXACT
        )
        expected = both.adapters["text"](given["text"], mask=mask)
        torch.testing.assert_close(text.materialize(), expected.materialize(), **EXACT)

    def test_masked_and_dropped_content_is_not_visible(self):
        chance = torch.Generator().manual_seed(0)
        both = self.both(token_mask_rate={"picture": 0.5}, modality_dropout={"text": 0.5}, generator=chance).train()
        tokens, given = both(self.given()), self.given()
        hidden = (tokens.content[:, :35] == both.mask_tokens["picture"]).all(-1).view(2, 5, 7)
        assert hidden.any() and not hidden.all()
        content = given["picture"].movedim(1, -1).masked_fill(hidden[..., None], 0)
        torch.testing.assert_close(tokens.modalities["picture"].content, content, **EXACT)
        assert torch.equal(tokens.modalities["text"].mask, tokens.mask[:, 35:])

    def test_a_label_that_is_always_masked_is_zeros(self):
        both = self.both(token_mask_rate={"label": 1.0}).eval()
        assert not both({"label": torch.tensor([1, 2])}).modalities["label"].materialize().any()


class TestTokenMasking:
    def test_rate_one_masks_every_token(self):
        both, given = made(token_mask_rate={"label": 1.0}), inputs()
        for mode in (True, False):
            tokens = both.train(mode)(given)
            torch.testing.assert_close(tokens.content[:, -1], both.mask_tokens["label"].expand(BATCH, -1), **EXACT)
            torch.testing.assert_close(tokens.content[:, :-1], made()(given).content[:, :-1], **EXACT)

    def test_tokens_are_masked_in_training_only(self):
        both, given = made(token_mask_rate={"set": 0.3}, generator=torch.Generator().manual_seed(7)), inputs()
        assert torch.equal(both.eval()(given).content, made()(given).content)
        given = {"set": drawn(200, 53, 5)}
        hidden = (both.train()(given).content == both.mask_tokens["set"]).all(-1)
        assert abs(hidden.double().mean() - 0.3) < 0.02 and hidden.any(0).all()

    def test_gradients_reach_the_mask_vector(self):
        both = made(token_mask_rate={"set": 0.5}, generator=torch.Generator().manual_seed(7))
        x = drawn(3, 11, 5).requires_grad_()
        both({"set": x}).content.sum().backward()
        seen = (x.grad != 0).any(-1)
        torch.testing.assert_close(both.mask_tokens["set"].grad, (~seen).sum().double().expand(both.dim), **EXACT)


class TestModalityDropout:
    def test_whole_modalities_are_dropped_in_training_only(self):
        both = made(modality_dropout={"set": 0.4}, generator=torch.Generator().manual_seed(7))
        given = {"set": drawn(2000, 3, 5), "label": torch.zeros(2000, dtype=torch.long)}
        assert both.eval()(given).mask is None
        mask = both.train()(given).mask
        assert mask[:, -1].all() and torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, 0], mask[:, 2])
        assert abs(mask[:, 0].double().mean() - 0.6) < 0.04

    def test_dropping_equals_leaving_the_modality_out(self):
        both, given = made(modality_dropout={"set": 0.5}, generator=torch.Generator().manual_seed(7)), inputs()
        read = encoder(both.dim)
        tokens = both.train()(given)
        kept = tokens.mask[:, 7]
        assert kept.any() and not kept.all()
        torch.testing.assert_close(read(tokens)[kept], read(both.eval()(given))[kept], **EXACT)
        given.pop("set")
        torch.testing.assert_close(read(tokens)[~kept], read(both(given))[~kept], **EXACT)

    def test_the_seed_determines_the_drops(self):
        actual = [
            made(
                modality_dropout={"set": 0.5},
                token_mask_rate={"set": 0.5},
                generator=torch.Generator().manual_seed(seed),
            )(inputs())
            for seed in (3, 3, 4)
        ]
        assert torch.equal(actual[0].mask, actual[1].mask) and torch.equal(actual[0].content, actual[1].content)
        assert not torch.equal(actual[0].content, actual[2].content)

    def test_each_sample_keeps_at_least_one_modality(self):
        """With rates of 0.5 for a and b, both are drawn in a quarter of the samples; half of these keep a."""
        both = Multimodal(
            {"a": OneHotLabel(3), "b": OneHotLabel(2)},
            modality_dropout={"a": 0.5, "b": 0.5},
            generator=torch.Generator().manual_seed(7),
        )
        numbers = torch.zeros(10_000, dtype=torch.long)
        mask = both.train()({"a": numbers, "b": numbers}).mask
        assert mask.any(1).all()
        torch.testing.assert_close(mask.double().mean(0), torch.full((2,), 0.625).double(), rtol=0, atol=0.015)
        assert abs(mask.all(1).double().mean() - 0.25) < 0.015

    @pytest.mark.parametrize("rates", [(1.0, 1.0, 1.0), (0.9, 0.5, 1.0)])
    def test_the_modality_kept_is_one_that_is_present(self, rates):
        names = ("a", "b", "c")
        both = Multimodal(
            {name: OneHotLabel(3) for name in names},
            modality_dropout=dict(zip(names, rates, strict=True)),
            generator=torch.Generator().manual_seed(7),
        )
        there = torch.rand(12_000, 3, generator=torch.Generator().manual_seed(1)) < 0.5
        there = there[there.any(1)]
        numbers = torch.zeros(len(there), dtype=torch.long)
        mask = both.train()(dict.fromkeys(names, numbers), mask=dict(zip(names, there.T, strict=True))).mask
        assert torch.equal(mask.any(1), there.any(1)) and not (mask & ~there).any()
        if rates == (1.0,) * 3:  # one of those present, each equally likely
            assert (mask.sum(1) == there.any(1)).all()
            shares = mask[there.all(1)].double().mean(0)
            torch.testing.assert_close(shares, torch.full((3,), 1 / 3).double(), rtol=0, atol=0.05)

    def test_modalities_that_are_always_masked_do_not_count(self):
        both = made(modality_dropout={"sound": 0.5, "set": 0.5, "label": 0.5}, token_mask_rate={"label": 1.0})
        given = {name: x[:1].expand(500, *x.shape[1:]) for name, x in inputs().items()}
        mask = both.train()(given).mask
        assert mask[:, :18].any(1).all() and not mask[:, 18].all()
        assert both({"label": torch.arange(9)}).mask.all()  # the only one left


def test_the_generator_is_not_saved(tmp_path):
    both = Multimodal(
        adapters(),
        modality_dropout={"set": 0.5},
        token_mask_rate={"label": 1.0},
        generator=torch.Generator().manual_seed(7),
    )
    again = pc.load(pc.save(both, tmp_path))
    assert (
        again.generator is None
        and again.modality_dropout == both.modality_dropout
        and again.token_mask_rate == both.token_mask_rate
    )
    given = {name: x.float() if x.is_floating_point() else x for name, x in inputs().items()}
    torch.testing.assert_close(again.eval()(given).content, both.eval()(given).content)
    assert copy.deepcopy(both).generator is not None


@pytest.mark.refusal
@pytest.mark.parametrize("name", ["values", "keys", "items", "type", "training", "to", "half", "a.b", "", "copy"])
def test_invalid_module_names_raise(name):
    for make, argument in (
        (Multimodal, "adapters"), (pc.queries.Multimodal, "sources"), (pc.heads.Multimodal, "heads"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{argument} must not have the name '{name}'"):
            make({name: OneHotLabel(3)})


@pytest.mark.refusal
def test_dictionaries_of_other_objects_raise():
    for make, argument in (
        (Multimodal, "adapters"), (pc.queries.Multimodal, "sources"), (pc.heads.Multimodal, "heads"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{argument} must be a dictionary whose values are each a module"):
            make([OneHotLabel(3)])
        with pytest.raises(TypeError, match=rf"{argument}\['a'\] must be a module; got the class .*Build it first"):
            make({"a": OneHotLabel})
        with pytest.raises(TypeError, match=f"{argument} must have strings as keys; got 3"):
            make({3: OneHotLabel(3)})


@pytest.mark.compile
def test_it_compiles_with_drops_and_masks():
    both = made(modality_dropout={"sound": 1.0}, token_mask_rate={"set": 1.0}).train()
    masks = {"set": torch.arange(11) < torch.tensor([[11], [0], [1], [7], [2]])}
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(inputs(), mask=masks), both(inputs(), mask=masks)
    torch.testing.assert_close(actual.materialize(), expected.materialize(), **EXACT)
    assert torch.equal(actual.mask, expected.mask) and actual.modalities["set"].grid == (11,)


@pytest.mark.refusal
class TestErrors:
    @pytest.mark.parametrize(
        ("given", "mask", "kind", "message"),
        [
            (torch.zeros(2, 9), None, TypeError, "inputs must be a dictionary by modality"),
            ({}, None, ValueError, "inputs must hold a modality at least"),
            ({"smell": torch.zeros(2)}, None, ValueError, r"inputs names \['smell'\]; the modalities are \['sound'"),
            ({"label": torch.zeros(2).long()}, torch.ones(2).bool(), TypeError, "mask must be a dictionary by mod"),
            ({"label": torch.zeros(2).long()}, {"smell": None}, ValueError, r"mask names \['smell'\]"),
            (
                {"label": torch.zeros(2).long(), "set": torch.zeros(3, 1, 5)},
                None, ValueError, "inputs must have one batch size; got {'set': 3, 'label': 2}",
            ),
            (
                {"label": torch.zeros(2).long()}, {"label": torch.ones(3).bool()},
                ValueError, r"mask\['label'\] must have shape \(2,\)",
            ),
            (
                {"label": torch.zeros(2).long()}, {"label": torch.ones(2)},
                TypeError, r"mask\['label'\] must be a boolean tensor",
            ),
            (
                {"set": torch.zeros(2, 3, 5)}, {"set": torch.ones(3, 3).bool()},
                ValueError, r"mask\['set'\] must have shape \(2, 3\)",
            ),
            ({"set": torch.zeros(2, 3, 4)}, None, ValueError, r"inputs\['set'\]: x must have 5 channels"),
            ({"label": [1, 2]}, None, TypeError, r"inputs\['label'\]: labels must be a torch.Tensor; got list"),
        ],
    )  # fmt: skip
    def test_invalid_inputs_raise(self, given, mask, kind, message):
        with pytest.raises(kind, match=message):
            Multimodal(adapters())(given, mask=mask)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_modality_channels": 0}, "min_modality_channels must be a whole number of at least 1; got 0"),
            ({"token_mask_rate": {"smell": 0.1}}, r"token_mask_rate names \['smell'\]"),
            ({"modality_dropout": {"set": 1.1}}, r"modality_dropout\['set'\] must lie in \[0, 1\]; got 1.1"),
        ],
    )
    def test_invalid_settings_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            Multimodal(adapters(), **options)
        with pytest.raises(ValueError, match="adapters must hold an adapter at least"):
            Multimodal({})
