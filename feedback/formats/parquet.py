"""Parquet: what its metadata declares is checked first, then the columns with a meaning are read.

Owns: bounds on a file that is small and says much: footer, columns, rows, uncompressed bytes. What
lies about itself meets the memory limit of the child that reads it. Does not own: what a record
says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from feedback.formats.records import (
    MOST_COLUMNS,
    Limits,
    Record,
    Unreadable,
    describe_columns,
    is_of_machine,
)

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile

ROWS_PER_BATCH = 64  #: decoded at once
MOST_FOOTER_BYTES = 16 * 1024 * 1024

_MARK = b"PAR1"
_BUFFER_BYTES = 1024 * 1024
_NAMES_SHOWN = 10  #: of columns without a meaning


def read_parquet(file: BinaryIO, limits: Limits, wanted: Collection[str]) -> Iterator[Record]:
    """Read the records of a parquet file with the columns in `wanted`.

    Of the other columns the first few appear with their name and no value.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise Unreadable(
            None,
            "parquet needs the package pyarrow, which is not installed here; install the extra "
            "'parquet' (pip install 'burnish[parquet]'), or upload JSON Lines",
        ) from None
    _check_footer(file)
    try:
        opened = ParquetFile(file, buffer_size=_BUFFER_BYTES)
        columns = _check_metadata(opened.metadata, limits, wanted)
        # Texts that repeat stay one text: a page of bytes may hold gigabytes of them.
        repeated = _find_flat_texts(opened, columns)
        opened = ParquetFile(
            file, buffer_size=_BUFFER_BYTES, read_dictionary=repeated, metadata=opened.metadata
        )
        others = (name for name in opened.schema_arrow.names if name not in columns)
        named = dict.fromkeys(name for name, _ in zip(others, range(_NAMES_SHOWN), strict=False))
        if not columns:
            if opened.metadata.num_rows:
                yield Record("row 1", named)
            return
        row = 0
        batches = opened.iter_batches(ROWS_PER_BATCH, columns=columns, use_threads=False)
        for batch in batches:
            for cells in zip(*batch.columns, strict=True):
                row += 1
                found = zip(batch.schema.names, cells, strict=True)
                values = {name: _without_nulls(cell.as_py()) for name, cell in found}
                yield Record(f"row {row}", named | values)
    except MemoryError:
        raise
    except RecursionError:
        raise Unreadable(None, "its columns are nested too deep to be read") from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and is_of_machine(error):
            raise
        raise Unreadable(None, f"not a readable parquet file: {str(error)[:200]}") from None


def _check_footer(file: BinaryIO) -> None:
    """Raise `Unreadable` unless the file ends as parquet does, with metadata of a sane size."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    file.seek(0)
    if size < 12 or tail[4:] != _MARK:
        raise Unreadable(
            None, "not a readable parquet file: its end is missing; was it sent whole?"
        )
    footer = int.from_bytes(tail[:4], "little")
    if footer > MOST_FOOTER_BYTES:
        raise Unreadable(
            None,
            f"its metadata has {footer} bytes, and at most {MOST_FOOTER_BYTES} are read; write the "
            "columns to be trained on alone",
        )


def _check_metadata(metadata: FileMetaData, limits: Limits, wanted: Collection[str]) -> list[str]:
    """The columns to read, in the file's order. Raises `Unreadable` for what declares too much."""
    if metadata.num_rows > limits.rows:
        raise Unreadable(None, f"the file has more than {limits.rows} rows")
    if metadata.num_columns > MOST_COLUMNS:
        raise Unreadable(None, describe_columns(metadata.num_columns))
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    read = [
        (index, top)
        for index, path in enumerate(paths)
        if (top := path.partition(".")[0]) in wanted or path in wanted
    ]
    declared = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        declared += sum(group.column(index).total_uncompressed_size for index, _ in read)
    if declared > limits.bytes:
        raise Unreadable(
            None,
            f"its columns come to {declared} bytes uncompressed, and at most {limits.bytes} are "
            "read; split it",
        )
    return list(
        dict.fromkeys(paths[index] if paths[index] in wanted else top for index, top in read)
    )


def _find_flat_texts(opened: ParquetFile, columns: list[str]) -> list[str]:
    schema = opened.metadata.schema
    flat = {
        column.path
        for column in map(schema.column, range(opened.metadata.num_columns))
        if column.physical_type == "BYTE_ARRAY"
    }
    return [name for name in columns if name in flat]


def _without_nulls(value: Any) -> Any:
    """Structs without the fields that are null: parquet writes each field of any row in all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
