"""Results that are removed: whole folders, aside by one rename and then away. Blocking.

Nothing partial is ever seen in ``done/`` or ``failed/``. What is left aside, by a crash or because
we may not empty it, is tried again in the next round and at the next start (`delivery.reap`).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from comfyd.core.model import JobId, Row
from comfyd.core.retention import Kept
from comfyd.spool.clearing import cleared
from comfyd.spool.layout import Spool, fsync_dir, full_disk_told, open_dir

# Ends the name, which begins with a dot, of a result that is being removed, under stage/.
REMOVED: Final = ".removed"


class Removal(enum.Enum):
    """What became of a result that was to go."""

    REMOVED = "removed"
    LEFT = "left"  # out of sight, but still on the disk
    GONE = "gone"  # a consumer had taken it
    CLAIMED = "claimed"  # what was submitted is still in claimed/: its job is not done with
    FOREIGN = "foreign"  # no folder: not made by us, and left
    REFUSED = "refused"  # the file system says no


def there(spool: Spool, results: Iterable[Kept]) -> list[Kept]:
    """Those of *results* whose folders have not been taken."""
    return [kept for kept in results if os.path.lexists(spool.root / kept.place.value / kept.job)]


def sync_claimed(spool: Spool) -> None:
    """Make durable that claimed files are gone, before the results that tell of them go.

    Otherwise a power loss could bring a file back whose result is not there any more, and after
    that of the journal too nothing would say that it was done.
    """
    fsync_dir(spool.claimed)


def remove(spool: Spool, kept: Kept) -> tuple[Removal, str]:
    """Remove the result of a job that is over; to be called after `sync_claimed`.

    Returns:
      What became of it, and why it is still there, if it is.

    Raises:
      DiskFull: The disk takes no changes now, not even this one.

    """
    place = spool.root / kept.place.value
    if claimed := lying_in_claimed(spool, kept.job):
        return Removal.CLAIMED, f"{claimed} is still there"
    if not os.path.lexists(place / kept.job):
        return Removal.GONE, ""
    if (place / kept.job).is_symlink() or not (place / kept.job).is_dir():
        return Removal.FOREIGN, f"{place / kept.job} is no folder"
    aside = f".{kept.job}{REMOVED}"
    place_fd, stage_fd = open_dir(place), open_dir(spool.stage)
    try:
        with full_disk_told():
            os.rename(kept.job, aside, src_dir_fd=place_fd, dst_dir_fd=stage_fd)
    except FileNotFoundError:
        return Removal.GONE, ""
    except OSError as error:
        return Removal.REFUSED, f"{place / kept.job} cannot be moved: {error.strerror}"
    finally:
        os.close(place_fd)
        os.close(stage_fd)
    if problem := _cleared(spool.stage / aside):
        return Removal.LEFT, problem
    return Removal.REMOVED, ""


def left_aside(spool: Spool) -> list[Path]:
    """What is left of results that were to go."""
    return sorted(spool.stage.glob(f".*{REMOVED}"))


def again(spool: Spool) -> list[str]:
    """Try once more to remove what is left aside; while nothing else does (`remove`).

    Returns:
      A sentence about each of which something is still there.

    Raises:
      DiskFull: The disk takes no changes now.

    """
    return [problem for path in left_aside(spool) if (problem := _cleared(path))]


def _cleared(path: Path) -> str:
    left = cleared(path)
    return f"{path} is left: {left}; remove it as root" if left else ""


def lying_in_claimed(spool: Spool, job: JobId) -> str:
    """Where in ``claimed/`` something of *job* lies, "" if nothing does."""
    paths = (spool.claimed / f"{job}{extension}" for extension in ("", ".json", ".yaml"))
    return next((str(path) for path in paths if os.path.lexists(path)), "")


def lies(spool: Spool, row: Row) -> bool:
    """Whether anything of *row*'s job lies in the spool: its row is needed."""
    names = (spool.done / row.job, spool.failed / row.job, spool.stage / row.job)
    claimed = lying_in_claimed(spool, row.job) or (
        row.payload and os.path.lexists(spool.claimed / row.payload)
    )
    return bool(claimed) or any(map(os.path.lexists, names))
