"""The door: who may read our pages, by basic authentication.

A password costs its hash's time, which nobody may make us spend at will: one is tried at a time, in
a thread beside the event loop, few wait for it, and one that was right is known again without. A
name that does not exist costs the same as a wrong password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Final

import bcrypt
import trio
from starlette.responses import Response

from comfyd.config import Secret
from comfyd.web.api import problem

WAITING_MAX: Final = 8
"""Passwords that wait to be tried; more are told to come again. A scraper asks every 15 s."""
_HASHED_BYTES: Final = 72  # of a password: bcrypt takes no more, and htpasswd cuts it there


class Door:
    """See the module. Nobody is asked if there are no users.

    Args:
      users: The bcrypt hash of each one's password.

    """

    def __init__(self, users: Mapping[str, Secret]) -> None:
        self._key = os.urandom(32)
        self._one = trio.CapacityLimiter(1)
        self.let_in(users)

    def let_in(self, users: Mapping[str, Secret]) -> None:
        """Let these in from now on, and nobody else."""
        self._hashes = {name: hash_.reveal().encode() for name, hash_ in users.items()}
        # Of what was right: a keyed digest for each user, not the password.
        self._known: dict[str, bytes] = {}
        # Tried for names that do not exist: a hash of nothing that is as dear as the dearest.
        cost = max((int(each.split(b"$")[2]) for each in self._hashes.values()), default=4)
        self._nobody = b"$2b$%02d$" % cost + b"." * 53

    async def refusal(self, authorization: bytes | None) -> Response | None:
        """The answer for who is not let in; None for who is.

        Args:
          authorization: The header's value.

        Cancellation: a password that is being tried is tried to its end, beside.

        """
        if not self._hashes:
            return None
        given = _credentials(authorization)
        if given is None:
            return _who_are_you()
        name, password = given
        digest = hmac.digest(self._key, password, hashlib.sha256)
        # Compared with something in any case: how long it takes says nothing of who is known.
        if hmac.compare_digest(self._known.get(name, bytes(len(digest))), digest):
            return None
        if self._one.statistics().tasks_waiting >= WAITING_MAX:
            busy = problem(503, "Too many logins at once.")
            busy.headers["retry-after"] = "5"
            return busy
        hashed = self._hashes.get(name)
        right = await trio.to_thread.run_sync(
            _is_right, password, hashed or self._nobody, limiter=self._one
        )
        if not right or hashed is None or self._hashes.get(name) != hashed:
            return _who_are_you()
        self._known[name] = digest
        return None


def _is_right(password: bytes, hashed: bytes) -> bool:
    return bcrypt.checkpw(password[:_HASHED_BYTES], hashed)


def _credentials(authorization: bytes | None) -> tuple[str, bytes] | None:
    """Name and password of a Basic header (RFC 7617); None if it holds none."""
    scheme, _, token = (authorization or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        name, colon, password = base64.b64decode(token.strip(), validate=True).partition(b":")
        return (name.decode(), password) if colon else None
    except (binascii.Error, ValueError):
        return None


def _who_are_you() -> Response:
    answer = problem(401, "A user name and its password are needed here.")
    answer.headers["www-authenticate"] = 'Basic realm="comfyd", charset="UTF-8"'
    return answer
