"""Rows of a table: each column against its formula, missing values, errors."""

from __future__ import annotations

import pytest
import torch

import perceiver_core as pc
from perceiver_core.adapters import Table

NAN = torch.nan


def made() -> Table:
    torch.manual_seed(0)
    return Table(num_numeric=3, category_sizes=(2, 5), dim=7).double()


def rows() -> dict[str, torch.Tensor]:
    numbers = torch.tensor([[0.5, NAN, -2.0], [1.0, 3.0, 0.0]], dtype=torch.float64)
    return {"numbers": numbers, "categories": torch.tensor([[1, -1], [0, 4]])}


def test_each_column_by_hand():
    table = made()
    tokens = table(rows())
    assert tokens.content.shape == (2, 5, 7) and table.dim == 7
    assert tokens.mask.tolist() == [[True, False, True, True, False], [True] * 5]
    numbers, categories = rows()["numbers"], rows()["categories"]
    for sample, column in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        expected = numbers[sample, column] * table.scales[column] + table.offsets[column]
        torch.testing.assert_close(tokens.content[sample, column], expected)
    for sample, column, first in ((0, 0, 0), (1, 0, 0), (1, 1, 2)):
        torch.testing.assert_close(
            tokens.content[sample, 3 + column], table.vectors[first + categories[sample, column]]
        )


def test_missing_values_have_no_effect():
    encoder = pc.Encoder(7, num_latents=3, dim=11, depth=1, num_heads=1).double()
    table, given = made(), rows()
    alone = {"numbers": given["numbers"][:1].clone(), "categories": torch.tensor([[1, 3]])}
    alone["categories"][0, 1] = -1
    torch.testing.assert_close(encoder(table(given))[:1], encoder(table(alone)))
    out = encoder(table(given)).square().sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, list(table.parameters())))


@pytest.mark.parametrize(("numbers", "categories"), [(1, ()), (0, (1,)), (0, (3, 2))])
def test_numeric_or_categorical_columns_alone(numbers, categories):
    table = Table(numbers, categories, dim=3)
    given = torch.zeros(2, numbers) if numbers else {"categories": torch.zeros(2, len(categories), dtype=torch.long)}
    assert table(given).content.shape == (2, numbers + len(categories), 3)


def test_it_is_saved_and_loaded(tmp_path):
    table = Table(num_numeric=3, category_sizes=(2, 5), dim=7)
    again = pc.load(pc.save(table, tmp_path))
    given = rows() | {"numbers": rows()["numbers"].float()}
    torch.testing.assert_close(again(given).materialize(), table(given).materialize())


@pytest.mark.refusal
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"categories": torch.tensor([[2, 0]])}, ValueError, r"categories must lie in -1 \.\.\. \[1, 4\]"),
        ({"categories": torch.tensor([[0, -2]])}, ValueError, r"categories must lie in -1"),
        ({"categories": torch.zeros(1, 2)}, TypeError, "categories must be integers"),
        ({"categories": torch.zeros(1, 3, dtype=torch.long)}, ValueError, "categories must have 2 features"),
        ({"categories": [[0, 1]]}, TypeError, r"categories'\] must be a torch.Tensor; got"),
        ({"categories": torch.zeros(1, 2).bool()}, TypeError, "categories must be integers; got torch.bool"),
        ({"numbers": [0.0]}, TypeError, r"numbers'\] must be a torch.Tensor; got"),
        ({"numbers": torch.zeros(1, 2)}, ValueError, "numbers must have 3 features"),
        ({"numbers": torch.zeros(1, 3).long()}, TypeError, "numbers must be floating point"),
        ({"numbers": torch.tensor([[0.0, torch.inf, NAN]] * 2)}, ValueError, "numbers holds NaN or infinite"),
        ({"numbers": torch.zeros(1, 3)}, ValueError, r"numbers and categories must have one batch size; got \[1, 2\]"),
        ({"other": torch.zeros(1, 3)}, ValueError, r"rows must have \['categories', 'numbers'\]; got"),
    ],
)
def test_invalid_rows_raise(change, kind, message):
    with pytest.raises(kind, match=message):
        Table(num_numeric=3, category_sizes=(2, 5), dim=7)(rows() | change)


@pytest.mark.refusal
def test_a_list_of_rows_raises():
    with pytest.raises(TypeError, match=r"rows must be a dictionary with \['numbers'\]; got list"):
        Table(num_numeric=2, dim=3)([1, 2])


@pytest.mark.refusal
def test_invalid_settings_raise():
    with pytest.raises(TypeError, match="category_sizes must be a sequence whose items are each a whole number; got 3"):
        Table(category_sizes=3, dim=3)
    with pytest.raises(ValueError, match="num_numeric and category_sizes must name a column at least; got 0"):
        Table(dim=3)
    with pytest.raises(ValueError, match=r"category_sizes\[1\] must be a whole number of at least 1; got 0"):
        Table(category_sizes=(3, 0), dim=3)
