"""LiteLLM as a library against Burnish: any address that speaks OpenAI's API."""

from __future__ import annotations

import json
import os
from typing import Any

import litellm
import report
from report import ASKED, ELSEWHERE, MODEL, WEATHER, raised

HERE = {"base_url": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}

litellm.suppress_debug_info = True  # it prints advice on every error


def complete(place: dict[str, str] = HERE, **options: Any) -> Any:
    request = {
        "model": f"openai/{MODEL}",
        "messages": ASKED,
        "api_base": place["base_url"],
        "api_key": place["api_key"],
        "max_retries": 0,
        **options,
    }
    return litellm.completion(**request)


def dumped(found: Any) -> dict[str, Any]:
    return json.loads(found.model_dump_json())


def chat() -> dict[str, Any]:
    return report.said(dumped(complete(max_tokens=8)))


def streamed_chat() -> dict[str, Any]:
    def read(**options: Any) -> dict[str, Any]:
        stream = complete(max_tokens=8, stream=True, **options)
        return report.streamed(dumped(chunk) for chunk in stream)

    return {**read(stream_options={"include_usage": True}), "without_usage": read()}


def tools() -> dict[str, Any]:
    called = complete(tools=[WEATHER])
    message = called.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}
        for call in message.tool_calls
    ]
    answered = complete(messages=[*ASKED, message, *results], tools=[WEATHER])
    named = complete(
        tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}
    )
    replies = {"called": called, "answered": answered, "named": named}
    return {name: report.said(dumped(found)) for name, found in replies.items()}


def streamed_tools() -> dict[str, Any]:
    other = {"type": "function", "function": {**WEATHER["function"], "name": "tides"}}
    options = {"tools": [WEATHER, other], "tool_choice": "required"}
    chunks = list(complete(stream=True, stream_options={"include_usage": True}, **options))
    return report.said(dumped(litellm.stream_chunk_builder(chunks, messages=ASKED)))


def json_schema() -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "phase": {"type": "string", "enum": ["high", "low"]},
            "is_spring_tide": {"type": "boolean"},
        },
        "required": ["phase", "is_spring_tide"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "tide", "schema": schema}}
    return {"created": json.loads(complete(response_format=form).choices[0].message.content)}


def for_others() -> dict[str, Any]:
    place = {**HERE, "api_key": os.environ["APPLICATION_KEY"]}
    made = [
        # Its own `metadata` is for its callbacks.
        complete(place, user=person, extra_body={"metadata": {"asked_for": person}})
        for person in report.PEOPLE
    ]
    return {"ids": [completion.id for completion in made]}


def errors() -> dict[str, Any]:
    def asking(place: dict[str, str] = HERE, **options: Any) -> dict[str, Any]:
        return raised(lambda: list(complete(place, **options)))

    complete(ELSEWHERE["at_limit"])
    return {
        "bad_request": asking(temperature=9),
        "unknown_model": asking(model="openai/gpt-17"),
        "too_long": asking(messages=report.TOO_LONG),
        "too_large": asking(messages=report.TOO_LARGE),
        **{name: asking(ELSEWHERE[name], stream=name == "breaks_off") for name in ELSEWHERE},
    }


if __name__ == "__main__":
    report.run(
        {
            "chat": chat,
            "streamed_chat": streamed_chat,
            "tools": tools,
            "streamed_tools": streamed_tools,
            "json_schema": json_schema,
            "for_others": for_others,
            "errors": errors,
        }
    )
