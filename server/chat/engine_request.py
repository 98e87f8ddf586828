"""What an engine is sent for a checked request: its fields, messages and bytes.

Owns: the system prompt's place, the sampling that a release fills in, control tokens that are
broken. Does not own: what a request may say (`request.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from feedback.answers import OURS
from feedback.formats.messages import as_sent
from server.chat.request import Parsed
from tuner.control_tokens import ControlTokens

NOT_FORWARDED = frozenset(
    {"model", "metadata", "user", "safety_identifier", "store", "chat_template_kwargs"}
)
"""Fields with a meaning of ours: accepted, acted upon, not sent as they are."""


def engine_body(
    parsed: Parsed,
    *,
    engine_name: str,
    messages: list[dict[str, Any]],
    sampling: Mapping[str, Any],
    template_kwargs: frozenset[str],
) -> dict[str, Any]:
    """Build the body that is sent to the engine, with `model` rewritten.

    It has the forwarded fields; the release's sampling fills in what the caller did not set. Usage
    is always asked for, for the record; `relay.py` takes it out where the caller did not.
    """
    given = {name: value for name, value in parsed.given.items() if value is not None}
    body = {name: value for name, value in sampling.items() if name not in given}
    if "max_completion_tokens" in given or "max_tokens" in given:
        body.pop("max_tokens", None)
        body.pop("max_completion_tokens", None)
    ignored = frozenset(parsed.ignored)
    for name, value in given.items():
        if name not in NOT_FORWARDED and name not in ignored:
            body[name] = value
    if "tools" in body and not body["tools"]:
        del body["tools"]  # some templates write that there are tools where the list is empty
    body["model"] = engine_name
    if "messages" in given and "messages" not in ignored:
        for message in messages:
            if isinstance(message.get("content"), list) or "reasoning_content" in message:
                messages = as_sent(messages)
                break
        body["messages"] = [
            {k: v for k, v in message.items() if k != OURS} if OURS in message else message
            for message in messages
        ]
        kwargs = {
            k: v
            for k, v in (given.get("chat_template_kwargs") or {}).items()
            if k in template_kwargs and isinstance(v, bool | int | str)
        }
        if kwargs:
            body["chat_template_kwargs"] = kwargs
    if parsed.stream:
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    return body


def with_system_prompt(
    messages: list[dict[str, Any]], prompt: str | None, *, prepend: bool
) -> list[dict[str, Any]]:
    """`messages` as the engine gets them.

    A caller's own system message wins, unless the deployment prepends its own.
    What is added is marked as ours; chat templates take one system message, so a prepended prompt
    joins the caller's.
    """
    if prompt is None:
        return messages
    if messages[0].get("role") not in ("system", "developer"):
        return [{"role": "system", "content": prompt, OURS: True}, *messages]
    if not prepend:
        return messages
    theirs = messages[0].get("content")
    if isinstance(theirs, list):  # an engine is sent parts line by line
        joined: Any = [{"type": "text", "text": prompt + "\n"}, *theirs]
    else:
        joined = f"{prompt}\n\n{theirs or ''}"
    return [{**messages[0], "content": joined, OURS: True}, *messages[1:]]


def encode_body(body: dict[str, Any], control_tokens: ControlTokens) -> bytes:
    """What an engine is sent, as JSON: no text in a chat becomes a control token.

    A text completion goes as it is: it is what the model reads, template and all.
    """
    encoded = to_json(body)
    if "messages" not in body or not control_tokens.may_be_in(encoded):
        return encoded
    defused = {**body, "messages": control_tokens.defuse(body["messages"])}
    if "tools" in body:
        defused["tools"] = control_tokens.defuse_tools(body["tools"])
    return to_json(defused)
