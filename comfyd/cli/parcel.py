"""One job on its way into the spool: found good, with the options of the command line in it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from comfyd.cli.screen import say
from comfyd.config import Config
from comfyd.core import workflow
from comfyd.core.workflow import Kind
from comfyd.errors import JobFileError
from comfyd.spool import bundle, jobfile, yamlfile
from comfyd.spool.bundle import drop_bundle
from comfyd.spool.claimedfile import Claim, opened_bundle, read_claim
from comfyd.spool.jobfile import DOCUMENT_NAMES, is_yaml
from comfyd.spool.layout import Spool, drop, extension_of, open_dir, safe
from comfyd.spool.library import read_workflow

_REQUEST: Final = "request"  # the stem of a request body that a job document of ours refers to


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to each job.

    Attributes:
      name: The stem of its id, instead of the file's.
      values, files: By ``NODE.INPUT``.

    """

    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    priority: int | None = None

    @property
    def change_it(self) -> bool:
        """Whether the job is another than the file says."""
        return bool(self.values or self.files) or self.priority is not None


@dataclass(frozen=True, slots=True)
class Parcel:
    """A job that was found good.

    Attributes:
      source: As typed.
      name: Of the file to drop, or of the folder.
      data: The file, or the job document of the folder.
      document: The name of the job document in the folder; "" if it is a single file.
      folder: The folder that was submitted, if one was.
      added: What lies in the folder besides, by relative name: a file to copy, or its content.

    """

    source: str
    name: str
    data: bytes
    document: str = ""
    folder: Path | None = None
    added: Mapping[str, Path | bytes] = field(default_factory=dict)

    def drop(self, spool: Spool) -> str:
        """Put it into the spool; its job id.

        Raises:
          JobFileError: A file of it changed since it was checked; nothing was submitted.
          DiskFull, OSError: As for ``layout.drop``.

        """
        if not self.document:
            return drop(spool, self.name, self.data)
        return drop_bundle(spool, self.name, self._fill)

    def _fill(self, target: Path) -> None:
        if self.folder is not None:
            fd = open_dir(self.folder)
            try:
                bundle.read(fd, into=target, linked=True)
            finally:
                os.close(fd)
            for name in DOCUMENT_NAMES:
                (target / name).unlink(missing_ok=True)
        for name, content in {**self.added, self.document: self.data}.items():
            with open(target / name, "xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with _opened(content) as original:
                        shutil.copyfileobj(original, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())


def prepare(source: str, options: Options, config: Config) -> Parcel:
    """Read and check the job *source*: a file, a folder, or ``-`` for stdin. Warnings are said.

    Raises:
      JobFileError: It is none.

    """
    folder, claim = _read(source, config.jobs.max_file_bytes)
    data, document = claim.document, "" if claim.pieces is None else claim.name
    added: dict[str, Path | bytes] = {}
    taken = set(claim.beside or ())
    name = claim.name if folder is None else folder.name
    if options.change_it:
        asked, added = _document(source, claim, options, taken)
        data, document = json.dumps(asked, ensure_ascii=False, allow_nan=False).encode(), ""
        if added or folder is not None:
            document, name = "job.json", name if folder is not None else _stem(name)
        elif not name.lower().endswith(".json"):
            name = f"{_stem(name)}.json"
    if document:
        name = safe(_stem(options.name)) if options.name is not None else name
    elif options.name is not None:
        name = safe(_stem(options.name)) + extension_of(name)
    beside = None if not document else taken | added.keys()
    job = jobfile.load(
        data,
        document or name,
        draw=lambda: secrets.randbits(53),
        beside=beside,
        named=_finder(folder, claim, added, config),
    )
    for warning in job.warnings:
        say(f"comfyd: {source}: {warning}")
    if len(data) > config.jobs.max_file_bytes:
        raise JobFileError("With its settings the job is larger than jobs.max_file_bytes allows.")
    _check_size(claim, added.values())
    return Parcel(source, name, data, document, folder, added)


def _source_name(source: str, data: bytes) -> str:
    """The file name of *source*; for stdin, by what it holds."""
    if source != "-":
        return Path(source).name
    looks_json = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    return "stdin.json" if looks_json else "stdin.yaml"


def _stem(name: str) -> str:
    base, dot, extension = name.rpartition(".")
    return base if dot and extension.lower() in {"json", "yaml", "yml"} else name


def _read(source: str, max_bytes: int) -> tuple[Path | None, Claim]:
    """What *source* holds, and its path if it is a folder."""
    try:
        if source != "-" and os.path.isdir(source):
            folder = Path(source).resolve()
            fd = open_dir(folder.parent)
            try:
                claim = read_claim(fd, folder.name, max_bytes=max_bytes, linked=True)
            finally:
                os.close(fd)
            return folder, claim
        with sys.stdin.buffer if source == "-" else open(source, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise JobFileError(getattr(error, "strerror", None) or str(error)) from None
    if len(data) > max_bytes:
        raise JobFileError(f"The file has more than {max_bytes} bytes (jobs.max_file_bytes).")
    return None, Claim(data, _source_name(source, data), None, "")


def _finder(
    folder: Path | None, claim: Claim, added: Mapping[str, Path | bytes], config: Config
) -> Callable[[str], bytes]:
    """Finds named workflows as the daemon will."""

    def named(name: str) -> bytes:
        content = added.get(name)
        if isinstance(content, bytes):
            return content
        if folder is not None and claim.pieces is not None and name in claim.pieces:
            fd = open_dir(folder.parent)
            try:
                with opened_bundle(fd, folder.name) as folder_fd:
                    return bundle.read_piece(folder_fd, name, claim.pieces[name])
            finally:
                os.close(fd)
        if config.workflows is None:
            raise jobfile.not_found(name)
        return read_workflow(config.workflows, name, max_bytes=config.jobs.max_file_bytes)

    return named


def _document(
    source: str, claim: Claim, options: Options, taken: set[str]
) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """What *claim* asks for as a job document with *options* in it, and the files it now needs."""
    data, added = claim.document, dict[str, Path | bytes]()
    found = yamlfile.parse(data) if is_yaml(claim.name) else workflow.parse_json(data)
    match workflow.recognise(found):
        case Kind.DOCUMENT:
            document = dict(found)
        case Kind.WORKFLOW:
            document = {"workflow": found}
        case Kind.REQUEST:
            request = jobfile.load(data, claim.name, draw=lambda: 0)
            if request.extra_data:  # which only a request body can hold: it goes beside
                name = _free(f"{_REQUEST}{extension_of(claim.name)}", taken)
                document, added[name] = {"workflow": name}, data
            else:
                document = {"workflow": request.graph}
                for warning in request.warnings:
                    say(f"comfyd: {source}: {warning}")
    if options.values:
        document["set"] = {**_object(document, "set"), **options.values}
    if options.files:
        names: dict[str, str] = {}  # by path: one that is used twice is sent once
        for path in options.files.values():
            if path not in names:
                names[path] = _free(_safe_file_name(path), taken | added.keys())
                added[names[path]] = _checked(path)
        own = _object(document, "files")
        document["files"] = {**own, **{key: names[path] for key, path in options.files.items()}}
    if options.priority is not None:
        document["priority"] = options.priority
    return document, added


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise JobFileError(f"{key}: must be an object.")
    return value


def _free(name: str, taken: Iterable[str]) -> str:
    """*name*, or one like it that is not taken; never that of a job document."""
    used = {*taken, *DOCUMENT_NAMES}
    stem, dot, ending = name.rpartition(".")
    number = 1
    free = name
    while free in used:
        number += 1
        free = f"{stem}-{number}{dot}{ending}" if dot else f"{name}-{number}"
    return free


def _safe_file_name(path: str) -> str:
    stem, dot, ending = os.path.basename(path).rpartition(".")
    return f"{safe(stem)}.{safe(ending, limit=16)}" if dot else safe(ending)


def _checked(path: str) -> Path:
    """*path*, if it is a file that can be read."""
    with _opened(Path(path)):
        return Path(path)


def _opened(path: Path) -> Any:
    """*path*, open, if it is a regular file; links are followed, for a person typed it."""
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "is not there"
            raise JobFileError(f"--file: {path} {what}.")
        return path.open("rb")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise JobFileError(f"--file: {path} cannot be read: {problem}.") from None


def _check_size(claim: Claim, added: Iterable[Path | bytes]) -> None:
    size_bytes = sum(piece.size_bytes for piece in (claim.pieces or {}).values())
    size_bytes += sum(each.stat().st_size for each in added if isinstance(each, Path))
    if size_bytes > bundle.MAX_BYTES:
        raise JobFileError(
            f"Its files have {size_bytes} bytes together; a bundle may have {bundle.MAX_BYTES}."
        )
