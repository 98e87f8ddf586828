"""Uploads and files of data sets, through OpenAI's own client."""

from __future__ import annotations

import hashlib
import json
import shutil

import openai
import pytest

from feedback.tables import File
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_dataset


@pytest.fixture
def dataset_file(sqlite_gateway: RunningGateway) -> str:
    """The file of training rows of a small data set."""
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    for number in range(8):
        answer = add_answer(sqlite_gateway.database, "anna", prompt=f"Which bird is {number}?")
        anna.post("/v1/feedback", json={"completion_id": answer, "kind": "rating", "value": True})
    made = add_dataset(sqlite_gateway.database, sqlite_gateway.gateway.settings.data)
    shown = sqlite_gateway.client().get(f"/admin/datasets/{made.id}").json()
    found: str = shown["files"]["labelled"]
    return found


def _client(running: RunningGateway, key: str | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key or running.admin_key)


def test_the_client_lists_retrieves_and_reads_a_file(
    sqlite_gateway: RunningGateway, dataset_file: str
) -> None:
    with _client(sqlite_gateway) as client:
        listed = client.files.list()
        found = client.files.retrieve(dataset_file)
        content = client.files.content(dataset_file).content

    assert dataset_file in [file.id for file in listed]
    assert (found.object, found.purpose, found.status) == ("file", "fine-tune", "processed")
    assert found.bytes == len(content)
    rows = [json.loads(line) for line in content.splitlines()]
    assert {row["label"] for row in rows} == {True}
    assert rows[0]["prompt"][0]["role"] == "user"


def test_a_page_is_as_long_as_asked_for(sqlite_gateway: RunningGateway, dataset_file: str) -> None:
    with _client(sqlite_gateway) as client:
        everything = [file.id for file in client.files.list()]
        by_ones = [file.id for file in client.files.list(limit=1)]  # follows `after`
        forward = [file.id for file in client.files.list(order="asc")]
    assert len(everything) > 1
    assert by_ones == everything == forward[::-1]


def test_files_of_other_deployments_are_unknown(
    sqlite_gateway: RunningGateway, dataset_file: str
) -> None:
    key = sqlite_gateway.key("tu", "tune", deployments=["poet"])
    with _client(sqlite_gateway, key) as client:
        assert list(client.files.list()) == []
        for call in (client.files.retrieve, client.files.content):
            with pytest.raises(openai.NotFoundError):
                call(dataset_file)


def test_a_row_that_points_out_of_the_data_directory_is_not_followed(
    sqlite_gateway: RunningGateway, dataset_file: str
) -> None:
    (sqlite_gateway.gateway.settings.data.parent / "secret").write_text("secret")
    admin = sqlite_gateway.client()
    for path in ("../secret", "/etc/passwd", "datasets", "gone.jsonl"):
        with sqlite_gateway.database.write() as session:
            session.get_one(File, dataset_file).path = path
        assert admin.get(f"/v1/files/{dataset_file}/content").status_code == 404, path


CHAT = {
    "messages": [
        {"role": "user", "content": "What is a heron?"},
        {"role": "assistant", "content": "A bird."},
    ]
}


def _lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _folders(running: RunningGateway) -> list[str]:
    home = running.gateway.settings.data / "files"
    return sorted(folder.name for folder in home.iterdir()) if home.exists() else []


def test_the_client_uploads_reads_and_deletes_a_file(sqlite_gateway: RunningGateway) -> None:
    key = sqlite_gateway.key("tu", "tune")
    sent = _lines(CHAT, CHAT)
    with _client(sqlite_gateway, key) as client:
        made = client.files.create(file=("birds.jsonl", sent), purpose="fine-tune")
        assert (made.object, made.filename, made.purpose, made.status) == (
            "file",
            "birds.jsonl",
            "fine-tune",
            "processed",
        )
        assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
        assert client.files.retrieve(made.id) == made
        content = client.files.content(made.id).content
        assert len(content) == made.bytes
        rows = [json.loads(line) for line in content.splitlines()]
        assert [(row["kind"], row["completion"]) for row in rows] == [
            ("supervised", CHAT["messages"][1:])
        ] * 2
        assert _folders(sqlite_gateway) == [made.id]

        gone = client.files.delete(made.id)
        assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            client.files.delete(made.id)
    assert _folders(sqlite_gateway) == []
    audit = sqlite_gateway.client().get("/admin/audit", params={"subject": made.id}).json()["data"]
    assert [entry["action"] for entry in audit] == ["file_deleted", "file_created"]
    assert audit[1]["details"]["original_sha256"] == hashlib.sha256(sent).hexdigest()


def test_columns_and_format_of_an_upload_are_fields_of_its_form(
    sqlite_gateway: RunningGateway,
) -> None:
    with _client(sqlite_gateway) as client:
        made = client.files.create(
            file=("birds.csv", b"question,answer\nHeron?,A bird.\n"),
            purpose="fine-tune",
            extra_body={
                "format": "csv",
                "columns": '{"prompt": "question", "completion": "answer"}',
            },
        )
        (row,) = client.files.content(made.id).text.splitlines()
    assert json.loads(row)["prompt"] == [{"role": "user", "content": "Heron?"}]


def test_an_upload_that_cannot_be_trained_on_is_refused_line_by_line(
    sqlite_gateway: RunningGateway,
) -> None:
    with _client(sqlite_gateway) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=("b", _lines(CHAT, {}, [])), purpose="fine-tune")
        assert (refused.value.param, refused.value.code) == ("file", "invalid_file")
        assert "line 2: its keys are none" in refused.value.message
        assert "; line 3: found a list, expected an object" in refused.value.message
        for options, param in (
            ({"purpose": "batch"}, "purpose"),
            ({"purpose": "fine-tune", "extra_body": {"format": "xml"}}, "format"),
            ({"purpose": "fine-tune", "extra_body": {"columns": "{"}}, "columns"),
            ({"purpose": "fine-tune", "extra_body": {"columns": '["a"]'}}, "columns"),
            ({"purpose": "fine-tune", "extra_body": {"model": "x"}}, "model"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                client.files.create(file=("b", _lines(CHAT)), **options)
            assert refused.value.param == param
        assert list(client.files.list()) == []
    assert _folders(sqlite_gateway) == []


def test_an_upload_is_seen_by_its_person_and_by_an_administrator_of_everything(
    sqlite_gateway: RunningGateway,
) -> None:
    with _client(sqlite_gateway, sqlite_gateway.key("tu", "tune")) as client:
        made = client.files.create(file=("b", _lines(CHAT)), purpose="fine-tune")
    others = (
        sqlite_gateway.key("other", "tune", "curate"),
        sqlite_gateway.key("part", "admin", deployments=["assistant"]),
    )
    for key in others:
        with _client(sqlite_gateway, key) as client:
            assert list(client.files.list()) == []
            for call in (client.files.retrieve, client.files.content, client.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(made.id)
            with pytest.raises(openai.NotFoundError):
                client.fine_tuning.jobs.create(model="assistant", training_file=made.id)
    with _client(sqlite_gateway) as client:
        assert [file.id for file in client.files.list()] == [made.id]
        assert client.files.delete(made.id).deleted


def test_a_file_of_a_data_set_and_one_that_a_job_needs_are_not_deleted(
    sqlite_gateway: RunningGateway, dataset_file: str
) -> None:
    with _client(sqlite_gateway) as client:
        made = client.files.create(file=("b", _lines(CHAT)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="assistant", training_file=made.id)
        for file, code in ((dataset_file, "file_of_dataset"), (made.id, "file_in_use")):
            with pytest.raises(openai.ConflictError) as refused:
                client.files.delete(file)
            assert refused.value.code == code
            assert client.files.content(file).content
        client.fine_tuning.jobs.cancel(job.id)
        assert client.files.delete(made.id).deleted


def test_a_file_whose_content_is_gone_has_the_status_error(sqlite_gateway: RunningGateway) -> None:
    with _client(sqlite_gateway) as client:
        made = client.files.create(file=("b", _lines(CHAT)), purpose="fine-tune")
        shutil.rmtree(sqlite_gateway.gateway.settings.data / "files" / made.id)
        found = client.files.retrieve(made.id)
    assert (found.status, found.status_details) == ("error", "its content is no longer on disk")
