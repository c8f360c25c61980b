"""Generated pages are current, and every decision is in the index."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("page", "maker"),
    [
        ("job-states.md", "make_job_states.py"),
        ("metrics.md", "make_metrics.py"),
        ("man/comfyd.1", "make_manpage.py"),
    ],
)
def test_a_generated_page_is_what_the_code_makes(page, maker):
    spec = importlib.util.spec_from_file_location("make", DOCS / maker)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    committed = (DOCS / page).read_text(encoding="utf-8")
    assert committed == make.page(), f"run: python docs/{maker}"


def test_every_decision_is_in_the_index():
    index = (DOCS / "decisions" / "000-index.md").read_text(encoding="utf-8")
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        assert path.name in index or path.name.startswith("000"), path.name


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff formats manual pages")
def test_the_manual_page_is_formatted_without_a_warning():
    page = DOCS / "man" / "comfyd.1"
    done = subprocess.run(
        ["groff", "-man", "-t", "-ww", "-Tutf8", str(page)], capture_output=True, check=True
    )
    assert done.stderr == b""
    assert "exit codes: 0 all ended as asked" in " ".join(done.stdout.decode().split())
