"""Forms with a file: what arrives whole, and every one that is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from feedback.errors import AppError
from server.endpoints.multipart import Form, receive_form

FILE = b'Content-Disposition: form-data; name="file"; filename="b.jsonl"\r\n\r\n'
HUGE = 3 * 1024 * 1024


def field(name: str, value: bytes) -> bytes:
    return f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value


def form(*parts: bytes) -> bytes:
    return b"".join(b"--cut\r\n" + part + b"\r\n" for part in parts) + b"--cut--\r\n"


def receive(
    body: bytes,
    to: Path,
    *,
    most: int = 2 * HUGE,
    kind: str = "multipart/form-data; boundary=cut",
    piece: int = 65_536,
    whole: bool = True,
) -> Form:
    """Have the body read as it would arrive, in pieces."""

    def messages() -> Iterator[dict[str, Any]]:
        for start in range(0, len(body), piece):
            yield {"type": "http.request", "body": body[start : start + piece], "more_body": True}
        yield {"type": "http.request"} if whole else {"type": "http.disconnect"}

    arriving = messages()

    async def next_message() -> dict[str, Any]:
        return next(arriving)

    headers = [(b"content-type", kind.encode())]
    request = Request({"type": "http", "method": "POST", "headers": headers}, next_message)
    return asyncio.run(receive_form(request, to, most=most))


@pytest.mark.parametrize("piece", [1, 7, 65_536])
def test_a_form_is_the_same_in_whatever_pieces_it_arrives(tmp_path: Path, piece: int) -> None:
    content = b'{"a": "b"}\r\n--cu\r\n--\r\n'
    body = form(field("purpose", b"fine-tune"), FILE + content, field("format", b"tr\xc3\xa9"))
    found = receive(body, tmp_path / "file", piece=piece)
    assert (found.filename, found.fields) == ("b.jsonl", {"purpose": "fine-tune", "format": "tré"})
    assert (tmp_path / "file").read_bytes() == content


def test_a_large_file_is_written_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * (HUGE // 256)
    receive(form(FILE + content), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize(
    ("body", "options", "status", "expected"),
    [
        (form(FILE + b"a" * 2000), {"most": 1000}, 413, "passes 1000 bytes"),
        (b"{}", {"kind": "application/json"}, 400, "application/json; send multipart/form-data"),
        (b"", {"kind": ""}, 400, "of no type; send"),
        (b"", {"kind": "multipart/form-data"}, 400, "send multipart/form-data"),
        (b"", {}, 400, "ends before its last boundary"),
        (b"--cut\r\n" + FILE + b"half", {}, 400, "ends before its last boundary"),
        (form(FILE + b"a"), {"whole": False}, 400, "the connection ended"),
        (b"nonsense", {}, 400, "the form cannot be read"),
        (form(field("purpose", b"x")), {}, 400, "no part 'file'"),
        (form(field("file", b"text")), {}, 400, "no part 'file' with a filename"),
        (form(FILE + b"a", FILE + b"b"), {}, 400, "the part 'file' twice"),
        (form(field("a", b"1"), field("a", b"2")), {}, 400, "the part 'a' twice"),
        (form(FILE.replace(b'"file"', b'"other"')), {}, 400, "a part 'other' with a file"),
        (form(b"X: y\r\n\r\nvalue"), {}, 400, "found a part ''"),
        (form(field("a", b"\xff"), FILE), {}, 400, "'a' is not UTF-8"),
        (form(field("a", b"x" * 70_000), FILE), {}, 400, "'a' has more than 65536 bytes"),
        (form(*[field(f"a{n}", b"") for n in range(17)]), {}, 400, "more than 16 parts"),
        (form(b"X: " + b"y" * 9000 + b"\r\n\r\n"), {}, 400, "header"),
    ],
)
def test_a_form_that_is_not_as_it_must_be_is_refused(
    tmp_path: Path, body: bytes, options: dict[str, Any], status: int, expected: str
) -> None:
    with pytest.raises(AppError, match=expected) as refused:
        receive(body, tmp_path / "file", **options)
    assert refused.value.status == status


def test_a_name_in_no_known_encoding_is_still_a_name(tmp_path: Path) -> None:
    named = FILE.replace(b"b.jsonl", b"\xff.jsonl")
    assert receive(form(named + b"a"), tmp_path / "file").filename == "\ufffd.jsonl"
