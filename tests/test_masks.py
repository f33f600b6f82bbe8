"""Masks: allowed pairs, blocks as parts of the whole, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perceiver_core import masks
from perceiver_core.masks import And, Causal, Mask, Or, Padding, Queries, Window

B, H, Q, K, D = 2, 3, 5, 11, 7

laws = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def whole(mask: Mask) -> Tensor:
    return masks.materialize(mask, queries=Q, keys=K).expand(B, H, Q, K)


def pair(mask: Mask, query: int, key: int) -> Tensor:
    """Evaluates a mask for one query and one key, by positions from the end."""
    return masks.block(mask, torch.tensor([query]), torch.tensor([key])).expand(B, H, 1, 1)[:, :, 0, 0]


PAD, WANTED, FULL = bools(B, K, seed=1), bools(B, Q, seed=2), bools(B, H, Q, K, seed=3)


def test_positions_count_from_the_end() -> None:
    assert masks.positions(3).tolist() == [-3, -2, -1]
    assert masks.positions(0).tolist() == []


def test_padding_allows_the_valid_keys() -> None:
    assert torch.equal(whole(Padding(PAD)), PAD[:, None, None, :].expand(B, H, Q, K))


def test_queries_allows_the_valid_queries() -> None:
    assert torch.equal(whole(Queries(WANTED)), WANTED[:, None, :, None].expand(B, H, Q, K))


def test_causal_aligns_the_last_query_with_the_last_key() -> None:
    allowed = whole(Causal())[0, 0]
    assert allowed.sum(-1).tolist() == [7, 8, 9, 10, 11]
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in allowed)
    # More queries than keys: the first have nothing to attend to.
    assert masks.materialize(Causal(), queries=5, keys=3).sum(-1).tolist() == [0, 0, 1, 2, 3]


@laws
@given(before=st.integers(-3, 13), after=st.integers(-3, 13), q=st.integers(1, 13), k=st.integers(1, 13))
def test_window_is_a_band_of_distances(before: int, after: int, q: int, k: int) -> None:
    allowed = masks.materialize(Window(before, after), queries=q, keys=k)
    band = [[-before <= (j - k) - (i - q) <= after for j in range(k)] for i in range(q)]
    assert allowed.tolist() == band


def test_an_unbounded_window_with_nothing_ahead_is_causal() -> None:
    assert torch.equal(whole(Window(before=K + Q, after=0)), whole(Causal()))


def test_and_or_are_logical() -> None:
    parts: tuple[Mask, ...] = (Causal(), Padding(PAD), FULL)
    written = [whole(part) for part in parts]
    assert torch.equal(whole(masks.and_(*parts)), written[0] & written[1] & written[2])
    assert torch.equal(whole(masks.or_(*parts)), written[0] | written[1] | written[2])
    nested = masks.or_(masks.and_(Causal(), FULL), Padding(PAD))
    assert torch.equal(whole(nested), written[0] & written[2] | written[1])


def test_and_skips_none_and_returns_a_single_mask_unchanged() -> None:
    causal = Causal()
    assert masks.and_() is None
    assert masks.and_(None, None) is None
    assert masks.and_(None, causal) is causal
    assert masks.and_(causal, None, FULL).masks == (causal, FULL)


@pytest.mark.refusal
def test_or_of_one_mask_is_that_mask_and_of_none_raises() -> None:
    causal = Causal()
    assert masks.or_(causal) is causal
    with pytest.raises(ValueError, match="or_ needs at least one mask; got none"):
        masks.or_()


ALL: dict[str, Mask] = {
    "padding": Padding(PAD),
    "padding of all": Padding(bools(1, K)),
    "one value a sample": Padding(torch.tensor([[True], [False]])),
    "queries": Queries(WANTED),
    "one query value": Queries(torch.tensor([[True], [False]])),
    "causal": Causal(),
    "window": Window(2, 1),
    "and": And((Causal(), Padding(PAD), FULL)),
    "or": Or((Window(2, 1), Queries(WANTED), FULL)),
    "function": lambda q, k: (q[:, None] * k) % 3 == 0,
    "full": FULL,
    "b h 1 k": FULL[:, :, :1],
    "b h q 1": FULL[..., :1],
    "q k": FULL[0, 0],
    "k": FULL[0, 0, 0],
    "1": torch.tensor([True]),
    "scalar": torch.tensor(False),
}


@pytest.mark.parametrize("mask", ALL.values(), ids=ALL.keys())
def test_a_block_is_a_part_of_the_whole(mask: Mask) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(Q, generator=generator)[:3] - Q, torch.randperm(K, generator=generator)[:4] - K
    part = masks.block(mask, rows, columns)
    assert torch.equal(part.expand(B, H, 3, 4), whole(mask)[:, :, rows[:, None], columns])
    # ... down to a single pair at any position.
    assert torch.equal(pair(mask, -2, -9), whole(mask)[:, :, -2, -9])


@pytest.mark.parametrize("mask", ALL.values(), ids=ALL.keys())
def test_masks_that_broadcast_are_accepted(mask: Mask) -> None:
    masks.check_broadcast(mask, torch.empty(B, H, Q, D), torch.empty(B, H, K, D))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation allocates, views excluded."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.size = max(self.size, out.numel())
        return out


def test_a_block_of_a_tensor_allocates_only_the_block() -> None:
    mask = bools(B, H, 101, 103)
    with Largest() as largest:
        masks.block(mask, masks.positions(7), masks.positions(13))
    assert largest.size == B * H * 7 * 13


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (bools(Q, 7), r"mask must broadcast to \(2, 3, 5, 11\); got shape \(5, 7\)"),
        (bools(4, K), r"mask must broadcast to \(2, 3, 5, 11\); got shape \(4, 11\)"),
        (bools(3, 1, 1, K), r"mask must broadcast to \(2, 3, 5, 11\); got shape \(3, 1, 1, 11\)"),
        (bools(1, B, H, Q, K), r"mask must broadcast to \(2, 3, 5, 11\); got shape \(1, 2, 3, 5, 11\)"),
        (Padding(bools(B, 7)), r"mask must broadcast to \(2, 11\); got shape \(2, 7\)"),
        (Padding(bools(3, K)), r"mask must broadcast to \(2, 11\); got shape \(3, 11\)"),
        (Queries(bools(B, K)), r"mask must broadcast to \(2, 5\); got shape \(2, 11\)"),
        (masks.and_(Causal(), masks.or_(Causal(), Padding(bools(B, 7)))), r"mask must broadcast to \(2, 11\)"),
    ],
    ids=["keys", "queries", "batch", "five axes", "padding", "padding batch", "queries of keys", "nested"],
)
def test_masks_that_do_not_broadcast_raise(mask: Mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.check_broadcast(mask, torch.empty(B, H, Q, D), torch.empty(B, H, K, D))


@pytest.mark.refusal
@pytest.mark.parametrize(
    "mask",
    [FULL.to("meta"), Padding(PAD.to("meta")), masks.and_(Causal(), Queries(WANTED.to("meta")))],
    ids=["tensor", "padding", "nested"],
)
def test_masks_on_another_device_raise(mask: Mask) -> None:
    with pytest.raises(ValueError, match=r"mask is on meta, the queries on cpu; move one: .to\('cpu'\)"):
        masks.check_broadcast(mask, torch.empty(B, H, Q, D), torch.empty(B, H, K, D))


@pytest.mark.refusal
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_masks_that_are_not_boolean_raise(dtype: torch.dtype) -> None:
    mask = FULL.to(dtype)
    message = rf"mask must be a boolean tensor, True = attend; got {dtype}. Convert it: mask.bool\(\)"
    q, k = torch.empty(B, H, Q, D), torch.empty(B, H, K, D)
    rows, columns = masks.positions(Q), masks.positions(K)
    for use in (
        lambda: masks.check_broadcast(mask, q, k),
        lambda: masks.materialize(mask, queries=Q, keys=K),
        lambda: masks.block(mask, rows, columns),
        lambda: masks.materialize(lambda q, k: mask, queries=Q, keys=K),
        lambda: masks.block(masks.and_(Causal(), mask), rows, columns),
    ):
        with pytest.raises(TypeError, match=message):
            use()


@pytest.mark.refusal
@pytest.mark.parametrize(("kind", "name"), [(Padding, "keys"), (Queries, "queries")])
def test_padding_and_queries_require_two_boolean_axes(kind: type, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a boolean tensor.*got torch.float32"):
        kind(torch.ones(B, K))
    with pytest.raises(TypeError, match=rf"{name} must be a boolean tensor.*got list"):
        kind([[True, False]])
    with pytest.raises(ValueError, match=rf"{name} must have 2 axes, one row a sample; got shape \(11,\)"):
        kind(bools(K))


def test_masks_on_another_device():
    padding, valid = masks.Padding(torch.ones(2, 5).bool()), masks.Queries(torch.ones(2, 3).bool())
    both = masks.and_(padding, masks.Causal(), masks.or_(valid, torch.ones(1, 1, 3, 5).bool()))
    moved = both.to("meta")
    assert moved.masks[0].keys.is_meta and moved.masks[1] == masks.Causal()
    assert moved.masks[2].masks[0].queries.is_meta and moved.masks[2].masks[1].is_meta
    assert not padding.keys.is_meta
