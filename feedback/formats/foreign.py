"""Files that are no training data, told by their first bytes and called by their name.

Owns: the table of what people send by mistake, each with the way out. Does not own: the files that
are read (`containers.py`).
"""

from __future__ import annotations

_UNPACK = "unpack it first"
_EXPORT = "export the sheet as CSV in UTF-8 first"
_CONVERT = "write it as JSON Lines, CSV or parquet first"
_UTF8 = 'save it as UTF-8 first (in Excel: "CSV UTF-8")'

_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz file", _UNPACK),
    (b"\x04\x22\x4d\x18", "an LZ4 file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook (.xls) or Office file", _EXPORT),
    (b"SQLite format 3\x00", "an SQLite database", "export its table as CSV first"),
    (b"%PDF-", "a PDF", _CONVERT),
    (b"{\\rtf", "a rich text document", _CONVERT),
    (b"ARROW1", "an Arrow (Feather) file", "write it as parquet first"),
    (b"PARE", "an encrypted parquet file", "write it without encryption first"),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"ORC", "an ORC file", _CONVERT),
    (b"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"GGUF", "a model's weights", "upload rows of training data"),
    (b"\x89PNG", "an image", "upload rows of training data"),
    (b"\xff\xd8\xff", "an image", "upload rows of training data"),
    (
        b"version https://git-lfs.github.com/spec",
        "a pointer of Git LFS and not the file",
        "run git lfs pull, then upload what it fetched",
    ),
    # The longer marks first: UTF-32's begins with UTF-16's.
    (b"\xff\xfe\x00\x00", "text in UTF-32", _UTF8),
    (b"\x00\x00\xfe\xff", "text in UTF-32", _UTF8),
    (b"\xff\xfe", "text in UTF-16 (Excel's Unicode text)", _UTF8),
    (b"\xfe\xff", "text in UTF-16", _UTF8),
)
_IN_ZIP: tuple[tuple[bytes, str, str], ...] = (
    (b"opendocument.spreadsheet", "a LibreOffice spreadsheet", _EXPORT),
    (b"xl/", "an Excel workbook", _EXPORT),
    (b"word/", "a Word document", _CONVERT),
    (b"[Content_Types].xml", "an Office file (an Excel workbook, it seems)", _EXPORT),
)
_PICKLES = tuple(b"\x80" + bytes([version]) for version in range(2, 6))


def find_foreign(head: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None for text and parquet."""
    for beginning, name, way in _BEGINNINGS:
        if head.startswith(beginning):
            return _say(name, way)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        for inside, name, way in _IN_ZIP:
            if inside in head:
                return _say(name, way)
        return _say("a zip archive", _UNPACK)
    if head.startswith(_PICKLES):
        return _say("a Python pickle", _CONVERT)
    if head[257:262] == b"ustar":
        return _say("a tar archive", _UNPACK)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return _say("a page in HTML", _CONVERT)
    if text.startswith(b"<?xml"):
        return _say("an XML file", _CONVERT)
    if _has_nul_beside_each_letter(head):
        return _say("text in UTF-16", _UTF8)
    if not head.startswith(b"PAR1") and head.count(0) * 20 > len(head):
        return _say("a binary file", _CONVERT)
    return None


def describe_not_utf8(error: UnicodeDecodeError) -> str:
    """What to do about bytes that are no UTF-8."""
    found = error.object[error.start]
    likely = "; is it Windows-1252 or Latin-1?" if found >= 0x80 else ";"
    return f"not UTF-8 (byte 0x{found:02x}: {error.reason}){likely} {_UTF8}"


def _say(name: str, way: str) -> str:
    return f"this is {name}: {way}"


def _has_nul_beside_each_letter(head: bytes) -> bool:
    """UTF-16 without its mark, which some tools leave out."""
    half = len(head[:64]) // 2
    return half > 2 and half in (head[: half * 2 : 2].count(0), head[1 : half * 2 : 2].count(0))
