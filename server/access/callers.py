"""Who asks: the key that a request shows, and the person that it speaks for.

Owns: the one authentication of all routes, and the persons kept in memory. Does not own: what keys
there are (`keyring.py`), what a route needs (`scopes.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.types import Scope as HttpScope

from feedback.db import Database
from feedback.people import find_or_create_person, find_person
from server.access.keyring import Caller, Keyring, KeyView, check_scope, end_user_of

MOST_PEOPLE = 100_000  #: kept in memory

_KEY = "burnish.key"
_AUTHORIZATION = b"authorization"


class Callers:
    """Finds out who asks. One event loop owns it.

    `keyring()` gives the keys in force, `user_headers` the headers in which an application may name
    its end user.
    """

    def __init__(
        self, database: Database, keyring: Callable[[], Keyring], user_headers: Sequence[str]
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._user_headers = user_headers
        self._people: dict[str, dict[str, str]] = {}  #: by user, then end user
        self._count = 0

    def authenticate(self, scope: HttpScope) -> KeyView:
        """The key of a request. Raises NotAuthenticated.

        It is kept in the request's `scope` as long as the keys in force are the same: a body may
        take minutes, and what is revoked meanwhile counts. Tokens expire at any moment.
        """
        keyring = self._keyring()
        kept: tuple[Keyring, KeyView] | None = scope.get(_KEY)
        if kept is not None and kept[0] is keyring:
            return kept[1]
        shown = next((v for name, v in scope["headers"] if name == _AUTHORIZATION), b"")
        found = keyring.authenticate(shown.decode("latin-1"))
        if found.grant is None:
            scope[_KEY] = keyring, found
        return found

    def authorize(self, scope: HttpScope, method: str, path: str) -> KeyView:
        """The key of a request, checked against the scope of the route at `path`, its template.

        Raises NotAuthenticated or Forbidden.
        """
        key = self.authenticate(scope)
        check_scope(key, method, path)
        return key

    async def caller(
        self, key: KeyView, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Caller:
        """The person that a request is for."""
        if key.grant is not None:
            return Caller(key, key.grant.person_id)
        end_user = end_user_of(key, body, headers, self._user_headers)
        return Caller(key, await self.person_id(key.user, end_user))

    async def person_id(self, user: str, end_user: str = "") -> str:
        """The person of that name, from memory after the first time."""
        known = self._people.get(user)
        found = None if known is None else known.get(end_user)
        if found is None:
            found = await asyncio.to_thread(self._find_or_create, user, end_user)
            if self._count >= MOST_PEOPLE:
                self._people.clear()
                self._count = 0
            self._people.setdefault(user, {})[end_user] = found
            self._count += 1
        return found

    def _find_or_create(self, user: str, end_user: str) -> str:
        with self._database.read() as session:  # a database that is locked is no hindrance
            found = find_person(session, user, end_user)
        if found is not None:
            return found.id
        with self._database.write() as session:
            return find_or_create_person(session, user, end_user).id

    def forget(self, user: str) -> None:
        """Drop a user's persons from memory, after an erasure."""
        self._count -= len(self._people.pop(user, ()))
