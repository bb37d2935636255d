"""Files of images that Pillow reads and does not write: odd depths, bands and headers, made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A little-endian TIFF of one strip; Pillow writes neither 12 bits nor white as zero."""
    height, width = values.shape
    if bits == 16:
        data = values.astype("<u2").tobytes()
    else:
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def png(pixels: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of colours [H, W, 3] in 8 or, big end first, 16 bits; `size`: another one than its pixels have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = size or (pixels.shape[1], pixels.shape[0])
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that has none of its pixels."""
    return png(np.empty((0, 0, 3), np.uint8), (width, height))


def tiff(tags: dict[int, tuple[int, ...]], data: bytes) -> bytes:
    """A little-endian TIFF of one strip, with tags of 16 bits."""
    size = 8 + len(data)
    entries, extra = b"", b""
    directory = size + len(data) % 2
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            place = directory + 2 + 12 * len(tags) + 4 + len(extra)
            extra += packed
            packed = struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    padded = data + b"\0" * (len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, directory) + padded + struct.pack("<H", len(tags)) + entries + bytes(4) + extra


def tiff_of_bands(bands: int, bits: int = 8) -> bytes:
    tags = {256: (4,), 257: (2,), 258: bands * (bits,), 259: (1,), 262: (1,), 273: (8,), 277: (bands,), 278: (2,)}
    return tiff(tags | {279: (8 * bands * bits // 8,)}, bytes(8 * bands * bits // 8))


def bmp(pixels: np.ndarray) -> bytes:
    """A BMP of 32 bits with masks for all four bytes, which Pillow reads as RGBA; pixels [H, W, 4]."""
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels[::-1, :, [2, 1, 0, 3]]).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(data), 2835, 2835, 0, 0) + masks
    head += bytes(108 - len(head))
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data
