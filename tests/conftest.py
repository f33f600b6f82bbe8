"""Where there is no GPU, Triton kernels are interpreted: slowly, so that there a few small cases stand for all."""

from __future__ import annotations

import os
import re

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when kernels are imported

SMALL = re.compile(
    r"test_every_grid\[triton-\((13,|7, 11|3, 5, 7|1,|1, 1|1, 13|5, 1, 3)\)-(masked-float64|all-float32)\]"
    r"|test_every_grid\[triton-\((2, 33, 3|3, 257)\)-masked-float64\]"
    r"|test_every_size\[triton-(4-33-shared-float32|1-17-own-float64|7-1-own-float64|20-33-own-float32)\]"
    r"|test_masked_tokens_are_inert\[triton-(nan-own-float32|-inf-shared-float64)\]"
    r"|test_scores_that_rise_or_fall_over_the_grid\[triton-(rising|falling)-float32\]"
    r"|test_gradients_of_some_inputs_alone\[triton-\(True, False, (True|False), False\)\]"
    r"|test_vmap_of_gradients_equals_a_loop\[triton-\(None, 0, 0, 0\)-own-masked\]"
    r"|test_inputs_that_are_not_contiguous\[triton-float64\]"
    r"|test_the_operators_are_what_they_say\[triton-masked\]"
    r"|test_(one_token_of_a_score_of_ten_thousand|scales_of_zero|autocast|it_is_differentiable_once|sums_along)\w*\[triton"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the Triton cases that take long where they are interpreted."""
    left_out = [
        item for item in items if INTERPRETED and item.get_closest_marker("triton") and not SMALL.search(item.name)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
