"""Real media bytes without an imaging library: PNG written by hand, the rest from templates."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from typing import Final

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

# Two frames of 8x8 pixels, lossless, without metadata.
ANIMATED_WEBP: Final = base64.b64decode(
    "UklGRoQAAABXRUJQVlA4WAoAAAACAAAABwAABwAAQU5JTQYAAAAAAAAAAABBTk1GKAAAAAAAAAAAAAcAAAcAAKYA"
    "AAJWUDhMDwAAAC8HwAEABxD9j/4HIqL/AQBBTk1GKAAAAAAAAAAAAAcAAAcAAKYAAABWUDhMDwAAAC8HwAEAB1DA"
    "iP4HIqL/AQA="
)
# A grey square of 8x8 pixels.
PREVIEW_JPEG: Final = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////"
    "////////////////////////////////wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAA"
    "AAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AP//Z"
)
# 192 samples of silence, mono.
FLAC: Final = base64.b64decode(
    "ZkxhQ4AAACIAwADAAAAAAAAACsRA8AAAAMAP6Lb/ICorgmy3P8UNCJ6b//gZCAC6AAAAMLI="
)
# Three frames of silence, mono, 32 kbit/s.
MP3: Final = (b"\xff\xfb\x10\xc4" + bytes(100)) * 3
# 20 ms of silence, mono.
OPUS: Final = base64.b64decode(
    "T2dnUwACAAAAAAAAAAABAAAAAAAAAIRs2SQBE09wdXNIZWFkAQEAAIC7AAAAAABPZ2dTAAAAAAAAAAAAAAEAAAABAAAA"
    "Ti3kkgEWT3B1c1RhZ3MGAAAAY29tZnlkAAAAAE9nZ1MABMADAAAAAAAAAQAAAAIAAAApk7DdAQP4//4="
)
# Containers without a track.
MP4: Final = base64.b64decode(
    "AAAAHGZ0eXBpc29tAAACAGlzb21pc28ybXA0MQAAAHRtb292AAAAbG12aGQAAAAAAAAAAAAAAAAAAAPoAAAAAAABAAAB"
    "AAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAB"
)
WEBM: Final = base64.b64decode(
    "GkXfo49CgoR3ZWJtQoeBAkKFgQIYU4BnnhVJqWaZKtexgw9CQE2AhmNvbWZ5ZFdBhmNvbWZ5ZA=="
)
# One pixel.
GIF: Final = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
# An empty scene.
GLB: Final = (
    struct.pack("<4sIIII", b"glTF", 2, 48, 28, 0x4E4F534A) + b'{"asset":{"version":"2.0"}} '
)


def latent(width: int, height: int, batch: int, texts: dict[str, str]) -> bytes:
    """A safetensors file as SaveLatent writes it, of zeros, with *texts* as its metadata."""
    end = 4 * 4 * width * height * batch
    head = json.dumps(
        {
            "__metadata__": texts,
            "latent_format_version_0": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]},
            "latent_tensor": {
                "dtype": "F32",
                "shape": [batch, 4, height, width],
                "data_offsets": [0, end],
            },
        }
    ).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + bytes(end)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width_px: int, height_px: int, rgb: tuple[int, int, int], texts: dict[str, str]) -> bytes:
    """A picture of one colour, with one tEXt chunk for each of *texts* (Latin-1)."""
    row = b"\0" + bytes(rgb) * width_px
    packer = zlib.compressobj(4)
    pixels = b"".join(packer.compress(row) for _ in range(height_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return b"".join(
        (
            PNG_SIGNATURE,
            _chunk(b"IHDR", header),
            *(
                _chunk(b"tEXt", key.encode("latin-1") + b"\0" + text.encode("latin-1"))
                for key, text in texts.items()
            ),
            _chunk(b"IDAT", pixels),
            _chunk(b"IEND", b""),
        )
    )


# A right file for each ending.
SAMPLES: Final = {
    "png": png(2, 2, (0, 0, 0), {}),
    "jpg": PREVIEW_JPEG,
    "webp": ANIMATED_WEBP,
    "gif": GIF,
    "flac": FLAC,
    "mp3": MP3,
    "opus": OPUS,
    "mp4": MP4,
    "webm": WEBM,
    "glb": GLB,
    "latent": latent(1, 1, 1, {}),
    "json": b"{}",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


def rgb_of(content: bytes) -> tuple[int, int, int]:
    """The colour of the first pixel of an RGB PNG; of everything else, grey."""
    at = len(PNG_SIGNATURE)
    packed = b""
    while content.startswith(PNG_SIGNATURE) and at + 8 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        if kind == b"IHDR" and body[8:10] != b"\x08\x02":
            break
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    try:
        pixel = zlib.decompressobj().decompress(packed, 4)[1:]  # no filter changes the first one
        red, green, blue = pixel
    except (zlib.error, ValueError):
        return (128, 128, 128)
    return (red, green, blue)


def size_px(content: bytes) -> tuple[int, int] | None:
    """Width and height of a picture, or None if *content* is none.

    Only PNG is measured; JPEG and WEBP are recognised and taken for 64x64.
    """
    if content.startswith(PNG_SIGNATURE) and len(content) >= 24:
        width_px, height_px = struct.unpack(">II", content[16:24])
        return width_px, height_px
    if content.startswith(b"\xff\xd8\xff") or (
        content.startswith(b"RIFF") and content[8:12] == b"WEBP"
    ):
        return 64, 64
    return None
