"""Layers below the blocks: linear layers, their initialization, and random draws for dropout."""
