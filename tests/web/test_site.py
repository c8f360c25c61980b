"""Every route, asked through ASGI; the real listener is in test_serve."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import httpx
import pytest
import trio
import trio.testing
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from comfyd.core.model import JobId, Outcome, Reason, Row, ServerName, State
from comfyd.core.notes import Note
from comfyd.core.present import SHOWN_STATES, job_summary
from comfyd.core.snapshot import JobView, ServerState, ServerView, Snapshot
from comfyd.core.wire.stats import Device
from comfyd.errors import JournalError
from comfyd.metrics import Metrics
from comfyd.web import page, site
from comfyd.web.api import BadQuestion, Page, Reads, page_of
from comfyd.web.exporter import Readiness
from tests.web.fixed import EVIL, READY, Fixed, T, row


@pytest.fixture
def fixed():
    return Fixed()


@pytest.fixture
async def client(fixed):
    reads = Reads(snapshot=fixed.snapshot, rows=fixed.page, latest=fixed.latest, story=fixed.story)
    app = site.build(fixed.metrics, reads, lambda: fixed.readiness)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://comfyd") as one:
        yield one


PATHS = [
    "/",
    "/metrics",
    "/-/healthy",
    "/-/ready",
    "/api/v1/status",
    "/api/v1/jobs",
    "/api/v1/jobs/job-1",
]


# --- the whole of it ---


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
async def test_every_answer_has_headers_that_keep_it_inert(client, path):
    answer = await client.get(path)
    assert answer.status_code == (404 if path == "/nowhere" else 200)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers.get_list("content-security-policy")[0].startswith("default-src 'none'")
    assert len(answer.headers.get_list("content-security-policy")) == 1


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"]
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/api/v1/jobs", "/nowhere"])
async def test_nothing_but_get(client, method, path):
    answer = await client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/nowhere", "/api/v1/jobs/", "/api/v1/jobs/a/b", "/metrics/"])
async def test_an_unknown_page_is_404_in_json(client, path):
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json() == {"error": "There is no such page."}


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/v1/status"])
async def test_what_cannot_be_read_now_is_503_and_says_nothing_of_why(client, fixed, path):
    fixed.error = JournalError("/secret/path/journal.db is damaged")
    answer = await client.get(path)
    assert answer.status_code == 503
    assert answer.json()["error"].endswith("its log says why.")
    assert "secret" not in answer.text


async def test_a_bug_is_500_without_its_traceback(client, fixed):
    fixed.error = ZeroDivisionError("secret")
    answer = await client.get("/api/v1/status")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_no_answer_holds_the_credentials_of_a_server(client):
    for path in PATHS:
        assert "hunter2" not in (await client.get(path)).text


async def test_a_request_that_takes_too_long_is_given_up(autojump_clock, fixed, client):
    async def never():
        await trio.sleep_forever()

    slow = Reads(snapshot=never, rows=fixed.page, latest=fixed.latest, story=fixed.story)
    app = site.build(Metrics(CollectorRegistry()), slow, lambda: READY)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://comfyd", timeout=None
    ) as one:
        answer = await one.get("/api/v1/status")
    assert answer.status_code == 503
    assert trio.current_time() == pytest.approx(site.REQUEST_S, abs=0.1)


async def test_so_many_requests_at_once_and_no_more(autojump_clock, fixed):
    go = trio.Event()

    async def waits():
        await go.wait()
        return fixed.now

    reads = Reads(snapshot=waits, rows=fixed.page, latest=fixed.latest, story=fixed.story)
    app = site.build(Metrics(CollectorRegistry()), reads, lambda: READY)
    got = []
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://comfyd", timeout=None
    ) as one:

        async def ask():
            got.append((await one.get("/api/v1/status")).status_code)

        async with trio.open_nursery() as nursery:
            for _ in range(site.REQUESTS_MAX):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert (await one.get("/-/healthy")).status_code == 503
            go.set()
        assert got == [200] * site.REQUESTS_MAX
        assert (await one.get("/-/healthy")).status_code == 200


# --- for machines ---


async def test_metrics_are_of_now_and_in_the_format_that_is_asked_for(client, fixed):
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    found = {s.name + str(s.labels): s.value for f in parse_text(plain.text) for s in f.samples}
    assert found["comfyd_jobs{'state': 'queued'}"] == 3
    accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.3"
    opened = await client.get("/metrics", headers={"accept": accept})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    assert {f.name for f in parse_openmetrics(opened.text)} >= {"comfyd_jobs", "comfyd_completions"}


async def test_who_scrapes_as_prometheus_does_gets_exemplars(client, fixed):
    data: dict[str, object] = {
        "outcome": "done",
        "reason": None,
        "durations_s": {},
        "latency_s": 0.2,
    }
    fixed.metrics.observe([Note("finished", JobId("fox.01K0"), "a", data)])
    accept = (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    opened = await client.get("/metrics", headers={"accept": accept})
    assert '# {job_id="fox.01K0"} 0.2' in opened.text
    assert "fox.01K0" not in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "text/html",
        "application/openmetrics-text;version=x",
        "application/openmetrics-text;version=1.x",
        "application/openmetrics-text;version=2.x.1,text/plain;version=",
        "text/plain;version=1.٣",
        "application/openmetrics-text;version=" + "9" * 5000,
        "application/openmetrics-text;version=1.0.0;escaping=evil",
        ";;,",
    ],
)
async def test_any_accept_gets_an_answer(client, accept):
    answer = await client.get("/metrics", headers={"accept": accept.encode()})
    assert answer.status_code == 200


async def test_healthy_only_says_that_the_loop_turns(client, fixed):
    fixed.readiness = Readiness()
    assert (await client.get("/-/healthy")).text == "OK\n"


async def test_ready_says_what_is_missing(client, fixed):
    fixed.readiness = Readiness(journal_open=True)
    answer = await client.get("/-/ready")
    assert answer.status_code == 503
    assert answer.text == "The spool is not watched.\nThe metrics listener is not bound.\n"
    fixed.readiness = READY
    assert (await client.get("/-/ready")).status_code == 200


# --- the API ---


async def test_status_is_the_snapshot(client, fixed):
    answer = await client.get("/api/v1/status")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == fixed.now.to_dict()


async def test_jobs_come_in_pages_to_the_last(client, fixed):
    seen: list[int] = []
    after: str | None = ""
    while after is not None:
        body = (await client.get("/api/v1/jobs", params={"limit": 3, "after": after})).json()
        seen += [one["seq"] for one in body["jobs"]]
        after = body["next"]
    assert seen == [7, 6, 5, 4, 3, 2, 1]


async def test_jobs_are_the_summaries_that_the_command_line_shows(client, fixed):
    body = (await client.get("/api/v1/jobs")).json()
    assert body["jobs"] == [job_summary(one) for one in reversed(fixed.rows)]


async def test_running_and_submitted_are_told_apart(client, fixed):
    fixed.rows = [
        row(1, State.SUBMITTED, started_at=T),
        row(2, State.SUBMITTED),
        row(3, State.SUBMITTED, started_at=T),
        row(4, State.QUEUED),
    ]

    async def seqs(state):
        body = (await client.get("/api/v1/jobs", params={"state": state})).json()
        return [one["seq"] for one in body["jobs"]]

    assert await seqs("running") == [3, 1]
    assert await seqs("submitted") == [2]
    assert await seqs("queued") == [4]
    assert await seqs("failed") == []


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("state=nonsense", "The parameter state is one of queued, held,"),
        ("limit=0", "The parameter limit is a whole number from 1 to 500."),
        ("limit=501", "The parameter limit is"),
        ("limit=-1", "The parameter limit is"),
        ("limit=1e2", "The parameter limit is"),
        ("limit=%D9%A1", "The parameter limit is"),
        ("after=1_0", "The parameter after is"),
        ("after=9223372036854775808", "The parameter after is"),
        ("after=" + "9" * 5000, "The parameter after is"),
        ("stat=done", "The parameters are state, limit and after."),
        ("limit=1&limit=2", "The parameter limit was given twice."),
    ],
)
async def test_a_bad_parameter_is_400_with_a_sentence(client, query, sentence):
    answer = await client.get(f"/api/v1/jobs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(sentence)
    assert answer.json()["error"].endswith(".")


def test_an_empty_parameter_is_none():
    assert page_of([("state", ""), ("limit", ""), ("after", "")]) == Page(None, 100, None)
    assert page_of([("state", "held"), ("limit", "500"), ("after", "0")]) == Page("held", 500, 0)
    for state in SHOWN_STATES:
        assert page_of([("state", state)]).state == state
    with pytest.raises(BadQuestion):
        page_of([("limit", "0x10")])


async def test_a_job_tells_its_story(client):
    answer = await client.get("/api/v1/jobs/job-1")
    assert answer.json()["job"] == "job-1"
    assert answer.json()["events"] == [
        {"at": "2030-03-17T17:46:40.000Z", "kind": "moved", "data": {"state": "done"}}
    ]


async def test_a_story_holds_nothing_its_owner_wrote(client, fixed):
    fixed.rows = [row(1, key="secret", metadata={"a": "secret"}, payload="secret.json")]
    assert "secret" not in (await client.get("/api/v1/jobs/job-1")).text
    assert "secret" not in (await client.get("/api/v1/jobs")).text


@pytest.mark.parametrize("job", ["job-99", "%00", "..%2f..", "x" * 3000, "%ff"])
async def test_a_job_that_is_not_there_is_404(client, job):
    answer = await client.get(f"/api/v1/jobs/{job}")
    assert answer.status_code == 404
    assert json.loads(answer.content)["error"]


async def test_json_is_ascii_whatever_is_in_it(client, fixed):
    failed = Outcome(state=State.FAILED, reason=Reason.REJECTED, message="\udcff " + EVIL)
    fixed.rows = [row(1, State.FAILED, outcome=failed)]
    answer = await client.get("/api/v1/jobs")
    assert answer.content.isascii()
    assert answer.json()["jobs"][0]["message"] == "\udcff " + EVIL


# --- the page ---


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), []
        self.skipped = False

    def handle_starttag(self, tag, attrs):
        self.skipped = tag in {"style", "script"}
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        if not self.skipped:
            self.words.append(data)

    def handle_endtag(self, tag):
        self.skipped = False


async def test_the_page_shows_servers_and_jobs(client):
    answer = await client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    words = Tags()
    words.feed(answer.text)
    text = " ".join(words.words)
    for expected in ("1.2.3", "Everything is fine.", "3 queued", "Running 1", "job-7"):
        assert expected in text


async def test_hostile_names_are_inert_on_the_page(client, fixed):
    calm = Tags()
    calm.feed((await client.get("/")).text)
    device = Device(EVIL, "cuda", 0, 1, 1)
    fixed.now = Snapshot(
        at=T,
        version=EVIL,
        waiting=EVIL,
        servers=(
            ServerView(
                name=EVIL, url="javascript:x", state=ServerState.DOWN, reason=EVIL, tracker=EVIL,
                version=EVIL, devices=(device, device),
            ),
        ),
        jobs=(
            JobView(
                job=EVIL, state=EVIL, server=EVIL, prompt_id=EVIL, attempt=1, since=T,
                silent_s=400.0, stale=True,
            ),
        ),
        more=2,
    )  # fmt: skip
    failed = Outcome(state=State.FAILED, reason=Reason.REJECTED, message="\udcff" + EVIL)
    fixed.rows = [
        Row(job=JobId(EVIL), seq=1, state=State.FAILED, outcome=failed, server=ServerName(EVIL))
    ]
    answer = await client.get("/")
    assert answer.status_code == 200
    evil = Tags()
    evil.feed(answer.text)
    assert evil.tags <= calm.tags | {"ul", "li", "strong"}
    assert evil.attributes <= calm.attributes
    assert "\u202e" not in answer.text
    assert "\x00" not in answer.text
    assert "<script>alert(1)</script>" in "".join(evil.words)  # there, as words
    assert re.findall(r'href="(?!/|#|data:image/svg)', answer.text) == []


async def test_the_policy_of_the_page_allows_its_own_style_and_script_alone(client):
    answer = await client.get("/")
    assert not re.search(r"<[^>]*\s(on\w+|style)=", answer.text)
    policy = answer.headers["content-security-policy"]
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, ""), (0.0, "0.0 s"), (89.94, "89.9 s"), (90, "2 min"), (5399, "90 min"),
        (7200, "2 h"), (172799, "48 h"), (432000, "5 d"),
    ],
)  # fmt: skip
def test_a_span_for_people(seconds, shown):
    assert page.span(seconds) == shown


def test_a_long_name_is_cut():
    assert len(page.text("x" * 5000)) == page.NAME_MAX


async def test_the_page_stays_small_however_much_is_at_hand(client, fixed):
    jobs = tuple(
        JobView(
            job=f"job-{n}", state="running" if n > 190 else "submitted", server="a",
            prompt_id="p", attempt=1, since=T,
        )
        for n in range(200)
    )  # fmt: skip
    fixed.now = Snapshot(at=T, version="1", jobs=jobs, more=7)
    text = (await client.get("/")).text
    assert f"and {200 - page.JOBS + 7} more" in text
    assert ">job-199<" in text  # what runs is shown first
    assert ">job-190<" not in text
    assert len(text) < 100_000
