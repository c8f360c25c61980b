"""The journal in SQL: its tables, how an older journal becomes today's, and every statement.

A row is its ``data``: the whole Row as JSON, in which fields at their default are left out, so that
rows written before a field existed still read. The other columns repeat what is searched for.
"""

from __future__ import annotations

from typing import Final

# "comf": how file(1) and we tell a journal from any other SQLite database.
APPLICATION_ID: Final = 0x636F6D66

# The setting that says: this journal knows of every job, and is not still to be rebuilt.
WHOLE: Final = "whole"

_VERSION_1: Final = (
    # seq is the rowid, so every index holds it too and arrivals are appended.
    """
    CREATE TABLE jobs (
      seq        INTEGER PRIMARY KEY,
      job        TEXT    NOT NULL UNIQUE,
      state      TEXT    NOT NULL,
      version    INTEGER NOT NULL,
      priority   INTEGER NOT NULL,
      not_before REAL    NOT NULL,
      claimed_at REAL    NOT NULL,
      retired    INTEGER NOT NULL,
      key        TEXT,
      server     TEXT,
      prompt_id  TEXT,
      data       BLOB    NOT NULL
    )
    """,
    # The look-ahead: walked in order until enough are found. not_before is in it so that those not
    # yet due, at most as many as were tried lately, are passed over without reading their rows.
    "CREATE INDEX queue ON jobs (priority DESC, seq, not_before) WHERE state = 'queued'",
    "CREATE INDEX due ON jobs (not_before) WHERE state = 'queued' AND not_before > 0",
    "CREATE INDEX active ON jobs (seq) WHERE retired = 0 AND state NOT IN ('queued', 'held')",
    "CREATE INDEX by_state ON jobs (state)",
    "CREATE INDEX by_key ON jobs (key) WHERE key IS NOT NULL",
    # Prompt ids of all attempts, and aliases.
    """
    CREATE TABLE names (
      name TEXT NOT NULL PRIMARY KEY,
      job  TEXT NOT NULL REFERENCES jobs (job)
    ) WITHOUT ROWID
    """,
    # No reference to jobs: a story may be told of a drop that never became a row.
    """
    CREATE TABLE events (
      id   INTEGER PRIMARY KEY,
      job  TEXT NOT NULL,
      at   REAL NOT NULL,
      kind TEXT NOT NULL,
      data BLOB NOT NULL
    )
    """,
    "CREATE INDEX story ON events (job)",
    "CREATE TABLE counts (state TEXT NOT NULL PRIMARY KEY, jobs INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE owner (closed INTEGER NOT NULL)",
    "INSERT INTO owner VALUES (1)",
    f"PRAGMA application_id = {APPLICATION_ID}",
)

_VERSION_2: Final = (
    "ALTER TABLE jobs ADD COLUMN queue_by REAL",
    """
    CREATE INDEX deadlines ON jobs (queue_by)
    WHERE state = 'queued' AND queue_by IS NOT NULL
    """,
    # In the order raised: id.
    """
    CREATE TABLE fences (
      id        INTEGER PRIMARY KEY,
      prompt_id TEXT NOT NULL UNIQUE,
      job       TEXT NOT NULL,
      server    TEXT NOT NULL,
      origin    TEXT NOT NULL
    )
    """,
    # What was abandoned before there were fences may still be on its server.
    """
    INSERT OR IGNORE INTO fences (prompt_id, job, server, origin)
    SELECT json_extract(given_up.value, '$[2]'), job,
           json_extract(given_up.value, '$[0]'), json_extract(given_up.value, '$[1]')
    FROM jobs, json_each(CAST(data AS TEXT), '$.abandoned') AS given_up
    ORDER BY seq, given_up.key
    """,
    "CREATE TABLE settings (name TEXT NOT NULL PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    # Of data; NULL in rows that were written before there was one.
    "ALTER TABLE jobs ADD COLUMN crc INTEGER",
    # WHOLE: a journal of version 1 that has any job has them all.
    "INSERT INTO settings SELECT 'whole', CAST('true' AS BLOB) FROM jobs LIMIT 1",
)

_VERSION_3: Final = (
    # Results in done/ and failed/, as far as is known. Of a job without a row too: after a rebuild.
    """
    CREATE TABLE results (
      job   TEXT    NOT NULL PRIMARY KEY,
      place TEXT    NOT NULL,
      at    REAL    NOT NULL,
      bytes INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "CREATE INDEX by_age ON results (place, at, job, bytes)",
    """
    CREATE TABLE tallies (
      place TEXT    NOT NULL PRIMARY KEY,
      count INTEGER NOT NULL,
      bytes INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "INSERT INTO tallies VALUES ('done', 0, 0), ('failed', 0, 0)",
    # The tallies follow by themselves, however a result comes or goes.
    """
    CREATE TRIGGER result_came AFTER INSERT ON results BEGIN
      UPDATE tallies SET count = count + 1, bytes = bytes + new.bytes WHERE place = new.place;
    END
    """,
    """
    CREATE TRIGGER result_went AFTER DELETE ON results BEGIN
      UPDATE tallies SET count = count - 1, bytes = bytes - old.bytes WHERE place = old.place;
    END
    """,
    """
    INSERT INTO results
    SELECT job, iif(state = 'done', 'done', 'failed'),
           coalesce(json_extract(CAST(data AS TEXT), '$.published_at'), claimed_at),
           coalesce(json_extract(CAST(data AS TEXT), '$.staged.bytes'), 0)
    FROM jobs WHERE state IN ('done', 'failed', 'cancelled')
    """,
    # The size of all events up to this one; NULL in those that were written before there was one.
    "ALTER TABLE events ADD COLUMN upto INTEGER",
    "CREATE INDEX names_of ON names (job)",
)

# Entry n turns version n into n + 1. Entries are never changed once released, only added.
_VERSION_4: Final = (
    # Whether a server has refused it: such jobs, however many, are passed over where nobody is left
    # to try them yet.
    "ALTER TABLE jobs ADD COLUMN refused INTEGER NOT NULL DEFAULT 0",
    """
    UPDATE jobs SET refused = 1
    WHERE state = 'queued' AND json_array_length(CAST(data AS TEXT), '$.verdicts') > 0
    """,
    "DROP INDEX queue",
    """
    CREATE INDEX queue ON jobs (refused, priority DESC, seq, not_before) WHERE state = 'queued'
    """,
    # When it was published, NULL before: the last to end may have been the first to arrive.
    "ALTER TABLE jobs ADD COLUMN over REAL",
    """
    UPDATE jobs
    SET over = coalesce(json_extract(CAST(data AS TEXT), '$.published_at'), claimed_at)
    WHERE state IN ('done', 'failed', 'cancelled')
    """,
    "CREATE INDEX by_end ON jobs (state, over) WHERE over IS NOT NULL",
)

_VERSION_5: Final = (
    # Of what kind it is while it is queued: `model.Shelf`. Those let down were among the refused.
    "ALTER TABLE jobs RENAME COLUMN refused TO shelf",
    """
    UPDATE jobs SET shelf = 2
    WHERE state = 'queued' AND shelf = 1
    AND coalesce(json_array_length(CAST(data AS TEXT), '$.verdicts'), 0) = 0
    """,
    "CREATE INDEX let_down ON jobs (not_before, seq) WHERE state = 'queued' AND shelf = 2",
)

MIGRATIONS: Final = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4, _VERSION_5)
VERSION: Final = len(MIGRATIONS)

# --- changes --------------------------------------------------------------------------------------

INSERT: Final = """
  INSERT OR IGNORE INTO jobs (state, version, priority, not_before, claimed_at, retired, key,
                              server, prompt_id, queue_by, shelf, over, data, crc, seq,
                              job)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
UPDATE: Final = """
  UPDATE jobs SET state = ?, version = ?, priority = ?, not_before = ?, claimed_at = ?,
                  retired = ?, key = ?, server = ?, prompt_id = ?, queue_by = ?, shelf = ?,
                  over = ?, data = ?, crc = ?
  WHERE seq = ? AND job = ?
"""
ALIAS: Final = """
  INSERT OR IGNORE INTO names SELECT :name, job FROM jobs
  WHERE job = :job AND NOT EXISTS (SELECT 1 FROM jobs WHERE job = :name)
"""
RAISE: Final = """
  INSERT OR IGNORE INTO fences (prompt_id, job, server, origin) VALUES (?, ?, ?, ?)
"""
LIFT: Final = "DELETE FROM fences WHERE prompt_id = ?"
REMEMBER: Final = """
  INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
NAME: Final = "INSERT OR IGNORE INTO names VALUES (?, ?)"
INSERT_EVENT: Final = """
  INSERT INTO events (job, at, kind, data, upto)
  VALUES (?, ?, ?, ?, ? + coalesce((SELECT upto FROM events ORDER BY id DESC LIMIT 1), 0))
"""
COUNT: Final = """
  INSERT INTO counts VALUES (?, ?) ON CONFLICT (state) DO UPDATE SET jobs = jobs + excluded.jobs
"""
# The story of a job that goes on is kept, whatever its age.
_OUT_OF_BOUNDS: Final = """
  FROM events WHERE id > :after AND id <= :last
  AND (at < :before OR id <= :to_id
       OR coalesce(upto - length(job) - length(kind) - length(data), -1) < :to_bytes)
  AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.job = events.job
                  AND NOT (retired AND state IN ('done', 'failed', 'cancelled')))
"""
PRUNE: Final = "DELETE" + _OUT_OF_BOUNDS
PRUNABLE: Final = "SELECT count(*)" + _OUT_OF_BOUNDS
KEEP: Final = "INSERT OR IGNORE INTO results (job, place, at, bytes) VALUES (?, ?, ?, ?)"
DROP: Final = "DELETE FROM results WHERE job = ?"
FORGET: Final = "DELETE FROM jobs WHERE job = ?"
UNNAME: Final = "DELETE FROM names WHERE job = ?"

# --- questions: each is answered from an index, in its order, without a scan or a sort ------------

CANDIDATES: Final = """
  SELECT data FROM jobs INDEXED BY queue
  WHERE state = 'queued' AND shelf = ? AND not_before <= ?
  ORDER BY priority DESC, seq LIMIT ?
"""
LET_DOWN: Final = """
  SELECT data FROM jobs INDEXED BY let_down
  WHERE state = 'queued' AND shelf = 2 AND not_before <= ?
  ORDER BY not_before, seq LIMIT ?
"""
NEXT_DUE: Final = """
  SELECT not_before FROM jobs INDEXED BY due
  WHERE state = 'queued' AND not_before > 0 AND not_before > ? ORDER BY not_before LIMIT 1
"""
OVERDUE: Final = """
  SELECT data FROM jobs INDEXED BY deadlines
  WHERE state = 'queued' AND queue_by IS NOT NULL AND queue_by <= ? ORDER BY queue_by, seq LIMIT ?
"""
NEXT_DEADLINE: Final = """
  SELECT queue_by FROM jobs INDEXED BY deadlines
  WHERE state = 'queued' AND queue_by IS NOT NULL AND queue_by > ? ORDER BY queue_by LIMIT 1
"""
ACTIVE: Final = """
  SELECT data FROM jobs INDEXED BY active
  WHERE retired = 0 AND state NOT IN ('queued', 'held') ORDER BY seq
"""
FENCES: Final = "SELECT prompt_id, job, server, origin FROM fences ORDER BY id"
REMEMBERED: Final = "SELECT name, value FROM settings"
COUNTS: Final = "SELECT state, jobs FROM counts"
OLDEST: Final = "SELECT claimed_at FROM jobs WHERE state = ? ORDER BY seq LIMIT 1"
PAGE: Final = "SELECT data FROM jobs WHERE seq < ? ORDER BY seq DESC LIMIT ?"
PAGE_OF_STATE: Final = "SELECT data FROM jobs WHERE state = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
LATEST: Final = """
  SELECT data FROM jobs INDEXED BY by_end
  WHERE state = ? AND over IS NOT NULL ORDER BY over DESC, seq DESC LIMIT ?
"""
KEYED: Final = "SELECT data FROM jobs WHERE key = ? ORDER BY seq DESC LIMIT 1"
NAMED: Final = "SELECT data FROM jobs WHERE job = (SELECT job FROM names WHERE name = ?)"
BEGINNING: Final = "SELECT data FROM jobs WHERE job BETWEEN ? AND ? ORDER BY job DESC LIMIT ?"
OLDEST_KEPT: Final = """
  SELECT job, at, bytes FROM results INDEXED BY by_age
  WHERE place = ? AND (at, job) > (?, ?) ORDER BY at, job LIMIT ?
"""
NEWEST_KEPT: Final = """
  SELECT job, at, bytes FROM results INDEXED BY by_age
  WHERE place = ? AND (at, job) < (?, ?) ORDER BY at DESC, job DESC LIMIT ?
"""
TALLY: Final = "SELECT count, bytes FROM tallies WHERE place = ?"
PAST: Final = """
  SELECT data, EXISTS (SELECT 1 FROM events WHERE events.job = jobs.job)
  FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?
"""
LAST_LOOKED: Final = """
  SELECT id, at, coalesce(upto - length(job) - length(kind) - length(data), -1)
  FROM events
  WHERE id = (SELECT max(id) FROM (SELECT id FROM events WHERE id > ? ORDER BY id LIMIT ?))
"""
LAST_EVENT: Final = "SELECT id, coalesce(upto, 0) FROM events ORDER BY id DESC LIMIT 1"
EVENTS: Final = "SELECT at, kind, data FROM events WHERE job = ? ORDER BY id"
GET: Final = "SELECT data FROM jobs WHERE job = ?"
AT_VERSION: Final = "SELECT data FROM jobs WHERE job = ? AND seq = ? AND version = ?"
KNOWN: Final = "SELECT 1 FROM jobs WHERE job = ?"
ALL: Final = "SELECT data, crc, seq, job, state, version FROM jobs"
LAST_SEQ: Final = "SELECT coalesce(max(seq), 0) FROM jobs"
