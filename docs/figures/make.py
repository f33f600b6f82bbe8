"""Draw the figures of the documentation that need no measurement: `python docs/figures/make.py`."""

import argparse
from pathlib import Path

import torch

import perceiver_core as pc
from perceiver_core.atomic_files import write_atomically

FOLDER = Path(__file__).parent


def architecture() -> None:
    """Draw a Perceiver of three reads, at the widths of the ImageNet model."""
    where = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=224)
    image = pc.adapters.Image(num_channels=3, positions=where)
    with torch.device("meta"):
        encoder = pc.Encoder(image.dim, num_latents=512, dim=1024, num_reads=3, depth=6, num_heads=8)
        model = pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=1000))
    figure = pc.visualize.architecture(model)
    write_atomically({FOLDER / "architecture.png": lambda path: figure.savefig(path, dpi=110, format="png")})


def positions() -> None:
    """Draw the Fourier features of an image of 24 x 32 pixels."""
    where = pc.positions.Fourier(num_axes=2, num_bands=7, max_resolution=(24, 32))
    figure = pc.visualize.position_features(where, (24, 32), columns=10)
    write_atomically({FOLDER / "positions.png": lambda path: figure.savefig(path, dpi=110, format="png")})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    architecture()
    positions()
