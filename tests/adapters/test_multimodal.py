"""Several kinds of input: order and padding, kinds that are not there, what is hidden and dropped, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core.adapters import Audio, Grid, Label, Multimodal, Table

EXACT = {"rtol": 1e-11, "atol": 1e-11}
BATCH = 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters() -> dict[str, nn.Module]:
    sound = Audio(patch=3, positions=pc.positions.Fourier(axes=1, bands=2, max_resolution=7))
    return {"sound": sound, "set": Grid(5, positions=None), "label": Label(13)}


def made(**options) -> Multimodal:
    torch.manual_seed(0)
    return Multimodal(adapters(), **options).double()


def inputs() -> dict[str, Tensor]:
    return {"label": torch.arange(BATCH), "sound": drawn(BATCH, 20), "set": drawn(BATCH, 11, 5, seed=1)}


def encoder(dim: int) -> nn.Module:
    torch.manual_seed(1)
    return pc.Encoder(dim, latents=3, dim=7, depth=1, heads=1).double()


def test_kinds_come_in_the_order_of_the_adapters_padded_by_their_vectors():
    both, given = made(), inputs()
    tokens = both(given)
    assert both.dim == 13 + 4 and tokens.content.shape == (BATCH, 7 + 11 + 1, 17) and tokens.mask is None
    for name, part in zip(("sound", "set", "label"), tokens.content.split([7, 11, 1], dim=1), strict=True):
        dense = both.adapters[name](given[name]).dense()
        torch.testing.assert_close(part[..., : dense.shape[-1]], dense.double(), **EXACT)
        torch.testing.assert_close(
            part[..., dense.shape[-1] :], both.padding[name].expand_as(part[..., dense.shape[-1] :])
        )


def test_the_widest_kind_has_least_learned_channels():
    both = made(least=1)
    assert both.dim == 14 and {name: len(vector) for name, vector in both.padding.items()} == {
        "sound": 14 - 8, "set": 9, "label": 1,
    }  # fmt: skip


def test_masks_of_a_kind_are_laid_side_by_side():
    there = torch.arange(11) < torch.tensor([[11], [3], [1], [7], [2]])
    tokens = made()(inputs(), mask={"set": there})
    assert tokens.mask[:, :7].all() and tokens.mask[:, -1].all() and torch.equal(tokens.mask[:, 7:-1], there)


@pytest.mark.parametrize("name", ["sound", "set", "label"])
def test_a_kind_that_is_absent_in_some_samples_is_left_out_for_them(name):
    both, given, there = made(), inputs(), torch.tensor([True, False, True, False, False])
    read = encoder(both.dim)
    found = read(both(given, mask={name: there}))
    torch.testing.assert_close(found[there], read(both(given))[there], **EXACT)
    without = {kind: x for kind, x in given.items() if kind != name}
    torch.testing.assert_close(found[~there], read(both(without))[~there], **EXACT)


def test_what_an_absent_kind_holds_has_no_effect():
    both, given, there = made(), inputs(), torch.tensor([True, False, True, False, False])
    masks = {"sound": there, "label": there}
    wanted = both(given, mask=masks)
    given["sound"][~there] = torch.nan
    given["label"][~there] = -1  # no class at all
    torch.testing.assert_close(both(given, mask=masks).dense()[wanted.mask], wanted.dense()[wanted.mask], **EXACT)
    assert both(given, mask=masks).content.isfinite().all() and given["sound"].isnan().any()


def test_a_table_may_be_absent_too():
    both = Multimodal({"row": Table(2, (3,), dim=5), "label": Label(7)})
    rows = {"numbers": torch.full((2, 2), torch.nan), "categories": torch.tensor([[-1], [-1]])}
    tokens = both({"row": rows, "label": torch.tensor([1, 2])}, mask={"row": torch.tensor([True, False])})
    assert tokens.mask.tolist() == [[False] * 3 + [True]] * 2


def test_a_sample_that_loses_all_its_kinds_is_finite():
    both = made(drop={"sound": 1.0, "set": 1.0, "label": 1.0})
    tokens = both.train()(inputs())
    assert not tokens.mask.any()
    assert encoder(both.dim)(tokens).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_class_numbers_take_the_dtype_of_the_model(dtype):
    both = made().to(dtype)
    assert both({"label": torch.tensor([3, 5])}).content.dtype == dtype
    assert both({"label": torch.tensor([3]), "set": torch.randn(1, 2, 5).to(dtype)}).content.dtype == dtype


class TestHiding:
    def test_rate_one_is_always_hidden_and_carries_nothing(self):
        both, given = made(hide={"label": 1.0}), inputs()
        for mode in (True, False):
            tokens = both.train(mode)(given)
            torch.testing.assert_close(tokens.content[:, -1], both.hidden["label"].expand(BATCH, -1), **EXACT)
            torch.testing.assert_close(tokens.content[:, :-1], made()(given).content[:, :-1], **EXACT)

    def test_some_tokens_are_hidden_in_training_only(self):
        both, given = made(hide={"set": 0.3}, generator=torch.Generator().manual_seed(7)), inputs()
        assert torch.equal(both.eval()(given).content, made()(given).content)
        given = {"set": drawn(200, 53, 5)}
        hidden = (both.train()(given).content == both.hidden["set"]).all(-1)
        assert abs(hidden.double().mean() - 0.3) < 0.02 and hidden.any(0).all()

    def test_gradients_reach_the_hidden_vector(self):
        both = made(hide={"set": 0.5}, generator=torch.Generator().manual_seed(7))
        x = drawn(3, 11, 5).requires_grad_()
        both({"set": x}).content.sum().backward()
        seen = (x.grad != 0).any(-1)
        torch.testing.assert_close(both.hidden["set"].grad, (~seen).sum().double().expand(both.dim), **EXACT)


class TestDropping:
    def test_a_whole_kind_is_dropped_for_some_samples_in_training_only(self):
        both = made(drop={"set": 0.4}, generator=torch.Generator().manual_seed(7))
        given = {"set": drawn(2000, 3, 5), "label": torch.zeros(2000, dtype=torch.long)}
        assert both.eval()(given).mask is None
        mask = both.train()(given).mask
        assert mask[:, -1].all() and torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, 0], mask[:, 2])
        assert abs(mask[:, 0].double().mean() - 0.6) < 0.04

    def test_it_is_as_leaving_the_kind_out(self):
        both, given = made(drop={"set": 0.5}, generator=torch.Generator().manual_seed(7)), inputs()
        read = encoder(both.dim)
        tokens = both.train()(given)
        kept = tokens.mask[:, 7]
        assert kept.any() and not kept.all()
        torch.testing.assert_close(read(tokens)[kept], read(both.eval()(given))[kept], **EXACT)
        given.pop("set")
        torch.testing.assert_close(read(tokens)[~kept], read(both(given))[~kept], **EXACT)

    def test_a_seed_says_what_is_drawn(self):
        found = [
            made(drop={"set": 0.5}, hide={"set": 0.5}, generator=torch.Generator().manual_seed(seed))(inputs())
            for seed in (3, 3, 4)
        ]
        assert torch.equal(found[0].mask, found[1].mask) and torch.equal(found[0].content, found[1].content)
        assert not torch.equal(found[0].content, found[2].content)


def test_it_is_saved_without_its_generator(tmp_path):
    both = Multimodal(adapters(), drop={"set": 0.5}, hide={"label": 1.0}, generator=torch.Generator().manual_seed(7))
    again = pc.load(pc.save(both, tmp_path))
    assert again.generator is None and again.drop == both.drop and again.hide == both.hide
    given = {name: x.float() if x.is_floating_point() else x for name, x in inputs().items()}
    torch.testing.assert_close(again.eval()(given).content, both.eval()(given).content)
    assert copy.deepcopy(both).generator is not None


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "mask", "kind", "message"),
        [
            (torch.zeros(2, 9), None, TypeError, "inputs must be a dictionary by kind"),
            ({}, None, ValueError, "inputs must hold a kind at least"),
            ({"smell": torch.zeros(2)}, None, ValueError, r"inputs names \['smell'\]; the kinds are \['sound'"),
            ({"label": torch.zeros(2).long()}, torch.ones(2).bool(), TypeError, "mask must be a dictionary by kind"),
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
        ],
    )  # fmt: skip
    def test_refused_inputs(self, given, mask, kind, message):
        with pytest.raises(kind, match=message):
            Multimodal(adapters())(given, mask=mask)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"least": 0}, "least must be a whole number of at least 1; got 0"),
            ({"hide": {"smell": 0.1}}, r"hide names \['smell'\]"),
            ({"drop": {"set": 1.1}}, r"drop\['set'\] must lie in \[0, 1\]; got 1.1"),
        ],
    )
    def test_refused_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            Multimodal(adapters(), **options)
        with pytest.raises(ValueError, match="adapters must name an adapter at least"):
            Multimodal({})
