"""Write the dashboards: ``python -m grafana.make``. A test holds the committed files to this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.overview import overview
from grafana.reliability import reliability
from grafana.servers import servers

FOLDER: Final = Path(__file__).with_name("dashboards")


def files() -> dict[str, str]:
    """The text of each dashboard by the name of its file."""
    made = {"overview": overview(), "servers": servers(), "reliability": reliability()}
    return {f"{name}.json": _text(each) for name, each in made.items()}


def _text(made: build.Dashboard) -> str:
    document = json.loads(json.dumps(made.build(), cls=JSONEncoder), object_hook=_in_sight)
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _in_sight(thing: dict[str, Any]) -> dict[str, Any]:
    """Without what the SDK always says: that links and annotations hide in a menu."""
    if thing.get("placement") == "inControlsMenu":
        del thing["placement"]
    return thing


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
