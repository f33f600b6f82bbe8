"""Heads: modules that compute the model output from the latents of an encoder or the outputs of a decoder.

`PerceiverIO` calls its head with the decoder outputs. If the head has the attribute `needs_query_layout = True`,
`PerceiverIO` also passes two keyword arguments to the head: its own argument `query_inputs`, and `grid`, which is the
grid size of the queries or None.
"""

from perceiver_core.heads.classification import Classification, LatentMean, Regression
from perceiver_core.heads.grid import Grid
from perceiver_core.heads.identity import Identity
from perceiver_core.heads.linear import Linear, Logits, TiedLogits
from perceiver_core.heads.multimodal import Multimodal
from perceiver_core.heads.single_query import SingleQuery
from perceiver_core.heads.unpatchify import Unpatchify, Waveform

__all__ = [
    "Classification",
    "Grid",
    "Identity",
    "LatentMean",
    "Linear",
    "Logits",
    "Multimodal",
    "Regression",
    "SingleQuery",
    "TiedLogits",
    "Unpatchify",
    "Waveform",
]
