"""Readers of weight files (safetensors, PyTorch `.bin`, `.npz` and pickles) that execute no code from the files."""
