"""Models as files: safetensors and readable JSON, nothing that executes; and the weights that others published."""

from perceiver_core.checkpoints import published
from perceiver_core.checkpoints.hub import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.loading import load
from perceiver_core.checkpoints.lucidrains import lucidrains
from perceiver_core.checkpoints.of_haiku import deepmind
from perceiver_core.checkpoints.of_transformers import hugging_face, to_hugging_face
from perceiver_core.checkpoints.saving import save

__all__ = [
    "deepmind",
    "from_pretrained",
    "hugging_face",
    "load",
    "lucidrains",
    "published",
    "push_to_hub",
    "save",
    "save_pretrained",
    "to_hugging_face",
]
