"""Saving and loading of models, in folders and on the Hugging Face Hub.

A saved model consists of a safetensors file and a JSON file. Neither contains code.
"""

from perceiver_core.checkpoints.deployment import save_program
from perceiver_core.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.save_load import load, save

__all__ = ["from_pretrained", "load", "push_to_hub", "save", "save_pretrained", "save_program"]
