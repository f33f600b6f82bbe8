"""Adapters: raw tensors to `Tokens`. Each knows the width of its tokens (`.dim`)."""

from perceiver_core.adapters.audio import Audio, Spectrogram
from perceiver_core.adapters.drop_tokens import DropTokens
from perceiver_core.adapters.grid import Grid
from perceiver_core.adapters.image import Image
from perceiver_core.adapters.per_read import PerRead
from perceiver_core.adapters.points import Points, pad_clouds
from perceiver_core.adapters.stems import ConvStem, Patches, Pixels, Project

__all__ = [
    "Audio",
    "ConvStem",
    "DropTokens",
    "Grid",
    "Image",
    "Patches",
    "PerRead",
    "Pixels",
    "Points",
    "Project",
    "Spectrogram",
    "pad_clouds",
]
