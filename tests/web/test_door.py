"""Who is let in, what it costs us to find out, and that a flood of logins keeps nobody else out."""

from __future__ import annotations

import base64

import bcrypt
import httpx
import pytest
import trio
from prometheus_client import CollectorRegistry

from comfyd.config import Secret
from comfyd.metrics import Metrics
from comfyd.web import site
from comfyd.web.api import Reads
from comfyd.web.door import WAITING_MAX, Door
from tests.web.fixed import READY, Fixed
from tests.web.test_site import PATHS


def hashed(password: str, cost: int = 4, prefix: bytes = b"2b") -> Secret:
    made = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost))
    return Secret((b"$" + prefix + made[3:]).decode())


def basic(name: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{name}:{password}".encode())


async def status(door: Door, authorization: bytes | None) -> int:
    refusal = await door.refusal(authorization)
    return 200 if refusal is None else refusal.status_code


USERS = {
    "ann": hashed("fox: ü", prefix=b"2y"),  # as htpasswd writes it
    "bob": hashed("b" * 100),
    "cy": hashed("", cost=5),
}


@pytest.mark.parametrize(
    ("authorization", "answer"),
    [
        (basic("ann", "fox: ü"), 200),
        (basic("ann", "fox: ü").replace(b"Basic", b"bAsIc "), 200),
        (basic("bob", "b" * 100), 200),
        (basic("bob", "b" * 72), 200),  # no more counts, with any bcrypt
        (basic("cy", ""), 200),
        (basic("ann", "fox"), 401),
        (basic("ann", ""), 401),
        (basic("bob", "fox: ü"), 401),
        (basic("Ann", "fox: ü"), 401),
        (basic("", ""), 401),
        (basic("nobody", ""), 401),
        (basic("nobody", "\0"), 401),
        (basic("ann", "a\0b"), 401),
        (b"Basic " + base64.b64encode(b"ann"), 401),
        (b"Basic " + base64.b64encode(b"\xff:\xff"), 401),
        (b"Basic %%%", 401),
        (b"Bearer abc", 401),
        (b"", 401),
        (None, 401),
    ],
)
async def test_who_is_let_in(authorization, answer):
    door = Door(USERS)
    for _ in range(2):  # found out, and known
        assert await status(door, authorization) == answer


async def test_without_users_nobody_is_asked():
    assert await status(Door({}), None) == 200


async def test_who_was_let_in_is_known_again_by_the_right_password_alone():
    door = Door(USERS)
    assert await status(door, basic("ann", "fox: ü")) == 200
    assert await status(door, basic("ann", "fox")) == 401
    assert await status(door, basic("bob", "fox: ü")) == 401
    door.let_in({"ann": hashed("new")})
    assert await status(door, basic("ann", "fox: ü")) == 401
    assert await status(door, basic("ann", "new")) == 200
    assert await status(door, basic("bob", "b" * 100)) == 401


async def test_a_name_that_does_not_exist_costs_as_much_as_a_wrong_password():
    """The same rounds are run; what the clock says of it is too uncertain for a test."""
    door = Door({"ann": hashed("fox", cost=4), "cy": hashed("fox", cost=7)})
    assert bcrypt.checkpw(b"", door._nobody) is False
    assert door._nobody.startswith(b"$2b$07$")


async def test_a_flood_of_logins_is_turned_away_and_keeps_nobody_known_out():
    door = Door({"ann": hashed("fox", cost=4), "slow": hashed("fox", cost=11)})
    assert await status(door, basic("ann", "fox")) == 200
    answers: list[int] = []

    async def attack(number: int) -> None:
        answers.append(await status(door, basic("slow", f"guess {number}")))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(attack, number)
            await trio.testing.wait_all_tasks_blocked()
            assert answers == [503] * (100 - 1 - WAITING_MAX)
            began_s = trio.current_time()
            for _ in range(1000):
                assert await status(door, basic("ann", "fox")) == 200
            # A thousand of the known, in no more than it takes to try one of the others.
            assert answers.count(401) <= 1 + (trio.current_time() - began_s) // 0.05
    assert sorted(set(answers)) == [401, 503]
    assert answers.count(401) == 1 + WAITING_MAX


async def test_someone_removed_while_the_password_is_tried_stays_out():
    door = Door({"ann": hashed("fox", cost=9)})
    answers: list[int] = []

    async def log_in() -> None:
        answers.append(await status(door, basic("ann", "fox")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(log_in)
        await trio.testing.wait_all_tasks_blocked()
        door.let_in({"bob": hashed("fox")})
    assert answers == [401]


# --- in front of every page ----------------------------------------------------------------------


@pytest.fixture
async def client():
    fixed = Fixed()
    reads = Reads(snapshot=fixed.snapshot, rows=fixed.page, latest=fixed.latest, story=fixed.story)
    metrics = Metrics(CollectorRegistry())
    metrics.prepare(["a"])
    headers = {"X-Frame-Options": "sameorigin", "Strict-Transport-Security": "max-age=9"}
    more = {"Content-Security-Policy": ""}
    app = site.build(
        metrics, reads, lambda: READY, door=Door(USERS), headers=lambda: headers | more
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://comfyd") as one:
        yield one


@pytest.mark.parametrize("path", [*PATHS, "/nowhere"])
async def test_every_page_asks_and_says_how(client, path):
    answer = await client.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Basic realm="comfyd"')
    assert answer.headers["x-content-type-options"] == "nosniff"
    let_in = await client.get(path, auth=("bob", "b" * 100))
    assert let_in.status_code == (404 if path == "/nowhere" else 200)


async def test_other_methods_are_not_told_about_to_strangers(client):
    assert (await client.post("/")).status_code == 401
    assert (await client.post("/", auth=("bob", "b" * 100))).status_code == 405


@pytest.mark.parametrize("path", ["/-/healthy", "/"])
async def test_headers_of_the_file_stand_in_the_place_of_ours(client, path):
    for auth in (None, ("bob", "b" * 100)):
        answer = await client.get(path, auth=auth)
        assert answer.headers.get_list("x-frame-options") == ["sameorigin"]
        assert answer.headers["strict-transport-security"] == "max-age=9"
        assert "content-security-policy" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"
