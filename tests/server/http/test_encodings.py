"""Compressed bodies: read like plain ones, piece by piece, and refused before they fill memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from feedback.errors import AppError, BadRequest
from server.errors import UnsupportedEncoding
from server.http.encodings import MOST_FRAMES, PIECE_BYTES, Decoded, find_encoding
from tests.gateway_fixtures import RunningGateway

MIB = 1024 * 1024


def bare_deflate(content: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(content) + encoder.flush()


COMPRESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate without a head": ("deflate", bare_deflate),
    "zstd": ("zstd", zstd.compress),
}
each = pytest.mark.parametrize("kind", COMPRESS)


def receiving(pieces: list[bytes]) -> tuple[Callable[[], object], Callable[[], int]]:
    """ASGI's `receive` of a body in these pieces, and how many of them were asked for."""
    left: Iterator[tuple[int, bytes]] = iter(enumerate(pieces, 1))
    asked = 0

    async def receive() -> Message:
        nonlocal asked
        found = next(left, None)
        if found is None:
            return {"type": "http.disconnect"}
        asked, piece = found
        return {"type": "http.request", "body": piece, "more_body": asked < len(pieces)}

    return receive, lambda: asked


def read(pieces: list[bytes], encoding: str, most: int = 64 * MIB) -> bytes:
    """The body as a route reads it, up to its limit; afterwards the client has left."""
    receive, _ = receiving(pieces)
    decoded = Decoded(receive, encoding)  # type: ignore[arg-type]

    async def work() -> bytes:
        body, more = bytearray(), True
        while more:
            message = await decoded()
            assert len(message["body"]) <= PIECE_BYTES
            body += message["body"]
            if len(body) > most:
                raise MemoryError
            more = message["more_body"]
        assert (await decoded())["type"] == "http.disconnect"
        return bytes(body)

    return asyncio.run(work())


@each
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_was_compressed_comes_out_however_it_is_cut(kind: str, data: st.DataObject) -> None:
    encoding, compress = COMPRESS[kind]
    seed, size = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([0, 1, 300, 200_000]))
    chance = random.Random(seed)
    content = chance.randbytes(size // 2) + bytes(size - size // 2)
    sent = compress(content)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=5)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert read(pieces, encoding) == content


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_several_parts_are_one_body(kind: str) -> None:
    encoding, compress = COMPRESS[kind]
    assert read([compress(b"a") + compress(b""), compress(b"b")], encoding) == b"ab"
    with pytest.raises(BadRequest, match=f"more than {MOST_FRAMES} parts"):
        read([compress(b"") * (MOST_FRAMES + 1)], encoding)


@each
def test_a_body_that_is_broken_or_cut_off_is_refused(kind: str) -> None:
    encoding, compress = COMPRESS[kind]
    sent = compress(random.Random(1).randbytes(5_000))
    with pytest.raises(BadRequest, match=f"cannot be read as {encoding}: its end is missing"):
        read([sent[:-3]], encoding)
    broken = b"no such thing at all"
    with pytest.raises(BadRequest, match=f"cannot be read as {encoding}"):
        read([broken], encoding)
    assert read([b""], encoding) == b""  # no body has no encoding


@each
def test_a_bomb_is_read_as_far_as_its_reader_goes_and_no_further(kind: str) -> None:
    encoding, compress = COMPRESS[kind]
    sent = compress(bytes(32 * MIB))
    read([compress(b"a")], encoding)
    tracemalloc.start()
    try:
        with pytest.raises(MemoryError):
            read([sent], encoding, most=MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


def test_data_of_which_nothing_comes_is_not_read_for_ever() -> None:
    encoder = zlib.compressobj(wbits=-15)
    nothing = encoder.flush(zlib.Z_FULL_FLUSH)  # a block of no bytes
    receive, asked = receiving([nothing * 10_000] * 1_000)

    async def work() -> None:
        await Decoded(receive, "deflate")()  # type: ignore[arg-type]

    with pytest.raises(BadRequest, match="larger than what comes out"):
        asyncio.run(work())
    assert asked() < 50


def test_a_window_that_would_fill_memory_is_refused() -> None:
    options = {int(zstd.CompressionParameter.window_log): 27}
    encoder = zstd.ZstdCompressor(options=options)
    sent = encoder.compress(b"a" * 1000) + encoder.flush()
    with pytest.raises(BadRequest, match="zstd"):
        read([sent], "zstd")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], None),
        ([b"identity"], None),
        ([b""], None),
        ([b" GZIP "], "gzip"),
        ([b"gzip, identity"], "gzip"),
        ([b"gzip,zstd"], "gzip, zstd"),
        ([b"gzip", b"gzip"], "gzip, gzip"),
    ],
)
def test_what_a_request_says_of_its_encoding(values: list[bytes], found: str | None) -> None:
    headers = [(b"content-encoding", value) for value in values]
    assert find_encoding({"headers": [(b"host", b"x"), *headers]}) == found


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "compress"])
def test_other_encodings_are_refused_with_those_that_are_read(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding) as refused:
        read([b"abc"], encoding)
    error: AppError = refused.value
    assert (error.status, error.code) == (415, "unsupported_encoding")
    for part in (encoding, "gzip, deflate, zstd"):
        assert part in error.message


QUESTION = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}


@each
def test_every_kind_of_route_reads_compressed_bodies(
    sqlite_gateway: RunningGateway, kind: str
) -> None:
    encoding, compress = COMPRESS[kind]
    client = sqlite_gateway.client()
    headers = {"content-encoding": encoding, "content-type": "application/json"}

    def send(path: str, content: bytes, **more: str) -> tuple[int, dict[str, object]]:
        reply = client.post(path, content=compress(content), headers={**headers, **more})
        return reply.status_code, reply.json()

    status, answer = send("/v1/chat/completions", json.dumps(QUESTION).encode())
    assert status == 200
    verdict = {"completion_id": answer["id"], "kind": "rating", "value": True}
    assert send("/v1/feedback", json.dumps(verdict).encode())[0] == 201
    row = {"prompt": "Which day is it?", "completion": "Monday."}
    form = (
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
        + json.dumps(row).encode()
        + b"\n\r\n--x--\r\n"
    )
    assert send("/v1/files", form, **{"content-type": "multipart/form-data; boundary=x"})[0] == 200
    for path in ("/v1/chat/completions", "/v1/feedback"):
        status, error = send(path, b'{"x": "' + bytes(40 * MIB))
        assert (status, error["error"]["code"]) == (413, "too_large")  # type: ignore[index]


def test_an_encoding_that_is_not_read_is_415_with_the_list(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client()
    headers = {"content-encoding": "br", "content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/feedback", "/admin/keys"):
        reply = client.post(path, content=b"\x0b\x02\x80{}\x03", headers=headers)
        assert reply.status_code == 415
        assert reply.headers["accept-encoding"] == "gzip, deflate, zstd"
    assert client.get("/v1/models", headers=headers).status_code == 200  # it has no body
