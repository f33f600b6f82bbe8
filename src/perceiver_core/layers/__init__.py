"""Layers that the blocks use: linear layers, weight initialization, and random draws for dropout."""
