"""Models as files: safetensors and readable JSON, nothing that executes; and models on the Hugging Face hub."""

from perceiver_core.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.save_load import load, save

__all__ = ["from_pretrained", "load", "push_to_hub", "save", "save_pretrained"]
