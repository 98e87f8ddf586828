"""From bytes to records: JSON Lines, a JSON array, CSV and parquet, one record at a time.

Owns: how a file's container is told, and how many records it may have. Does not own: the readers
(`json_text.py`, `csv_text.py`, `parquet.py`), what a record says (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import BinaryIO

from feedback.formats.csv_text import read_csv
from feedback.formats.foreign import find_foreign
from feedback.formats.json_text import BOM, read_json_array, read_json_lines
from feedback.formats.parquet import read_parquet
from feedback.formats.records import Limits, Record, Unreadable


class Container(StrEnum):
    """How records lie in a file."""

    JSON_LINES = "jsonl"
    JSON_ARRAY = "json"
    CSV = "csv"
    PARQUET = "parquet"


def detect_container(file: BinaryIO) -> Container:
    """Tell the container from the first bytes of a file, which is left at its beginning.

    Raises `Unreadable` where it is empty, or no training data.
    """
    file.seek(0)
    head = file.read(4096)
    if (reason := find_foreign(head)) is not None:
        raise Unreadable(None, reason)
    while head and not head.removeprefix(BOM).strip():  # white space alone
        head = file.read(4096)
    file.seek(0)
    if not head:
        raise Unreadable(None, "the file is empty")
    if head.startswith(b"PAR1"):
        return Container.PARQUET
    first = head.removeprefix(BOM).lstrip()[:1]
    return {b"{": Container.JSON_LINES, b"[": Container.JSON_ARRAY}.get(first, Container.CSV)


def read_records(
    file: BinaryIO, container: Container, limits: Limits, wanted: Collection[str]
) -> Iterator[Record]:
    """The file's records in order; of a parquet file the columns in `wanted` alone.

    Raises `Unreadable`; a record that alone is broken says so.
    """
    file.seek(0)
    match container:
        case Container.JSON_LINES:
            records = read_json_lines(file, limits)
        case Container.JSON_ARRAY:
            records = read_json_array(file, limits)
        case Container.CSV:
            records = read_csv(file, limits)
        case Container.PARQUET:
            records = read_parquet(file, limits, wanted)
    for count, record in enumerate(records, 1):
        if count > limits.rows:
            raise Unreadable(record.place, f"the file has more than {limits.rows} rows")
        yield record
