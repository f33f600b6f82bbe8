"""Queries of a decoder.

A source of queries is a module `(tokens, query_inputs=None) -> queries`, with `dim`, the width of the queries; `tokens`
is the output of the adapter. The second argument depends on the source: `query_indices` selects some of the queries
that it returns by default, by indices `q` for all samples or `b q` for each; `Coordinates` takes `points`, and
`External` takes `queries`.
"""

from perceiver_core.queries.external import Coordinates, External
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.queries.learned import Learned
from perceiver_core.queries.multimodal import Multimodal

__all__ = ["Coordinates", "External", "FromInputs", "Grid", "Learned", "Multimodal"]
