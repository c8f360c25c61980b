"""Reading multipart/form-data, as uploads are sent."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form; *filename* is None for a plain value."""

    filename: str | None
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8")


def parse_form(content_type: str, body: bytes) -> dict[str, Part]:
    """The fields of a form by name; the last of a name wins.

    Raises:
      ValueError: if *body* is no multipart form.

    """
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    if boundary is None:
        raise ValueError("no boundary")
    parts = {}
    for piece in body.split(b"--" + boundary[1].encode("latin-1"))[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        names = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode("utf-8")))
        if "name" not in names:
            raise ValueError("a part without a name")
        parts[names["name"]] = Part(names.get("filename"), content.removesuffix(b"\r\n"))
    return parts
