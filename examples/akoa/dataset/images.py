"""Reading of PNG files as 8-bit gray images, as an image viewer shows them on a black background.

All images of this application are read by `read_gray`: those of the audit, of training and of the driver. It accepts
every PNG file that is complete and undamaged, and refuses all others with an error that names the file.

- 16-bit samples are reduced to their upper 8 bits, so that the full range remains the full range.
- Transparent pixels are blended with black.
- The orientation in an eXIf chunk is applied. A different one in a text chunk, which some viewers apply and others do
  not, is refused.
- Animations are refused, since it is undefined which of their frames is meant.
- Other optional chunks are ignored and never unpacked: gamma, color profiles, background color, other texts, and data
  after the end of the image.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops

from examples.akoa.dataset import png_chunks
from examples.akoa.dataset.orientation import exif_orientation
from examples.akoa.dataset.png_chunks import Chunk, Header

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """Raised for an image file that cannot be read. `reason` does not name the file, while the message does."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"image {str(path)!r} cannot be read: {reason}")
        self.reason = reason


def read_image(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """Read a PNG file in gray levels, reduced to `size` (height, width) without aliasing.

    Raises:
        UnreadableImageError: As in `read_gray`.
    """
    return np.asarray(read_gray(path).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def read_gray(path: Path) -> Image.Image:
    """Read a PNG file as an image of Pillow's mode `L`.

    Reading needs up to 10 bytes of memory per pixel plus twice the size of the file.

    Raises:
        UnreadableImageError: The file does not exist, is not a regular file, is damaged, is not a PNG file, is an
            animation, or exceeds the limits of `png_chunks`.
    """
    try:
        header, chunks = png_chunks.read_chunks(path)
        gray = _decode(header, chunks)
        orientation = exif_orientation(png_chunks.find(chunks, b"eXIf"))
    except OSError as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise UnreadableImageError(path, str(error)) from error
    return gray if orientation == 1 else gray.transpose(_TRANSPOSITIONS[orientation])


def _decode(header: Header, chunks: Sequence[Chunk]) -> Image.Image:
    """Decode an image as 8-bit gray on a black background."""
    parts = (chunk.whole for chunk in chunks if chunk.name != b"eXIf")
    try:
        with Image.open(io.BytesIO(b"".join([png_chunks.SIGNATURE, *parts])), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"its pixels cannot be decoded ({error}); copy it again from its source") from error
    transparency = png_chunks.find(chunks, b"tRNS")
    if header.color_type == png_chunks.PALETTE:
        if image.getextrema()[1] >= len(png_chunks.find(chunks, b"PLTE")) // 3:
            raise ValueError("it is damaged: a pixel is beyond the end of the palette; copy it again from its source")
        image = image.convert("RGBA" if transparency else "RGB")
    elif transparency and header.color_type in (png_chunks.GRAY, png_chunks.RGB):
        return _with_transparent_color(image, header, transparency)
    if image.mode in ("LA", "RGBA"):
        return ImageChops.multiply(image.convert("L"), image.getchannel("A"))
    return _to_gray(image)


def _with_transparent_color(image: Image.Image, header: Header, transparency: bytes) -> Image.Image:
    """Convert an image of which one color is transparent."""
    if header.color_type == png_chunks.RGB and header.depth == 16:  # Pillow has reduced the samples to 8 bits
        raise ValueError("it has 16 bits per sample and a transparent color; save it with 8 bits or without this color")
    color = np.frombuffer(transparency, ">u2").astype(np.int64)
    if header.depth < 8:  # Pillow scales the samples, but not the color
        color *= 255 // (2**header.depth - 1)
    opaque = np.asarray(image.convert("L") if image.mode == "1" else image) != color
    return Image.fromarray(np.asarray(_to_gray(image)) * (opaque.any(-1) if opaque.ndim == 3 else opaque))


def _to_gray(image: Image.Image) -> Image.Image:
    """Convert an image without transparency to 8-bit gray."""
    if image.mode.startswith("I"):  # 16 bits, which `convert` clips
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L")
