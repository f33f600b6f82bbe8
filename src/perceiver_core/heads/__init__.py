"""Heads: what turns latents, or the answers of a decoder, into an output."""

from perceiver_core.heads.of_answers import Multimodal, OnGrid, Only, Patches, Samples, Values
from perceiver_core.heads.of_latents import Classify, Latents, Regress
from perceiver_core.heads.of_tokens import Logits, TiedLogits

__all__ = [
    "Classify",
    "Latents",
    "Logits",
    "Multimodal",
    "OnGrid",
    "Only",
    "Patches",
    "Regress",
    "Samples",
    "TiedLogits",
    "Values",
]
