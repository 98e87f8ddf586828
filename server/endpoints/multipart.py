"""Forms with a file, as `multipart/form-data`: the file goes to disk while it arrives.

Owns: that nothing is held in memory but short fields, and that no body passes its limit. Does not
own: what is done with the file. The route's own dependency has checked the key before this reads.
Starlette's parser is not used: it spools to the system's temporary directory, which may be memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from feedback.errors import BadRequest, TooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MOST_PARTS = 16
_MOST_FIELD_BYTES = 64 * 1024
_MOST_HEADER_BYTES = 8 * 1024
_WRITE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Form:
    """What came beside the file's content."""

    filename: str
    fields: Mapping[str, str]


async def receive_form(request: Request, destination: Path, *, most: int) -> Form:
    """Read the form; the content of its part `file` is at `destination` afterwards.

    Raises BadRequest, and TooLarge when the body passes `most` bytes.
    """
    parts = _Parts()
    parser = MultipartParser(_boundary(request), parts.callbacks())
    received = 0
    try:
        with destination.open("wb") as stream:
            async for piece in request.stream():
                received += len(piece)
                if received > most:
                    raise TooLarge(f"the body passes {most} bytes (gateway.max_upload_bytes)")
                parser.write(piece)
                if len(parts.pending) >= _WRITE_BYTES:
                    await asyncio.to_thread(stream.write, parts.take())
            await asyncio.to_thread(stream.write, parts.take())
    except ClientDisconnect:
        raise BadRequest("the connection ended before the body did") from None
    except FormParserError as error:
        raise BadRequest(f"the form cannot be read: {error}") from None
    if not parts.ended:
        raise BadRequest("the form ends before its last boundary")
    if parts.filename is None:
        raise BadRequest("the form has no part 'file' with a filename", param="file")
    return Form(parts.filename, parts.fields)


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        found = kind.decode("latin-1") or "of no type"
        raise BadRequest(f"the body is {found}; send multipart/form-data with the part 'file'")
    return boundary


class _Parts:
    """What the parser has seen so far."""

    def __init__(self) -> None:
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        self.pending = bytearray()  #: of the file, still to be written
        self.ended = False
        self._count = 0
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None  # None: the part is the file
        self._value = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def take(self) -> bytes:
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def _begin(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise BadRequest(f"the form has more than {_MOST_PARTS} parts")
        self._headers.clear()
        self._value.clear()

    def _add_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if sum(map(len, self._header)) > _MOST_HEADER_BYTES:
            raise BadRequest("a part of the form has a header that is too long")

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        if name in self.fields or (name == "file" and self.filename is not None):
            raise BadRequest(f"the form has the part {name[:100]!r} twice", param=name[:100])
        if name == "file" and filename is not None:
            self.filename = filename.decode(errors="replace")
            self._name = None
        elif filename is not None or not name:
            raise BadRequest(
                f"found a part {name[:100]!r} with a file, expected 'file' alone", param="file"
            )
        else:
            self._name = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MOST_FIELD_BYTES:
            raise BadRequest(
                f"{self._name[:100]!r} has more than {_MOST_FIELD_BYTES} bytes",
                param=self._name[:100],
            )

    def _end(self) -> None:
        if self._name is not None:
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise BadRequest(f"{self._name[:100]!r} is not UTF-8") from None

    def _end_all(self) -> None:
        self.ended = True
