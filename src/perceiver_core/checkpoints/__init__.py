"""Models as files: safetensors and readable JSON, nothing that executes; and models on the Hugging Face hub."""

from perceiver_core.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.loading import load
from perceiver_core.checkpoints.saving import save

__all__ = [
    "from_pretrained",
    "load",
    "push_to_hub",
    "save",
    "save_pretrained",
]
