"""``make systemd-test``: run the steps, or those named; ``--page FILE`` writes the transcript."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.systemd.machine import Failed, Machine
from tests.systemd.steps import STEPS, Run, selected, title
from tests.systemd.transcript import Transcript

HEAD = Path(__file__).with_name("page.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [step.__name__ for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these: {', '.join(names)}")
    parser.add_argument("--page", type=Path, help="write the transcript here, if all goes well")
    args = parser.parse_args()
    transcript = Transcript()
    try:
        with Machine.booted(transcript) as machine:
            run = Run(machine, transcript)
            for step in selected(args.steps):
                transcript.step(title(step))
                try:
                    step(run)
                except Failed:
                    log = machine.ask("journalctl --no-pager -n 60 -u 'comfyd*'", check=False)
                    print(log, file=sys.stderr)
                    raise
    except Failed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    transcript.step(f"all {len(selected(args.steps))} steps passed")
    if args.page:
        transcript.write(args.page, HEAD.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
