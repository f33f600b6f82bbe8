"""Losses against their formulas, at points where they are not smooth, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.losses import cross_entropy, end_point_error, weighted

SHAPES = [(2, 2, 5, 7), (1, 2, 1, 1), (2, 11, 2), (3, 1, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestEndPointError:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_is_the_mean_length_of_the_difference(self, shape):
        flow, target = drawn(*shape), drawn(*shape, seed=1)
        lengths = (flow - target).norm(dim=1 if len(shape) == 4 else 2)
        torch.testing.assert_close(end_point_error(flow, target), lengths.mean())
        known = torch.rand(lengths.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        known.view(-1)[0] = True
        torch.testing.assert_close(end_point_error(flow, target, known), lengths[known].mean())

    def test_selected_points_are_those_of_the_grid(self):
        flow, target = drawn(2, 2, 5, 7), drawn(2, 2, 5, 7, seed=1)
        listed = [x.flatten(2).mT for x in (flow, target)]
        torch.testing.assert_close(end_point_error(*listed), end_point_error(flow, target))

    def test_gradients(self):
        target = drawn(1, 2, 2, 3, seed=1)
        assert torch.autograd.gradcheck(lambda flow: end_point_error(flow, target), drawn(1, 2, 2, 3).requires_grad_())

    def test_the_gradient_of_a_correct_flow_is_zero(self):
        flow = drawn(1, 2, 3, 5).requires_grad_()
        loss = end_point_error(flow, flow.detach().clone())
        loss.backward()
        assert loss == 0 and torch.equal(flow.grad, torch.zeros_like(flow))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_unknown_flows_have_no_effect(self, value):
        flow, target = drawn(1, 2, 3, 5).requires_grad_(), drawn(1, 2, 3, 5, seed=1)
        known = torch.ones(1, 3, 5, dtype=torch.bool)
        known[0, 1, 2] = False
        expected = end_point_error(flow, target, known)
        (gradient,) = torch.autograd.grad(expected, flow)
        target[0, :, 1, 2] = value  # as files of ground-truth flows mark it
        actual = end_point_error(flow, target, known)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, flow)[0], gradient)

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        ("flow", "target", "mask", "message"),
        [
            ((1, 2, 3, 5), (1, 2, 3, 4), None, "flow and target must both be b 2 h w, or b q 2"),
            ((1, 3, 3, 5), (1, 3, 3, 5), None, "must both be b 2 h w"),
            ((1, 2, 5), (1, 2, 5), None, "must both be b 2 h w"),
            ((3, 5), (3, 5), None, "must both be b 2 h w"),
            ((1, 2, 3, 5), (1, 2, 3, 5), torch.ones(1, 5, 3).bool(), r"mask must have shape \(1, 3, 5\)"),
            ((1, 2, 3, 5), (1, 2, 3, 5), torch.zeros(1, 3, 5).bool(), "mask must leave at least one point"),
        ],
    )
    def test_invalid_flows_raise(self, flow, target, mask, message):
        with pytest.raises(ValueError, match=message):
            end_point_error(torch.zeros(flow), torch.zeros(target), mask)

    @pytest.mark.refusal
    def test_invalid_masks_of_numbers_raise(self):
        with pytest.raises(TypeError, match="mask must be a boolean tensor"):
            end_point_error(drawn(1, 2, 3, 5), drawn(1, 2, 3, 5), torch.ones(1, 3, 5))


class TestWeighted:
    def test_it_returns_the_weighted_sum_and_each_loss(self):
        outputs = {"sound": drawn(2, 7), "label": drawn(2, 3, seed=1), "film": drawn(2, 5)}
        targets = {"sound": drawn(2, 7, seed=2), "label": torch.tensor([0, 2])}
        losses = {"sound": (F.l1_loss, 2.0), "label": (F.cross_entropy, 0.5), "film": (F.mse_loss, 1.0)}
        total, each = weighted(outputs, targets, losses)
        assert set(each) == {"sound", "label"}
        torch.testing.assert_close(each["sound"], (outputs["sound"] - targets["sound"]).abs().mean())
        torch.testing.assert_close(total, 2 * each["sound"] + 0.5 * F.cross_entropy(outputs["label"], targets["label"]))

    def test_one_modality_and_gradients(self):
        output = drawn(2, 7).requires_grad_()
        total, _ = weighted({"a": output}, {"a": torch.zeros(2, 7).double()}, {"a": (F.mse_loss, 3.0)})
        total.backward()
        torch.testing.assert_close(output.grad, 3 * 2 * output.detach() / 14)

    def test_losses_of_different_dtypes(self):
        outputs = {"a": torch.ones(2, 3), "b": torch.ones(2, 3).double()}
        targets = {name: torch.zeros_like(x) for name, x in outputs.items()}
        total, _ = weighted(outputs, targets, dict.fromkeys(outputs, (F.l1_loss, 1.0)))
        assert total == 2

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        ("outputs", "targets", "losses", "message"),
        [
            ({}, {"a": 0}, {"a": 0}, r"targets must have their outputs; there are none for \['a'\]"),
            ({"a": 0}, {"a": 0}, {}, "targets must have their losses"),
            ({"a": 0}, {}, {"a": 0}, "targets must hold at least one modality"),
        ],
    )
    def test_invalid_modalities_raise(self, outputs, targets, losses, message):
        with pytest.raises(ValueError, match=message):
            weighted(outputs, targets, losses)

    def test_samples_without_a_modality_are_ignored(self):
        outputs = {"sound": drawn(3, 7).requires_grad_(), "label": drawn(3, 5, seed=1).requires_grad_()}
        sound = drawn(3, 7, seed=2)
        sound[1] = torch.nan
        there = torch.tensor([True, False, True])
        targets, losses = (
            {"sound": sound, "label": torch.tensor([0, 2, 4])},
            {
                "sound": (F.l1_loss, 2.0),
                "label": (cross_entropy, 1.0),
            },
        )
        total, each = weighted(outputs, targets, losses, masks={"sound": there})
        torch.testing.assert_close(each["sound"], (outputs["sound"] - sound)[there].abs().mean())
        torch.testing.assert_close(each["label"], F.cross_entropy(outputs["label"], targets["label"]))
        total.backward()
        assert (outputs["sound"].grad[1] == 0).all()
        assert (outputs["sound"].grad[[0, 2]] != 0).all()

    def test_a_modality_absent_in_all_samples_has_zero_loss(self):
        output = drawn(2, 7).requires_grad_()
        none = torch.zeros(2, dtype=torch.bool)
        total, _ = weighted(
            {"a": output}, {"a": torch.full((2, 7), torch.nan)}, {"a": (F.l1_loss, 1.0)}, masks={"a": none}
        )
        total.backward()
        assert total == 0
        assert (output.grad == 0).all()

    @pytest.mark.refusal
    def test_invalid_targets_and_masks_raise(self):
        losses = {"a": (F.l1_loss, 1.0)}
        with pytest.raises(ValueError, match=r"targets\['a'\] must have the shape of its output, \(2, 1, 5\)"):
            weighted({"a": torch.zeros(2, 1, 5)}, {"a": torch.zeros(2, 5)}, losses)
        with pytest.raises(ValueError, match=r"masks names \['b'\]; there are targets for \['a'\]"):
            weighted({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, losses, masks={"b": torch.ones(2).bool()})
        with pytest.raises(TypeError, match=r"masks\['a'\] must be a boolean tensor"):
            weighted({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, losses, masks={"a": torch.ones(2)})


class TestCrossEntropy:
    @pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 5), (4, 4)])
    def test_it_is_the_mean_over_labels_that_are_not_ignored(self, shape):
        logits = drawn(*shape, 4).requires_grad_()
        labels = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
        labels.view(-1)[1::3] = -100
        counted = labels != -100
        expected = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted].mean()
        actual = cross_entropy(logits, labels)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)))

    def test_half_precision_is_summed_in_float32(self):
        logits, labels = torch.randn(2, 3000, 11).bfloat16(), torch.randint(11, (2, 3000))
        torch.testing.assert_close(cross_entropy(logits, labels), cross_entropy(logits.float(), labels))

    @pytest.mark.refusal
    def test_invalid_labels_raise(self):
        with pytest.raises(TypeError, match=r"labels must be whole numbers; got torch.float32"):
            cross_entropy(torch.zeros(2, 5), torch.zeros(2))
        with pytest.raises(ValueError, match=r"without their last axis, \(2, 5\); got \(2, 4\)"):
            cross_entropy(torch.zeros(2, 5, 4), torch.zeros(2, 4).long())
        with pytest.raises(ValueError, match="at least one that is not -100; got none"):
            cross_entropy(torch.zeros(2, 5), torch.tensor([-100, -100]))


def test_long_flows_in_half_precision():
    flow = torch.full((1, 2, 3, 5), 300.0, dtype=torch.float16)
    assert end_point_error(flow, torch.zeros_like(flow)).item() == pytest.approx(300 * 2**0.5)
