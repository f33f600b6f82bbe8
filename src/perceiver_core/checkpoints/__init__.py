"""Models as files: safetensors and readable JSON, nothing that executes."""

from perceiver_core.checkpoints.folder import load, save

__all__ = ["load", "save"]
