"""Rows of a table: a token a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks, init
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="adapters.Table")
class Table(nn.Module):
    """Every column is a token: a number times a learned vector plus another, or a category's learned vector.

    A number that is missing (NaN), and a category that is (-1), is a token that is not there.

    Args:
        num_numeric: how many columns hold numbers; standardize them.
        category_sizes: of each other column, how many categories it has.
        dim: the width of a token.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> table = pc.adapters.Table(num_numeric=2, category_sizes=(3, 7), dim=32)
        >>> rows = {"numbers": torch.tensor([[0.5, torch.nan]]), "categories": torch.tensor([[2, -1]])}
        >>> table(rows).mask.tolist()
        [[True, False, True, False]]

    Reference: Gorishniy et al. 2021 (FT-Transformer), section 3.3, the feature tokenizer.
    """

    def __init__(self, num_numeric: int = 0, category_sizes: Sequence[int] = (), *, dim: int) -> None:
        super().__init__()
        if not isinstance(category_sizes, Sequence):
            raise TypeError(f"category_sizes must be how many each column has, as (3, 7); got {category_sizes!r}")
        if num_numeric < 0 or (num_numeric == 0 and not category_sizes):
            raise ValueError(f"numbers and category_sizes must name a column at least; got {num_numeric} and {category_sizes!r}")
        checks.positive(dim=dim, **{f"categories[{i}]": count for i, count in enumerate(category_sizes)})
        self.num_numeric, self.category_sizes, self.dim = num_numeric, tuple(category_sizes), dim
        self.scales, self.offsets = (init.embedding(num_numeric, dim, std=dim**-0.5) for _ in range(2))
        self.vectors = init.embedding(sum(self.category_sizes), dim, std=dim**-0.5)

    def forward(self, rows: Mapping[str, Tensor] | Float[Tensor, "b numbers"]) -> Tokens:
        """The tokens, numbers first.

        Args:
            rows: `numbers`, `b n` floating point, and `categories`, `b k` whole numbers; the former alone as a tensor.

        Raises:
            TypeError, ValueError: columns that are not there, of another number or kind, infinite, or beyond their
                categories; different numbers of rows.
        """
        wanted = {name for name, count in (("numbers", self.num_numeric), ("categories", len(self.category_sizes))) if count}
        if not isinstance(rows, (Tensor, Mapping)):
            raise TypeError(f"rows must be a dictionary with {sorted(wanted)}; got {type(rows).__name__}")
        given = {"numbers": rows} if isinstance(rows, Tensor) else dict(rows)
        if given.keys() != wanted:
            raise ValueError(f"rows must have {sorted(wanted)}; got {sorted(given)}")
        parts = []
        if self.num_numeric:
            parts.append(self._of_numbers(given["numbers"]))
        if self.category_sizes:
            parts.append(self._of_categories(given["categories"]))
        counts = [content.shape[0] for content, _ in parts]
        if counts[0] != counts[-1]:
            raise ValueError(f"rows must be as many of each kind; got {counts}")
        content, there = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return Tokens(content, mask=there)

    def _of_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        checks.is_floating("numbers", numbers)
        checks.has_shape("numbers", numbers, "b n", last=self.num_numeric)
        there = ~numbers.isnan()
        numbers = numbers.where(there, 0.0)
        checks.values("numbers", numbers)
        return numbers[..., None] * self.scales + self.offsets, there

    def _of_categories(self, categories: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(categories, Tensor):
            raise TypeError(
                f"categories must be a torch.Tensor; got {type(categories).__name__}. Convert it: torch.as_tensor(...)"
            )
        checks.has_shape("categories", categories, "b k", last=len(self.category_sizes))
        if categories.is_floating_point() or categories.dtype == torch.bool:
            raise TypeError(
                f"categories must be whole numbers; got {categories.dtype}. Convert them: categories.long()"
            )
        counts = torch.tensor(self.category_sizes, device=categories.device)
        if not checks.is_true(lambda: ((categories < counts) & (categories >= -1)).all(), categories):
            raise ValueError(
                f"categories must lie in -1 ... {[count - 1 for count in self.category_sizes]}, column by column"
            )
        there = categories >= 0
        return self.vectors[categories.clamp(min=0) + counts.cumsum(0) - counts], there
