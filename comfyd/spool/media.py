"""What an output file is, judged by its first bytes: a server's word for it is not enough."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final

from comfyd.spool.layout import safe

HEAD_BYTES: Final = 512  # of a file's start; enough for every judgement here


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _riff(kind: bytes) -> Callable[[bytes], bool]:
    return lambda head: head[:4] == b"RIFF" and head[8:12] == kind


def _boxes(head: bytes) -> bool:
    return head[4:8] in {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}


def _heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp"


def _mpeg_audio(head: bytes) -> bool:
    return head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)


def _jxl(head: bytes) -> bool:
    return head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))


def _stl(head: bytes) -> bool:
    """Text that begins with `solid`, or 80 bytes of anything, a count and triangles."""
    if _text(head):
        return head.lstrip().startswith(b"solid")
    return len(head) >= 84 and not head.startswith(b"PK\x03\x04")


def _safetensors(head: bytes) -> bool:
    """Eight bytes of little-endian header size, then the header: a JSON object."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def _text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    # The head may end within a character: up to three of its bytes are missing then.
    return any(_is_utf8(head[: len(head) - cut]) for cut in range(4))


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError:
        return False
    return True


def _json(head: bytes) -> bool:
    return (
        _text(head)
        and re.match(rb'(?:\xef\xbb\xbf)?\s*(?:[\[{"0-9-]|true|false|null)', head) is not None
    )


def _svg(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--"))


def _html(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _plain(head: bytes) -> bool:
    return _text(head) and not _html(head)


# Every extension a result may carry, and what its bytes must look like to get it.
_BINARY: Final[dict[str, Callable[[bytes], bool]]] = {
    "png": _starts(b"\x89PNG\r\n\x1a\n"),
    "jpg": _starts(b"\xff\xd8\xff"),
    "jpeg": _starts(b"\xff\xd8\xff"),
    "webp": _riff(b"WEBP"),
    "gif": _starts(b"GIF87a", b"GIF89a"),
    "bmp": _starts(b"BM"),
    "tif": _starts(b"II*\0", b"MM\0*"),
    "tiff": _starts(b"II*\0", b"MM\0*"),
    "exr": _starts(b"\x76\x2f\x31\x01"),
    "hdr": _starts(b"#?RADIANCE", b"#?RGBE"),
    "avif": _heic,
    "heic": _heic,
    "jxl": _jxl,
    "psd": _starts(b"8BPS"),
    "pdf": _starts(b"%PDF-"),
    "mp4": _boxes,
    "m4v": _boxes,
    "m4a": _boxes,
    "mov": _boxes,
    "webm": _starts(b"\x1a\x45\xdf\xa3"),
    "mkv": _starts(b"\x1a\x45\xdf\xa3"),
    "avi": _riff(b"AVI "),
    "flac": _starts(b"fLaC", b"ID3"),
    "mp3": _mpeg_audio,
    "aac": _mpeg_audio,
    "wav": _riff(b"WAVE"),
    "ogg": _starts(b"OggS"),
    "opus": _starts(b"OggS"),
    "glb": _starts(b"glTF"),
    "fbx": _starts(b"Kaydara FBX Binary", b"; FBX"),
    "ply": _starts(b"ply\n", b"ply\r"),
    "stl": _stl,
    "usdz": _starts(b"PK\x03\x04"),
    "zip": _starts(b"PK\x03\x04", b"PK\x05\x06"),
    "npz": _starts(b"PK\x03\x04", b"PK\x05\x06"),
    "npy": _starts(b"\x93NUMPY"),
    "safetensors": _safetensors,
    "latent": _safetensors,
}
_TEXT: Final[dict[str, Callable[[bytes], bool]]] = {
    "svg": _svg,
    "json": _json,
    "gltf": _json,
    "txt": _text,
    "md": _text,
    "csv": _text,
    "srt": _text,
    "vtt": _text,
    "obj": _plain,
    "mtl": _plain,
}
_CHECKED: Final = {**_BINARY, **_TEXT}
_MAY_BE_EMPTY: Final = frozenset({"txt", "md", "csv", "srt", "vtt"})


def local_name(node: str, index: int, filename: str, head: bytes) -> str:
    """Our own name for an output: ``<node>-<index>.<ext>``, safe in any folder.

    Args:
      node: Its node id. One that needs changing gets a digest, so that no two share a name.
      index: Its place among that node's files, from 0.
      filename: The server's name; only its extension counts, and only if the bytes agree.
      head: The file's first HEAD_BYTES, or all of it.

    """
    extension = _extension(filename)
    check = _CHECKED.get(extension)
    if check is None or not check(head):
        extension = "bin"
    return f"{_distinct(node)}-{index}.{extension}"


def looks_wrong(filename: str, head: bytes) -> str | None:
    """Say in one sentence why *head* cannot be the start of the file *filename*, or None.

    Only what betrays a wrong body counts (nothing at all, an error page, text for a picture): a
    PNG named .jpg is a custom node's own business.
    """
    extension = _extension(filename)
    if not head:
        return None if extension in _MAY_BE_EMPTY else "the file is empty"
    if extension in _BINARY and not _BINARY[extension](head):
        if _html(head):
            return f"a web page came instead of a .{extension} file"
        if _text(head):
            return f"text came instead of a .{extension} file"
    if extension in {"svg", "json", "gltf", "obj"} and _html(head):
        return f"a web page came instead of a .{extension} file"
    return None


def _extension(filename: str) -> str:
    return filename.rpartition(".")[2].lower() if "." in filename else ""


def _distinct(node: str) -> str:
    own = safe(node)
    if own == node:
        return own
    return f"{own}_{hashlib.sha256(node.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
