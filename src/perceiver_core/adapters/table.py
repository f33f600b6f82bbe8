"""Adapter for tabular data: one token per column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@partial(register, name="adapters.Table")
class Table(nn.Module):
    """Adapter for table rows: one token per column.

    The token of a numeric column is `number * scale + offset`, with a learned scale and offset vector per column. The
    token of a categorical column is a learned embedding. Missing numbers (NaN) and categories (-1) are masked.

    Args:
        num_numeric: Number of numeric columns. Their values should be standardized.
        category_sizes: Number of categories in each categorical column.
        dim: Token width.

    Example:
        >>> table = pc.adapters.Table(num_numeric=2, category_sizes=(3, 7), dim=32)
        >>> rows = {"numbers": torch.tensor([[0.5, torch.nan]]), "categories": torch.tensor([[2, -1]])}
        >>> table(rows).mask.tolist()
        [[True, False, True, False]]

    Reference: Gorishniy et al. 2021 (FT-Transformer), section 3.3, the feature tokenizer.
    """

    def __init__(self, num_numeric: int = 0, category_sizes: Sequence[int] = (), *, dim: int) -> None:
        super().__init__()
        if not isinstance(category_sizes, Sequence):
            raise TypeError(f"category_sizes must be the size of each column, as (3, 7); got {category_sizes!r}")
        if num_numeric < 0 or (num_numeric == 0 and not category_sizes):
            raise ValueError(
                f"num_numeric and category_sizes must name a column at least; got {num_numeric} and {category_sizes!r}"
            )
        checks.positive(dim=dim, **{f"category_sizes[{i}]": size for i, size in enumerate(category_sizes)})
        self.num_numeric, self.category_sizes, self.dim = num_numeric, tuple(category_sizes), dim
        self.scales, self.offsets = (init.embedding(num_numeric, dim, std=dim**-0.5) for _ in range(2))
        self.vectors = init.embedding(sum(self.category_sizes), dim, std=dim**-0.5)

    def forward(self, rows: Mapping[str, Tensor] | Float[Tensor, "b numbers"]) -> Tokens:
        """Convert table rows to tokens, numeric columns first.

        Args:
            rows: Dictionary with a floating-point tensor `numbers`, `b n`, and an integer tensor `categories`, `b k`.
                Omit the key of a column type that the table does not have. If all columns are numeric, `rows` may be
                the tensor `numbers` itself.

        Raises:
            TypeError: If `rows` is neither a dictionary nor a tensor, or a tensor has the wrong dtype.
            ValueError: If the keys or the shapes of the tensors are wrong, or the batch sizes differ.
            ValueError: If a number is infinite or a category is out of range (checked on the CPU in eager mode only).
        """
        embed: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {}
        if self.num_numeric:
            embed["numbers"] = self._embed_numbers
        if self.category_sizes:
            embed["categories"] = self._embed_categories
        if not isinstance(rows, (Tensor, Mapping)):
            raise TypeError(f"rows must be a dictionary with {sorted(embed)}; got {type(rows).__name__}")
        columns = {"numbers": rows} if isinstance(rows, Tensor) else dict(rows)
        if columns.keys() != embed.keys():
            raise ValueError(f"rows must have {sorted(embed)}; got {sorted(columns)}")
        parts = [function(columns[name]) for name, function in embed.items()]
        sizes = [content.shape[0] for content, _ in parts]
        if sizes[0] != sizes[-1]:
            raise ValueError(f"numbers and categories must have one batch size; got {sizes}")
        content, valid = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return Tokens(content, mask=valid)

    def _embed_numbers(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens `b n dim` of the numeric columns and the mask `b n` of valid tokens."""
        checks.is_floating("numbers", numbers)
        checks.has_shape("numbers", numbers, "b n", last=self.num_numeric)
        valid = ~numbers.isnan()
        numbers = numbers.where(valid, 0.0)
        checks.values("numbers", numbers)
        return numbers[..., None] * self.scales + self.offsets, valid

    def _embed_categories(self, categories: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens `b k dim` of the categorical columns and the mask `b k` of valid tokens."""
        if not isinstance(categories, Tensor):
            raise TypeError(
                f"categories must be a torch.Tensor; got {type(categories).__name__}. Convert it: torch.as_tensor(...)"
            )
        checks.has_shape("categories", categories, "b k", last=len(self.category_sizes))
        if categories.is_floating_point() or categories.dtype == torch.bool:
            raise TypeError(f"categories must be integers; got {categories.dtype}. Convert them: categories.long()")
        sizes = torch.tensor(self.category_sizes, device=categories.device)
        if not checks.is_true(lambda: ((categories < sizes) & (categories >= -1)).all(), categories):
            raise ValueError(
                f"categories must lie in -1 ... {[size - 1 for size in self.category_sizes]}, column by column"
            )
        return self.vectors[categories.clamp(min=0) + sizes.cumsum(0) - sizes], categories >= 0
