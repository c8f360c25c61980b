"""Record the transcripts from a real server: `python -m tests.contract.record URL OUTDIR`.

The server should be idle and nobody else's; its version is written into each file.
"""

from __future__ import annotations

import inspect
import json
import sys
from functools import partial
from pathlib import Path

import httpx
import trio

from tests.contract.scenarios import SCENARIOS
from tests.contract.wire import open_session

SCENARIO_LIMIT_S = 60.0


async def record(url: str, folder: Path) -> None:
    """Play every scenario against *url* and write one file each to *folder*."""
    async with httpx.AsyncClient(base_url=url) as client:
        stats = (await client.get("/system_stats")).json()
    version = stats["system"]["comfyui_version"]
    for name, scenario in SCENARIOS.items():
        with trio.fail_after(SCENARIO_LIMIT_S):
            async with open_session(url) as session:
                await scenario(session)
                steps = session.normalised()
        document = {
            "scenario": name,
            "about": inspect.getdoc(scenario),
            "comfyui_version": version,
            "steps": steps,
        }
        text = json.dumps(document, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(steps)} steps, {len(text)} bytes", file=sys.stderr)


if __name__ == "__main__":
    trio.run(partial(record, sys.argv[1], Path(sys.argv[2])))
