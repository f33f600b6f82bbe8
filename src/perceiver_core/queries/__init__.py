"""Queries of a decoder. Each source knows the width of its queries (`.dim`) and can give some of them only.

A source of queries is a module `(tokens, query_inputs=None) -> queries`: `tokens` is what the adapter made of the
input. The second argument has a name of its own in each source: `query_indices` chooses from the queries that are given
without it, by indices `q` or `b q`, the same for all samples or each its own; `Coordinates` takes `points`, `External`
takes `queries`.
"""

from perceiver_core.queries.coordinates import Coordinates
from perceiver_core.queries.external import External
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.queries.learned import Learned
from perceiver_core.queries.multimodal import Multimodal

__all__ = ["Coordinates", "External", "FromInputs", "Grid", "Learned", "Multimodal"]
