"""How fast the journal is here: ``python -m tests.bench.journal [FOLDER] [--rows N]``.

FOLDER must be on the disk that matters: in memory an fsync is free. Needs about 1 KB a row.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from comfyd.core.model import JobId, Row, ServerName, Shelf, State, prompt_id_of
from comfyd.journal.sqlite import SqliteStore
from comfyd.journal.store import Batch, Event, Insert, Update


def arrival(seq: int) -> Row:
    return Row(
        job=JobId(f"portrait-{seq:08}.01K5V2Q7Z0G4M6N8P9R1S3T5V7"),
        seq=seq,
        priority=seq % 3,
        payload=f"portrait-{seq:08}.01K5V2Q7Z0G4M6N8P9R1S3T5V7.json",
        sha256="5e" * 32,
        claimed_at=1.7e9 + seq,
    )


def submission(row: Row) -> Batch:
    """What the journal is told of one job most often: a step and a line of its story."""
    after = msgspec.structs.replace(
        row,
        version=row.version + 1,
        state=State.SUBMITTED,
        attempt=row.attempt + 1,
        server=ServerName("local"),
        origin="http://127.0.0.1:8188",
        prompt_id=prompt_id_of(row.job, row.attempt + 1),
    )
    event = Event(job=row.job, at=1.7e9, kind="submitted", data={"attempt": after.attempt})
    return Batch(changes=(Update(row=after, expected=row.version),), events=(event,))


def together(batches: list[Batch]) -> Batch:
    return Batch(
        changes=tuple(change for batch in batches for change in batch.changes),
        events=tuple(event for batch in batches for event in batch.events),
    )


def report_commits(store: SqliteStore, rows: tuple[Row, ...], size: int) -> None:
    took_s = []
    for start in range(0, len(rows), size):
        batch = together([submission(row) for row in rows[start : start + size]])
        before_s = time.perf_counter()
        assert all(store.commit(batch))
        took_s.append(time.perf_counter() - before_s)
    total_s = sum(took_s)
    print(
        f"commits of {size:>3}: {len(took_s) / total_s:>7,.0f} commits/s"
        f" {len(rows) / total_s:>8,.0f} rows/s   p50 {statistics.median(took_s) * 1e3:.2f} ms"
        f"   max {max(took_s) * 1e3:.1f} ms"
    )


def report_call(name: str, call: Callable[[], object], times: int = 200) -> None:
    took_s = []
    for _ in range(times):
        before_s = time.perf_counter()
        call()
        took_s.append(time.perf_counter() - before_s)
    print(
        f"{name:<24} p50 {statistics.median(took_s) * 1e3:.3f} ms   max {max(took_s) * 1e3:.2f} ms"
    )


def run(folder: Path, rows: int) -> None:
    path = folder / "state" / "journal.db"
    store = SqliteStore.open(path)
    before_s = time.perf_counter()
    for start in range(1, rows + 1, 256):
        changes = [Insert(row=arrival(seq)) for seq in range(start, min(start + 256, rows + 1))]
        store.commit(Batch(changes=tuple(changes)))
    took_s = time.perf_counter() - before_s
    print(f"arrivals, 256 a commit:  {rows / took_s:,.0f} rows/s")
    for size, jobs in ((1, 2000), (16, 4000), (256, 20_000)):
        report_commits(store, store.candidates(jobs, 2e9, Shelf.FRESH).rows, size)
    now_s = 2e9
    report_call("candidates(256)", lambda: store.candidates(256, now_s, Shelf.FRESH))
    report_call("counts()", store.counts)
    report_call("oldest(queued)", lambda: store.oldest(State.QUEUED))
    report_call("rows(limit=100)", lambda: store.rows(limit=100))
    report_call("find(beginning)", lambda: store.find("portrait-0000"))
    store.close()
    size_bytes = path.stat().st_size
    before_s = time.perf_counter()
    SqliteStore.open(path).close()
    took_s = time.perf_counter() - before_s
    print(f"open, checked: {took_s:.2f} s for {rows:,} rows in {size_bytes / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="comfyd-bench-") as made:
        run(Path(made), arguments.rows)
