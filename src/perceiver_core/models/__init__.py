"""Whole models, each a page that reads like its paper's figure."""

from perceiver_core.models import papers, sampling
from perceiver_core.models.generate import generate, stream
from perceiver_core.models.perceiver import Perceiver
from perceiver_core.models.perceiver_ar import PerceiverAR

__all__ = ["Perceiver", "PerceiverAR", "generate", "papers", "sampling", "stream"]
