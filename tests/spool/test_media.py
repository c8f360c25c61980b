"""What an output is called here, and what gives a wrong body away."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.spool.media import HEAD_BYTES, local_name, looks_wrong

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
SAFETENSORS = (40).to_bytes(8, "little") + b'{"__metadata__":{}}'
RIGHT = {
    "a.png": PNG,
    "a.PNG": PNG,
    "a.jpg": b"\xff\xd8\xff\xe0",
    "a.jpeg": b"\xff\xd8\xff\xe1",
    "a.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "a.gif": b"GIF89a",
    "a.mp4": b"\0\0\0\x20ftypisom",
    "a.mov": b"\0\0\0\x14ftypqt  ",
    "a.webm": b"\x1a\x45\xdf\xa3",
    "a.mkv": b"\x1a\x45\xdf\xa3",
    "a.avi": b"RIFF\x00\x00\x00\x00AVI LIST",
    "a.flac": b"fLaC\0",
    "a.mp3": b"\xff\xfb\x90",
    "b.mp3": b"ID3\x04",
    "a.wav": b"RIFF\x00\x00\x00\x00WAVEfmt ",
    "a.ogg": b"OggS",
    "a.opus": b"OggS",
    "a.glb": b"glTF\x02",
    "a.fbx": b"Kaydara FBX Binary  \0",
    "b.fbx": b"; FBX 7.4.0 project file",
    "a.ply": b"ply\nformat ascii 1.0\n",
    "a.stl": b"solid cube\n",
    "b.stl": bytes(80) + b"\x01\0\0\0",
    "a.usdz": b"PK\x03\x04",
    "a.heic": b"\0\0\0\x18ftypheic",
    "a.jxl": b"\xff\x0a\xfa",
    "b.jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
    "a.psd": b"8BPS\0\x01",
    "a.pdf": b"%PDF-1.7",
    "a.gltf": b'{"asset": {}}',
    "a.obj": b"# a cube\nv 0 0 0\n",
    "a.json": b' [1, "\xc3\xa9"]',
    "b.json": b"null",
    "a.txt": "ein Füchslein".encode(),
    "b.txt": b"<html>is text, too</html>",
    "a.svg": b"<?xml version='1.0'?><svg/>",
    "a.latent": SAFETENSORS,
    "a.safetensors": SAFETENSORS,
}


@pytest.mark.parametrize("filename", RIGHT)
def test_an_extension_is_kept_where_the_bytes_agree(filename: str) -> None:
    extension = filename.rpartition(".")[2].lower()
    assert local_name("9", 0, filename, RIGHT[filename]) == f"9-0.{extension}"
    assert looks_wrong(filename, RIGHT[filename]) is None


@pytest.mark.parametrize(
    ("filename", "head"),
    [
        ("a.png", b"GIF89a"),
        ("a.exe", b"MZ"),
        ("a.html", b"<html>"),
        ("png", PNG),
        ("a.", PNG),
        ("", PNG),
        ("a.png/../../b", PNG),
        ("a.txt", b"a\0b"),
        ("a.json", b"hello"),
        ("a.latent", b"\xff" * 8 + b"{"),
        ("a.png", b""),
        ("a.stl", b"a text"),
        ("a.stl", bytes(83)),
        ("a.fbx", b"FBX"),
    ],
)
def test_everything_else_is_called_bin(filename: str, head: bytes) -> None:
    assert local_name("9", 3, filename, head) == "9-3.bin"


def test_a_text_head_may_end_within_a_character() -> None:
    head = ("x" * (HEAD_BYTES - 1) + "🦊").encode()[:HEAD_BYTES]
    assert local_name("9", 0, "a.txt", head) == "9-0.txt"


def test_node_ids_that_must_change_stay_apart() -> None:
    names = {local_name(node, 0, "a.png", PNG) for node in ("3:1", "3_1", "3/1", "3\0", "", "-")}
    assert len(names) == 6
    assert "3_1-0.png" in names


@given(st.text(), st.integers(0, 999), st.text(), st.binary(max_size=40))
def test_no_name_leaves_its_folder(node: str, index: int, filename: str, head: bytes) -> None:
    name = local_name(node, index, filename, head)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*\.[a-z0-9]+", name)
    assert len(name) < 100
    looks_wrong(filename, head)


@pytest.mark.parametrize(
    ("filename", "head", "says"),
    [
        ("a.png", b"", "empty"),
        ("a", b"", "empty"),
        ("a.txt", b"", None),
        ("a.png", b"<!DOCTYPE html><html>", "web page"),
        ("a.png", b"\n <html lang=en>", "web page"),
        ("a.json", b"<html>", "web page"),
        ("a.svg", b"<html>", "web page"),
        ("a.mp4", b'{"error": "gone"}', "text"),
        ("a.ply", b"<html>", "web page"),
        ("a.stl", b"404: Not Found", "text"),
        ("a.flac", b"404: Not Found", "text"),
        ("a.png", b"GIF89a\xff\xfe\0", None),
        ("a.unknown", b"<html>", None),
        ("a.txt", b"<html>", None),
    ],
)
def test_a_wrong_body_gives_itself_away(filename: str, head: bytes, says: str | None) -> None:
    wrong = looks_wrong(filename, head)
    assert (wrong is None) if says is None else (wrong is not None and says in wrong)
