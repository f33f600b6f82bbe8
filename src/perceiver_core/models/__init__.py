"""Whole models, each a page that reads like its paper's figure."""

from perceiver_core.models import papers
from perceiver_core.models.perceiver import Perceiver
from perceiver_core.models.perceiver_io import PerceiverIO

__all__ = ["Perceiver", "PerceiverIO", "papers"]
