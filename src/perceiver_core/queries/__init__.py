"""Query modules: modules that return the queries of a decoder.

A query module is called as `(tokens, query_inputs=None) -> queries`, where `tokens` is the output of the adapter. Its
attribute `dim` is the width of the queries. In most query modules, the second argument is `query_indices`: indices of
the queries to return, `q` for all samples or `b q` for each sample. By default, all queries are returned. `Coordinates`
takes `points` instead, and `External` takes `queries`.
"""

from perceiver_core.queries.external import Coordinates, External
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.queries.learned import Learned
from perceiver_core.queries.multimodal import Multimodal

__all__ = ["Coordinates", "External", "FromInputs", "Grid", "Learned", "Multimodal"]
