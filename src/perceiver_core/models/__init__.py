"""Whole models, each a page that reads like its paper's figure."""

from perceiver_core.models import papers
from perceiver_core.models.perceiver import Perceiver

__all__ = ["Perceiver", "papers"]
