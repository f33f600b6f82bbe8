"""Complete models, presets with published sizes, and autoregressive generation."""

from perceiver_core.models import presets, sampling
from perceiver_core.models.generate import generate, stream
from perceiver_core.models.hierarchical import HierarchicalAutoencoder, HierarchicalPerceiver
from perceiver_core.models.perceiver import Perceiver
from perceiver_core.models.perceiver_ar import PerceiverAR
from perceiver_core.models.perceiver_io import PerceiverIO
from perceiver_core.models.resampler import AllFrames, EachFrame, Resampler

__all__ = [
    "AllFrames",
    "EachFrame",
    "HierarchicalAutoencoder",
    "HierarchicalPerceiver",
    "Perceiver",
    "PerceiverAR",
    "PerceiverIO",
    "Resampler",
    "generate",
    "presets",
    "sampling",
    "stream",
]
