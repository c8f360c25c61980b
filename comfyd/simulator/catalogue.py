"""The node classes the simulator knows: their inputs as ComfyUI publishes them, and what they do.

Pictures are of one colour each, which is enough to follow them through a graph. Classes whose name
begins with `Sim` exist in the simulator only; `SimUi` outputs any ui object, given as JSON, and
makes the files that it names: right ones for their endings, unless it is told what is in them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from comfyd.simulator import media
from comfyd.simulator.files import FOLDERS, Files, is_inside, split_annotated
from comfyd.simulator.nodes import (
    Image,
    InputSpec,
    Latent,
    NodeClass,
    NodeError,
    Result,
    Run,
    ServerCrashError,
    Sound,
    Values,
    Video,
    without_choices,
)

MAX_SIDE_PX: Final = 16384
TICK_S: Final = 0.05


def next_counter(files: Files, folder: str, subfolder: str, prefix: str) -> int:
    """One more than the highest `PREFIX_COUNTER_` in use, as ComfyUI counts."""
    highest = 0
    for name in files.names(folder, subfolder):
        if name.startswith(f"{prefix}_"):
            digits = name[len(prefix) + 1 :].split("_")[0]
            highest = max(highest, int(digits) if digits.isdecimal() else 0)
    return highest + 1


def _save(run: Run, folder: str, prefix: str, contents: list[bytes], ending: str) -> list[Any]:
    subfolder, name = posixpath.split(posixpath.normpath(prefix))
    if subfolder.startswith(("/", "..")):
        raise NodeError("Saving image outside the output folder is not allowed.", "Exception")
    if "\0" in prefix:
        raise NodeError("embedded null byte", "ValueError")
    counter = next_counter(run.files, folder, subfolder, name)
    saved = []
    for number, content in enumerate(contents):
        stem = name.replace("%batch_num%", str(number))
        filename = f"{stem}_{counter + number:05}_.{ending}"
        run.files.write(folder, subfolder, filename, content)
        saved.append({"filename": filename, "subfolder": subfolder, "type": folder})
    return saved


def _texts(run: Run) -> dict[str, str]:
    """What goes into a file beside the picture."""
    texts = {"prompt": json.dumps(run.prompt)}
    for key, value in (run.extra_pnginfo or {}).items():
        texts[key] = json.dumps(value)
    return texts


def _pngs(run: Run, image: Image) -> list[bytes]:
    texts = _texts(run)
    content = media.png(image.width_px, image.height_px, image.rgb, texts)
    return [content] * image.frames


async def _empty_image(run: Run, values: Values) -> Result:
    colour = values["color"]
    rgb = (colour >> 16 & 0xFF, colour >> 8 & 0xFF, colour & 0xFF)
    return Result((Image(values["width"], values["height"], values["batch_size"], rgb),))


async def _image_scale(run: Run, values: Values) -> Result:
    image: Image = values["image"]
    width_px, height_px = values["width"], values["height"]
    if width_px == height_px == 0:
        return Result((image,))
    if width_px == 0:
        width_px = max(1, round(image.width_px * height_px / image.height_px))
    elif height_px == 0:
        height_px = max(1, round(image.height_px * width_px / image.width_px))
    return Result((Image(width_px, height_px, image.frames, image.rgb),))


async def _image_invert(run: Run, values: Values) -> Result:
    image: Image = values["image"]
    red, green, blue = (255 - part for part in image.rgb)
    return Result((Image(image.width_px, image.height_px, image.frames, (red, green, blue)),))


async def _image_blur(run: Run, values: Values) -> Result:
    image: Image = values["image"]
    radius = values["blur_radius"]
    if radius >= min(image.width_px, image.height_px):
        size = f"{[image.frames, 3, image.height_px, image.width_px]}"
        raise NodeError(f"Padding of {radius} is too large for an input of {size}")
    return Result((image,))


async def _save_image(run: Run, values: Values) -> Result:
    pictures = _pngs(run, values["images"])
    return Result(ui={"images": _save(run, "output", values["filename_prefix"], pictures, "png")})


async def _preview_image(run: Run, values: Values) -> Result:
    prefix = f"ComfyUI_temp_{run.temp_tag}"
    return Result(ui={"images": _save(run, "temp", prefix, _pngs(run, values["images"]), "png")})


async def _save_animated_webp(run: Run, values: Values) -> Result:
    content = [media.ANIMATED_WEBP]
    saved = _save(run, "output", values["filename_prefix"], content, "webp")
    return Result(ui={"images": saved, "animated": [values["images"].frames != 1]})


async def _save_animated_png(run: Run, values: Values) -> Result:
    # Equal frames are merged into one, and then it is a plain PNG.
    content = _pngs(run, values["images"])[:1]
    saved = _save(run, "output", values["filename_prefix"], content, "png")
    return Result(ui={"images": saved, "animated": [True]})


async def _save_webm(run: Run, values: Values) -> Result:
    saved = _save(run, "output", values["filename_prefix"], [media.WEBM], "webm")
    return Result(ui={"images": saved, "animated": [True]})


async def _create_video(run: Run, values: Values) -> Result:
    return Result((Video(values["images"], values["fps"]),))


async def _save_video(run: Run, values: Values) -> Result:
    saved = _save(run, "output", values["filename_prefix"], [media.MP4], "mp4")
    return Result(ui={"images": saved, "animated": [True]})


async def _empty_audio(run: Run, values: Values) -> Result:
    return Result((Sound(values["duration"]),))


def _saves_audio(ending: str) -> Callable[[Run, Values], Awaitable[Result]]:
    async def save(run: Run, values: Values) -> Result:
        content = [media.SAMPLES[ending]]
        return Result(
            ui={"audio": _save(run, "output", values["filename_prefix"], content, ending)}
        )

    return save


async def _preview_audio(run: Run, values: Values) -> Result:
    prefix = f"ComfyUI_temp_{run.temp_tag}"
    return Result(ui={"audio": _save(run, "temp", prefix, [media.FLAC], "flac")})


async def _empty_latent_image(run: Run, values: Values) -> Result:
    return Result((Latent(values["width"] // 8, values["height"] // 8, values["batch_size"]),))


async def _save_latent(run: Run, values: Values) -> Result:
    samples: Latent = values["samples"]
    content = [media.latent(samples.width, samples.height, samples.batch, _texts(run))]
    saved = _save(run, "output", values["filename_prefix"], content, "latent")
    return Result(ui={"latents": saved})


async def _preview_3d(run: Run, values: Values) -> Result:
    return Result(ui={"result": [values["model_file"], values.get("camera_info")]})


async def _preview_any(run: Run, values: Values) -> Result:
    source = values.get("source")
    if isinstance(source, str):
        text = source
    elif isinstance(source, bool | int | float) or source is None:
        text = str(source)
    else:
        try:
            text = json.dumps(source)
        except TypeError:
            text = str(source)
    return Result(ui={"text": [text]})


def _loaded(files: Files, values: Values) -> bytes | None:
    name, folder = split_annotated(values["image"], "input")
    return files.read(folder, *posixpath.split(name))


async def _load_image(run: Run, values: Values) -> Result:
    content = _loaded(run.files, values)
    if content is None:
        raise NodeError(f"No such file or directory: '{values['image']}'", "FileNotFoundError")
    size = media.size_px(content)
    if size is None:
        message = f"cannot identify image file '{values['image']}'"
        raise NodeError(message, "PIL.UnidentifiedImageError")
    return Result((Image(*size, 1, media.rgb_of(content)), None))


def _load_image_changed(files: Files, values: Values) -> str:
    return hashlib.sha256(_loaded(files, values) or b"").hexdigest()


def _load_image_check(files: Files, values: Values) -> str | None:
    if _loaded(files, values) is None:
        return f"Invalid image file: {values['image']}"
    return None


async def _sim_sleep(run: Run, values: Values) -> Result:
    seconds = values["seconds"]
    # A sleep of hours has coarser ticks, else a test with a jumping clock would drown in messages.
    tick_s = max(TICK_S, seconds / 200)
    total = max(1, int(seconds / tick_s))
    for value in range(1, total + 1):
        await run.sleep(seconds / total)
        run.tick(value, total, media.PREVIEW_JPEG if values.get("preview") else None)
    return Result((values["image"],))


async def _sim_fail(run: Run, values: Values) -> Result:
    raise NodeError(values["message"])


async def _sim_ui(run: Run, values: Values) -> Result:
    try:
        ui, contents = json.loads(values["ui"]), json.loads(values.get("contents", "{}"))
    except ValueError as error:
        raise NodeError(str(error), "json.decoder.JSONDecodeError") from None
    if not isinstance(ui, dict) or not all(isinstance(items, list) for items in ui.values()):
        raise NodeError("a ui is an object of lists", "TypeError")
    for item in (item for items in ui.values() for item in items):
        match item:
            case {"filename": str(name)} if name:
                folder, subfolder = item.get("type", "output"), item.get("subfolder", "")
                content = contents.get(name, "sample")
                is_there = content is not None and folder in FOLDERS
                if is_there and is_inside(posixpath.join(subfolder, name)):
                    run.files.write(folder, subfolder, name, _content(name, content))
    return Result(ui=ui)


def _content(name: str, content: str) -> bytes:
    if content == "sample":
        return media.SAMPLES.get(name.rpartition(".")[2], b"simulated")
    return base64.b64decode(content)


async def _sim_model(run: Run, values: Values) -> Result:
    return Result((values["image"],))


async def _sim_crash(run: Run, values: Values) -> Result:
    raise ServerCrashError


def _side(least: int) -> InputSpec:
    return ["INT", {"default": 512, "min": least, "max": MAX_SIDE_PX, "step": 1}]


_PREFIX: Final[InputSpec] = ["STRING", {"default": "ComfyUI"}]
_AUDIO_PREFIX: Final[InputSpec] = ["STRING", {"default": "audio/ComfyUI"}]
_AUDIO_SAVERS: Final[tuple[tuple[str, str, dict[str, InputSpec]], ...]] = (
    ("SaveAudio", "flac", {}),
    ("SaveAudioMP3", "mp3", {"quality": [["V0", "128k", "320k"], {"default": "V0"}]}),
    (
        "SaveAudioOpus",
        "opus",
        {"quality": [["64k", "96k", "128k", "192k", "320k"], {"default": "128k"}]},
    ),
)
_METHODS: Final = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
NODE_CLASSES: Final[dict[str, NodeClass]] = {
    node_class.name: node_class
    for node_class in (
        NodeClass(
            "EmptyImage",
            {
                "width": _side(1),
                "height": _side(1),
                "batch_size": ["INT", {"default": 1, "min": 1, "max": 4096}],
                "color": [
                    "INT",
                    {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1, "display": "color"},
                ],
            },
            _empty_image,
            returns=("IMAGE",),
        ),
        NodeClass(
            "ImageScale",
            {
                "image": ["IMAGE"],
                "upscale_method": [_METHODS],
                "width": _side(0),
                "height": _side(0),
                "crop": [["disabled", "center"]],
            },
            _image_scale,
            returns=("IMAGE",),
        ),
        NodeClass("ImageInvert", {"image": ["IMAGE"]}, _image_invert, returns=("IMAGE",)),
        NodeClass(
            "ImageBlur",
            {
                "image": ["IMAGE", {}],
                "blur_radius": ["INT", {"default": 1, "min": 1, "max": 31, "step": 1}],
                "sigma": ["FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.1}],
            },
            _image_blur,
            returns=("IMAGE",),
        ),
        NodeClass(
            "LoadImage",
            {"image": [[], {"image_upload": True}]},
            _load_image,
            returns=("IMAGE", "MASK"),
            changed=_load_image_changed,
            check=_load_image_check,
            checked="image",
        ),
        NodeClass(
            "SaveImage",
            {"images": ["IMAGE"], "filename_prefix": _PREFIX},
            _save_image,
            is_output=True,
        ),
        NodeClass("PreviewImage", {"images": ["IMAGE"]}, _preview_image, is_output=True),
        NodeClass(
            "SaveAnimatedWEBP",
            {
                "images": ["IMAGE"],
                "filename_prefix": _PREFIX,
                "fps": ["FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}],
                "lossless": ["BOOLEAN", {"default": True}],
                "quality": ["INT", {"default": 80, "min": 0, "max": 100}],
                "method": [["default", "fastest", "slowest"]],
            },
            _save_animated_webp,
            is_output=True,
        ),
        NodeClass(
            "SaveAnimatedPNG",
            {
                "images": ["IMAGE"],
                "filename_prefix": _PREFIX,
                "fps": ["FLOAT", {"default": 6.0, "min": 0.01, "max": 1000.0, "step": 0.01}],
                "compress_level": ["INT", {"default": 4, "min": 0, "max": 9}],
            },
            _save_animated_png,
            is_output=True,
        ),
        NodeClass(
            "SaveWEBM",
            {
                "images": ["IMAGE", {}],
                "filename_prefix": _PREFIX,
                "codec": ["COMBO", {"multiselect": False, "options": ["vp9", "av1"]}],
                "fps": ["FLOAT", {"default": 24.0, "min": 0.01, "max": 1000.0, "step": 0.01}],
                "crf": ["FLOAT", {"default": 32.0, "min": 0, "max": 63.0, "step": 1}],
            },
            _save_webm,
            is_output=True,
        ),
        NodeClass(
            "CreateVideo",
            {
                "images": ["IMAGE", {}],
                "fps": ["FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0}],
            },
            _create_video,
            optional={"audio": ["AUDIO", {}]},
            returns=("VIDEO",),
        ),
        NodeClass(
            "SaveVideo",
            {
                "video": ["VIDEO", {}],
                "filename_prefix": ["STRING", {"default": "video/ComfyUI"}],
                "format": ["COMBO", {"default": "auto", "options": ["auto", "mp4"]}],
                "codec": ["COMBO", {"default": "auto", "options": ["auto", "h264"]}],
            },
            _save_video,
            is_output=True,
        ),
        NodeClass(
            "EmptyAudio",
            {
                "duration": ["FLOAT", {"default": 60.0, "min": 0.0, "max": 2**64 - 1}],
                "sample_rate": ["INT", {"default": 44100}],
                "channels": ["INT", {"default": 2, "min": 1, "max": 2}],
            },
            _empty_audio,
            returns=("AUDIO",),
            category="audio",
        ),
        *(
            NodeClass(
                name,
                {"audio": ["AUDIO"], "filename_prefix": _AUDIO_PREFIX, **more},
                _saves_audio(ending),
                is_output=True,
                category="audio",
            )
            for name, ending, more in _AUDIO_SAVERS
        ),
        NodeClass(
            "PreviewAudio", {"audio": ["AUDIO"]}, _preview_audio, is_output=True, category="audio"
        ),
        NodeClass(
            "EmptyLatentImage",
            {
                "width": ["INT", {"default": 512, "min": 16, "max": MAX_SIDE_PX, "step": 8}],
                "height": ["INT", {"default": 512, "min": 16, "max": MAX_SIDE_PX, "step": 8}],
                "batch_size": ["INT", {"default": 1, "min": 1, "max": 4096}],
            },
            _empty_latent_image,
            returns=("LATENT",),
            category="latent",
        ),
        NodeClass(
            "SaveLatent",
            {
                "samples": ["LATENT"],
                "filename_prefix": ["STRING", {"default": "latents/ComfyUI"}],
            },
            _save_latent,
            is_output=True,
            category="_for_testing",
        ),
        NodeClass(
            "Preview3D",
            {"model_file": ["STRING", {"default": "", "multiline": False}]},
            _preview_3d,
            optional={"camera_info": ["LOAD3D_CAMERA", {}]},
            is_output=True,
            category="3d",
        ),
        NodeClass("PreviewAny", {"source": ["*", {}]}, _preview_any, is_output=True),
        NodeClass(
            "SimSleep",
            {
                "image": ["IMAGE"],
                "seconds": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 86400.0}],
            },
            _sim_sleep,
            optional={"preview": ["BOOLEAN", {"default": False}]},
            returns=("IMAGE",),
            category="simulator",
        ),
        NodeClass(
            "SimFail",
            {"image": ["IMAGE"], "message": ["STRING", {"default": "boom"}]},
            _sim_fail,
            returns=("IMAGE",),
            category="simulator",
        ),
        NodeClass(
            "SimUi",
            {"ui": ["STRING", {"default": "{}"}]},
            _sim_ui,
            # By file name, in base64; null makes no file.
            optional={"contents": ["STRING", {"default": "{}"}]},
            is_output=True,
            category="simulator",
        ),
        NodeClass(
            "SimModel",
            {"image": ["IMAGE"], "model": [["base.safetensors", "tuned.safetensors"]]},
            _sim_model,
            returns=("IMAGE",),
            category="simulator",
        ),
        NodeClass(
            "SimCrash", {"image": ["IMAGE"]}, _sim_crash, returns=("IMAGE",), category="simulator"
        ),
    )
}


def installed(
    missing_nodes: frozenset[str], missing_models: frozenset[str]
) -> dict[str, NodeClass]:
    """The node classes of a server that lacks some, and some of the choices of the others."""
    classes = {name: node for name, node in NODE_CLASSES.items() if name not in missing_nodes}
    if not missing_models:
        return classes
    return {
        name: replace(
            node,
            required={
                key: without_choices(spec, missing_models) for key, spec in node.required.items()
            },
        )
        for name, node in classes.items()
    }
