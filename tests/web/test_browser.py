"""The status page in a real browser: Debian's chromium, without a window."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from playwright.sync_api import Browser, Page, expect
from prometheus_client import CollectorRegistry

from comfyd.core.model import JobId, Outcome, Reason, Row, ServerName, Source, State
from comfyd.core.present import shown_counts
from comfyd.core.progress import Progress
from comfyd.core.snapshot import (
    JobView,
    MissedView,
    QueuedView,
    ServerState,
    ServerView,
    Snapshot,
)
from comfyd.core.wire.stats import Device
from comfyd.errors import JournalError
from comfyd.metrics import Metrics
from comfyd.web import page as status_page
from comfyd.web import serve, site
from comfyd.web.api import Reads
from tests.web.browser import chromium, where
from tests.web.fixed import EVIL, READY, Fixed, T, row

START_S = 10.0
ULID = "01K9Z3V6W8Q4M2N7R5T1X0Y9AB"
MARK = "<img src=x onerror=window.hit=1><script>window.hit=1</script>\"'&\u202eexe."
LONG = "a-name-that-never-ends-" * 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if where() is None and os.environ.get("CI") != "true":
        pytest.skip("there is no chromium here: apt-get install chromium")
    with chromium() as one:
        yield one


class Site:
    """The real listener around *fixed*, in a thread with an event loop of its own."""

    def __init__(self, fixed: Fixed) -> None:
        self.fixed = fixed
        self.url = ""
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken
        self._thread = threading.Thread(target=lambda: trio.run(self._run))

    async def _run(self) -> None:
        self._token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
        fixed = self.fixed
        reads = Reads(
            snapshot=fixed.snapshot, rows=fixed.page, latest=fixed.latest, story=fixed.story
        )
        app = site.build(Metrics(CollectorRegistry()), reads, lambda: READY)
        async with trio.open_nursery() as nursery:
            host, port = await nursery.start(
                partial(serve.serve, app, "127.0.0.1", 0, stop=self._stop)
            )
            self.url = f"http://{host}:{port}/"
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()

    def __enter__(self) -> Site:
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()


@pytest.fixture
def served() -> Iterator[Site]:
    with Site(Fixed()) as one:
        one.fixed.now = busy()
        one.fixed.rows = rows()
        yield one


def busy(name: str = "portrait", server: str = "atelier") -> Snapshot:
    job = f"{name}.{ULID}"
    progress = Progress(
        names={"1": "Load", "3": "KSampler"}, node="3", step=12, steps=20, behind=frozenset("1")
    )
    return Snapshot(
        at=T,
        version="1.2.3",
        started_at=T - 4000,
        servers=(
            ServerView(
                name=server, url="http://h:1", state=ServerState.UP, tracker="connected",
                connected=True, in_flight=2, window=2, queue_remaining=2, run_s=42.0, missed=1,
                version="0.3.64", devices=(Device("card", "cuda", 0, 2**33, 2**34),),
            ),
            ServerView(name="attic", url="http://h:2", state=ServerState.DOWN, reason="refused"),
        ),
        counts=shown_counts(
            {State.SUBMITTED: 2, State.QUEUED: 31, State.HELD: 1, State.DONE: 7, State.FAILED: 1}, 1
        ),
        oldest_at={"queued": T - 30, "submitted": T - 60},
        jobs=(
            JobView(
                job=job, state="running", server=server, prompt_id="p", attempt=2, since=T - 30,
                silent_s=0.1, progress=progress, ready_s=12.0,
            ),
            JobView(
                job="next", state="submitted", server=server, prompt_id="q", attempt=1, since=T
            ),
        ),
        queue=(QueuedView(job=job, position=1, priority=3, claimed=T - 90, ready_s=130.0),),
        ready_s=700.0,
        missed=(MissedView(at=T - 9, job=job, server=server, cause="deaf", source="audit"),),
        free_bytes=2**35,
    )  # fmt: skip


def rows(name: str = "portrait", message: str = "Node 2 raised ValueError: no.") -> list[Row]:
    outcome = Outcome(state=State.FAILED, reason=Reason.EXECUTION_ERROR, message=message)
    return [
        row(
            1, State.DONE, published_at=T - 50, completion=Source.AUDIT,
            server=ServerName("atelier"),
        ),
        Row(
            job=JobId(f"{name}.{ULID}"), seq=2, state=State.FAILED, outcome=outcome,
            claimed_at=T - 99, published_at=T - 20,
        ),
        row(3, State.HELD, held=message),
    ]  # fmt: skip


@pytest.fixture
def opened(browser: Browser, served: Site) -> Iterator[Page]:
    """The page, watched."""
    page = browser.new_page()
    with watched(page, served):
        page.goto(served.url)
        yield page
    page.close()


@contextmanager
def watched(page: Page, served: Site) -> Iterator[None]:
    """Any word in the console, error, dialog or request that goes elsewhere fails the test."""
    said: list[str] = []

    def asked(url: str) -> None:
        if not url.startswith((served.url, "data:image/svg+xml,")):
            said.append(f"asked {url}")

    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked(request.url))
    yield
    assert said == []


def test_everything_is_there(opened: Page) -> None:
    for part, words in {
        "#verdict": [
            "3 things need you.",
            "attic is down: refused",
            "1 job is held",
            "2 on servers",
        ],
        "#counts": ["Queued", "31"],
        "#servers": ["1 of 2 up", "atelier", "KSampler 12 of 20", "2 of 2", "42.0 s", "8.0 GiB"],
        "#jobs": ["attempt 2", "running", "KSampler 12 of 20, 1 of 2 nodes done", "10 s"],
        "#held": ["job-3", "Node 2 raised"],
        "#failed": ["execution error", "Node 2 raised ValueError: no.", "20 s ago"],
        "#queue": ["priority 3", "2 min", "30 more"],
        "#done": ["job-1", "found by the auditor"],
        "#missed": ["the connection heard nothing", "1 since the daemon started"],
        "#live": ["live"],
    }.items():
        for word in words:
            expect(opened.locator(part)).to_contain_text(word)
    assert opened.title() == "(3) comfyd"
    assert opened.locator("progress").evaluate("bar => bar.value") == pytest.approx(0.8)


def test_every_job_leads_to_its_story(opened: Page, served: Site) -> None:
    served.fixed.rows = [row(1, State.DONE, published_at=T)]
    opened.reload()
    opened.locator("#done a").click()
    assert '"job":"job-1"' in opened.inner_text("body")


def test_all_is_fine_in_words(browser: Browser, served: Site) -> None:
    up = ServerView(name="a", url="http://h", state=ServerState.UP, connected=True)
    served.fixed.now = replace(busy(), servers=(up,), counts=shown_counts({}, 0), jobs=(), queue=(),
                               missed=(), ready_s=0.0)  # fmt: skip
    served.fixed.rows = []
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator("#verdict")).to_have_text("Everything is fine.Nothing to do.")
    expect(page.locator("#jobs")).to_contain_text("No job is on a server.")
    expect(page.locator("#queue")).to_contain_text("The queue is empty")
    expect(page.locator("#failed")).to_contain_text("No job has failed.")
    expect(page.locator("#missed")).to_contain_text("Every end signal has come")
    expect(page.locator("#held")).to_be_hidden()
    assert page.title() == "comfyd"
    page.close()


def test_without_javascript_it_is_whole_and_loads_itself_again(
    browser: Browser, served: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_page, "REFRESH_S", 1)
    page = browser.new_page(java_script_enabled=False)
    with watched(page, served):
        page.goto(served.url)
        assert "3 things need you." in page.inner_text("#verdict")
        assert page.inner_text("#live") == "reloads every 1 s"
        with page.expect_navigation(timeout=5000):
            served.fixed.now = busy("another")
        assert "another" in page.inner_text("#jobs")
    page.close()


def test_with_javascript_the_news_come_by_themselves(opened: Page, served: Site) -> None:
    opened.evaluate("window.same = true")
    opened.locator("#failed a").first.focus()
    served.fixed.now = replace(busy("another"), paused=True)
    served.fixed.rows = rows(message="Another one.")
    expect(opened.locator("#jobs")).to_contain_text("another")
    expect(opened.locator("#failed")).to_contain_text("Another one.")
    expect(opened.locator("#verdict")).to_contain_text("The intake is paused")
    assert opened.title() == "(4) comfyd"
    assert opened.evaluate("window.same"), "it was loaded anew"
    assert opened.evaluate("document.activeElement.closest('section')?.id") == "failed"


def test_what_someone_marks_stays_marked(opened: Page, served: Site) -> None:
    opened.evaluate("getSelection().selectAllChildren(document.querySelector('#jobs bdi'))")
    served.fixed.now = replace(busy("another"), paused=True)
    expect(opened.locator("#verdict")).to_contain_text("The intake is paused")
    assert opened.evaluate("getSelection().toString()") == f"portrait.{ULID}"
    opened.evaluate("getSelection().removeAllRanges()")
    expect(opened.locator("#jobs")).to_contain_text("another")


def test_a_daemon_that_does_not_answer_is_said_so(browser: Browser, served: Site) -> None:
    page = browser.new_page()
    page.goto(served.url)
    served.fixed.error = JournalError("x")
    expect(page.locator("#live")).to_contain_text("what you see is old")
    expect(page.locator("#jobs")).to_contain_text("portrait")
    served.fixed.error = None
    expect(page.locator("#live")).to_have_text("live")
    page.close()


def test_another_version_is_loaded_whole(
    opened: Page, served: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = status_page.SCRIPT + "// newer\n"
    policy = status_page.POLICY.replace("script-src", f"script-src {status_page._hash(script)}")
    with opened.expect_navigation(timeout=5000):
        monkeypatch.setattr(status_page, "POLICY", policy)
        monkeypatch.setattr(status_page, "SCRIPT", script)
    expect(opened.locator("#live")).to_have_text("live")


CUT_OFF = """
() => [...document.querySelectorAll("section")]
  .filter(each => each.scrollWidth > each.clientWidth).map(each => each.id)
"""


@pytest.mark.parametrize("width", [320, 375, 768, 960, 1280])
@pytest.mark.parametrize("name", ["portrait", LONG, MARK, EVIL.replace("\x00", "")])
def test_nothing_is_wider_than_the_screen_nor_alive(
    browser: Browser, served: Site, width: int, name: str
) -> None:
    many = shown_counts(dict.fromkeys(State, 1_234_567), 123_456)
    served.fixed.now = replace(busy(name, server=name), counts=many)
    served.fixed.rows = rows(name, message=name * 3)
    page = browser.new_page(viewport={"width": width, "height": 800})
    with watched(page, served):
        page.goto(served.url)
        expect(page.locator("#live")).to_have_text("live")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate("window.hit") is None
        assert page.locator("img, iframe, main script, main style").count() == 0
        assert name.replace("\u202e", "�").split()[0][:20] in page.inner_text("#jobs")
    page.close()


def test_a_hostile_name_that_comes_later_is_as_inert(opened: Page, served: Site) -> None:
    served.fixed.now = busy(MARK, server=MARK)
    served.fixed.rows = rows(MARK, message=MARK)
    expect(opened.locator("#failed")).to_contain_text("<img src=x onerror=window.hit=1>")
    assert opened.evaluate("window.hit") is None
    assert opened.locator("img, main script").count() == 0


CONTRAST = """
() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = each => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (rgb(colour)[3] !== 0) return rgb(colour);
    }
  };
  return [...document.querySelectorAll("body *")]
    .filter(each => [...each.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .filter(each => each.checkVisibility() && !each.closest("progress, script"))
    .map(each => {
      const [a, b] = [light(rgb(getComputedStyle(each).color)), light(ground(each))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), each.outerHTML.slice(0, 80)];
    })
    .filter(([ratio]) => ratio < 4.5);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Browser, served: Site, scheme: str) -> None:
    """WCAG AA: every text has a contrast of 4.5 to what is behind it."""
    page = browser.new_page(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(served.url)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 64) is (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    page.close()
