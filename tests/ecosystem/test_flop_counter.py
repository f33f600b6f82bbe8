"""torch.utils.flop_counter: counts with and without gradients, and the FLOPs of structured reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import perceiver_core as pc
from perceiver_core import reads
from perceiver_core.kernels.grid import read_grid
from tests.integration.whole_models import MODELS, make

pytestmark = pytest.mark.no_shape_checks

STRATEGIES = {"dense": reads.Dense(), "factored": reads.Factored(), "structured": reads.Structured()}
READS_TENSORS = ("text", "byte_text", "frames", "all_frames", "hierarchical")


def count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def backward(outputs: Any) -> None:
    sum(x.square().sum() for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)).backward()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_counts_do_not_depend_on_the_gradient_mode(name: str, strategy: str) -> None:
    if strategy != "dense" and name in READS_TENSORS:
        pytest.skip("the reads are of tensors")
    model, inputs = make(name, STRATEGIES[strategy])
    expected = count(lambda: model(inputs))
    assert expected > 0
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert count(lambda: model(inputs)) == expected
    assert 2 * expected < count(lambda: backward(model(inputs))) < 4 * expected


def structured(needs_token_gradients: bool) -> tuple[torch.Tensor, ...]:
    drawn = [torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 5 + 11), torch.randn(4, 3, 5, 11), torch.rand(4, 5, 11)]
    return tuple(x.requires_grad_(i < 2 or needs_token_gradients) for i, x in enumerate(drawn))


@pytest.mark.parametrize("needs_token_gradients", [False, True])
def test_structured_reads_are_counted_as_by_hand(needs_token_gradients: bool) -> None:
    """4 samples, 2 heads, 7 queries, 5 x 11 tokens of 3 channels."""
    pairs = 4 * 2 * 7 * 5 * 11
    product, terms = 2 * 3 * pairs, 2 * pairs  # a product with the content, and a term per axis
    inputs = structured(needs_token_gradients)
    assert count(lambda: read_grid(*inputs)) == 2 * (product + terms)
    outputs = read_grid(*inputs)
    expected = 3 * (product + terms) + (2 * product if needs_token_gradients else 0)
    assert count(lambda: backward(tuple(outputs))) == expected


def test_a_read_is_counted_as_by_hand() -> None:
    num_queries, num_tokens, dim, channels = 7, 55, 8, 3
    read = pc.CrossAttend(dim, channels, mlp=None, strategy=reads.Dense())
    x, tokens = torch.randn(2, num_queries, dim), torch.rand(2, num_tokens, channels)
    width = read.attention.key.out_features
    projections = 2 * 2 * (num_queries * 2 * dim + num_tokens * 2 * channels) * width
    with sdpa_kernel(SDPBackend.MATH):
        assert count(lambda: read(x, tokens)) == projections + 2 * 2 * 2 * num_queries * num_tokens * width
    assert count(lambda: read(x, tokens)) == projections  # PyTorch has no formula for its attention kernel of the CPU


def test_the_table_names_the_parts() -> None:
    model, inputs = make("image", reads.Structured())
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        model(inputs)
    counts = {name: table.get(torch.ops.perceiver_core.read_grid) for name, table in counter.get_flop_counts().items()}
    per_read = 2 * (2 * 12 + 1) * 2 * 5 * 20  # 12 channels, one table; 2 samples, 5 queries, 20 tokens
    assert counts["Perceiver.encoder.reads.0.attention"] == per_read
    assert counts["Perceiver.encoder.reads.1.attention"] == 2 * per_read  # two steps share it
    assert counts["Perceiver.encoder"] == counts["Global"] == 3 * per_read


class Frozen(nn.Module):
    """A module of the user that passes a view of its parameter to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.norm = nn.Parameter(torch.zeros(2, 3)), nn.LayerNorm(3)

    def forward(self) -> torch.Tensor:
        return self.norm(self.vectors[None])


def test_pytorch_cannot_count_modules_that_get_views_of_parameters_without_gradients() -> None:
    """The reason why a copy of the latents is passed on."""
    with torch.no_grad(), pytest.raises(AssertionError):
        count(Frozen())
