"""Functions that load, save and convert models of transformers, DeepMind's Haiku code and perceiver-pytorch."""

from perceiver_core.interop.conversion import convert
from perceiver_core.interop.haiku import load_haiku
from perceiver_core.interop.perceiver_pytorch import load_perceiver_pytorch
from perceiver_core.interop.published_models import DEEPMIND_NUMERICS, TRANSFORMERS_NUMERICS, Numerics
from perceiver_core.interop.transformers import load_transformers, save_transformers

__all__ = [
    "DEEPMIND_NUMERICS",
    "TRANSFORMERS_NUMERICS",
    "Numerics",
    "convert",
    "load_haiku",
    "load_perceiver_pytorch",
    "load_transformers",
    "save_transformers",
]
