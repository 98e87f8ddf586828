"""What every program in Python says at its end: one JSON object, scenario by scenario.

Runs in the clients' own environments, from Python 3.11 on: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Scenario = Callable[[], dict[str, Any]]

MODEL = "gpt-4o-mini"  # an alias of the deployment: a script names OpenAI's model
QUESTION = "What is a tide?"
ASKED = [{"role": "user", "content": QUESTION}]
TOO_LARGE = [{"role": "user", "content": "a" * 2**23}]
TOO_LONG = [{"role": "user", "content": "a" * 150_000}]  # for the model, not for the gateway
PEOPLE = ("ann", "ann", "bob")  # for whom an application asks, one after the other
ELSEWHERE: dict[str, dict[str, str]] = json.loads(os.environ.get("ELSEWHERE", "{}"))
"""Places beside the service, by name: each with its `base_url` and `api_key`."""

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
            },
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}


def said(completion: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat completion says, from its JSON."""
    choice = completion["choices"][0]
    return {
        "id": completion["id"],
        "model": completion["model"],
        "text": choice["message"]["content"],
        "calls": calls_of(choice["message"].get("tool_calls") or ()),
        "finish_reason": choice["finish_reason"],
        "usage": figures(completion["usage"]),
    }


def streamed(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a stream says, from the JSON of its chunks."""
    read = list(chunks)
    choices = [choice for chunk in read for choice in chunk["choices"]]
    usages = [chunk["usage"] for chunk in read if chunk.get("usage")]
    return {
        "ids": sorted({chunk["id"] for chunk in read}),
        "models": sorted({chunk["model"] for chunk in read}),
        "pieces": [p for choice in choices if (p := choice["delta"].get("content"))],
        "finish_reasons": [r for choice in choices if (r := choice["finish_reason"])],
        "usages": [figures(usage) for usage in usages],
    }


def calls_of(tool_calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": call["id"],
            "name": call["function"]["name"],
            "arguments": json.loads(call["function"]["arguments"]),
        }
        for call in tool_calls
    ]


def figures(usage: Mapping[str, Any]) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def run(scenarios: Mapping[str, Scenario]) -> None:
    """Run those that the command line names, and print what each found or how it failed."""
    report = {}
    for name in sys.argv[1:]:
        try:
            report[name] = scenarios[name]()
        except Exception:  # one that fails is no reason not to hear of the others
            report[name] = {"failure": traceback.format_exc()}
    json.dump(report, sys.stdout)


def raised(action: Callable[[], object]) -> dict[str, Any]:
    """The error that a call ends with."""
    try:
        found = action()
    except Exception as error:
        response = getattr(error, "response", None)
        headers = getattr(response, "headers", None) or {}
        return {
            "class": type(error).__name__,
            "bases": [base.__name__ for base in type(error).__mro__],
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "type": getattr(error, "type", None),
            "param": getattr(error, "param", None),
            "message": str(error),
            "retry_after": headers.get("retry-after"),
            "request_id": getattr(error, "request_id", None),
        }
    raise AssertionError(f"no error; it said {found!r}")
