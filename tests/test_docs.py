"""Generated pages are current, and every decision is in the index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_job_states_is_what_the_table_makes():
    spec = importlib.util.spec_from_file_location("make", DOCS / "make_job_states.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    committed = (DOCS / "job-states.md").read_text(encoding="utf-8")
    assert committed == make.page(), "run: python docs/make_job_states.py"


def test_every_decision_is_in_the_index():
    index = (DOCS / "decisions" / "000-index.md").read_text(encoding="utf-8")
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        assert path.name in index or path.name.startswith("000"), path.name
