"""Models as files: safetensors and readable JSON, nothing that executes. Models of other libraries as ours."""

from perceiver_core.checkpoints.folder import load, save
from perceiver_core.checkpoints.lucidrains import lucidrains

__all__ = ["load", "lucidrains", "save"]
