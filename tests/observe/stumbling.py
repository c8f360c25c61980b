"""comfyd with a health probe that fails in a way that nobody thought of, while a file is there.

What servers do wrong is dealt with inside the supervised tasks, so no simulated server can make one
of them end; this stands for the case that was forgotten. The file is ``stumble``, beside the
configuration. Run as the program itself: ``python -m tests.observe.stumbling run -c FILE``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from comfyd.__main__ import main
from comfyd.errors import ServerProtocol
from comfyd.services.health import HealthProbe

if __name__ == "__main__":
    real = HealthProbe._ask
    stumble = Path(sys.argv[-1]).with_name("stumble")

    async def ask(probe: HealthProbe) -> None:
        if stumble.exists():
            raise ServerProtocol("a case that was forgotten")
        await real(probe)

    HealthProbe._ask = ask  # type: ignore[method-assign,assignment]
    sys.exit(main())
