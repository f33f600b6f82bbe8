"""Weight mappings by themselves: every transform and its inverse, errors by the names of the original."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from perceiver_core.checkpoints.state import assign
from perceiver_core.interop.weight_mapping import (
    TRANSPOSED,
    UNCHANGED,
    Entry,
    Transform,
    WeightMapping,
    fused,
    rearranged,
    renamed,
    split,
)

STACKED = rearranged("parts ... -> parts ...")
Loaded = Callable[[list[Tensor]], list[Tensor]]
HEADS, ROWS = 5, 2  # of each head
CASES: dict[str, tuple[Transform, list[tuple[int, ...]], int | None, Loaded]] = {
    # transform, shapes of theirs, number of ours (None: one name, not a group), what is loaded
    "renamed": (UNCHANGED, [(3, 7)], None, lambda x: x),
    "renamed, a number": (UNCHANGED, [()], None, lambda x: x),
    "transposed": (TRANSPOSED, [(3, 7)], None, lambda x: [x[0].T]),
    "transposed, of a kernel": (TRANSPOSED, [(2, 3, 5, 7)], None, lambda x: [x[0].mT]),
    "permuted": (rearranged("h w i o -> o i h w"), [(2, 3, 5, 7)], None, lambda x: [x[0].permute(3, 2, 0, 1)]),
    "reshaped": (rearranged("(h w) d -> h w d", h=5), [(15, 7)], None, lambda x: [x[0].view(5, 3, 7)]),
    "axes of one": (rearranged("1 1 d -> d"), [(1, 1, 7)], None, lambda x: [x[0][0, 0]]),
    "fused": (fused(3), [(21, 5)], 3, lambda x: list(x[0].chunk(3))),
    "fused biases": (fused(2), [(14,)], 2, lambda x: list(x[0].chunk(2))),
    "fused and transposed": (rearranged("i (p o) -> p o i", p=3), [(5, 21)], 3, lambda x: list(x[0].T.chunk(3))),
    "split": (rearranged("p o ... -> (p o) ...", p=2), [(7, 5), (7, 5)], None, lambda x: [torch.cat(x)]),
    "of different lengths": (split(8, 2, 3), [(13, 5)], 3, lambda x: list(x[0].split([8, 2, 3]))),
    "interleaved by head": (
        fused(3, num_heads=HEADS),
        [(HEADS * 3 * ROWS, 7)],
        3,
        lambda x: [torch.cat([x[0][(3 * h + part) * ROWS :][:ROWS] for h in range(HEADS)]) for part in range(3)],
    ),
    "stacked": (STACKED, [(3, 5, 7)], 3, lambda x: list(x[0])),
    "stacked, of one": (STACKED, [(1, 5, 7)], 1, lambda x: list(x[0])),
    "unstacked": (STACKED, [(5, 7)] * 3, None, lambda x: [torch.stack(x)]),
    "a group to a group": (UNCHANGED, [(5, 7)] * 2, 2, lambda x: x),
}


def names(prefix: str, number: int | None) -> str | tuple[str, ...]:
    return prefix if number is None else tuple(f"{prefix}{i}" for i in range(number))


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@pytest.mark.parametrize("case", CASES)
def test_transforms_go_both_ways_exactly(case: str) -> None:
    transform, shapes, number, loaded = CASES[case]
    entry = Entry(names("ours", number), names("theirs", None if len(shapes) == 1 else len(shapes)), transform)
    mapping, tensors = WeightMapping([entry]), [torch.randn(shape) for shape in shapes]
    theirs = dict(zip(as_tuple(entry.theirs), tensors, strict=True))
    ours = mapping.load(theirs)
    torch.testing.assert_close(ours, dict(zip(as_tuple(entry.ours), loaded(tensors), strict=True)), rtol=0, atol=0)
    torch.testing.assert_close(mapping.save(ours), theirs, rtol=0, atol=0)
    torch.testing.assert_close(mapping.load(mapping.save(ours)), ours, rtol=0, atol=0)
    like = {name: tensor.to("meta") for name, tensor in ours.items()}
    mapping.check({name: tensor.to("meta") for name, tensor in theirs.items()}, like)
    wrong = {name: torch.zeros((*tensor.shape, 2)) for name, tensor in theirs.items()}
    with pytest.raises(ValueError, match=r"theirs\d? has shape .*, not "):
        mapping.check(wrong, like)


@pytest.mark.parametrize("parts", [2, 3])
def test_fused_parts_are_views(parts: int) -> None:
    theirs = torch.randn(parts * 7, 5)
    for part in fused(parts).load(theirs):
        assert part.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()


def test_attention_of_fused_interleaved_heads() -> None:
    """The definition of the layout: head h of part p is what a view by head gives."""
    theirs = torch.randn(HEADS * 3 * ROWS, 7)
    query, key, value = fused(3, num_heads=HEADS).load(theirs)
    by_head = theirs.view(HEADS, 3, ROWS, 7)
    for part, tensor in enumerate((query, key, value)):
        torch.testing.assert_close(tensor.view(HEADS, ROWS, 7), by_head[:, part], rtol=0, atol=0)


def test_constants_are_ours_alone() -> None:
    mapping = WeightMapping([Entry("count", (), Transform(lambda _: torch.tensor(3), lambda _: ())), Entry("a", "b")])
    ours = mapping.load({"b": torch.zeros(2)})
    assert ours["count"] == 3 and mapping.theirs == ["b"] and mapping.ours == ["count", "a"]
    ours["count"] += 1
    assert mapping.load({"b": torch.zeros(2)})["count"] == 3
    assert mapping.save(ours).keys() == {"b"}


def table() -> WeightMapping:
    entries = [
        *renamed({"norm": "ln"}),
        Entry(("key", "value"), "kv", fused(2)),
        Entry("out", "proj", TRANSPOSED),
    ]
    return WeightMapping([*WeightMapping(entries).within("layers.0.", "h/0/"), Entry("latents", "wte")])


def theirs() -> dict[str, Tensor]:
    layer = {"ln.weight": (7,), "ln.bias": (7,), "kv": (10, 7), "proj": (5, 7)}
    return {f"h/0/{name}": torch.randn(shape) for name, shape in layer.items()} | {"wte": torch.randn(3, 7)}


def test_a_table_of_several_entries_goes_both_ways() -> None:
    given = theirs()
    ours = table().load(given)
    assert list(ours) == [f"layers.0.{name}" for name in ("norm.weight", "norm.bias", "key", "value", "out")] + [
        "latents"
    ]
    torch.testing.assert_close(table().save(ours), given, rtol=0, atol=0)
    assert table().theirs == list(given)


def test_missing_unexpected_and_misshapen_tensors_are_listed_by_their_names() -> None:
    like = table().load(theirs())
    given = theirs() | {"h/0/kv": torch.zeros(12, 7), "h/0/proj": torch.zeros(7, 5), "rope": torch.zeros(1)}
    del given["h/0/ln.bias"]
    message = (
        "weights do not fit the model: missing ['h/0/ln.bias']; unknown ['rope']; h/0/kv has shape (12, 7) "
        "torch.float32, not (10, 7) torch.float32; h/0/proj has shape (7, 5) torch.float32, not (5, 7) torch.float32"
    )
    for refuse in (table().check, table().load):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuse(given, like)


def test_five_of_each_sort_are_listed() -> None:
    mapping = WeightMapping(renamed({f"a{i}": f"b{i}" for i in range(9)}, parts=["weight"]))
    with pytest.raises(ValueError, match=r"missing \['b0.weight', .*'b4.weight'\]; unknown \['c0', .*'c4'\]$"):
        mapping.check({f"c{i}": torch.zeros(1) for i in range(9)})
    wrong = {name: torch.zeros(3) for name in mapping.theirs}
    with pytest.raises(ValueError, match="has shape") as caught:
        mapping.check(wrong, {name: torch.zeros(2) for name in mapping.ours})
    assert str(caught.value).count("not (2,)") == 5


def test_names_with_a_prefix_of_data_parallel_get_a_hint() -> None:
    with pytest.raises(ValueError, match=r"Take off the module\. at the start of all names"):
        table().check({f"module.{name}": tensor for name, tensor in theirs().items()})


def test_kinds_of_numbers_must_agree() -> None:
    mapping, like = WeightMapping([Entry("a", "b")]), {"a": torch.zeros(2)}
    mapping.check({"b": torch.zeros(2, dtype=torch.float16)}, like)
    with pytest.raises(ValueError, match=r"b has shape \(2,\) torch.int64, not \(2,\) torch.float32"):
        mapping.check({"b": torch.zeros(2, dtype=torch.int64)}, like)
    with pytest.raises(ValueError, match=r"b has shape \(2,\) torch.float32, not \(2,\) torch.int64"):
        mapping.check({"b": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)})


def test_saving_refuses_another_state_dict_by_our_names() -> None:
    ours = table().load(theirs())
    del ours["latents"]
    with pytest.raises(ValueError, match=r"missing \['latents'\]; unknown \['more'\]"):
        table().save(ours | {"more": torch.zeros(1)})


def test_a_name_stands_in_one_entry() -> None:
    with pytest.raises(ValueError, match=r"ours must name a tensor once; \['a'\] stand in several entries"):
        WeightMapping([Entry("a", "b"), Entry("a", "c")])
    with pytest.raises(ValueError, match=r"theirs must name a tensor once; \['b'\]"):
        WeightMapping([Entry("a", "b"), Entry(("c", "d"), ("b", "e"))])


@pytest.mark.parametrize(
    "entry, shape, message",
    [
        (Entry(("a", "b"), "x", fused(3)), (21, 5), r"\('a', 'b'\) cannot be made of x with shapes \[\(21, 5\)\]"),
        (Entry(("a", "b"), "x", fused(2)), (7, 5), r"\('a', 'b'\) cannot be made of x"),
        (Entry("a", "x", split(1, 2)), (3, 5), "a cannot be made of x"),
        (Entry(("a", "b"), "x", split(1, 3)), (3, 5), "cannot be made of x"),
        (Entry("a", "x", TRANSPOSED), (3,), "a cannot be made of x"),
    ],
)
def test_a_transform_that_does_not_go_with_its_names_or_shapes(
    entry: Entry, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WeightMapping([entry]).load({"x": torch.zeros(shape)})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(()))
        self.first.requires_grad_(False)


def test_a_model_gets_the_very_tensors_and_stays_tied() -> None:
    with torch.device("meta"):
        model = Tied()
    weight, count = torch.randn(3, 3), torch.tensor(2.0)
    assign(model, {"first.weight": weight, "count": count})
    assert model.first.weight is model.second.weight and not model.first.weight.requires_grad
    assert model.first.weight.data_ptr() == weight.data_ptr() and model.count.data_ptr() == count.data_ptr()
