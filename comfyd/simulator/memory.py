"""All that a ComfyUI process keeps in memory, and so loses when it ends."""

from __future__ import annotations

import trio

from comfyd.simulator.execution import Executor
from comfyd.simulator.faults import Faults
from comfyd.simulator.files import Files
from comfyd.simulator.hub import Hub
from comfyd.simulator.promptqueue import PromptQueue


class Memory:
    """Queue, history, prompt counter, node cache and sockets of one life of the server.

    Attributes:
      number: The next prompt's number; counts refused prompts too.
      done: Prompts ended in this life.
      gone: Set when this life is over.

    """

    def __init__(self, faults: Faults, files: Files, run_s: float) -> None:
        self.hub = Hub(faults)
        self.queue = PromptQueue(faults, self._announce)
        self.executor = Executor(self.hub, files, faults, run_s)
        self.number = 0
        self.done = 0
        self.gone = trio.Event()

    def _announce(self, remaining: int) -> None:
        self.hub.send("status", exec_info(remaining), None)


def exec_info(remaining: int) -> dict[str, object]:
    """The data of a `status` message."""
    return {"status": {"exec_info": {"queue_remaining": remaining}}}
