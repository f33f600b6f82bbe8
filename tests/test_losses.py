"""Losses against their formulas, where they are not smooth, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core.losses import end_point_error, weighted

SHAPES = [(2, 2, 5, 7), (1, 2, 1, 1), (2, 11, 2), (3, 1, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestEndPointError:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_mean_length_of_the_difference(self, shape):
        flow, target = drawn(*shape), drawn(*shape, seed=1)
        lengths = (flow - target).norm(dim=1 if len(shape) == 4 else 2)
        torch.testing.assert_close(end_point_error(flow, target), lengths.mean())
        known = torch.rand(lengths.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        known.view(-1)[0] = True
        torch.testing.assert_close(end_point_error(flow, target, known), lengths[known].mean())

    def test_points_are_those_of_the_grid(self):
        flow, target = drawn(2, 2, 5, 7), drawn(2, 2, 5, 7, seed=1)
        listed = [x.flatten(2).mT for x in (flow, target)]
        torch.testing.assert_close(end_point_error(*listed), end_point_error(flow, target))

    def test_gradients(self):
        target = drawn(1, 2, 2, 3, seed=1)
        assert torch.autograd.gradcheck(lambda flow: end_point_error(flow, target), drawn(1, 2, 2, 3).requires_grad_())

    def test_where_the_flow_is_right_the_gradient_is_zero(self):
        flow = drawn(1, 2, 3, 5).requires_grad_()
        loss = end_point_error(flow, flow.detach().clone())
        loss.backward()
        assert loss == 0 and torch.equal(flow.grad, torch.zeros_like(flow))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_known_has_no_effect(self, value):
        flow, target = drawn(1, 2, 3, 5).requires_grad_(), drawn(1, 2, 3, 5, seed=1)
        known = torch.ones(1, 3, 5, dtype=torch.bool)
        known[0, 1, 2] = False
        wanted = end_point_error(flow, target, known)
        (gradient,) = torch.autograd.grad(wanted, flow)
        target[0, :, 1, 2] = value  # as files of true flows mark it
        found = end_point_error(flow, target, known)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, flow)[0], gradient)

    @pytest.mark.parametrize(
        ("flow", "target", "mask", "message"),
        [
            ((1, 2, 3, 5), (1, 2, 3, 4), None, "flow and target must both be b 2 h w, or b q 2"),
            ((1, 3, 3, 5), (1, 3, 3, 5), None, "must both be b 2 h w"),
            ((1, 2, 5), (1, 2, 5), None, "must both be b 2 h w"),
            ((3, 5), (3, 5), None, "must both be b 2 h w"),
            ((1, 2, 3, 5), (1, 2, 3, 5), torch.ones(1, 5, 3).bool(), r"mask must have shape \(1, 3, 5\)"),
            ((1, 2, 3, 5), (1, 2, 3, 5), torch.zeros(1, 3, 5).bool(), "mask must leave a point at least"),
        ],
    )
    def test_refused_flows(self, flow, target, mask, message):
        with pytest.raises(ValueError, match=message):
            end_point_error(torch.zeros(flow), torch.zeros(target), mask)

    def test_refused_masks_of_numbers(self):
        with pytest.raises(TypeError, match="mask must be a boolean tensor"):
            end_point_error(drawn(1, 2, 3, 5), drawn(1, 2, 3, 5), torch.ones(1, 3, 5))


class TestWeighted:
    def test_the_weighted_sum_and_each(self):
        outputs = {"sound": drawn(2, 7), "label": drawn(2, 3, seed=1), "film": drawn(2, 5)}
        targets = {"sound": drawn(2, 7, seed=2), "label": torch.tensor([0, 2])}
        losses = {"sound": (F.l1_loss, 2.0), "label": (F.cross_entropy, 0.5), "film": (F.mse_loss, 1.0)}
        total, each = weighted(outputs, targets, losses)
        assert set(each) == {"sound", "label"}
        torch.testing.assert_close(each["sound"], (outputs["sound"] - targets["sound"]).abs().mean())
        torch.testing.assert_close(total, 2 * each["sound"] + 0.5 * F.cross_entropy(outputs["label"], targets["label"]))

    def test_one_kind_and_gradients(self):
        output = drawn(2, 7).requires_grad_()
        total, _ = weighted({"a": output}, {"a": torch.zeros(2, 7).double()}, {"a": (F.mse_loss, 3.0)})
        total.backward()
        torch.testing.assert_close(output.grad, 3 * 2 * output.detach() / 14)

    def test_losses_of_different_dtypes(self):
        outputs = {"a": torch.ones(2, 3), "b": torch.ones(2, 3).double()}
        targets = {name: torch.zeros_like(x) for name, x in outputs.items()}
        total, _ = weighted(outputs, targets, dict.fromkeys(outputs, (F.l1_loss, 1.0)))
        assert total == 2

    @pytest.mark.parametrize(
        ("outputs", "targets", "losses", "message"),
        [
            ({}, {"a": 0}, {"a": 0}, r"targets must have their outputs; there are none for \['a'\]"),
            ({"a": 0}, {"a": 0}, {}, "targets must have their losses"),
            ({"a": 0}, {}, {"a": 0}, "targets must hold a kind at least"),
        ],
    )
    def test_refused_kinds(self, outputs, targets, losses, message):
        with pytest.raises(ValueError, match=message):
            weighted(outputs, targets, losses)
