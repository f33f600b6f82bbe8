"""Adapters: modules that convert raw inputs to `Tokens`. The attribute `dim` of an adapter is its token width.

If `forward` has an argument `mask`, it marks the valid tokens (True = attend). Adapters raise TypeError if an input or
mask has the wrong dtype, and ValueError if it has the wrong shape or an axis of size 0. Most adapters also raise
ValueError if a valid token contains NaN or infinity, or if a sample has no valid token. These two checks run only on
the CPU in eager mode.
"""

from perceiver_core.adapters.audio import Audio, Spectrogram
from perceiver_core.adapters.drop_tokens import DropTokens
from perceiver_core.adapters.grid import Grid
from perceiver_core.adapters.image import Image
from perceiver_core.adapters.lengths import pad
from perceiver_core.adapters.log_mel import LogMel, hann_window, htk_frequencies, slaney_frequencies
from perceiver_core.adapters.multimodal import Multimodal
from perceiver_core.adapters.one_hot_label import OneHotLabel
from perceiver_core.adapters.per_read import PerRead
from perceiver_core.adapters.point_cloud import PointCloud, pad_point_clouds
from perceiver_core.adapters.stems import ConvStem, Patches, Pixels, Project, SymmetricPadConvStem
from perceiver_core.adapters.table import Table
from perceiver_core.adapters.token_embedding import Bytes, TokenEmbedding
from perceiver_core.adapters.video import FramePair, Video

__all__ = [
    "Audio",
    "Bytes",
    "ConvStem",
    "DropTokens",
    "FramePair",
    "Grid",
    "Image",
    "LogMel",
    "Multimodal",
    "OneHotLabel",
    "Patches",
    "PerRead",
    "Pixels",
    "PointCloud",
    "Project",
    "Spectrogram",
    "SymmetricPadConvStem",
    "Table",
    "TokenEmbedding",
    "Video",
    "hann_window",
    "htk_frequencies",
    "pad",
    "pad_point_clouds",
    "slaney_frequencies",
]
