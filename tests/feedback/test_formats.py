"""Files are read as what they are, or refused by line: never silently as something else."""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
import tarfile
import zipfile
from typing import Any

import pytest

from feedback.formats import parquet as parquet_format
from feedback.formats.records import Limits, find_twice
from feedback.formats.rows import UploadError, read_upload

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Row = dict[str, Any]

ASK = {"role": "user", "content": "Which bird?"}
GOOD = {"role": "assistant", "content": "A heron."}
BAD = {"role": "assistant", "content": "A carp."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(*records: Row, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(list(records)), sink, **options)
    return sink.getvalue()


def read(content: bytes, **options: Any) -> list[Row]:
    return list(read_upload(io.BytesIO(content), **options))


def refusals(content: bytes, **options: Any) -> list[str]:
    with pytest.raises(UploadError) as caught:
        read(content, **options)
    return [str(problem) for problem in caught.value.problems]


def refusal(content: bytes, **options: Any) -> str:
    (found,) = refusals(content, **options)
    return found


# Two forms at once


def test_a_pair_that_carries_its_better_chat_too_is_a_pair() -> None:
    chats = [ASK, GOOD]
    whole = {"prompt": "Which bird?", "chosen": chats, "rejected": [ASK, BAD]}
    for record in ({**whole, "messages": chats}, {**PAIR, "messages": chats}):
        (row,) = read(lines({**record, "score": 8.5}))
        assert (row["kind"], row["chosen"], row["rejected"]) == ("preference", [GOOD], [BAD])


def test_a_chat_that_is_there_under_two_names_is_read_once() -> None:
    turns = [{"from": "human", "value": "Which bird?"}, {"from": "gpt", "value": "A heron."}]
    for more in ({"conversations": turns}, {"prompt": "Which bird?", "completion": "A heron."}):
        (row,) = read(lines({"messages": [ASK, GOOD], **more}))
        assert row["completion"] == [GOOD]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [ASK, BAD]},
        {"messages": [SYSTEM, ASK, GOOD]},
        {"completion": "A stork."},
        {"instruction": "Which bird?", "output": "A stork."},
    ],
)
def test_a_record_of_two_forms_that_say_different_things_is_refused(more: Row) -> None:
    record = {**PAIR, **more}
    assert "which say different things; name the keys that count" in refusal(lines(record))
    columns = {key: key for key in PAIR}
    assert [row["kind"] for row in read(lines(record), columns=columns)] == ["preference"]


def test_an_empty_column_makes_no_second_form() -> None:
    content = b"prompt,completion,chosen,rejected\nWhich bird?,A heron.,,\n"
    assert [row["kind"] for row in read(content)] == ["supervised"]


# Columns


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Which bird?", "completion": "A heron."},
        {"prompt": "Which bird?", "chosen": "A heron.", "rejected": "A carp."},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Which bird?", "completion": "A heron.", "label": True},
        {"messages": [ASK, GOOD]},
        {"instruction": "Which bird?", "output": "A heron."},
        {"conversations": [{"from": "human", "value": "Which bird?"},
                           {"from": "gpt", "value": "A heron."}]},
    ],
)  # fmt: skip
def test_a_system_column_becomes_a_system_message_in_every_form(record: Row) -> None:
    for content in (
        lines({**record, "system": "Be brief."}),
        table({**record, "system": "Be brief."}),
    ):
        (row,) = read(content)
        assert row["prompt"] == [SYSTEM, ASK]
    assert read(lines({**record, "system": ""}))[0]["prompt"] == [ASK]


def test_two_system_prompts_that_differ_are_refused() -> None:
    chat = {"messages": [SYSTEM, ASK, GOOD]}
    assert read(lines({**chat, "system": "Be brief."})) == read(lines(chat))
    assert "'system' is not the system message" in refusal(lines({**chat, "system": "Be long."}))


def test_a_mapped_column_that_says_nothing_is_refused_by_name() -> None:
    record = {"q": "Which bird?", "good": "A heron.", "bad": "A carp.", "extra": "no"}
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    for name in ("history", "input", "label"):
        assert f"has no use for {name!r}" in refusal(lines(record), columns={**pair, name: "extra"})
    gone = {**pair, "system": "sytsem"}
    assert refusal(lines(record, record), columns=gone) == (
        "'columns' maps 'system' to 'sytsem', which no row has"
    )


# Labels, weights, roles


@pytest.mark.parametrize(
    ("good", "bad"),
    [(True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0"), ("TRUE", " false ")],
)
def test_good_and_bad_are_told_alike_in_every_container(good: Any, bad: Any) -> None:
    records = [
        {"prompt": "Which bird?", "completion": "A heron.", "label": label} for label in (good, bad)
    ]
    text = f"prompt,completion,label\na,b,{good}\na,c,{bad}\n".encode()
    for content in (lines(*records), json.dumps(records).encode(), table(*records), text):
        assert [row["label"] for row in read(content)] == [True, False]


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "", [1]])
def test_other_labels_are_refused(label: Any) -> None:
    record = {"prompt": "Which bird?", "completion": "A heron.", "label": label}
    assert "expected true or false, or 1 or 0" in refusal(lines(record))


def test_an_answer_that_was_cut_off_stays_marked_so() -> None:
    marked = [
        read(lines({"prompt": [ASK], "chosen": [GOOD], "rejected": [{**BAD, "cut_off": cut}]}))
        for cut in (True, False, None)
    ]
    assert [row["rejected"][0].get("cut_off") for (row,) in marked] == [True, None, None]
    found = refusal(lines({"prompt": [ASK], "completion": [{**GOOD, "cut_off": 1}]}))
    assert "'cut_off' 1; true or false" in found


def test_what_a_better_answer_corrects_is_kept_and_is_no_part_of_what_it_teaches() -> None:
    plain = {"prompt": [ASK], "completion": [GOOD]}
    (alone,), (corrected,), (text,) = (
        read(lines({**plain, "corrects": worse})) for worse in (None, [BAD], BAD["content"])
    )
    assert "corrects" not in alone
    assert corrected["corrects"] == text["corrects"] == [BAD]
    assert alone["id"] == corrected["id"]
    for worse, expected in (
        ([BAD, ASK], "'corrects'"),
        ([{**BAD, "content": "a\x00"}], "it has a NUL"),
        (7, "'corrects'"),
    ):
        assert expected in refusal(lines({**plain, "corrects": worse}))


def test_the_only_answer_of_a_row_cannot_have_the_weight_0() -> None:
    unweighted = {**GOOD, "weight": 0}
    for record in (
        {"prompt": [ASK], "completion": [unweighted]},
        {"messages": [ASK, unweighted], "label": True},
    ):
        assert "weight 0, so nothing is taught" in refusal(lines(record))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user", "content": " "}, GOOD]}, "before the answer are empty"),
        ({"messages": [ASK, {**GOOD, "reasoning_content": "Legs."}]}, "leave it out, or write it"),
        ({"messages": [ASK, {**GOOD, "function_call": {}, "x": 1}]}, "write calls as 'tool_calls'"),
        ({"messages": "[{'role': 'user', 'content': 'Hi'}]"}, "Python's way of writing a list"),
        ({"prompt": "[{'role': 'user'}]", "completion": "Hi"}, "Python's way of writing a list"),
        ({"messages": "Which bird?"}, "'messages' is 'Which bird?', a text that is no JSON"),
        ({"chosen": "Human: Hi\n\nAssistant: Hello.", "rejected": "Human: Hi\n\nAssistant: No."},
         "Split off the prompt"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": "Hello."}, "a whole dialogue"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n", "completion": "Hello."}, "chat template"),
        ({"messages": [ASK, GOOD], "tools": [{"a": 1}]}, '{"type": "function"'),
        ({"messages": [ASK, GOOD], "tools": '[{"a": 1, "a": 2}]'}, "'a' stands twice"),
        ({"data": [{"messages": [ASK, GOOD]}]}, "below the key 'data'; upload that array alone"),
    ],
)  # fmt: skip
def test_what_would_be_read_as_something_else_is_refused_with_a_way_out(
    record: Row, expected: str
) -> None:
    found = refusal(lines(record))
    assert found.startswith("line 1: ")
    assert expected in found


# Tools


def _call(arguments: Any) -> Row:
    function = {"name": "find", "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]}


def test_arguments_are_an_object_whose_keys_stay_in_order() -> None:
    for sent in ({"z": 1, "a": {"y": 2, "b": 3}}, '{"z": 1, "a": 2}'):
        (row,) = read(lines(_call(sent)))
        kept = row["completion"][0]["tool_calls"][0]["function"]["arguments"]
        assert json.dumps(kept) == json.dumps(sent)
    for nothing in (None, "", "{}"):
        (row,) = read(lines(_call(nothing)))
        assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == "{}"
    for broken in ('{"city": "Os', "[1]", '{"a": 1, "a": 2}', 7, "Oslo"):
        found = refusal(lines(_call("{}"), _call(broken)))
        assert found.startswith("line 2: ")
        assert "call of 'find' whose 'arguments' are" in found


def test_sharegpts_calls_and_results_become_openais() -> None:
    turns = [
        {"from": "human", "value": "Which bird?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"z": 1, "a": 2}}'},
        {"from": "observation", "value": "heron"},
        {"from": "gpt", "value": "A heron."},
    ]
    tools = json.dumps([{"name": "look", "parameters": {"type": "object"}}])
    called, told = read(lines({"conversations": turns, "tools": tools}))
    (call,) = called["completion"][0]["tool_calls"]
    assert json.dumps(call["function"]) == '{"name": "look", "arguments": {"z": 1, "a": 2}}'
    assert told["prompt"][2] == {"role": "tool", "content": "heron", "tool_call_id": call["id"]}
    assert told["tools"][0]["function"] == {"name": "look", "parameters": {"type": "object"}}
    assert "is a text and not JSON" in refusal(
        lines({"conversations": [turns[0], {"from": "function_call", "value": "look()"}]})
    )


def test_what_parquet_fills_in_is_absent() -> None:
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": {"place": {"type": "a"}}}},
        {"type": "function", "function": {"name": "hear", "parameters": {"sound": {"type": "b"}}}},
    ]
    records = [
        {"messages": [ASK, {**GOOD, "weight": 1}], "tools": [tools[0]]},
        {"messages": [ASK, {**GOOD, "name": "bird"}], "tools": [tools[1]]},
        {"messages": [ASK, GOOD], "tools": None},
    ]
    assert read(table(*records)) == read(lines(*records))


# Spreadsheets, and lists in tables


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nprompt;completion\nWhich, bird?;A heron.\n",
        "sep=|\r\nprompt|completion\r\nWhich, bird?|A heron.\r\n",
        '\ufeff"sep=;"\nprompt;completion\nWhich, bird?;A heron.\n',
        ";;\n\nprompt;completion;\nWhich, bird?;A heron.;\n",
        'prompt,completion,,\n"Which, bird?",A heron.,,\n,,,\n',
        'prompt,completion\n"Which, bird?",A heron.,,\n',
        ',prompt,completion\n0,"Which, bird?",A heron.\n',  # with pandas' index
        '\ufeffprompt,completion\r\n"Which, bird?",A heron.',
    ],
)
def test_what_spreadsheets_add_to_a_csv_is_passed_over(content: str) -> None:
    (row,) = read(content.encode())
    assert row["prompt"][0]["content"] == "Which, bird?"
    assert row["completion"][0]["content"] == "A heron."


def test_a_csv_still_says_its_lines() -> None:
    content = b"sep=;\n;;\nprompt;completion\na;b\n\na;b;c\n"
    assert refusal(content) == "line 6: it has 3 columns, the header has 2"


def test_a_list_of_messages_may_be_json_text_in_a_table() -> None:
    written = {key: json.dumps(value) for key, value in PAIR.items()}
    cells = ",".join('"' + text.replace('"', '""') + '"' for text in written.values())
    csv = f"{','.join(written)}\n{cells}\n".encode()
    for content in (csv, table(written), lines(written)):
        assert read(content) == read(lines(PAIR))
    chat = {"messages": json.dumps([ASK, GOOD])}
    assert read(table(chat)) == read(lines({"messages": [ASK, GOOD]}))


# Layouts: one message, not ten


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (json.dumps({"messages": [ASK, GOOD]}, indent=1), "goes on over several lines"),
        (json.dumps({"data": [{"messages": [ASK, GOOD]}]}, indent=1), "upload that array alone"),
        ('{"data": [\n{"messages": []},\n{"messages": []}\n]}', "below the key 'data'"),
        ('{"prompt": "a", "completion": "b"},\n' * 3, "a comma stands between the rows"),
        ('{"prompt": "a", "completion": "b"}\n,{"prompt": "a", "completion": "b"}\n' * 2,
         "a comma stands between the rows"),
        ('{"prompt": "a", "completion": "b"}{"prompt": "a", "completion": "b"}\n' * 3,
         "a second object stands on the line"),
        ('[{"prompt": "a", "completion": "b"},\n]', "a comma stands before the array's end"),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_said_once(content: str, expected: str) -> None:
    assert expected in refusal(content.encode())


def test_a_broken_first_line_is_one_line_among_others() -> None:
    good = {"prompt": "a", "completion": "b"}
    found = refusals(b'{"prompt": "a"\n' + lines(good) + b'{"prompt": \n')
    assert [text.partition(": ")[0] for text in found] == ["line 1", "line 3"]


def _zip(*names: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return sink.getvalue()


def _tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return sink.getvalue()


def _sqlite() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE rows (a)")
        return database.serialize()


GOOD_LINE = lines({"prompt": "a", "completion": "é"})
FOREIGN = {
    "gzip": (gzip.compress(GOOD_LINE), "a gzip file: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "a Zstandard file: unpack it first"),
    "bzip2": (b"BZh91AY&SY", "a bzip2 file"),
    "xz": (b"\xfd7zXZ\x00", "an xz file"),
    "zip": (_zip("rows.jsonl"), "a zip archive: unpack it first"),
    "xlsx": (_zip("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook: export the sheet"),
    "docx": (_zip("word/document.xml"), "a Word document"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an old Excel workbook"),
    "tar": (_tar(), "a tar archive"),
    "sqlite": (_sqlite(), "an SQLite database"),
    "pdf": (b"%PDF-1.7\n", "a PDF"),
    "html": (b"\n<!DOCTYPE html><html>", "a page in HTML"),
    "xml": (b'<?xml version="1.0"?>', "an XML file"),
    "feather": (b"ARROW1\x00\x00", "an Arrow (Feather) file: write it as parquet"),
    "pickle": (b"\x80\x04\x95", "a Python pickle"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    "utf-16": ("prompt,completion\na,b\n".encode("utf-16"), "text in UTF-16"),
    "utf-16 unmarked": ("prompt,completion\na,b\n".encode("utf-16-be"), "text in UTF-16"),
    "utf-32": ("prompt,completion\n".encode("utf-32"), "text in UTF-32"),
    "cp1252": ("prompt,completion\nKafé,b\n".encode("cp1252"), "is it Windows-1252 or Latin-1?"),
    "binary": (bytes(range(256)) * 2 + bytes(100), "a binary file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_called_by_its_name(kind: str) -> None:
    content, expected = FOREIGN[kind]
    assert expected in refusal(content)
    assert expected in refusal(content, format="jsonl" if kind != "cp1252" else "csv")


def test_letters_that_look_like_line_ends_and_marks_are_kept() -> None:
    said = "one\u2028two\u2029three\x85four \ufeff five \U0001f469\u200d\U0001f680"
    record = {"messages": [ASK, {"role": "assistant", "content": said}]}
    text = json.dumps(record, ensure_ascii=False)
    content = f"\ufeff{text}\r\n\r\n \t\n{text}".encode()
    assert [row["completion"][0]["content"] for row in read(content)] == [said] * 2


# Bounds before work


class _Counted(str):
    """A name that counts how often it is compared."""

    compared = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return str.__eq__(self, other)


@pytest.mark.parametrize("count", [1_000, 20_000])
def test_looking_for_a_name_that_stands_twice_is_linear(count: int) -> None:
    names: list[str] = [_Counted(number) for number in range(count)]
    _Counted.compared = 0
    assert find_twice(names) is None
    assert find_twice([*names, _Counted(count - 1)]) == str(count - 1)
    assert _Counted.compared < 4 * count


def test_columns_without_a_meaning_are_not_read() -> None:
    record = {"prompt": "Which bird?", "completion": "A heron.", "junk": "x" * 1_000}
    content = bytearray(table(*[record] * 100, compression="none", use_dictionary=False))
    chunk = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(2)
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    content[start : start + size] = b"\xff" * size  # nobody who reads it gets far
    assert len(read(bytes(content))) == 100
    mapped = {"prompt": "prompt", "completion": "junk"}
    assert "not a readable parquet file" in refusal(bytes(content), columns=mapped)


def test_what_parquet_declares_is_checked_before_it_is_read() -> None:
    heavy = table({"prompt": "a", "completion": "b" * 100_000})
    assert "uncompressed, and at most 50000 are read" in refusal(heavy, limits=Limits(bytes=50_000))
    light = table({"prompt": "a", "completion": "b", "junk": "c" * 100_000})
    assert len(read(light, limits=Limits(bytes=50_000))) == 1
    wide = table({"prompt": "a", "completion": "b", **{f"c{i}": 1 for i in range(10_000)}})
    assert "it has 10002 columns, and at most 10000 are read" in refusal(wide)
    footer = (parquet_format.MOST_FOOTER_BYTES + 1).to_bytes(4, "little")
    assert "its metadata has" in refusal(light[:-8] + footer + b"PAR1")


def test_a_text_that_repeats_in_parquet_is_held_once() -> None:
    text = "x" * 200_000
    sink = io.BytesIO()
    pq.write_table(pyarrow.table({"prompt": ["a"] * 64, "completion": [text] * 64}), sink)
    held = max(pyarrow.total_allocated_bytes() for _ in read_upload(sink))
    assert held < 16 * len(text)


def test_one_chat_has_an_end_to_the_rows_that_come_of_it() -> None:
    chat = {"messages": [ASK, GOOD] * 100}
    few = Limits(record_bytes=100_000)
    assert len(read(lines(*[{"messages": [ASK, GOOD]}] * 500), limits=few)) == 500
    assert "it comes to more than 100000 bytes; split the chat" in refusal(lines(chat), limits=few)


def test_json_has_an_end_to_its_depth_and_digits() -> None:
    for content in (b'{"a": %s}', b'[{"a": %s}]'):
        digits = refusal(content % (b"9" * 5_000))
        assert "a number with more than 4300 digits, which is the limit" in digits
        assert "nested deeper than 64 levels" in refusal(content % (b"[" * 9_999 + b"]" * 9_999))


def test_a_csv_has_an_end_to_its_columns_and_cells() -> None:
    many = ",".join(f"c{number}" for number in range(20_000)).encode()
    assert "it has 20000 columns, and at most 10000 are read" in refusal(many + b"\n")
    long = b"prompt,completion\na," + b"b" * 5 * 2**20
    assert refusal(long) == "line 2: it has more than 4194304 bytes"
