"""File names and images for the tests of the labels."""

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 59, 67  # primes, never square, near the size of a thumbnail


def file_name(patient: int, visit: int, side: str, slice_: int, gap: str = "_") -> str:
    return f"OAI{patient:07}_BaseLine_{visit}{gap}de3d1_SAG_3D_DESS_WE_{side}.nii.gz_{slice_}.png"


def draw(seed: int) -> np.ndarray:
    """Blobs unlike those of any other seed, h x w gray levels."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 11), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
