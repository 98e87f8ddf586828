"""The command `llm` against Burnish, which it is told of in `extra-openai-models.yaml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from report import ELSEWHERE, MODEL, QUESTION

HERE = {"base_url": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
FUNCTIONS = """
def weather(place: str) -> str:
    "The weather at a place."
    return "20 degrees"
"""


def llm(*arguments: str, place: dict[str, str] = HERE, **model: Any) -> dict[str, Any]:
    """Run the command on a model of its own settings; what it says and how it ends."""
    described = {
        "model_id": "burnish",
        "model_name": MODEL,
        "api_base": place["base_url"],
        "api_key_name": "burnish",
        "supports_tools": True,
        "supports_schema": True,
        **model,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "keys.json").write_text(json.dumps({"burnish": place["api_key"]}))
        # JSON is YAML too.
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([described]))
        command = [sys.executable, "-m", "llm", "prompt", "-m", "burnish", *arguments]
        done = subprocess.run(
            [*command, QUESTION],
            env={**os.environ, "LLM_USER_PATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    return {"exit": done.returncode, "text": done.stdout.rstrip("\n"), "message": done.stderr}


def chat() -> dict[str, Any]:
    return llm("--no-stream", "-o", "max_tokens", "8", "--usage")


def streamed_chat() -> dict[str, Any]:
    return llm("-o", "max_tokens", "8", "--usage")


def tools() -> dict[str, Any]:
    """It calls the function itself, and answers with what that gave."""
    return llm("--functions", FUNCTIONS, "--td")


def json_schema() -> dict[str, Any]:
    answer = llm("--no-stream", "--schema", "phase, is_spring_tide bool")
    return {**answer, "created": json.loads(answer["text"])}


def for_others() -> dict[str, Any]:
    place = {**HERE, "api_key": os.environ["APPLICATION_KEY"]}
    made = [
        llm("--no-stream", "--json", place=place, headers={"X-OpenWebUI-User-Id": person})
        for person in report.PEOPLE
    ]
    return {"ids": [json.loads(answer["text"])[0]["response_json"]["id"] for answer in made]}


def errors() -> dict[str, Any]:
    """Those that it does not try again after a pause: its patience can't be switched off."""
    return {
        "bad_request": llm("-o", "top_p", "0"),
        "unknown_model": llm(model_name="gpt-17"),
        **{
            name: llm(place=ELSEWHERE[name])
            for name in ("wrong_key", "without_scope", "breaks_off")
        },
    }


if __name__ == "__main__":
    report.run(
        {
            "chat": chat,
            "streamed_chat": streamed_chat,
            "tools": tools,
            "json_schema": json_schema,
            "for_others": for_others,
            "errors": errors,
        }
    )
