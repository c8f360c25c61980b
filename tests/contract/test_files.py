"""Outputs, uploads and what the server says of itself."""

from __future__ import annotations

import json
import struct
import zlib

import httpx
import pytest

from comfyd.spool.media import local_name
from tests.contract import graphs
from tests.contract.wire import Session


def png_texts(content: bytes) -> dict[str, str]:
    """The tEXt chunks of a PNG, whose checksums are verified."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    texts = {}
    position = 8
    while position < len(content):
        size, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack(">I", content[position + 8 + size : position + 12 + size])
        assert checksum == zlib.crc32(kind + body)
        if kind == b"tEXt":
            key, _, text = body.partition(b"\0")
            texts[key.decode()] = text.decode("latin-1")
        position += 12 + size
    assert kind == b"IEND"
    return texts


async def run(session: Session, graph: graphs.Graph, **more: object) -> dict[str, object]:
    """The outputs of *graph*, run to its end."""
    body = {"prompt": graph, "prompt_id": session.new_prompt_id(), **more}
    response = await session.http("POST", "/prompt", json=body)
    assert response.status_code == 200, response.text
    record = await session.wait_recorded(response.json()["prompt_id"])
    assert record["status"]["completed"] is True, record["status"]
    outputs: dict[str, object] = record["outputs"]
    return outputs


async def view(session: Session, **query: str) -> httpx.Response:
    return await session.http("GET", f"/view?{httpx.QueryParams(query)}")


async def upload(session: Session, name: str, content: bytes, **data: str) -> httpx.Response:
    files = {"image": (name, content, "application/octet-stream")}
    return await session.http("POST", "/upload/image", files=files, data=data)


async def test_every_kind_of_output_is_recorded(session: Session) -> None:
    outputs = await run(session, graphs.mixed(session.prefix, session.colour))

    def file(name: str) -> dict[str, str]:
        return {"filename": name, "subfolder": "", "type": "output"}

    assert outputs == {
        "9": {"images": [file(f"{session.prefix}_0000{n}_.png") for n in (1, 2)]},
        "10": {"images": [file(f"{session.prefix}-anim_00001_.webp")], "animated": [True]},
        "12": {"text": [f"text of {session.prefix}"]},
    }


def lies(key: str, name: str, **more: object) -> dict[str, object]:
    """What a node says that saved one file in the folder PREFIX."""
    subfolder, _, filename = name.rpartition("/")
    return {key: [{"filename": filename, "subfolder": subfolder, "type": "output"}], **more}


async def test_sounds_are_recorded(session: Session) -> None:
    outputs = await run(session, graphs.sounds(session.prefix))
    preview = outputs.pop("11")

    assert outputs == {
        "8": lies("audio", f"{session.prefix}/a_00001_.flac"),
        "9": lies("audio", f"{session.prefix}/b_00001_.mp3"),
        "10": lies("audio", f"{session.prefix}/c_00001_.opus"),
    }
    ((file,),) = preview.values()  # type: ignore[attr-defined]
    assert (file["type"], file["filename"][-5:]) == ("temp", ".flac")


async def test_films_are_recorded_as_animated_pictures(session: Session) -> None:
    outputs = await run(session, graphs.films(session.prefix, session.colour))

    assert outputs == {
        "8": lies("images", f"{session.prefix}/a_00001_.png", animated=[True]),
        "9": lies("images", f"{session.prefix}/b_00001_.webm", animated=[True]),
        "10": lies("images", f"{session.prefix}/c_00001_.mp4", animated=[True]),
    }


async def test_latents_are_recorded_and_a_3d_preview_is_no_file(session: Session) -> None:
    outputs = await run(session, graphs.latent(session.prefix))

    assert outputs == {
        "8": lies("latents", f"{session.prefix}/a_00001_.latent"),
        "9": {"result": ["mesh.glb", None]},
    }


async def test_saved_files_are_what_their_names_say(session: Session) -> None:
    seen = set()
    for graph in (
        graphs.sounds(session.prefix),
        graphs.films(f"{session.prefix}-f", session.colour),
        graphs.latent(f"{session.prefix}-l"),
    ):
        for keys in (await run(session, graph)).values():
            for item in (item for items in keys.values() for item in items):  # type: ignore[attr-defined]
                if isinstance(item, dict):
                    response = await view(session, **item)
                    assert response.status_code == 200
                    assert local_name("1", 0, item["filename"], response.content[:512]) != "1-0.bin"
                    seen.add(item["filename"].rpartition(".")[2])
    assert seen == {"flac", "mp3", "opus", "png", "webm", "mp4", "latent"}


async def test_a_picture_carries_its_graph(session: Session) -> None:
    graph = graphs.success(session.prefix, session.colour)
    workflow: dict[str, object] = {"nodes": [], "links": []}
    await run(session, graph, extra_data={"extra_pnginfo": {"workflow": workflow}})
    response = await view(session, filename=f"{session.prefix}_00001_.png")

    texts = png_texts(response.content)
    assert json.loads(texts["prompt"]) == graph
    assert json.loads(texts["workflow"]) == workflow
    assert response.headers["content-type"] == "image/png"
    assert int(response.headers["content-length"]) == len(response.content)


async def test_what_is_flagged_as_animated_is_a_webp(session: Session) -> None:
    await run(session, graphs.mixed(session.prefix, session.colour))
    response = await view(session, filename=f"{session.prefix}-anim_00001_.webp")

    # Whether it holds several frames is not promised: equal ones are merged by the encoder.
    assert response.headers["content-type"] == "image/webp"
    assert (response.content[:4], response.content[8:12]) == (b"RIFF", b"WEBP")


async def test_names_count_upwards(session: Session) -> None:
    for number in (1, 2, 3):
        outputs = await run(session, graphs.success(session.prefix, session.colour + number))
        (image,) = outputs["9"]["images"]  # type: ignore[index]
        assert image["filename"] == f"{session.prefix}_0000{number}_.png"


async def test_a_prefix_may_name_a_subfolder(session: Session) -> None:
    outputs = await run(session, graphs.success(f"{session.prefix}/deep/name", session.colour))
    (image,) = outputs["9"]["images"]  # type: ignore[index]

    assert image == {
        "filename": "name_00001_.png",
        "subfolder": f"{session.prefix}/deep",
        "type": "output",
    }
    assert (await view(session, **image)).status_code == 200


async def test_a_preview_lies_in_the_temp_folder(session: Session) -> None:
    outputs = await run(session, graphs.preview(session.colour))
    (image,) = outputs["9"]["images"]  # type: ignore[index]

    assert image["type"] == "temp"
    assert image["filename"].startswith("ComfyUI_temp_")
    assert (await view(session, **image)).status_code == 200
    assert (await view(session, **{**image, "type": "output"})).status_code == 404


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"filename": "no-such-file.png"}, 404),
        ({"type": "output"}, 404),
        ({"filename": ""}, 400),
        ({"filename": "/etc/hostname"}, 400),
        ({"filename": "../x.png"}, 400),
        ({"filename": "a..b.png"}, 400),
        ({"filename": "x.png", "type": "models"}, 400),
        ({"filename": "x.png", "subfolder": "../.."}, 403),
    ],
)
async def test_a_view_is_refused(session: Session, query: dict[str, str], status: int) -> None:
    assert (await view(session, **query)).status_code == status


@pytest.mark.parametrize("control", ["\n", "\x7f"])
async def test_a_name_that_no_header_can_hold_is_never_handed_out(
    session: Session, control: str
) -> None:
    graph = graphs.success(f"{session.prefix}{control}name", session.colour)
    (image,) = (await run(session, graph))["9"]["images"]  # type: ignore[index]
    assert control in image["filename"]
    with pytest.raises(httpx.RemoteProtocolError):
        await view(session, **image)


async def test_a_null_byte_in_a_prefix_raises(session: Session) -> None:
    body = {"prompt": graphs.success(f"{session.prefix}\0name", session.colour)}
    answer = await session.http("POST", "/prompt", json=body)
    record = await session.wait_recorded(answer.json()["prompt_id"])
    assert record["status"]["completed"] is False
    name, said = record["status"]["messages"][-1]
    assert name == "execution_error"
    assert said["exception_type"] == "ValueError"
    assert "embedded null byte" in said["exception_message"]


async def test_an_upload_is_renamed_only_if_its_content_differs(session: Session) -> None:
    name = f"{session.prefix}.bin"
    names = []
    for content in (b"one", b"one", b"two", b"two", b"one"):
        answer = (await upload(session, name, content)).json()
        assert set(answer) == {"name", "subfolder", "type"}
        assert answer["type"] == "input"
        names.append(answer["name"])

    other = f"{session.prefix} (1).bin"
    assert names == [name, name, other, other, name]
    assert (await view(session, filename=other, type="input")).content == b"two"


async def test_an_upload_may_overwrite(session: Session) -> None:
    name = f"{session.prefix}.bin"
    await upload(session, name, b"one")
    answer = (await upload(session, name, b"two", overwrite="true")).json()

    assert answer["name"] == name
    assert (await view(session, filename=name, type="input")).content == b"two"


async def test_an_upload_cannot_leave_its_folder(session: Session) -> None:
    response = await upload(session, f"{session.prefix}.bin", b"x", subfolder="../..")
    assert response.status_code == 400


async def test_an_uploaded_picture_can_be_loaded(session: Session) -> None:
    await run(session, graphs.success(session.prefix, session.colour))
    picture = (await view(session, filename=f"{session.prefix}_00001_.png")).content
    name = (await upload(session, f"{session.prefix}.png", picture)).json()["name"]
    outputs = await run(session, graphs.load(name, f"{session.prefix}-inverted"))
    assert list(outputs) == ["9"]


async def test_loading_what_is_no_picture_fails_when_it_runs(session: Session) -> None:
    name = (await upload(session, f"{session.prefix}.png", b"no picture")).json()["name"]
    prompt_id = await session.submit(graphs.load(name, session.prefix), None)
    record = await session.wait_recorded(prompt_id)

    event, data = record["status"]["messages"][-1]
    assert (event, data["node_type"]) == ("execution_error", "LoadImage")
    assert data["exception_type"] == "PIL.UnidentifiedImageError"


async def test_the_server_says_what_it_is(session: Session) -> None:
    stats = (await session.http("GET", "/system_stats")).json()

    version = stats["system"]["comfyui_version"]
    assert [int(part) for part in version.split(".")[:3]] >= [0, 3, 57]
    device = stats["devices"][0]
    assert {"name", "type", "index", "vram_total", "vram_free"} <= set(device)


async def test_features_and_classes_can_be_asked_for(session: Session) -> None:
    features = (await session.http("GET", "/features")).json()
    assert features["supports_preview_metadata"] is True
    assert features["max_upload_size"] > 0
    info = (await session.http("GET", "/object_info/SaveImage")).json()["SaveImage"]
    assert info["output_node"] is True
    assert list(info["input"]["required"]) == ["images", "filename_prefix"]
    assert (await session.http("GET", "/object_info/NoSuchNode")).json() == {}


async def test_every_route_has_an_api_prefix(session: Session) -> None:
    for path in ("/queue", "/prompt", "/features", "/history/none"):
        plain = await session.http("GET", path)
        prefixed = await session.http("GET", f"/api{path}")
        assert plain.json() == prefixed.json()
