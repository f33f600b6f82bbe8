"""Queries: what a decoder asks with. Each knows its width (`.dim`) and can ask at some places only.

A source of queries is a module `(tokens, *, at=None) -> queries`: `tokens` is what the adapter made of the input, and
`at` chooses: indices `q` or `b q`, the same for all samples or each its own, of what it would ask without.
"""

from perceiver_core.queries.coordinates import Coordinates
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.external import External
from perceiver_core.queries.learned import Learned
from perceiver_core.queries.multimodal import Multimodal
from perceiver_core.queries.grid import Grid

__all__ = ["Coordinates", "FromInputs", "External", "Learned", "Multimodal", "Grid"]
