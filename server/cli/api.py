"""The command line's way to the gateway.

Owns: where the gateway is and which key is used (`BURNISH_URL`, `BURNISH_API_KEY`, else
`DATA/credentials`), and what its errors become. Does not own: what is asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

DEFAULT_URL = "http://127.0.0.1:8000"


class NoConnection(Exception):
    """No gateway, or no key to open it with; the message says what to do."""


class ApiError(Exception):
    """The gateway refused; `status` and `code` are its own."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Api:
    """Requests with one key. Every method raises ApiError or NoConnection."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float = 660.0) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout_seconds, connect=5.0),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """GET with the parameters that are not None."""
        params = {key: value for key, value in query.items() if value is not None}
        return self._call("GET", path, params=params)

    def post(self, path: str, body: Any = None) -> Any:
        return self._call("POST", path, json={} if body is None else body)

    def patch(self, path: str, body: Any) -> Any:
        return self._call("PATCH", path, json=body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every row of a list, page after page."""
        after = None
        while True:
            page = self.get(path, after=after, **query)
            yield from page["data"]
            if not page.get("has_more"):
                return
            after = page["data"][-1].get("id") or page["data"][-1]["name"]

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            reply = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise NoConnection(
                f"no gateway answers at {self.url} ({type(error).__name__}); "
                "start one with `make serve`, or set BURNISH_URL"
            ) from None
        if reply.is_success:
            return reply.json()
        try:
            found = reply.json()["error"]
            raise ApiError(reply.status_code, found.get("code"), str(found["message"]))
        except (ValueError, KeyError, TypeError):
            raise ApiError(reply.status_code, None, reply.text[:500]) from None


def read_credentials(data: Path) -> dict[str, str]:
    """`url` and `api_key` of `DATA/credentials`; empty where there is none."""
    try:
        found: dict[str, str] = json.loads((data / "credentials").read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise NoConnection(f"{data / 'credentials'} cannot be read: {error}") from None


@contextmanager
def connect() -> Iterator[Api]:
    """The gateway of the environment, else of the data directory.

    Raises NoConnection without a key, or with something that can be none.
    """
    from server.setting_sources import as_secret
    from server.settings import load_settings

    url, key = os.environ.get("BURNISH_URL"), os.environ.get("BURNISH_API_KEY")
    if url is None or key is None:
        data = load_settings().data
        found = read_credentials(data)
        url, key = url or found.get("url") or DEFAULT_URL, key or found.get("api_key")
        if key is None:
            raise NoConnection(
                f"no key: set BURNISH_API_KEY, or run where {data / 'credentials'} is "
                "(the first `make serve` writes it)"
            )
    try:
        key = as_secret(SecretStr(key)).get_secret_value()
    except ValueError as error:
        raise NoConnection(
            f"the key of BURNISH_API_KEY or the credentials {error}; give it as it was shown"
        ) from None
    connection = Api(url, key)
    try:
        yield connection
    finally:
        connection.close()
