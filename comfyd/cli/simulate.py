"""``comfyd simulate``: the embedded ComfyUI simulator as a server."""

from __future__ import annotations

import argparse
import signal

from comfyd.cli.exits import Exit, leaves
from comfyd.cli.screen import Table, put, say
from comfyd.errors import UsageError
from comfyd.simulator import SWITCHES, Faults, Simulator


def main(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    if args.list_faults:
        rows = [(each.name, each.argument, each.about) for each in SWITCHES]
        put(Table(("FAULT", "ARGUMENT", "WHAT IT DOES"), rows))
        return Exit.OK
    import trio

    try:
        faults = Faults.parse(args.fault)
    except ValueError as error:
        raise UsageError(f"--fault {error}") from None
    simulator = Simulator(faults=faults, run_s=args.run_time)

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                try:
                    url = await nursery.start(simulator.serve, args.port)
                except* OSError as group:
                    [error, *_] = leaves(group)
                    raise UsageError(f"--port {args.port}: {error}") from None
                put(url)
                say("comfyd: a simulated ComfyUI; Ctrl-C stops it")
                async for _ in signals:
                    nursery.cancel_scope.cancel()

    trio.run(serve)
    return Exit.OK
