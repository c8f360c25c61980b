"""Write the dashboards: ``python -m grafana.make``. A test holds the committed files to this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.overview import overview
from grafana.reliability import reliability
from grafana.servers import servers

FOLDER: Final = Path(__file__).with_name("dashboards")


def files() -> dict[str, str]:
    """The text of each dashboard by the name of its file."""
    made = {"overview": overview(), "servers": servers(), "reliability": reliability()}
    return {
        f"{name}.json": json.dumps(each.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        for name, each in made.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
