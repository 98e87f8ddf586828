"""The child that reads an upload: its limits, its environment, its ends."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feedback.errors import AppError, BadRequest, TooLarge
from feedback.formats import __main__ as child
from feedback.formats.records import Limits
from feedback.formats.rows import UploadError
from feedback.reading import Abandoned, Effort, Outcome, Reader

CHAT = {
    "messages": [
        {"role": "user", "content": "Which bird?"},
        {"role": "assistant", "content": "A heron."},
    ]
}
LITTLE = Effort(memory_bytes=512 * 2**20, seconds=60)
_START = """
import sys
from pathlib import Path
from feedback.formats.records import Limits
from feedback.reading import Effort, Reader
Reader(Path(sys.argv[1])).read(format=None, columns=None, limits=Limits(), effort=Effort())
"""


def read(folder: Path, content: bytes | None = None, effort: Effort = LITTLE) -> Outcome:
    if content is not None:
        (folder / "original").write_bytes(content)
    return Reader(folder).read(format=None, columns=None, limits=Limits(), effort=effort)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A folder whose file never comes to its end, so that its reader waits."""
    os.mkfifo(tmp_path / "original")
    return tmp_path


def until(found: Callable[[], int | None]) -> int:
    deadline = time.monotonic() + 30
    while (value := found()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the reader is another process: there is no event
    return value


def reader_of(folder: Path) -> int | None:
    """The process that reads in `folder`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\x00")
            except OSError:
                continue
            if b"feedback.formats" in command and bytes(folder) in command:
                return int(entry.name)
    return None


def test_what_the_child_finds_is_what_the_caller_gets(tmp_path: Path) -> None:
    outcome = read(tmp_path, (json.dumps(CHAT) + "\n").encode() * 3)
    assert (outcome.kind, outcome.rows) == ("supervised", 3)
    assert (tmp_path / "rows.jsonl").stat().st_size == outcome.bytes
    with pytest.raises(UploadError, match="line 2: its keys are 'a'") as caught:
        read(tmp_path, json.dumps(CHAT).encode() + b'\n{"a": "\xc3\xa9"}\n')
    assert [problem.place for problem in caught.value.problems] == ["line 2"]


def test_the_child_loads_neither_database_nor_framework_nor_model() -> None:
    code = "import feedback.formats.__main__, sys; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {
        "torch",
        "sqlalchemy",
        "pydantic",
        "fastapi",
        "numpy",
        "pyarrow",
        "asyncio",
    }


def test_the_child_knows_no_settings_and_runs_within_limits(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BURNISH_DATABASE__URL", "BURNISH_API_KEY", "PGPASSWORD", "OTEL_EXPORTER_HEADERS"):
        monkeypatch.setenv(name, "a-secret")
    reader = Reader(endless)
    with ThreadPoolExecutor(1) as pool:
        options = {"format": None, "columns": None, "limits": Limits(), "effort": LITTLE}
        reading = pool.submit(reader.read, **options)
        pid = until(lambda: reader_of(endless))
        try:
            # The limits are the last that it sets before it opens its file.
            until(lambda: 1 if f"{LITTLE.memory_bytes} " in limits_of(pid) else None)
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            limits = limits_of(pid)
        finally:
            reader.abandon()
        with pytest.raises(Abandoned):
            reading.result(30)
    assert b"a-secret" not in environment
    assert b"BURNISH" not in environment
    assert f"Max cpu time              {LITTLE.seconds} " in limits
    assert "Max core file size        0 " in limits
    assert not Path(f"/proc/{pid}").exists()


def limits_of(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def test_a_reader_that_was_abandoned_starts_nothing(endless: Path) -> None:
    reader = Reader(endless)
    reader.abandon()
    with pytest.raises(Abandoned):
        reader.read(format=None, columns=None, limits=Limits(), effort=LITTLE)
    assert reader_of(endless) is None


def test_time_that_is_up_is_named_with_its_setting(endless: Path) -> None:
    with pytest.raises(TooLarge, match=r"1 seconds \(gateway.upload_timeout_seconds\)"):
        read(endless, effort=Effort(seconds=1))
    assert reader_of(endless) is None


@pytest.mark.processes
def test_memory_that_is_up_is_named_with_its_setting(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # One text of 4 MB that thirty rows name: it is declared once, and decoded thirty times.
    turns = [CHAT["messages"][0], {"role": "assistant", "content": "x" * 4_000_000}]
    rows = pyarrow.Table.from_pylist([{"messages": turns}] * 30)
    bomb = io.BytesIO()
    parquet.write_table(rows, bomb, compression="zstd", dictionary_pagesize_limit=2**24)
    assert len(bomb.getvalue()) < 16 * 1024
    with pytest.raises(TooLarge, match=r"400 MiB of memory \(gateway.upload_memory_bytes\)"):
        read(tmp_path, bomb.getvalue(), Effort(memory_bytes=400 * 2**20, seconds=60))


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT])
def test_a_child_that_dies_is_a_refusal(endless: Path, sent: signal.Signals) -> None:
    killer = threading.Thread(target=lambda: os.kill(until(lambda: reader_of(endless)), sent))
    killer.start()
    with pytest.raises(AppError) as caught:
        read(endless)
    killer.join()
    assert isinstance(caught.value, TooLarge | BadRequest)
    assert caught.value.param == "file"


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "no room for secret words"), 500), (KeyError("secret words"), 400)],
)
def test_a_fault_that_is_not_the_files_is_told_and_logged_without_its_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: int,
) -> None:
    def fail(_folder: Path) -> int:
        raise error

    monkeypatch.setattr(child, "_read_order", fail)

    def run(reader: Reader, _lifeline: int, _seconds: float) -> int:
        os.close(_lifeline)
        try:
            return child.main(reader.folder)
        except Exception:
            return 1

    monkeypatch.setattr(Reader, "_run", run)
    with pytest.raises(AppError) as caught:
        read(tmp_path)
    assert caught.value.status == code
    (record,) = caplog.records
    assert vars(record)["error"] == type(error).__name__
    assert vars(record)["place"].startswith("test_reading.py:")
    assert "secret" not in caught.value.message + str(vars(record))


def test_the_child_ends_with_a_parent_that_is_killed(endless: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-P", "-c", _START, str(endless)])
    try:
        pid = until(lambda: reader_of(endless))
        # From its limits on it waits for its file, and the pipe is watched since before.
        until(lambda: 1 if f"{Effort().memory_bytes} " in limits_of(pid) else None)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: None if _runs(pid) else 1)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
