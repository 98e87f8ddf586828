"""OpenAI's Python client against Burnish. The same program for every major version.

Takes address and key from `OPENAI_BASE_URL` and `OPENAI_API_KEY`, as any script for OpenAI does.
"""

from __future__ import annotations

import io
import json
import os
import time
from typing import Any, Literal

import report
from openai import OpenAI
from pydantic import BaseModel
from report import ASKED, ELSEWHERE, MODEL, QUESTION, WEATHER, raised

client = OpenAI()


def checked(found: Any) -> dict[str, Any]:
    """What the client made of a reply, once its own types have been held to it."""
    type(found).model_validate(found.model_dump())
    return json.loads(found.model_dump_json())


def asked(**options: Any) -> dict[str, Any]:
    """What a chat completion says."""
    request = {"model": MODEL, "messages": ASKED, **options}
    return report.said(checked(client.chat.completions.create(**request)))


def models() -> dict[str, Any]:
    names = [model.id for model in client.models.list()]
    return {"names": names, "retrieved": [checked(client.models.retrieve(n)) for n in names]}


def chat() -> dict[str, Any]:
    made = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=8)
    return {**report.said(checked(made)), "request_id": made._request_id}


def streamed_chat() -> dict[str, Any]:
    def read(**options: Any) -> dict[str, Any]:
        stream = client.chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=8, stream=True, **options
        )
        return report.streamed(checked(chunk) for chunk in stream)

    return {**read(stream_options={"include_usage": True}), "without_usage": read()}


def tools() -> dict[str, Any]:
    called = client.chat.completions.create(model=MODEL, messages=ASKED, tools=[WEATHER])
    message = called.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}
        for call in message.tool_calls
    ]
    named = {"type": "function", "function": {"name": "weather"}}
    return {
        "called": report.said(checked(called)),
        "answered": asked(messages=[*ASKED, message, *results], tools=[WEATHER]),
        "named": asked(tools=[WEATHER], tool_choice=named),
    }


def streamed_tools() -> dict[str, Any]:
    other = {"type": "function", "function": {**WEATHER["function"], "name": "tides"}}
    with client.chat.completions.stream(
        model=MODEL,
        messages=ASKED,
        tools=[WEATHER, other],
        tool_choice="required",
        stream_options={"include_usage": True},
    ) as stream:
        for event in stream:
            assert event.type != "error", event
        return report.said(checked(stream.get_final_completion()))


def json_schema() -> dict[str, Any]:
    class Tide(BaseModel):
        phase: Literal["high", "low"]
        is_spring_tide: bool

    schema = {"name": "tide", "schema": Tide.model_json_schema()}
    made = asked(response_format={"type": "json_schema", "json_schema": schema})
    parsed = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Tide)
    return {
        "created": Tide.model_validate_json(made["text"]).model_dump(),
        "parsed": parsed.choices[0].message.parsed.model_dump(),
    }


def for_others() -> dict[str, Any]:
    with OpenAI(api_key=os.environ["APPLICATION_KEY"]) as application:
        made = [
            application.chat.completions.create(
                model=MODEL, messages=ASKED, user=person, metadata={"asked_for": person}
            )
            for person in report.PEOPLE
        ]
    return {"ids": [completion.id for completion in made]}


def stored_completions() -> dict[str, Any]:
    mine = {"run": str(time.time_ns())}
    made = [
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": f"{QUESTION} {number}"}]},
            ],
            max_tokens=4,
            store=True,
            metadata={**mine, "number": str(number)},
            user="somebody",
        )
        for number in range(5)
    ]
    ids = [completion.id for completion in made]
    stored = client.chat.completions

    def listed(**options: Any) -> list[str]:
        return [found.id for found in stored.list(metadata=mine, **options)]

    first_page = stored.list(metadata=mine, limit=2, order="asc")
    facts: dict[str, Any] = {
        "made": ids,
        "all": listed(limit=2),  # page by page
        "descending": listed(order="desc"),
        "after": listed(after=ids[2]),
        "of_the_release": listed(model=made[0].model),
        "of_another_model": listed(model="assistant@999"),
        "first_page": [found.id for found in first_page.data],
        "has_more": first_page.has_next_page(),
        "retrieved": checked(stored.retrieve(ids[0])),
        # Not checked: the client's type knows messages of the assistant alone.
        "messages": [found.model_dump() for found in stored.messages.list(ids[0])],
        "updated": checked(stored.update(ids[0], metadata={"kept": "yes"})),
    }
    facts["deleted"] = [checked(stored.delete(completion_id)) for completion_id in ids]
    facts["then"] = raised(lambda: stored.retrieve(ids[0]))
    return facts


def examples(first: int = 0) -> tuple[str, bytes]:
    """A file of eight examples in OpenAI's own form."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is bird {number}?"},
                {"role": "assistant", "content": f"Bird {number} sings."},
            ]
        }
        for number in range(first, first + 8)
    ]
    return "birds.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


def files() -> dict[str, Any]:
    name, content = examples()
    made = client.files.create(file=(name, io.BytesIO(content)), purpose="fine-tune")
    facts: dict[str, Any] = {
        "made": checked(made),
        "listed": [found.id for found in client.files.list(purpose="fine-tune", limit=1)],
        "retrieved": checked(client.files.retrieve(made.id)),
        "rows": [json.loads(line) for line in client.files.content(made.id).text.splitlines()],
        "deleted": checked(client.files.delete(made.id)),
    }
    facts["then"] = raised(lambda: client.files.retrieve(made.id))
    return facts


def fine_tuning() -> dict[str, Any]:
    """A script for OpenAI's fine-tuning, from the files to the model."""
    file = client.files.create(file=examples(), purpose="fine-tune")
    validation = client.files.create(file=examples(first=100), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        validation_file=validation.id,
        suffix="birds",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}},
        },
        metadata={"made_by": "a script"},
    )
    while_needed = raised(lambda: client.with_options(max_retries=0).files.delete(file.id))
    job = client.fine_tuning.jobs.retrieve(made.id)
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.25)  # OpenAI's API has no call that waits for a job
        job = client.fine_tuning.jobs.retrieve(made.id)
    jobs = client.fine_tuning.jobs
    return {
        "made": checked(made),
        "job": checked(job),
        "while_needed": while_needed,
        "events": [checked(event) for event in jobs.list_events(made.id, limit=2)],
        # Not checked: Burnish's checkpoints can't be asked and have no name.
        "checkpoints": [found.model_dump() for found in jobs.checkpoints.list(made.id)],
        "listed": [found.id for found in jobs.list(limit=1)],
        "model": checked(client.models.retrieve(job.fine_tuned_model)),
    }


def fine_tuned_model() -> dict[str, Any]:
    """Ask the model that came of the job; `FINE_TUNED_MODEL` is its name."""
    return asked(model=os.environ["FINE_TUNED_MODEL"], max_tokens=8)


def errors() -> dict[str, Any]:
    def asking(there: OpenAI, **options: Any) -> dict[str, Any]:
        request = {"model": MODEL, "messages": ASKED, **options}
        return raised(lambda: list(there.chat.completions.create(**request)))

    impatient = client.with_options(max_retries=0)
    places = {name: OpenAI(max_retries=0, **place) for name, place in ELSEWHERE.items()}
    places["at_limit"].chat.completions.create(model=MODEL, messages=ASKED)
    return {
        "bad_request": asking(impatient, temperature=9),
        "unknown_model": asking(impatient, model="gpt-17"),
        "too_long": asking(impatient, messages=report.TOO_LONG),
        "too_large": asking(impatient, messages=report.TOO_LARGE),
        **{name: asking(place, stream=name == "breaks_off") for name, place in places.items()},
    }


if __name__ == "__main__":
    report.run(
        {
            "models": models,
            "chat": chat,
            "streamed_chat": streamed_chat,
            "tools": tools,
            "streamed_tools": streamed_tools,
            "json_schema": json_schema,
            "for_others": for_others,
            "stored_completions": stored_completions,
            "files": files,
            "fine_tuning": fine_tuning,
            "errors": errors,
            "fine_tuned_model": fine_tuned_model,
        }
    )
