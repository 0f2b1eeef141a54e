"""Pictures without an imaging library: a PNG is zlib and four chunks."""

import struct
import zlib
from pathlib import Path

import numpy as np

from utils.files import write_atomically


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, 3) uint8 red, green, blue as a PNG file, atomically."""
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each row is preceded by its filter's number, 0: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits per channel, colour type 2: RGB
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
