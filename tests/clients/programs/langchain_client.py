"""LangChain's ChatOpenAI against Burnish."""

from __future__ import annotations

import os
from functools import reduce
from operator import add
from typing import Any, Literal

import report
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from report import ELSEWHERE, MODEL, QUESTION, WEATHER, raised

ASKED = [HumanMessage(QUESTION)]
NAMES = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "total_tokens": "total_tokens",
}


def model(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": MODEL, "max_retries": 0, **options})


def said(message: AIMessage) -> dict[str, Any]:
    usage = message.usage_metadata or {}
    return {
        "id": message.response_metadata.get("id") or message.id,
        "model": message.response_metadata["model_name"],
        "text": message.content,
        "calls": [
            {"id": call["id"], "name": call["name"], "arguments": call["args"]}
            for call in message.tool_calls
        ],
        "finish_reason": message.response_metadata["finish_reason"],
        "usage": {theirs: usage[ours] for ours, theirs in NAMES.items()},
    }


def chat() -> dict[str, Any]:
    return said(model(max_tokens=8).invoke(ASKED))


def streamed_chat() -> dict[str, Any]:
    def read(**options: Any) -> dict[str, Any]:
        chunks = list(model(max_tokens=8, **options).stream(ASKED))
        usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        about = [chunk.response_metadata for chunk in chunks]
        return {
            "models": sorted({found["model_name"] for found in about if "model_name" in found}),
            "pieces": [chunk.content for chunk in chunks if chunk.content],
            "finish_reasons": [f["finish_reason"] for f in about if "finish_reason" in f],
            "usages": [{theirs: u[ours] for ours, theirs in NAMES.items()} for u in usages],
        }

    return {**read(stream_usage=True), "without_usage": read(stream_usage=False)}


def tools() -> dict[str, Any]:
    bound = model().bind_tools([WEATHER])
    called = bound.invoke(ASKED)
    results = [ToolMessage("20 degrees", tool_call_id=call["id"]) for call in called.tool_calls]
    named = model().bind_tools([WEATHER], tool_choice="weather")
    return {
        "called": said(called),
        "answered": said(bound.invoke([*ASKED, called, *results])),
        "named": said(named.invoke(ASKED)),
    }


def streamed_tools() -> dict[str, Any]:
    other = {"type": "function", "function": {**WEATHER["function"], "name": "tides"}}
    bound = model(stream_usage=True).bind_tools([WEATHER, other], tool_choice="required")
    return said(reduce(add, bound.stream(ASKED)))


def json_schema() -> dict[str, Any]:
    class Tide(BaseModel):
        phase: Literal["high", "low"]
        is_spring_tide: bool

    return {"parsed": model().with_structured_output(Tide).invoke(ASKED).model_dump()}


def for_others() -> dict[str, Any]:
    asking = model(api_key=os.environ["APPLICATION_KEY"])
    made = [
        # Its own `metadata` is for its callbacks.
        asking.invoke(ASKED, user=person, extra_body={"metadata": {"asked_for": person}})
        for person in report.PEOPLE
    ]
    return {"ids": [said(message)["id"] for message in made]}


def errors() -> dict[str, Any]:
    def asking(messages: Any = ASKED, **options: Any) -> dict[str, Any]:
        return raised(lambda: model(**options).invoke(messages))

    model(**ELSEWHERE["at_limit"]).invoke(ASKED)
    return {
        "bad_request": asking(temperature=9),
        "unknown_model": asking(model="gpt-17"),
        "too_long": asking(report.TOO_LONG),
        "too_large": asking(report.TOO_LARGE),
        **{
            name: asking(streaming=name == "breaks_off", **place)
            for name, place in ELSEWHERE.items()
        },
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
