"""The workflows that the contract is tested with: core nodes only, small and quick.

`SimSleep` is the one exception: it is a node of the simulator, and a real server has it only if a
pack with the same node is installed there.
"""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]

NODES_IN_SLOW_GRAPH = 30


def _node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _empty(colour: int, side_px: int = 16, frames: int = 1) -> dict[str, Any]:
    return _node("EmptyImage", width=side_px, height=side_px, batch_size=frames, color=colour)


def _blur(source: str) -> dict[str, Any]:
    return _node("ImageBlur", image=[source, 0], blur_radius=31, sigma=1.0)


def success(prefix: str, colour: int = 1) -> Graph:
    """One picture, saved."""
    return {
        "1": _empty(colour),
        "9": _node("SaveImage", images=["1", 0], filename_prefix=prefix),
    }


def preview(colour: int = 1) -> Graph:
    """One picture in the temp folder."""
    return {"1": _empty(colour), "9": _node("PreviewImage", images=["1", 0])}


def failing(prefix: str, colour: int = 1) -> Graph:
    """Passes validation; the blur raises, for its radius is larger than the picture."""
    return {
        "1": _empty(colour, side_px=8),
        "2": _blur("1"),
        "9": _node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def half_failing(prefix: str, colour: int = 1) -> Graph:
    """One output is saved before another branch raises."""
    return {
        "1": _empty(colour, side_px=8),
        "8": _node("SaveImage", images=["1", 0], filename_prefix=prefix),
        "2": _blur("1"),
        "9": _node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def slow(prefix: str, colour: int = 1) -> Graph:
    """A chain of blurs, each about 0.1 s on a CPU; interruptible between nodes."""
    graph = {"1": _empty(colour, side_px=128)}
    for number in range(2, NODES_IN_SLOW_GRAPH + 2):
        graph[str(number)] = _blur(str(number - 1))
    last = str(NODES_IN_SLOW_GRAPH + 1)
    graph["99"] = _node("SaveImage", images=[last, 0], filename_prefix=prefix)
    return graph


def sleep(prefix: str, seconds: float, colour: int = 1, *, with_preview: bool = False) -> Graph:
    """Progress every 50 ms, with binary previews if asked."""
    return {
        "1": _empty(colour),
        "2": _node("SimSleep", image=["1", 0], seconds=seconds, preview=with_preview),
        "9": _node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def mixed(prefix: str, colour: int = 1) -> Graph:
    """Two pictures, an animated WEBP and a text."""
    return {
        "1": _empty(colour, frames=2),
        "9": _node("SaveImage", images=["1", 0], filename_prefix=prefix),
        "10": _node(
            "SaveAnimatedWEBP",
            images=["1", 0],
            filename_prefix=f"{prefix}-anim",
            fps=6.0,
            lossless=True,
            quality=80,
            method="default",
        ),
        "12": _node("PreviewAny", source=f"text of {prefix}"),
    }


def sounds(prefix: str) -> Graph:
    """Silence in every format, and as a preview."""
    return {
        "1": _node("EmptyAudio", duration=0.1, sample_rate=44100, channels=1),
        "8": _node("SaveAudio", audio=["1", 0], filename_prefix=f"{prefix}/a"),
        "9": _node("SaveAudioMP3", audio=["1", 0], filename_prefix=f"{prefix}/b", quality="V0"),
        "10": _node("SaveAudioOpus", audio=["1", 0], filename_prefix=f"{prefix}/c", quality="64k"),
        "11": _node("PreviewAudio", audio=["1", 0]),
    }


def films(prefix: str, colour: int = 1) -> Graph:
    """Moving pictures in every format."""
    return {
        "1": _empty(colour, frames=3),
        "2": _node("CreateVideo", images=["1", 0], fps=24.0),
        "8": _node(
            "SaveAnimatedPNG",
            images=["1", 0],
            filename_prefix=f"{prefix}/a",
            fps=6.0,
            compress_level=4,
        ),
        "9": _node(
            "SaveWEBM",
            images=["1", 0],
            filename_prefix=f"{prefix}/b",
            codec="vp9",
            fps=24.0,
            crf=32.0,
        ),
        "10": _node(
            "SaveVideo",
            video=["2", 0],
            filename_prefix=f"{prefix}/c",
            format="auto",
            codec="auto",
        ),
    }


def latent(prefix: str) -> Graph:
    """A latent picture, and what a 3D preview says of a file."""
    return {
        "1": _node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "8": _node("SaveLatent", samples=["1", 0], filename_prefix=f"{prefix}/a"),
        "9": _node("Preview3D", model_file="mesh.glb"),
    }


def load(name: str, prefix: str) -> Graph:
    """An uploaded picture, inverted and saved."""
    return {
        "1": _node("LoadImage", image=name),
        "2": _node("ImageInvert", image=["1", 0]),
        "9": _node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def partial(prefix: str) -> Graph:
    """Two outputs, one of which fails validation."""
    return {
        "1": _empty(1),
        "9": _node("SaveImage", images=["1", 0], filename_prefix=prefix),
        "2": _empty(-1),
        "8": _node("SaveImage", images=["2", 0], filename_prefix=prefix),
    }


def out_of_range(prefix: str) -> Graph:
    """The only output depends on a value below its minimum."""
    return {"1": _empty(-1), "9": _node("SaveImage", images=["1", 0], filename_prefix=prefix)}


def unknown_class() -> Graph:
    """A node that no server has."""
    return {"1": _node("NoSuchNodeAnywhere", value=1)}


def missing_input() -> Graph:
    """SaveImage without its required inputs."""
    return {"9": _node("SaveImage")}


def no_outputs() -> Graph:
    """Valid nodes, none of which is an output."""
    return {"1": _empty(1)}
