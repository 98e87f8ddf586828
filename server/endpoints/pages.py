"""The chat page at `/`, and the files it is made of.

Owns: which files are served, and the policy that browsers get with them. Does not own: what the
page does (`server/pages/`). The files are read once, at import, and found by their name in a table:
a path of the request never reaches the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from feedback.errors import NotFound

router = APIRouter(include_in_schema=False)

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

_FOLDER = Path(__file__).resolve().parent.parent / "pages"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    content_type: str
    etag: str


def read_page_file(path: Path) -> PageFile:
    """The file at `path`. KeyError for a type that no page is made of."""
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, _TYPES[path.suffix], etag)


_INDEX = read_page_file(_FOLDER / "index.html")
_STATIC: Mapping[str, PageFile] = {
    path.name: read_page_file(path)
    for path in sorted((_FOLDER / "static").iterdir())
    if path.suffix in _TYPES
}


@router.get("/")
async def get_index(request: Request) -> Response:
    """The chat page."""
    return _send(_INDEX, request)


@router.get("/static/{path:path}")
async def get_static(path: str, request: Request) -> Response:
    """A script, the style sheet or the icon."""
    file = _STATIC.get(path)
    if file is None:
        raise NotFound(f"no file {path!r} belongs to the page")
    return _send(file, request)


def _send(file: PageFile, request: Request) -> Response:
    """`file`, or 304 where the browser has it: it asks each time, so an update shows at once."""
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "etag": file.etag,
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.content_type)
