"""Shapes of attention: b samples, h heads, q queries and k keys of width d, values of width e."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Queries: TypeAlias = Float[Tensor, "b h q d"]
Keys: TypeAlias = Float[Tensor, "b h k d"]
Values: TypeAlias = Float[Tensor, "b h k e"]
Outputs: TypeAlias = Float[Tensor, "b h q e"]
QueryIndices: TypeAlias = int | Sequence[int] | Int[Tensor, " chosen"] | None
