"""Readers of weight files (safetensors, PyTorch `.bin`, `.npz`, pickle) that do not execute code in the files."""
