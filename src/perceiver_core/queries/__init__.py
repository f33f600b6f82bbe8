"""Query modules: modules that return the queries of a decoder.

A query module has the attribute `dim`, the width of the queries. It is called with the tokens (the output of the
adapter) and the argument `query_inputs` of `PerceiverIO`. It returns queries of shape `b q dim`, or `1 q dim` if all
samples have the same queries.

For `FromInputs`, `Grid` and `Learned`, the second argument is `query_indices`: indices of the queries to return, either
`q` for all samples or `b q` for each sample. By default, all queries are returned. For `Coordinates`, the second
argument is `points`. For `External`, it is `queries`. For `Multimodal`, it is a dictionary with one such argument per
modality.
"""

from perceiver_core.queries.external import Coordinates, External
from perceiver_core.queries.from_inputs import FromInputs
from perceiver_core.queries.grid import Grid
from perceiver_core.queries.learned import Learned
from perceiver_core.queries.multimodal import Multimodal

__all__ = ["Coordinates", "External", "FromInputs", "Grid", "Learned", "Multimodal"]
