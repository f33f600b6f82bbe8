"""Images are read as a viewer shows them, or refused with an error that names the file and the remedy."""

from __future__ import annotations

import io
import os
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.akoa.dataset import images
from examples.akoa.dataset.images import UnreadableImageError, read_gray, read_image
from tests.akoa import png_files
from tests.akoa.png_files import CASES, FORMATS, Chunks, chunk, chunks_of, header, join, palette, random_samples

pytestmark = pytest.mark.no_shape_checks

HEIGHT, WIDTH = 13, 19
PALETTE = 3


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], np.ndarray]:
    def read(content: bytes) -> np.ndarray:
        (tmp_path / "picture.png").write_bytes(content)
        return np.asarray(read_gray(tmp_path / "picture.png")).astype(int)

    return read


def gray_of(colors: np.ndarray) -> np.ndarray:
    """Gray levels of 8-bit samples `h w c` with 1 to 4 channels, in front of black."""
    alpha = colors[..., -1] / 255 if colors.shape[-1] in (2, 4) else 1
    color = colors[..., :3] @ [0.299, 0.587, 0.114] if colors.shape[-1] >= 3 else colors[..., 0]
    return color * alpha


def to_8_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    return samples // 256 if depth == 16 else samples * 255 // (2**depth - 1)


def drawn(color_type: int, depth: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Chunks]:
    """Samples of an image, its gray levels, and its palette if it has one."""
    rng = np.random.default_rng(seed)
    samples = random_samples(rng, color_type, depth, HEIGHT, WIDTH)
    if color_type != PALETTE:
        return samples, gray_of(to_8_bits(samples, depth)), []
    colors = palette(rng, depth)
    return samples, gray_of(colors[samples[..., 0]]), [(b"PLTE", colors.tobytes())]


# Formats


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(("color_type", "depth"), CASES)
def test_all_formats_are_read(read, color_type, depth, interlace):
    samples, expected, before = drawn(color_type, depth)
    actual = read(join(chunks_of(samples, depth, color_type, before=before, interlace=interlace)))
    assert actual.shape == (HEIGHT, WIDTH)
    assert np.abs(actual - expected).max() <= 1.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3)])
@pytest.mark.parametrize(("color_type", "depth"), [(0, 1), (0, 16), (2, 8)])
def test_small_interlaced_images_are_read(read, color_type, depth, shape):
    samples = random_samples(np.random.default_rng(1), color_type, depth, *shape)
    expected = gray_of(to_8_bits(samples, depth))
    assert np.abs(read(join(chunks_of(samples, depth, color_type, interlace=True))) - expected).max() <= 1.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_files_of_pillow_are_read(read, mode):
    levels = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    expected = np.where(levels > 127, 255, 0) if mode == "1" else levels
    if mode == "1":
        expected = np.asarray(image.convert("L"))
    assert np.array_equal(read(file.getvalue()), expected)


def test_16_bit_images_equal_their_8_bit_versions(read):
    levels = np.arange(256).reshape(16, 16, 1)
    for factor in (256, 257):
        assert np.array_equal(read(join(chunks_of(levels * factor, 16))), levels[..., 0])


# Transparency


@pytest.mark.parametrize(("color_type", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8)])
def test_a_transparent_color_is_black(read, color_type, depth):
    samples, expected, _ = drawn(color_type, depth)
    color = samples[3, 5]
    assert expected[3, 5] > 0
    before = [(b"tRNS", color.astype(">u2").tobytes())]
    expected = np.where((samples == color).all(-1), 0, expected)
    assert np.abs(read(join(chunks_of(samples, depth, color_type, before=before))) - expected).max() <= 1.5


@pytest.mark.parametrize("alpha", [[255, 0], [0], [255, 128, 3, 0], list(range(16))])
def test_a_palette_may_be_transparent(read, alpha):
    samples, _, [(_, colors)] = drawn(PALETTE, 4)
    rgba = np.full((16, 4), 255)
    rgba[:, :3] = np.frombuffer(colors, np.uint8).reshape(16, 3)
    rgba[: len(alpha), 3] = alpha
    before = [(b"PLTE", colors), (b"tRNS", bytes(alpha))]
    actual = read(join(chunks_of(samples, 4, PALETTE, before=before)))
    assert np.abs(actual - gray_of(rgba[samples[..., 0]])).max() <= 1.5


# Orientation


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("behind", [False, True])
def test_the_orientation_is_applied(read, order, behind):
    samples, expected, _ = drawn(0, 8)
    turned = {
        1: expected,
        2: expected[:, ::-1],
        3: expected[::-1, ::-1],
        4: expected[::-1],
        5: expected.T,
        6: np.rot90(expected, -1),
        7: expected[::-1, ::-1].T,
        8: np.rot90(expected),
    }
    for orientation, result in turned.items():
        data = [(b"eXIf", png_files.exif(orientation, order))]
        content = join(chunks_of(samples, **{"after" if behind else "before": data}))
        assert np.array_equal(read(content), result)


def raw_profile(orientation):
    data = png_files.exif(orientation)
    return b"\nexif\n" + str(len(data)).rjust(8).encode() + b"\n" + data.hex().encode() + b"\n"


TEXTS = {
    "text": lambda n: (b"tEXt", b"Raw profile type exif\0" + raw_profile(n)),
    "packed text": lambda n: (b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(raw_profile(n))),
    "attribute": lambda n: (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation='%d'/>" % n),
    "element": lambda n: (
        b"iTXt",
        b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<tiff:Orientation>%d</tiff:Orientation>" % n),
    ),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_orientations_that_some_viewers_apply_are_refused(read, text):
    samples, expected, _ = drawn(0, 8)
    upright = [(b"eXIf", png_files.exif(3))]
    assert np.array_equal(read(join(chunks_of(samples, after=[text(1)]))), expected)
    with pytest.raises(UnreadableImageError, match="states the orientation 3, which some viewers apply"):
        read(join(chunks_of(samples, after=[text(3)])))
    assert np.array_equal(read(join(chunks_of(samples, after=[text(3), *upright]))), np.rot90(expected, 2))
    with pytest.raises(UnreadableImageError, match="states the orientation 6"):
        read(join(chunks_of(samples, before=[text(6)], after=upright)))


@pytest.mark.parametrize(
    "text", [b"Raw profile type exif\0\nexif\n 3\nxyz", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21))]
)
def test_texts_that_cannot_be_read_are_refused(read, text):
    samples, _, _ = drawn(0, 8)
    with pytest.raises(UnreadableImageError, match=r"cannot be read .*; remove it"):
        read(join(chunks_of(samples, after=[(b"iTXt" if b"XML" in text else b"tEXt", text)])))


# What is ignored


def test_other_chunks_are_ignored_and_not_unpacked(read):
    samples, expected, _ = drawn(0, 8)
    bomb = zlib.compress(bytes(20_000_000))
    before = [
        (b"gAMA", struct.pack(">I", 1)),
        (b"iCCP", b"a\0\0" + bomb),
        (b"bKGD", b"\xff\xff"),
        (b"zTXt", b"a\0\0" + bomb),
        (b"iTXt", b"a\0\1\0\0\0" + bomb),
        (b"cHRM", b""),
    ]
    content = join(chunks_of(samples, before=before, after=[(b"tEXt", b"\xff"), (b"zTXt", b"a\0\0" + bomb)]))
    tracemalloc.start()
    actual = read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert np.array_equal(actual, expected)


def test_data_after_the_image_are_ignored(read):
    samples, expected, _ = drawn(0, 8)
    content = join(chunks_of(samples))
    for rest in (b"\0", b"text" * 999, content):
        assert np.array_equal(read(content + rest), expected)


# What is refused


def image_data(num_rows: int) -> bytes:
    return zlib.compress(bytes((1 + WIDTH) * num_rows))


def gray(*data: bytes, head: bytes = header(WIDTH, HEIGHT), before: Chunks | None = None) -> bytes:
    return join([(b"IHDR", head), *(before or []), *((b"IDAT", part) for part in data), (b"IEND", b"")])


FULL = image_data(HEIGHT)
COLORS = (b"PLTE", bytes(6))
PALETTE_HEAD = header(WIDTH, HEIGHT, 8, PALETTE)
REFUSED = {
    "empty": (b"", "it is not a PNG file; convert it"),
    "text": (b"no picture", "it is not a PNG file; convert it"),
    "fewer rows": (gray(image_data(HEIGHT - 1)), "pixel data are damaged.*13"),
    "more rows": (gray(image_data(HEIGHT + 1)), "pixel data are damaged"),
    "end of data missing": (gray(FULL[:-2]), "pixel data are damaged"),
    "checksum of data": (gray(FULL[:-1] + b"\0"), "pixel data are damaged"),
    "no data": (gray(), "incomplete or out of order"),
    "unknown filter": (gray(zlib.compress(bytes([9, *bytes(WIDTH)]) * HEIGHT)), "cannot be decoded"),
    "no width": (gray(FULL, head=header(0, HEIGHT)), "it has 0 x 13 pixels, need at least one"),
    "no height": (gray(FULL, head=header(WIDTH, 0)), "it has 19 x 0 pixels, need at least one"),
    "huge": (gray(FULL, head=header(2**31 - 1, 2**31 - 1)), "more than 30,000,000, the limit; reduce"),
    "too large": (gray(FULL, head=header(10_000, 3_001)), "it has 10,000 x 3,001 pixels, more than 30,000,000"),
    "data of another size": (gray(FULL, head=header(WIDTH + 1, HEIGHT)), "pixel data are damaged"),
    "depth": (gray(FULL, head=header(WIDTH, HEIGHT, 3)), "header is invalid or of an unknown format"),
    "color type": (gray(FULL, head=header(WIDTH, HEIGHT, 8, 5)), "header is invalid or of an unknown format"),
    "interlace": (gray(FULL, head=header(WIDTH, HEIGHT, 8, 0, 2)), "header is invalid or of an unknown format"),
    "short header": (gray(FULL, head=header(WIDTH, HEIGHT)[:9]), "header is missing or has a wrong length"),
    "chunk before the header": (
        join([(b"eXIf", png_files.exif(1)), *png_files.split(gray(FULL))]),
        "header is missing",
    ),
    "two headers": (gray(FULL, before=[(b"IHDR", header(WIDTH, HEIGHT))]), "incomplete or out of order"),
    "two palettes": (gray(FULL, head=PALETTE_HEAD, before=[COLORS, COLORS]), "incomplete or out of order"),
    "no palette": (gray(FULL, head=PALETTE_HEAD), "palette is missing or invalid"),
    "odd palette": (gray(FULL, head=PALETTE_HEAD, before=[(b"PLTE", bytes(7))]), "palette is missing or invalid"),
    "short palette": (
        gray(zlib.compress(bytes([0, *[2] * WIDTH]) * HEIGHT), head=PALETTE_HEAD, before=[COLORS]),
        "beyond the end of the palette",
    ),
    "much alpha": (gray(FULL, head=PALETTE_HEAD, before=[COLORS, (b"tRNS", bytes(3))]), "palette is missing"),
    "transparent color": (gray(FULL, before=[(b"tRNS", b"\0")]), "its transparent color is invalid"),
    "alpha before palette": (gray(FULL, before=[(b"tRNS", b"\0\0"), COLORS]), "incomplete or out of order"),
    "transparent 16-bit color": (
        join(chunks_of(np.zeros((2, 3, 3), int), 16, 2, before=[(b"tRNS", bytes(6))])),
        "save it with 8 bits or without",
    ),
    "unknown critical chunk": (gray(FULL, before=[(b"ABCD", b"")]), "incomplete or out of order"),
    "gap in data": (join([*png_files.split(gray(FULL))[:2], COLORS, (b"IDAT", b""), (b"IEND", b"")]), "out of order"),
    "two orientations": (gray(FULL, before=[(b"eXIf", png_files.exif(1))] * 2), "incomplete or out of order"),
    "orientation": (gray(FULL, before=[(b"eXIf", png_files.exif(9))]), "the orientation is 9, need 1 to 8.*remove"),
    "exif": (gray(FULL, before=[(b"eXIf", b"text")]), "Exif data are invalid.*remove them"),
    "short exif": (gray(FULL, before=[(b"eXIf", png_files.exif(3)[:20])]), "Exif data are invalid"),
    "animation": (gray(FULL, before=[(b"acTL", struct.pack(">2I", 2, 0))]), "it is an animation; save the frame"),
    "many chunks": (gray()[:33] + chunk(b"aaaa") * 50_000, "more than 50,000 chunks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_files_are_refused(read, case):
    content, message = REFUSED[case]
    with pytest.raises(UnreadableImageError, match=rf"image '.*picture\.png' cannot be read: .*{message}") as error:
        read(content)
    assert "picture.png" not in error.value.reason


def test_every_damaged_byte_and_every_cut_is_noticed(read):
    samples, _, before = drawn(PALETTE, 8)
    content = join(chunks_of(samples[:3, :2], 8, PALETTE, before=[(b"PLTE", before[0][1][:30]), (b"tEXt", b"a\0b")]))
    content = content.replace(png_files.split(content)[1][1], before[0][1][:30])
    for i in range(len(content)):
        with pytest.raises(UnreadableImageError):
            read(content[:i])
        with pytest.raises(UnreadableImageError):
            read(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "GIF", "BMP"])
def test_other_formats_are_refused(read, format):
    file = io.BytesIO()
    Image.new("CMYK" if format in ("JPEG", "TIFF") else "L", (WIDTH, HEIGHT)).save(file, format)
    with pytest.raises(UnreadableImageError, match="it is not a PNG file; convert it to PNG"):
        read(file.getvalue())


def test_animations_are_refused(read):
    file = io.BytesIO()
    frames = [Image.new("L", (WIDTH, HEIGHT), level) for level in (3, 5, 7)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableImageError, match="it is an animation"):
        read(file.getvalue())


def test_large_images_take_no_memory(read, monkeypatch):
    content = join([(b"IHDR", header(40_000, 40_000)), (b"IDAT", zlib.compress(bytes(2**24))), (b"IEND", b"")])
    tracemalloc.start()
    with pytest.raises(UnreadableImageError, match="30,000,000, the limit"):
        read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    monkeypatch.setattr(images.png_chunks, "MAX_BYTES", 9_999)
    with pytest.raises(UnreadableImageError, match="it has 10,000 bytes, more than 9,999"):
        read(bytes(10_000))


# What is no file


def special_files(folder: Path) -> dict[str, str]:
    """Make files of all kinds that cannot be read; returns the reason of each."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "linked.png").symlink_to("pipe.png")
    here = os.getcwd()
    os.chdir(folder)  # paths of sockets are limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(here)
    return {
        "folder.png": "it is a folder, need a regular file",
        "pipe.png": "it is a pipe",
        "circle.png": "symbolic links",
        "dangling.png": "No such file",
        "zero.png": "it is a device",
        "linked.png": "it is a pipe",
        "socket.png": "it is a socket",
    }


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_special_files_are_refused(tmp_path):
    for name, reason in special_files(tmp_path).items():
        with pytest.raises(UnreadableImageError, match=f"{name}' cannot be read: .*{reason}"):
            read_gray(tmp_path / name)


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(gray(FULL))
    before = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda _: before)
    with pytest.raises(UnreadableImageError, match="it is a pipe"):
        read_gray(path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(gray(FULL))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadableImageError, match=r"a\.png' cannot be read: Permission denied"):
        read_gray(path)


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(gray(FULL))
    (tmp_path / "b.png").symlink_to(tmp_path / "elsewhere" / "a")
    assert read_image(tmp_path / "b.png", (5, 7)).shape == (5, 7)


def test_unusual_names_are_escaped(tmp_path):
    with pytest.raises(UnreadableImageError) as error:
        read_gray(tmp_path / "a\x1b[2J\n\u202e.png")
    assert str(error.value).isprintable()
    assert r"a\x1b[2J\n\u202e.png" in str(error.value)


def test_formats_of_the_test_are_complete():
    assert len(CASES) == sum(len(depths) for depths, _ in FORMATS.values()) == 15
