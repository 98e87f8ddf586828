"""Clients that people use, each in its own environment and version, against a running Burnish.

Covered: chat, streams, tools, JSON, errors and end users with every client; stored completions,
files and fine-tuning with OpenAI's own. The engine is the fake one, so that what it says is known;
`test_a_real_engine.py` asks a vLLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests.clients.conftest import Report, run_program
from tests.clients.environments import CLIENTS, Client
from tests.clients.service import Service
from tests.fake_engine import BASE, fake_answer

pytestmark = pytest.mark.clients

QUESTION = [{"role": "user", "content": "What is a tide?"}]
OPENAI = [name for name, client in CLIENTS.items() if client.is_openai]
LIBRARIES = [name for name in CLIENTS if name != "llm"]

of_openai = pytest.mark.parametrize("client", OPENAI, indirect=True, scope="session")
of_libraries = pytest.mark.parametrize("client", LIBRARIES, indirect=True, scope="session")
of_the_command = pytest.mark.parametrize("client", ["llm"], indirect=True, scope="session")


# Chat


@of_libraries
def test_an_answer_names_its_release_and_counts_its_tokens(report: Report) -> None:
    answer = report["chat"]
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"].startswith("assistant@")
    assert len(answer["text"].split(" ")) == 8
    assert (answer["finish_reason"], answer["calls"]) == ("length", [])
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8 > 8


@of_libraries
def test_a_stream_says_the_same_in_pieces_and_counts_tokens_where_it_was_asked_to(
    report: Report,
) -> None:
    answer, stream = report["chat"], report["streamed_chat"]
    for read in (stream, stream["without_usage"]):
        assert len(read["pieces"]) == 8
        assert "".join(read["pieces"]) == answer["text"]
        assert read["finish_reasons"] == ["length"]
    assert stream["usages"] == [answer["usage"]]
    assert stream["without_usage"]["usages"] == []


@of_openai
def test_every_chunk_of_a_stream_has_the_answers_id_and_release(report: Report) -> None:
    stream = report["streamed_chat"]
    assert len(stream["ids"]) == 1
    assert stream["models"] == [report["chat"]["model"]]


@of_libraries
def test_a_tool_is_called_and_its_result_answered(report: Report) -> None:
    tools = report["tools"]
    # vLLM's reason for a call by name; LiteLLM puts its own in the place.
    by_name = "tool_calls" if report.client.name == "litellm" else "stop"
    for name, reason in (("called", "tool_calls"), ("named", by_name)):
        found = tools[name]
        assert not found["text"]
        assert found["finish_reason"] == reason
        [call] = found["calls"]
        assert call["name"] == "weather"
        assert call["id"]
        assert call["arguments"]["unit"] == "celsius"
    answered = tools["answered"]
    assert (answered["calls"], answered["finish_reason"]) == ([], "stop")
    assert answered["text"]
    # The call and its result were in the prompt.
    assert answered["usage"]["prompt_tokens"] > tools["called"]["usage"]["prompt_tokens"]


@of_libraries
def test_two_tool_calls_come_whole_out_of_one_stream(report: Report) -> None:
    streamed = report["streamed_tools"]
    assert [call["name"] for call in streamed["calls"]] == ["weather", "tides"]
    assert [call["arguments"]["unit"] for call in streamed["calls"]] == ["celsius"] * 2
    assert len({call["id"] for call in streamed["calls"]}) == 2
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["usage"]["completion_tokens"] > 0


@of_libraries
def test_an_answer_fits_the_schema_that_was_asked_for(report: Report) -> None:
    for answer in report["json_schema"].values():
        assert answer == {"phase": "high", "is_spring_tide": True}


def test_an_application_asks_for_its_end_users(report: Report, service: Service) -> None:
    """By `user`, or by a header where the client sends no such field."""
    ids = report["for_others"]["ids"]
    explained = [service.admin.get(f"/admin/explain/{found}").json() for found in ids]
    ann, again, bob = [found["answer"]["person_id"] for found in explained]
    assert ann == again != bob


@of_libraries
def test_metadata_is_kept_with_the_answer(report: Report, service: Service) -> None:
    ids = report["for_others"]["ids"]
    stored = [service.admin.get(f"/v1/chat/completions/{found}").json() for found in ids]
    assert [found["metadata"] for found in stored] == [
        {"asked_for": person} for person in ("ann", "ann", "bob")
    ]


# The command `llm`


@of_the_command
def test_the_command_chats_streamed_or_not(report: Report) -> None:
    for name in ("chat", "streamed_chat"):
        found = report[name]
        assert (found["exit"], len(found["text"].split(" "))) == (0, 8), found
        assert found["message"].startswith("Token usage: ")
        assert found["message"].endswith(" 8 output\n")


@of_the_command
def test_the_command_calls_a_function_and_answers_with_its_result(report: Report) -> None:
    found = report["tools"]
    assert found["exit"] == 0
    assert "Tool call: weather({'place': " in found["message"]
    assert "20 degrees" in found["message"]
    assert found["text"]


@of_the_command
def test_the_command_gets_json_that_fits_its_schema(report: Report) -> None:
    created = report["json_schema"]["created"]
    assert isinstance(created["phase"], str)
    assert created["is_spring_tide"] is True


@of_the_command
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad_request", "400 - top_p: Input should be greater than 0"),
        ("wrong_key", "401 - this API key is unknown or was revoked"),
        ("unknown_model", "404 - the model 'gpt-17' does not exist"),
        ("breaks_off", "the engine failed"),
    ],
)
def test_the_command_fails_in_our_words(report: Report, name: str, words: str) -> None:
    found = report["errors"][name]
    assert found["exit"] == 1
    assert words in found["message"]


# Errors


@dataclass(frozen=True)
class Expected:
    """An error as the clients have it: status and code, and its class in each of them."""

    status: int | None
    code: str | None
    openai: str
    langchain: str
    litellm: str
    words: str


ERRORS = {
    "bad_request": Expected(
        *(400, None, "BadRequestError", "OpenAIInvalidRequestError", "BadRequestError"),
        "temperature: Input should be less than or equal to 2",
    ),
    # LangChain has a class of its own, and looks for the code in the message, where OpenAI's
    # client no longer writes it.
    "too_long": Expected(
        *(400, "context_length_exceeded", "BadRequestError", "OpenAIInvalidRequestError"),
        *("ContextWindowExceededError", "maximum context length"),
    ),
    "wrong_key": Expected(
        *(401, "invalid_api_key", "AuthenticationError", "OpenAIAuthenticationError"),
        *("AuthenticationError", "this API key is unknown or was revoked"),
    ),
    "without_scope": Expected(
        *(403, "insufficient_scope", "PermissionDeniedError", "OpenAIPermissionDeniedError"),
        *("APIError", "this key has the scopes feedback"),
    ),
    "unknown_model": Expected(
        *(404, "model_not_found", "NotFoundError", "OpenAIModelNotFoundError", "NotFoundError"),
        "the model 'gpt-17' does not exist",
    ),
    "too_large": Expected(
        *(413, "too_large", "APIError", "APIStatusError", "APIError"), "the body passes"
    ),
    "at_limit": Expected(
        *(429, "rate_limit_exceeded", "RateLimitError", "OpenAIRateLimitError", "RateLimitError"),
        "1 requests per minute",
    ),
    "fails": Expected(
        *(502, "engine_error", "InternalServerError", "OpenAIAPIError", "BadGatewayError"),
        "the engine failed",
    ),
    "not_ready": Expected(
        *(503, "engine_not_ready", "InternalServerError", "OpenAIAPIError"),
        *("ServiceUnavailableError", "no engine is ready"),
    ),
    "nobody_there": Expected(
        *(None, None, "APIConnectionError", "OpenAIConnectionError", "InternalServerError"),
        "Connection error",
    ),
    "breaks_off": Expected(  # in mid-stream
        *(None, "engine_error", "APIError", "APIError", "MidStreamFallbackError"),
        "the engine failed",
    ),
}


@of_libraries
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_raised_as_the_clients_own_class(report: Report, name: str) -> None:
    found, expected = report["errors"][name], ERRORS[name]
    assert expected.words in found["message"]
    if report.client.is_openai:
        assert expected.openai in found["bases"]
    else:
        assert found["class"] == getattr(expected, report.client.name)
    if report.client.name != "litellm":  # it keeps no code, and has a status for what has none
        assert (found["status"], found["code"]) == (expected.status, expected.code)
    elif expected.status is not None:
        assert found["status"] == expected.status


@of_libraries
@pytest.mark.parametrize("name", ["at_limit", "not_ready"])
def test_an_error_that_passes_says_when_to_try_again(report: Report, name: str) -> None:
    assert 1 <= int(report["errors"][name]["retry_after"]) <= 60


@of_openai
def test_answers_and_errors_name_their_request(report: Report) -> None:
    """What a caller quotes to an administrator, who finds it in the log."""
    answer = report["chat"]
    assert answer["id"] == f"chatcmpl-{answer['request_id']}"
    replies = [report["errors"][name] for name, error in ERRORS.items() if error.status]
    assert all(found["request_id"] for found in replies)
    assert len({found["request_id"] for found in replies}) == len(replies) > 5


# Models, stored completions, files


@of_openai
def test_models_are_listed_and_retrieved(report: Report) -> None:
    models = report["models"]
    assert models["names"] == ["assistant", "gpt-4o-mini", "tiny"]
    assert [model["id"] for model in models["retrieved"]] == models["names"]


@of_openai
def test_stored_completions_are_listed_by_page_order_model_and_metadata(report: Report) -> None:
    stored = report["stored_completions"]
    made = stored["made"]
    assert stored["all"] == stored["of_the_release"] == made
    assert stored["descending"] == made[::-1]
    assert stored["after"] == made[3:]
    assert stored["of_another_model"] == []
    assert (stored["first_page"], stored["has_more"]) == (made[:2], True)


@of_openai
def test_a_stored_completion_is_retrieved_with_its_messages(report: Report) -> None:
    stored = report["stored_completions"]
    retrieved = stored["retrieved"]
    assert retrieved["id"] == stored["made"][0]
    assert retrieved["metadata"]["number"] == "0"
    assert len(retrieved["choices"][0]["message"]["content"].split(" ")) == 4
    assert retrieved["usage"]["completion_tokens"] == 4
    system, user = stored["messages"]
    assert (system["role"], system["content"]) == ("system", "Be brief.")
    assert (user["role"], user["content"]) == ("user", "What is a tide? 0")
    [part] = user["content_parts"]
    assert (part["type"], part["text"]) == ("text", "What is a tide? 0")


@of_openai
def test_a_stored_completion_is_changed_and_deleted(report: Report) -> None:
    stored = report["stored_completions"]
    assert stored["updated"]["metadata"] == {"kept": "yes"}
    assert [(found["id"], found["deleted"]) for found in stored["deleted"]] == [
        (made, True) for made in stored["made"]
    ]
    assert "NotFoundError" in stored["then"]["bases"]


@of_openai
def test_a_file_is_uploaded_read_and_deleted(report: Report) -> None:
    files = report["files"]
    made = files["made"]
    assert (made["filename"], made["purpose"], made["status"]) == (
        *("birds.jsonl", "fine-tune"),
        "processed",
    )
    assert files["retrieved"] == made
    assert made["id"] in files["listed"]
    assert len(files["rows"]) == 8
    assert files["rows"][0]["completion"] == [{"role": "assistant", "content": "Bird 0 sings."}]
    assert files["deleted"]["deleted"] is True
    assert "NotFoundError" in files["then"]["bases"]


# Fine-tuning


@of_openai
def test_a_script_for_openais_fine_tuning_runs_to_a_candidate(
    report: Report, service: Service
) -> None:
    tuned = report["fine_tuning"]
    made, job = tuned["made"], tuned["job"]
    assert (made["object"], made["status"]) == ("fine_tuning.job", "queued")
    assert (made["model"], made["seed"]) == ("assistant", 7)
    assert made["method"]["supervised"]["hyperparameters"]["n_epochs"] == 1
    assert job["status"] == "succeeded", job["error"]
    assert job["trained_tokens"] > 0
    assert job["finished_at"] >= made["created_at"]
    assert job["metadata"] == {"made_by": "a script"}
    assert job["user_provided_suffix"] == "birds"
    assert job["validation_file"].startswith("file-")
    assert job["validation_file"] != job["training_file"]
    assert tuned["model"]["id"] == job["fine_tuned_model"]
    release = service.admin.get(f"/admin/releases/{job['fine_tuned_model']}").json()
    assert (release["deployment"], release["job_id"]) == ("assistant", job["id"])


@of_openai
def test_a_job_tells_its_events_and_checkpoints_page_by_page(report: Report) -> None:
    tuned = report["fine_tuning"]
    messages = [event["message"] for event in tuned["events"]]  # newest first
    assert messages[0] == "Job succeeded."
    assert messages[-1] == "Job created and queued."
    assert len({event["id"] for event in tuned["events"]}) == len(messages) > 4
    metrics = [event["message"] for event in tuned["events"] if event["type"] == "metrics"]
    [checkpoint] = tuned["checkpoints"]
    assert checkpoint["fine_tuning_job_id"] == tuned["job"]["id"]
    assert (checkpoint["step_number"], checkpoint["metrics"]["step"]) == (1, 1)
    for name in ("train_loss", "full_valid_loss"):
        assert any(f"{checkpoint['metrics'][name]:.4f}" in message for message in metrics)
    assert tuned["listed"][0] == tuned["job"]["id"]


@of_openai
def test_a_file_that_a_job_needs_is_a_conflict(report: Report) -> None:
    refused = report["fine_tuning"]["while_needed"]
    assert "ConflictError" in refused["bases"]
    assert (refused["status"], refused["code"]) == (409, "file_in_use")


@of_openai
def test_the_fine_tuned_model_answers_once_an_administrator_has_promoted_it(
    report: Report, client: Client, environment: dict[str, str], service: Service
) -> None:
    name = report["fine_tuning"]["job"]["fine_tuned_model"]
    service.promote(name)
    environment = {**environment, "FINE_TUNED_MODEL": name}
    answer = run_program(client, environment, "fine_tuned_model")["fine_tuned_model"]
    assert answer["model"] == name
    # The fake engine's words are signed by the weights: these are no longer the base's.
    signature = answer["text"].split(" ")[0]
    assert signature != BASE == fake_answer(BASE, QUESTION).split(" ")[0]
    explained = service.admin.get(f"/admin/explain/{name}").raise_for_status()
    assert report["fine_tuning"]["made"]["training_file"] in json.dumps(explained.json())


def test_what_clients_do_wrong_is_no_error_of_ours(report: Report, service: Service) -> None:
    assert report["chat"]
    assert service.problems() == []
