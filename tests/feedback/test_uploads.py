"""Uploads: every form of training data, good and bad, and what is kept of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback import uploads
from feedback.db import Database
from feedback.errors import BadRequest, Conflict
from feedback.formats.records import Limits
from feedback.formats.rows import UploadError, read_upload
from feedback.tables import Dataset, DatasetStatus, File
from tuner.training.rows import read_rows

DATA = Path(
    os.environ.get("BURNISH_TEST_DATA")
    or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)

Row = dict[str, Any]

ASK = {"role": "user", "content": "Heron?"}
GOOD = {"role": "assistant", "content": "A bird."}
BAD = {"role": "assistant", "content": "A fish."}
SUPERVISED = ("supervised", {"prompt": [ASK], "completion": [GOOD]})
PREFERENCE = ("preference", {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]})
LABELLED = ("labelled", {"prompt": [ASK], "completion": [BAD], "label": False})


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(content: bytes, **options: Any) -> list[Row]:
    return list(read_upload(io.BytesIO(content), **options))


def said(rows: list[Row]) -> list[tuple[str, Row]]:
    """What the rows teach, without their ids and weights."""
    common = ("kind", "id", "weight")
    return [
        (row["kind"], {key: value for key, value in row.items() if key not in common})
        for row in rows
    ]


def problems(content: bytes, **options: Any) -> list[tuple[str | None, str]]:
    with pytest.raises(UploadError) as caught:
        read(content, **options)
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")
    return [(problem.place, problem.reason) for problem in caught.value.problems]


def parquet(records: list[Row]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    sink = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue()


TURNS = [{"from": "human", "value": "Heron?"}, {"from": "gpt", "value": "A bird."}]
SHOWN = {"instruction": "Heron?", "input": ""}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASK, GOOD]}, SUPERVISED),
        ({"messages": [ASK, BAD], "label": False}, LABELLED),
        (
            {
                "input": {"messages": [ASK]},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD],
            },
            PREFERENCE,
        ),
        ({"prompt": "Heron?", "completion": "A bird."}, SUPERVISED),
        ({"prompt": [ASK], "completion": [GOOD], "source": "wild"}, SUPERVISED),
        ({"prompt": "Heron?", "chosen": "A bird.", "rejected": "A fish."}, PREFERENCE),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "score": 0.5}, PREFERENCE),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PREFERENCE),
        ({"prompt": "Heron?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PREFERENCE),
        ({"prompt": "Heron?", "completion": "A fish.", "label": False}, LABELLED),
        ({**SHOWN, "output": "A bird."}, SUPERVISED),
        ({"instruction": "Heron?", "output": "A fish.", "label": False}, LABELLED),
        ({**SHOWN, "chosen": "A bird.", "rejected": "A fish."}, PREFERENCE),
        ({"conversations": TURNS, "id": "identity_0"}, SUPERVISED),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "A fish."}], "label": 0 > 1},
         LABELLED),
        (
            {
                "conversations": TURNS[:1],
                "chosen": TURNS[1],
                "rejected": {"from": "gpt", "value": "A fish."},
            },
            PREFERENCE,
        ),
    ],
)  # fmt: skip
def test_each_form_is_told_by_its_keys_and_becomes_the_same_rows(
    record: Row, expected: tuple[str, Row]
) -> None:
    for content in (
        lines(record),
        b"\xef\xbb\xbf" + lines(record),
        json.dumps([record], indent=2).encode(),
        json.dumps(record).encode(),
    ):
        assert said(read(content)) == [expected]


def test_a_chat_teaches_every_answer_that_is_not_weighted_0() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        ASK,
        {**BAD, "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "Sure"}, {"text": "now?"}]},
        {**GOOD, "weight": 1, "refusal": None},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "Welcome."},
    ]
    first, second = read(lines({"messages": turns}))
    assert [turn["content"] for turn in first["prompt"]] == [
        "Be brief.",
        "Heron?",
        "A fish.",
        "Sure\nnow?",
    ]
    assert (first["completion"], second["completion"][0]["content"]) == ([GOOD], "Welcome.")
    assert len(second["prompt"]) == 6
    assert not any("weight" in turn for row in (first, second) for turn in row["prompt"])


def test_tools_and_their_calls_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "heron"},
        GOOD,
    ]
    called, told = read(lines({"messages": turns, "tools": tools}))
    assert called["completion"] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert told["prompt"][2] == turns[2]
    assert called["tools"] == told["tools"] == tools


def test_alpacas_input_system_and_history_stand_in_the_prompt() -> None:
    record = {
        "instruction": "Name it.",
        "input": "Long legs.",
        "output": "A heron.",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    (row,) = read(lines(record))
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Name it.\nLong legs."),
    ]


def test_equal_rows_may_stand_twice_under_one_id_and_a_weight_is_kept() -> None:
    record = {"prompt": "Heron?", "completion": "A bird."}
    one, two, heavy = read(lines(record, record, {**record, "weight": 2}))
    assert one == two
    assert (one["id"], one["weight"], heavy["weight"]) == (heavy["id"], 1.0, 2.0)


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_a_csv_is_read_by_its_header(delimiter: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows(
        [
            ["prompt", "completion", "label"],
            ["Heron?", "A bird,\nor so; a \"tall\" one", "TRUE"],
            [],
            ["Eel?", "A bird.", "0"],
        ]
    )  # fmt: skip
    rows = read(text.getvalue().encode())
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [
        ('A bird,\nor so; a "tall" one', True),
        ("A bird.", False),
    ]


def test_columns_are_mapped_and_the_others_passed_over() -> None:
    columns = {"prompt": "question", "completion": "reply"}
    record = {"question": "Heron?", "reply": "A bird.", "label": "unsure", "at": 1.5}
    table = b"question,reply,label\nHeron?,A bird.,unsure\n"
    for content in (table, lines(record), parquet([record])):
        assert said(read(content, columns=columns)) == [SUPERVISED]
    assert problems(table, columns={"prompt": "question", "completion": "answer"}) == [
        ("line 2", "there is no column 'answer'; found 'question', 'reply', 'label'")
    ]
    optional = {**columns, "tools": "functions"}
    sometimes = lines(record, {**record, "functions": []})
    assert said(read(sometimes, columns=optional)) == [SUPERVISED] * 2


def test_a_parquet_file_holds_nested_turns_and_its_rows_are_numbered() -> None:
    records: list[Row] = [{"messages": [ASK, GOOD], "score": float("nan")} for _ in range(200)]
    assert said(read(parquet(records))) == [SUPERVISED] * 200
    records[150] = {"messages": [ASK], "score": 1.0}
    ((place, reason),) = problems(parquet(records))
    assert place == "row 151"
    assert "the last message is of the role 'user'" in reason


def test_a_broken_parquet_file_is_refused_and_a_missing_package_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = parquet([{"prompt": "Heron?", "completion": "A bird."}])
    for content in (whole[:-20], b"PAR1" + b"\x00" * 50, whole[:40] + b"\xff" * 30 + whole[70:]):
        ((place, reason),) = problems(content)
        assert place is None
        assert "parquet" in reason
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ((_, reason),) = problems(whole)
    assert "install the extra 'parquet'" in reason


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "Herons."}, "its keys are 'text'; expected those of OpenAI's preference"),
        ({}, "its keys are none"),
        ({"messages": []}, "'messages' is []; expected a list of messages"),
        ({"messages": "Heron?"}, "'messages' is 'Heron?'"),
        ({"messages": [{"role": "bird", "content": ""}, GOOD]}, "expected a message with a 'role'"),
        ({"messages": [ASK, {**GOOD, "audio": 1}]}, "the key 'audio'"),
        ({"messages": [ASK, {**GOOD, "weight": 0.5}]}, "of weight 0.5; 0 or 1"),
        ({"messages": [ASK, {**GOOD, "weight": 0}]}, "no assistant message of a weight above 0"),
        ({"messages": [GOOD]}, "no assistant message"),
        ({"messages": [ASK]}, "the last message is of the role 'user'"),
        ({"messages": [ASK, {"role": "assistant"}]}, "a message of 'assistant' without content"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "the answer is empty"),
        ({"messages": [ASK, {"role": "assistant", "content": 5}]}, "content other than text: 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, GOOD]},
            "content other than text",
        ),
        ({"messages": [ASK, {**GOOD, "tool_calls": [{"id": "1"}]}]}, "without a function's name"),
        ({"messages": [{**ASK, "tool_calls": [{}]}, GOOD]}, "not the assistant's"),
        ({"messages": [ASK, GOOD], "tools": "{"}, "'tools' is a text that is no JSON"),
        ({"messages": [ASK, GOOD], "tools": {"a": 1}}, "expected a list of objects"),
        ({"messages": [ASK, GOOD], "label": "maybe"}, "'label' is 'maybe'; expected true or false"),
        ({"messages": [GOOD], "label": True}, "there is no message before the answer"),
        (
            {"input": "Heron?", "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "'input' is 'Heron?'; expected an object",
        ),
        (
            {
                "input": {"messages": [ASK]},
                "preferred_output": [GOOD, GOOD],
                "non_preferred_output": [BAD],
            },
            "'preferred_output' must be one assistant message, found",
        ),
        ({"prompt": "", "completion": "A bird."}, "'prompt' is empty"),
        ({"prompt": "Heron?", "completion": [ASK]}, "found the role 'user'"),
        ({"prompt": "Heron?", "completion": "A bird.", "weight": 0}, "'weight' is 0"),
        ({"prompt": "Heron?", "completion": "A bird.", "weight": True}, "'weight' is True"),
        ({"prompt": "Heron?", "chosen": "Same.", "rejected": "Same."}, "nothing to prefer"),
        ({"chosen": [ASK, GOOD], "rejected": [BAD]}, "begin differently"),
        ({"chosen": "A bird.", "rejected": "A fish."}, "there is no 'prompt'"),
        (
            {"prompt": "Eel?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            "'prompt' is not what",
        ),
        ({"instruction": "", "input": " ", "output": "A bird."}, "'instruction' and 'input' are"),
        ({"instruction": "Heron?", "output": ["A bird."]}, "'output' is ['A bird.']"),
        ({"instruction": "Heron?", "output": "A bird.", "history": [["Hi"]]}, "'history' must be"),
        ({"conversations": [{"value": "Hi"}]}, "expected a turn with 'from' and 'value'"),
        (
            {"conversations": [{"from": "observation", "value": "{}"}, TURNS[1]]},
            "the turn 'observation' without a 'function_call' before it",
        ),
        ({"prompt": "a\x00b", "completion": "A bird."}, "it has a NUL"),
        ({"prompt": "\ud800", "completion": "A bird."}, "half of a surrogate pair"),
        ({"messages": [ASK, GOOD], "tools": [{"a": float("nan")}]}, "NaN is no JSON"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named_with_the_reason(
    record: Any, expected: str
) -> None:
    ((place, reason),) = problems(b"\n" + lines(record))
    assert place == "line 2"
    assert expected in reason


@pytest.mark.parametrize(
    ("content", "place", "expected"),
    [
        (b"", None, "the file is empty"),
        (b"\xef\xbb\xbf \n\t\n", None, "the file is empty"),
        (b"[]", None, "the file has no rows"),
        (b"prompt,completion\n", None, "the file has no rows"),
        (b'{"prompt": "a"\n', "line 1", "not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "a", "prompt": "b"}\n', "line 1", "the key 'prompt' stands twice"),
        (b'{"prompt": "a\xff", "completion": "b"}\n', "line 1", "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1", "nested deeper"),
        (b"[" * 100_000, "line 1 (row 1)", "nested deeper"),
        (b'{"prompt": "a", "completion": "b"}\n["c"]\n', "line 2", "found a list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1", "limit"),
        (b'[{"prompt": "a"\n "b": 1}, {}]' + b" " * 99, "line 1 (row 1)", "not JSON: Expecting"),
        (b'[\n{"prompt": "a', "line 2 (row 1)", "not JSON: Unterminated string"),
        (b"[\n5]", "line 2 (row 1)", "found a number"),
        (b'[{"prompt": "a", "completion": "b"}\n{}]', "line 2", "found '{', expected ','"),
        (b'[{"prompt": "a", "completion": "b"}', "line 1", "found the file's end"),
        (b'[{"prompt": "a", "completion": "b"}]\n[]', "line 2", "behind the array's end"),
        (b'[{"prompt": "\xff"}]', "line 1 or below", "not UTF-8"),
        (b"prompt,prompt\na,b\n", "line 1", "names the column 'prompt' twice"),
        (b"prompt,completion\na,b,c\n", "line 2", "it has 3 columns, the header has 2"),
        (b'prompt,completion\na,"b', "line 2", "not CSV"),
        (b'prompt,completion\na,"b"c\n', "line 2", "not CSV"),
        (b"just some prose", None, "the file has no rows"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_cannot_be_read_says_where(
    content: bytes, place: str | None, expected: str
) -> None:
    found, *more = problems(content)
    assert found[0] == place
    assert expected in found[1]
    assert not more


def test_one_file_holds_one_form() -> None:
    ((place, reason),) = problems(
        lines({"messages": [ASK, GOOD]}, {"prompt": "Heron?", "completion": "A fish.", "label": 0})
    )
    assert place == "line 2"
    assert "the file began with OpenAI's chat (messages)" in reason


def test_the_first_ten_problems_are_told_and_no_row_after_the_first() -> None:
    good = {"prompt": "Heron?", "completion": "A bird."}
    content = lines(good, *[{"prompt": str(number)} for number in range(20)], good)
    rows = []
    with pytest.raises(UploadError) as caught:
        rows.extend(read_upload(io.BytesIO(content)))
    assert [problem.place for problem in caught.value.problems] == [
        f"line {number}" for number in range(2, 12)
    ]
    assert caught.value.message.startswith("line 2: its keys are 'prompt'; expected")
    assert caught.value.message.endswith("; there may be more")


def test_a_message_can_be_sent_whatever_the_file_held() -> None:
    with pytest.raises(UploadError) as caught:
        read(b'{"\\ud800": 1}\n{"messages": [{"role": "\\udfff"}]}\n')
    assert caught.value.message.encode()


def test_limits_hold_for_rows_of_a_file_and_bytes_of_a_row() -> None:
    record = {"prompt": "Heron?", "completion": "A bird." * 20}
    few = Limits(rows=2, row_bytes=600)
    assert len(read(lines(record, record), limits=few)) == 2
    assert problems(lines(record, record, record), limits=few) == [
        ("line 3", "the file has more than 2 rows")
    ]
    assert problems(parquet([record] * 3), limits=few)[0][1] == "the file has more than 2 rows"
    long = {**record, "completion": "A bird." * 100}
    for content in (lines(long), json.dumps([long]).encode(), parquet([long])):
        assert "has more than 600 bytes" in problems(content, limits=few)[0][1]
    unclosed = b'prompt,completion\na,"b\n' + b"long\n" * 200
    assert problems(unclosed, limits=few)[0][1].endswith("is a quotation mark missing?")
    # A long chat becomes a row for each answer, each with all that came before.
    chat = {"messages": [ASK, GOOD] * 50}
    ((place, reason),) = problems(lines(chat), limits=Limits(bytes=50_000))
    assert (place, "with a row for each answer" in reason) == ("line 1", True)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = json.dumps({"instruction": "Heron?", "output": "A bird." * 500})
    file = tmp_path / "large.json"
    with file.open("w") as stream:
        stream.write("[" + record)
        for _ in range(2_000):
            stream.write(",\n" + record)
        stream.write("]")
    with file.open("rb") as stream:
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_upload(stream)) == 2_001
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert file.stat().st_size > 7_000_000
    assert peak < 1_500_000


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1),
            st.integers(0, 70_000),
        ).filter(lambda pair: pair[0].strip() != ""),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)  # fmt: skip
def test_an_array_says_what_its_elements_say_as_lines(
    texts: list[tuple[str, int]], ascii_only: bool
) -> None:
    records = [{"prompt": text, "completion": text + "é" * more} for text, more in texts]
    array = json.dumps(records, ensure_ascii=ascii_only, indent=1).encode()
    assert read(array) == read(lines(*records))


@pytest.mark.parametrize(
    ("options", "param", "expected"),
    [
        ({"format": "xml"}, "format", "expected one of openai, trl, alpaca"),
        ({"columns": []}, "columns", "must be an object"),
        ({"columns": {}}, "columns", "must be an object"),
        ({"columns": {"answer": "reply"}}, "columns", "has the key 'answer'"),
        ({"columns": {"prompt": 1}}, "columns", "columns.prompt must be"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    options: dict[str, Any], param: str, expected: str
) -> None:
    with pytest.raises(BadRequest, match=expected) as caught:
        read(lines({"prompt": "Heron?", "completion": "A bird."}), **options)
    assert caught.value.param == param


def test_a_format_that_is_named_is_the_only_one_tried() -> None:
    record = {"prompt": "Heron?", "completion": "A bird."}
    for name in ("trl", "jsonl"):
        assert said(read(lines(record), format=name)) == [SUPERVISED]
    for name in ("openai", "alpaca", "sharegpt"):
        assert "its keys are 'prompt', 'completion'" in problems(lines(record), format=name)[0][1]
    for name in ("json", "csv", "parquet"):
        assert problems(lines(record), format=name)


# What is kept


def accept(data: Path, content: bytes, filename: str = "birds.jsonl") -> uploads.Upload:
    incoming = uploads.begin(data)
    try:
        incoming.original.write_bytes(content)
        return uploads.accept(incoming, filename=filename)
    finally:
        incoming.discard()


def test_an_upload_is_kept_as_rows_that_the_trainer_reads(
    database: Database, tmp_path: Path
) -> None:
    content = lines({"messages": [ASK, BAD, ASK, GOOD]})
    upload = accept(tmp_path, content, "../../etc/bi\nrds\u202e.jsonl")
    with database.write() as session:
        uploads.create_file(session, upload, person_id="per_1")
    with database.read() as session:
        row = session.get_one(File, upload.id)
    assert (row.filename, row.kind, row.rows, row.side, row.dialect) == (
        "birds.jsonl",
        "supervised",
        2,
        None,
        "trl",
    )
    kept = (tmp_path / row.path).read_bytes()
    assert (row.bytes, row.sha256) == (len(kept), hashlib.sha256(kept).hexdigest())
    assert [len(read.prompt) for read in read_rows([tmp_path / row.path])] == [1, 3]
    folder = (tmp_path / row.path).parent
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "rows.jsonl"]
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["original_sha256"] == hashlib.sha256(content).hexdigest()
    # Its own rows can be uploaded again, and are the same.
    assert accept(tmp_path, kept).sha256 == row.sha256

    with database.write() as session:
        locked = uploads.lock_upload(session, row.id)
        session.delete(locked)
    uploads.remove_content(tmp_path, row.id)
    assert not folder.exists()


def test_a_refused_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UploadError):
        accept(tmp_path, lines({"messages": [ASK, GOOD]}, {"messages": [ASK]}))
    assert list((tmp_path / "files").iterdir()) == []


def test_a_file_of_a_data_set_is_not_an_upload(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        session.add(Dataset(id="ds_1", deployment="assistant", status=DatasetStatus.READY))
        session.flush()
        facts = {"filename": "a", "bytes": 1, "sha256": "0", "path": "a", "rows": 1}
        session.add(File(id="file-1", dataset_id="ds_1", **facts))
        session.flush()
        with pytest.raises(Conflict, match="part of ds_1"):
            uploads.lock_upload(session, "file-1")
        assert uploads.lock_upload(session, "file-2") is None


def test_what_a_killed_process_left_goes_after_a_day(
    sqlite_database: Database, tmp_path: Path
) -> None:
    upload = accept(tmp_path, lines({"messages": [ASK, GOOD]}))
    home = tmp_path / "files"
    for name in ("file-old", "file-old.partial", "file-new.partial"):
        (home / name).mkdir()
    for folder in home.iterdir():
        if "new" not in folder.name:
            os.utime(folder, (0, 0))
    with sqlite_database.write() as session:
        uploads.create_file(session, upload, person_id="per_1")
        uploads.remove_leftovers(session, tmp_path)
    assert sorted(folder.name for folder in home.iterdir()) == sorted(
        [upload.id, "file-new.partial"]
    )


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("instructions.jsonl", "supervised", 999), ("preferences.jsonl", "preference", 200)],
)
def test_real_files_are_taken_whole(tmp_path: Path, name: str, kind: str, count: int) -> None:
    file = DATA / name
    if not file.exists():
        # Data of others is never part of the project, so a plain checkout doesn't have it.
        pytest.skip(f"{name} is not there; BURNISH_TEST_DATA names a directory that has it")
    upload = accept(tmp_path, file.read_bytes())
    assert (upload.kind, upload.rows) == (kind, count)
    assert len(read_rows([tmp_path / upload.path])) == count
