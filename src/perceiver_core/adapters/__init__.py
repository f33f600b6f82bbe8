"""Adapters: raw tensors to `Tokens`. Each knows the width of its tokens (`.dim`)."""

from perceiver_core.adapters.audio import Audio, Spectrogram
from perceiver_core.adapters.bytes import Bytes
from perceiver_core.adapters.drop_tokens import DropTokens
from perceiver_core.adapters.flow import FramePair
from perceiver_core.adapters.grid import Grid
from perceiver_core.adapters.ids import Ids
from perceiver_core.adapters.image import Image
from perceiver_core.adapters.label import Label
from perceiver_core.adapters.multimodal import Multimodal
from perceiver_core.adapters.per_read import PerRead
from perceiver_core.adapters.points import Points, pad_clouds
from perceiver_core.adapters.stems import ConvStem, Patches, Pixels, Project, UnpaddedConvStem
from perceiver_core.adapters.table import Table
from perceiver_core.adapters.video import Video

__all__ = [
    "Audio",
    "Bytes",
    "ConvStem",
    "DropTokens",
    "FramePair",
    "Grid",
    "Ids",
    "Image",
    "Label",
    "Multimodal",
    "Patches",
    "PerRead",
    "Pixels",
    "Points",
    "Project",
    "Spectrogram",
    "Table",
    "UnpaddedConvStem",
    "Video",
    "pad_clouds",
]
