"""Animations and lettering without an imaging library. Pictures are (H, W, 3) uint8 red, green, blue; utils/png.py writes one."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.files import write_atomically

# 5 x 7 pixels per character: a byte per row, whose lower five bits are the pixels from left to right.
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789. "
_ROWS, _COLUMNS, _PITCH = 7, 5, 6
_GLYPHS = np.frombuffer(
    bytes.fromhex(
        """
        0E11111F111111 1E11111E11111E 0E11101010110E 1E11111111111E 1F10101E10101F 1F10101E101010 0E11101711110F 1111111F111111
        0E04040404040E 0702020202120C 11121418141211 1010101010101F 111B1515111111 11191513111111 0E11111111110E 1E11111E101010
        0E11111115120D 1E11111E141211 0F10100E01011E 1F040404040404 1111111111110E 11111111110A04 111111151B1111 11110A040A1111
        110A0404040404 1F01020408101F 0E11131519110E 040C040404040E 0E11010608101F 1F02040201110E 02060A121F0202 1F101E0101110E
        0608101E11110E 1F010204080808 0E11110E11110E 0E11110F01020C 00000000000C0C 00000000000000
        """
    ),
    np.uint8,
).reshape(len(_CHARACTERS), _ROWS)
_GIF_BITS_PER_CODE = 12


def lettering(text: str, scale: int, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """`text` as a picture (7 * scale, 6 * scale * len(text), 3); capitals, digits, full stop and space.

    Raises `ValueError` for a character that the font does not have.
    """
    cells = np.zeros((_ROWS, _PITCH * len(text)), bool)
    for number, character in enumerate(text.upper()):
        bits = np.unpackbits(_GLYPHS[_CHARACTERS.index(character), :, None], axis=1)
        cells[:, number * _PITCH : number * _PITCH + _COLUMNS] = bits[:, -_COLUMNS:]
    return np.where(cells.repeat(scale, axis=0).repeat(scale, axis=1)[:, :, None], ink, paper).astype(np.uint8)


def write_gif(path: Path, frames: Sequence[np.ndarray], seconds: Sequence[float]) -> None:
    """Write frames of one size, each shown for its `seconds`, as a GIF that starts over for ever; atomically.

    Raises `ValueError` when the frames have more than 256 colours together.
    """
    packed = np.stack([(frame.astype(np.uint32) << (16, 8, 0)).sum(axis=-1, dtype=np.uint32) for frame in frames])
    palette, indices = np.unique(packed, return_inverse=True)
    if len(palette) > 256:
        raise ValueError(f"a GIF has at most 256 colours, these frames have {len(palette)}")
    indices = indices.reshape(packed.shape).astype(np.uint8)
    bits = max(2, int(len(palette) - 1).bit_length())
    height, width = indices.shape[1:]
    table = b"".join(int(colour).to_bytes(3, "big") for colour in palette).ljust(3 << bits, b"\0")
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0x80 | (bits - 1), 0, 0), table]
    parts.append(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # repeat for ever
    shown = None
    for frame, duration in zip(indices, seconds, strict=True):
        top, left, bottom, right = (0, 0, height, width) if shown is None else _changed_box(frame, shown)
        parts.append(struct.pack("<BBBBHBB", 0x21, 0xF9, 4, 1 << 2, round(duration * 100), 0, 0))  # leave the frame in place
        parts.append(struct.pack("<BHHHHB", 0x2C, left, top, right - left, bottom - top, 0))
        code = _lzw(frame[top:bottom, left:right], bits)
        blocks = (code[start : start + 255] for start in range(0, len(code), 255))
        parts += [bytes([bits]), *(bytes([len(block)]) + block for block in blocks), b"\0"]
        shown = frame
    data = b"".join([*parts, b"\x3b"])
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _changed_box(frame: np.ndarray, before: np.ndarray) -> tuple[int, int, int, int]:
    """top, left, bottom, right of what differs; one pixel where nothing does."""
    rows, columns = (np.flatnonzero((frame != before).any(axis=axis)) for axis in (1, 0))
    return (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1) if len(rows) else (0, 0, 1, 1)


def _lzw(indices: np.ndarray, bits: int) -> bytes:
    """GIF's variant of LZW: codes grow from bits + 1 to 12 bits, and the table starts anew when it is full."""
    clear = 1 << bits
    out, held, filled = bytearray(), 0, 0
    table: dict[tuple[int, int], int] = {}
    width, following = bits + 1, clear + 2

    def put(code: int) -> None:
        nonlocal held, filled
        held |= code << filled
        filled += width
        while filled >= 8:
            out.append(held & 255)
            held >>= 8
            filled -= 8

    put(clear)
    first, *rest = indices.ravel().tolist()
    run = first
    for index in rest:
        longer = table.get((run, index))
        if longer is not None:
            run = longer
            continue
        put(run)
        if following == 1 << _GIF_BITS_PER_CODE:
            put(clear)
            table.clear()
            width, following = bits + 1, clear + 2
        else:
            table[run, index] = following
            width += following == 1 << width
            following += 1
        run = index
    put(run)
    if following == 1 << width and width < _GIF_BITS_PER_CODE:  # the reader has by now as many codes as the writer
        width += 1
    put(clear + 1)
    return bytes(out) + (bytes([held]) if filled else b"")
