"""Losses against their formulas, at points where they are not smooth, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.losses import binary_cross_entropy, cross_entropy, end_point_error, weighted

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

    @pytest.mark.parametrize("shape", [(7,), (3, 5)])
    @pytest.mark.parametrize("weighting", [False, True])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
    def test_values_and_gradients_are_pytorchs(self, shape, weighting, label_smoothing):
        logits, labels = (
            drawn(*shape, 4).requires_grad_(),
            torch.arange(15)[: torch.Size(shape).numel()].view(shape) % 4,
        )
        labels.view(-1)[2::5] = 9
        options = {
            "weight": torch.tensor([0.0, 0.5, 2.0, 1.0]).double() if weighting else None,
            "label_smoothing": label_smoothing,
            "ignore_index": 9,
        }
        expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)
        actual = cross_entropy(logits, labels, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)), rtol=0, atol=0)

    def test_weights_of_another_dtype(self):
        logits, labels, weight = drawn(5, 3), torch.arange(5) % 3, torch.tensor([1.0, 3.0, 0.5])
        expected = F.cross_entropy(logits, labels, weight=weight.double())
        torch.testing.assert_close(cross_entropy(logits, labels, weight=weight), expected)
        half = cross_entropy(logits.bfloat16(), labels, weight=weight.bfloat16())
        torch.testing.assert_close(half, cross_entropy(logits.bfloat16().float(), labels, weight=weight))

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\]; got 1.5"),
            ({"label_smoothing": float("nan")}, r"label_smoothing must lie in \[0, 1\]; got nan"),
            ({"weight": torch.ones(3)}, r"weight must have shape \(4,\), one per class; got \(3,\)"),
            ({"weight": torch.tensor([1.0, -1, 1, 1])}, "weight must be finite and not negative"),
            ({"weight": torch.tensor([1.0, torch.inf, 1, 1])}, "weight must be finite and not negative"),
            ({"weight": torch.tensor([0.0, 0, 1, 1])}, "weight must be positive for at least one of the labels"),
            (
                {"weight": torch.ones(4, device="meta")},
                "weight must be on the device of the logits, cpu; it is on meta",
            ),
            ({"labels": torch.tensor([0, 4])}, r"labels must lie in 0 \.\.\. 3; got 4"),
            ({"labels": torch.tensor([0, -1])}, r"labels must lie in 0 \.\.\. 3; got -1"),
        ],
    )
    def test_invalid_options_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            cross_entropy(torch.zeros(2, 4), **{"labels": torch.tensor([0, 1]), **options})
        with pytest.raises(TypeError, match=r"weight must be floating point; got torch\.int64"):
            cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), weight=torch.ones(4).long())


class TestBinaryCrossEntropy:
    @pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3)])
    @pytest.mark.parametrize("pos_weight", [None, torch.tensor([1.0, 7.0, 0.0]).double()], ids=["equal", "weighted"])
    def test_values_and_gradients_are_pytorchs(self, shape, pos_weight):
        logits, targets = drawn(*shape).requires_grad_(), drawn(*shape, seed=1).sigmoid()
        expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight)
        actual = binary_cross_entropy(logits, targets, pos_weight=pos_weight)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_dtypes_of_targets(self, dtype):
        logits, targets = drawn(2, 3), torch.tensor([[1, 0, 1], [0, 0, 1]])
        expected = F.binary_cross_entropy_with_logits(logits, targets.double())
        torch.testing.assert_close(binary_cross_entropy(logits, targets.to(dtype)), expected)

    def test_label_smoothing_moves_targets_toward_one_half(self):
        logits, targets = drawn(2, 3), torch.tensor([[1.0, 0, 1], [0, 0, 1]]).double()
        smooth = torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.1, 0.9]]).double()
        actual = binary_cross_entropy(logits, targets, label_smoothing=0.2)
        torch.testing.assert_close(actual, F.binary_cross_entropy_with_logits(logits, smooth))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -100.0])
    def test_unknown_targets_have_no_effect(self, value):
        logits, targets = drawn(2, 5, 3).requires_grad_(), drawn(2, 5, 3, seed=1).sigmoid().round()
        known, weight = drawn(2, 5, 3, seed=2) < 0, torch.tensor([1.0, 7.0, 0.5]).double()
        each = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
        expected = each[known].mean()
        actual = binary_cross_entropy(logits, targets.where(known, value), pos_weight=weight, mask=known)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)))

    def test_half_precision_is_summed_in_float32(self):
        logits, targets = torch.randn(200, 300).bfloat16(), torch.rand(200, 300) < 0.5
        torch.testing.assert_close(binary_cross_entropy(logits, targets), binary_cross_entropy(logits.float(), targets))

    def test_it_is_a_loss_of_a_modality(self):
        outputs, targets = {"tags": drawn(2, 3)}, {"tags": torch.tensor([[1, 0, 1], [0, 0, 1]])}
        total, _ = weighted(outputs, targets, {"tags": (binary_cross_entropy, 2.0)})
        torch.testing.assert_close(total, 2 * binary_cross_entropy(outputs["tags"], targets["tags"]))

    @pytest.mark.refusal
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"targets": torch.zeros(2)}, r"targets must have the shape of the logits, \(2, 4\); got \(2,\)"),
            ({"targets": torch.full((2, 4), 1.5)}, r"targets must lie in \[0, 1\]"),
            ({"targets": torch.full((2, 4), torch.nan)}, r"targets must lie in \[0, 1\]"),
            ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\]; got -0.1"),
            ({"pos_weight": torch.ones(2, 4)}, r"pos_weight must have shape \(4,\), one per class; got \(2, 4\)"),
            ({"mask": torch.ones(2).bool()}, r"mask must have shape \(2, 4\)"),
            ({"mask": torch.zeros(2, 4).bool()}, "mask must leave at least one target"),
        ],
    )
    def test_invalid_arguments_raise(self, options, message):
        with pytest.raises(ValueError, match=message):
            binary_cross_entropy(torch.zeros(2, 4), **{"targets": torch.zeros(2, 4), **options})
        with pytest.raises(TypeError, match="mask must be a boolean tensor"):
            binary_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 4), mask=torch.ones(2, 4))


@pytest.mark.compile
def test_losses_compile_without_a_graph_break(fresh):
    def loss(logits, labels, weight, targets, mask):
        return cross_entropy(logits, labels, weight=weight, label_smoothing=0.1) + binary_cross_entropy(
            logits, targets, pos_weight=weight, mask=mask
        )

    logits, labels, targets = drawn(5, 3), torch.arange(5) % 3, drawn(5, 3, seed=1).sigmoid()
    arguments = (logits, labels, torch.tensor([1.0, 2.0, 0.5]).double(), targets, targets < 0.5)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(*arguments), loss(*arguments))


def test_long_flows_in_half_precision():
    flow = torch.full((1, 2, 3, 5), 300.0, dtype=torch.float16)
    assert end_point_error(flow, torch.zeros_like(flow)).item() == pytest.approx(300 * 2**0.5)
