"""What each HTTP route of the simulated server answers.

After server.py of ComfyUI 0.3.64, oddities included: a handler that raises answers 500 in plain
text, and most refusals have no body.
"""

from __future__ import annotations

import logging
import mimetypes
import posixpath
import re
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from comfyd.simulator.catalogue import installed
from comfyd.simulator.faults import Faults
from comfyd.simulator.files import FOLDERS, Files, is_inside, split_annotated
from comfyd.simulator.http import (
    MAX_BODY_BYTES,
    Answer,
    Hangup,
    Request,
    Response,
    Silence,
    json_response,
    server_error,
    too_large,
)
from comfyd.simulator.memory import Memory, exec_info
from comfyd.simulator.multipart import parse_form
from comfyd.simulator.nodes import NodeClass
from comfyd.simulator.validation import validate

_RAM_BYTES: Final = 32 * 1024**3
_VRAM_BYTES: Final = 24 * 1024**3
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_log = logging.getLogger(__name__)


class Routes:
    """The routes, over the memory of the server's present life.

    Attributes:
      posts: Prompts accepted, by prompt id.
      views: Files asked for, by name.
      uploads: Files taken, by the name they were given.

    """

    def __init__(
        self, faults: Faults, files: Files, memory: Callable[[], Memory], version: str
    ) -> None:
        self._faults = faults
        self._files = files
        self._present = memory
        self._version = version
        self.posts: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    async def handle(self, request: Request) -> Answer:
        """Answer *request*, which is not for a WebSocket."""
        if self._faults.slow_s:
            await trio.sleep(self._faults.slow_s)
        if self._faults.half_open in ("http", "all"):
            return Silence()
        if is_cross_origin(request):
            return Response(403)
        if len(request.body) > (limit := features(self._faults)["max_upload_size"]):
            return too_large(limit)
        path = request.path.removeprefix("/api")
        try:
            return await self._route(request.method, path, request)
        except Exception:  # noqa: BLE001 - aiohttp answers 500 for any error in a handler
            _log.debug("%s %s raised", request.method, path, exc_info=True)
            return server_error()

    async def _route(self, method: str, path: str, request: Request) -> Answer:
        match method, path.strip("/").split("/"):
            case "POST", ["prompt"]:
                return await self._post_prompt(request)
            case "GET", ["prompt"]:
                remaining = self._present().queue.remaining
                return json_response(exec_info(remaining)["status"])
            case "GET", ["queue"]:
                return self._get_queue()
            case "POST", ["queue"]:
                return self._post_queue(request.json())
            case "POST", ["interrupt"]:
                return self._post_interrupt(request)
            case "GET", ["history"]:
                return self._get_history(request)
            case "GET", ["history", prompt_id]:
                return self._get_record(prompt_id)
            case "POST", ["history"]:
                return self._post_history(request.json())
            case "GET", ["view"]:
                return self._get_view(request.query)
            case "POST", ["upload", "image"]:
                return self._post_upload(request)
            case "GET", ["system_stats"]:
                return json_response(self._stats())
            case "GET", ["features"]:
                return json_response(features(self._faults))
            case "GET", ["object_info"]:
                return json_response({name: node.info() for name, node in self._classes().items()})
            case "GET", ["object_info", name]:
                node_class = self._classes().get(name)
                return json_response({} if node_class is None else {name: node_class.info()})
            case "POST", ["free"]:
                request.json()
                return Response()
            case "GET", [""]:
                text = b"<!doctype html><title>ComfyUI (simulated)</title>"
                return Response(200, text, "text/html; charset=utf-8")
            case _:
                return Response(404, content_type="application/octet-stream")

    async def _post_prompt(self, request: Request) -> Answer:
        faults = self._faults
        if faults.strikes(faults.post_refuse):
            return Hangup()
        if faults.post_fail is not None and faults.strikes(faults.post_fail):
            return Response(faults.post_fail.status, b"on purpose", "text/plain; charset=utf-8")
        if (fail := faults.post_fail_class) is not None and fail.class_type in _classes(request):
            return Response(fail.status, b"on purpose", "text/plain; charset=utf-8")
        # A client that gives up does not stop the handler: the prompt is queued all the same.
        await trio.sleep(faults.post_delay_s)
        answer = self._accept(request.json())
        if answer.status == 200 and faults.strikes(faults.post_ambiguous):
            return Hangup()
        if answer.status == 200 and faults.strikes(faults.post_hang):
            return Silence()
        return answer

    def _accept(self, body: dict[str, Any]) -> Response:
        memory = self._present()
        number: float
        if "number" in body:
            number = float(body["number"])
        else:
            number = -memory.number if body.get("front") else memory.number
            memory.number += 1
        if "prompt" not in body:
            text = "No prompt provided"
            error = {"type": "no_prompt", "message": text, "details": text, "extra_info": {}}
            return json_response({"error": error, "node_errors": {}}, 400)
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        targets = body.get("partial_execution_targets")
        verdict = validate(body["prompt"], self._classes(), self._files, targets)
        extra_data = body.get("extra_data", {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if verdict.error is not None:
            return json_response({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        memory.queue.put((number, prompt_id, body["prompt"], extra_data, verdict.outputs))
        self.posts[prompt_id] += 1
        answer = {"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors}
        return json_response(answer)

    def _get_queue(self) -> Response:
        if self._faults.strikes(self._faults.queue_fail):
            return server_error()
        queue = self._present().queue
        return json_response({"queue_running": queue.running, "queue_pending": queue.pending})

    def _post_queue(self, body: dict[str, Any]) -> Response:
        queue = self._present().queue
        if body.get("clear"):
            queue.wipe()
        for prompt_id in body.get("delete", []):
            queue.delete(prompt_id)
        return Response()

    def _post_interrupt(self, request: Request) -> Response:
        memory = self._present()
        prompt_id = (request.json() if request.body else {}).get("prompt_id")
        is_running = any(item[1] == prompt_id for item in memory.queue.running)
        if (is_running or not prompt_id) and not self._faults.strikes(
            self._faults.interrupt_ignored
        ):
            memory.executor.interrupt()
        return Response()

    def _get_history(self, request: Request) -> Response:
        if self._faults.strikes(self._faults.history_fail):
            return server_error()
        most = request.query.get("max_items")
        records = self._present().queue.records(
            most=None if most is None else int(most), offset=int(request.query.get("offset", -1))
        )
        return json_response(records)

    def _get_record(self, prompt_id: str) -> Response:
        if self._faults.strikes(self._faults.history_fail):
            return server_error()
        return json_response(self._present().queue.records(prompt_id))

    def _post_history(self, body: dict[str, Any]) -> Response:
        queue = self._present().queue
        if body.get("clear"):
            queue.forget_all()
        for prompt_id in body.get("delete", []):
            queue.forget(prompt_id)
        return Response()

    def _get_view(self, query: dict[str, str]) -> Answer:
        fail = self._faults.view_fail
        if fail is not None and self._faults.strikes(fail):
            return Response(fail.status, b"on purpose", "text/plain; charset=utf-8")
        if "filename" not in query:
            return Response(404)
        name, folder = split_annotated(query["filename"], query.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or folder not in FOLDERS:
            return Response(400)
        subfolder = query.get("subfolder", "")
        if not is_inside(subfolder):
            return Response(403)
        name = posixpath.basename(name)
        self.views[name] += 1
        content = self._files.read(folder, subfolder, name)
        if content is None or self._faults.strikes(self._faults.view_missing):
            return Response(404)
        if self._faults.strikes(self._faults.view_wrong):
            page = b"<html><body>Sign in to continue</body></html>"
            return Response(200, page, "text/html; charset=utf-8")
        if _CONTROL.search(name):
            return Hangup()  # aiohttp refuses to write such a header, and closes the connection
        is_cut = self._faults.strikes(self._faults.view_truncate)
        return Response(
            200,
            content,
            mimetypes.guess_type(name)[0] or "application/octet-stream",
            {"Content-Disposition": f'filename="{name}"'},
            sent_bytes=len(content) // 2 if is_cut else None,
        )

    def _post_upload(self, request: Request) -> Response:
        fail = self._faults.upload_fail
        if fail is not None and self._faults.strikes(fail):
            return Response(fail.status, b"on purpose", "text/plain; charset=utf-8")
        kind = request.headers.get("content-type", "")
        form = parse_form(kind, request.body) if kind.startswith("multipart/form-data") else {}
        image = form.get("image")
        if image is None or not image.filename:
            return Response(400)
        folder = form["type"].text if "type" in form else "input"
        if folder not in FOLDERS:
            return server_error()
        subfolder = form["subfolder"].text if "subfolder" in form else ""
        if not is_inside(posixpath.join(subfolder, image.filename)):
            return Response(400)
        name = image.filename
        if not ("overwrite" in form and form["overwrite"].text in ("true", "1")):
            stem, ending = posixpath.splitext(name)
            count = 0
            while self._files.read(folder, subfolder, name) not in (None, image.content):
                count += 1
                name = f"{stem} ({count}){ending}"
        self._files.write(folder, subfolder, name, image.content)
        self.uploads[name] += 1
        return json_response({"name": name, "subfolder": subfolder, "type": folder})

    def _classes(self) -> dict[str, NodeClass]:
        return installed(self._faults.missing_nodes, self._faults.missing_models)

    def _stats(self) -> dict[str, Any]:
        return {
            "system": {
                "os": "posix",
                "ram_total": _RAM_BYTES,
                "ram_free": _RAM_BYTES // 2,
                "comfyui_version": self._version,
                "required_frontend_version": "1.27.10",
                "installed_templates_version": None,
                "required_templates_version": "0.1.95",
                "python_version": "3.11",
                "pytorch_version": "simulated",
                "embedded_python": False,
                "argv": ["main.py"],
            },
            "devices": [
                {
                    "name": "simulated",
                    "type": "cuda",
                    "index": 0,
                    "vram_total": _VRAM_BYTES,
                    "vram_free": _VRAM_BYTES // 2,
                    "torch_vram_total": _VRAM_BYTES // 4,
                    "torch_vram_free": _VRAM_BYTES // 8,
                }
            ],
        }


def _classes(request: Request) -> set[str]:
    """The node classes of the graph in a request, as far as it has one."""
    graph = request.json().get("prompt")
    nodes = graph.values() if isinstance(graph, dict) else ()
    return {str(node.get("class_type")) for node in nodes if isinstance(node, dict)}


def features(faults: Faults) -> dict[str, Any]:
    """What GET /features says."""
    limit = faults.max_upload_bytes
    return {
        "supports_preview_metadata": True,
        "max_upload_size": MAX_BODY_BYTES if limit is None else min(limit, MAX_BODY_BYTES),
    }


def is_cross_origin(request: Request) -> bool:
    """Whether a browser's other page sent this; ComfyUI answers 403 on a loopback host."""
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host")
