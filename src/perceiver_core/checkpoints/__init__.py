"""Saving and loading of models in folders and on the Hugging Face hub, as safetensors and JSON without any code."""

from perceiver_core.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.save_load import load, save

__all__ = ["from_pretrained", "load", "push_to_hub", "save", "save_pretrained"]
