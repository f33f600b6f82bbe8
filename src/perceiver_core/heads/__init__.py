"""Heads: what turns latents, or the answers of a decoder, into an output."""

from perceiver_core.heads import Grid, Linear, Multimodal, SingleQuery, Unpatchify, Waveform
from perceiver_core.heads import Classification, Identity, Regression
from perceiver_core.heads import Logits, TiedLogits

__all__ = [
    "Classification",
    "Identity",
    "Logits",
    "Multimodal",
    "Grid",
    "SingleQuery",
    "Unpatchify",
    "Regression",
    "Waveform",
    "TiedLogits",
    "Linear",
]
