"""Heads: what turns latents, or the answers of a decoder, into an output."""

from perceiver_core.heads.of_answers import Multimodal, OnGrid, Only, Samples, Values
from perceiver_core.heads.of_latents import Classify, Latents, Regress

__all__ = ["Classify", "Latents", "Multimodal", "OnGrid", "Only", "Regress", "Samples", "Values"]
