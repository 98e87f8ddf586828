"""Messages as people hand them in: what is taken, what is refused, and in which words.

Owns: the roles and keys of a message, texts, tools and weights of a record, and what cannot be
stored. Every function raises ValueError with what was found and what was expected; `where` is the
key that the caller knows. Does not own: what a record teaches (`shapes.py`).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from feedback.formats.json_text import MAX_DEPTH, parse_json

Message = dict[str, Any]
Fields = Mapping[str, Any]  #: of one record

_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "cut_off")
_ADVICE = {
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "reasoning is not trained on: leave it out, or write it into 'content' as the model does "
        "(<think>…</think>)",
    ),
    "function_call": "write calls as 'tool_calls'",
    "weights": "the key is 'weight', 0 or 1",
}
_WRITTEN_TURNS = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
_SPEAKER = re.compile(r"\s*(?:human|user)[ \t]*:", re.IGNORECASE)
_REPLY = re.compile(r"^[ \t]*(?:assistant|ai|bot|gpt)[ \t]*:", re.IGNORECASE | re.MULTILINE)
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*"
    r"(?:<\|(?:im_start|start_header_id|system|user)\|>|\[INST\]|<start_of_turn>)"
)


def find_unstorable(value: Any) -> str | None:
    """Why `value` can't be kept as JSON in UTF-8; None where it can."""
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"it is nested deeper than {MAX_DEPTH} levels"
        match found:
            case str():
                if "\x00" in found:
                    return "it has a NUL"
                if not found.isascii() and re.search("[\ud800-\udfff]", found):
                    return "it has half of a surrogate pair, which is no character"
            case dict():
                waiting += [(key, depth) for key in found]
                waiting += [(item, depth + 1) for item in found.values()]
            case list():
                waiting += [(item, depth + 1) for item in found]
            case float():
                if not math.isfinite(found):
                    return "it has a number that is not finite"
            case bool() | int() | None:
                pass
            case _:
                return f"it has a value of type {type(found).__name__}, which JSON has not"
    return None


def read_list(given: Any, where: str, of: str) -> list[Any]:
    """A list with something in it, which a table holds as JSON text; `of` says what it lists."""
    found, why = given, ""
    if isinstance(given, str):
        try:
            found = parse_json(given)
        except ValueError as error:
            why = f", a text that is {_describe_text(given, error)}"
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where!r} is {show(given)}{why}; expected a list of {of}")
    return found


def _describe_text(text: str, error: ValueError) -> str:
    turns = _WRITTEN_TURNS.match(text)
    if turns is not None and turns[1] == "'":
        return "Python's way of writing a list and no JSON (write it with json.dumps)"
    return f"no JSON ({error})"


def read_messages(given: Any, where: str) -> list[Message]:
    """A list of messages, at least one; perhaps as JSON text."""
    return [read_message(message, where) for message in read_list(given, where, "messages")]


def read_message(given: Any, where: str) -> Message:
    """A message with what is rendered, and its weight."""
    if not isinstance(given, dict) or given.get("role") not in _ROLES:
        raise ValueError(
            f"{where!r} holds {show(given)}; expected a message with a 'role' "
            f"({', '.join(_ROLES)}) and 'content'"
        )
    # Some writers fill every key, others leave out what is empty.
    message = {key: value for key, value in given.items() if value not in (None, [])}
    unknown = sorted(str(key) for key in message.keys() - {*_KEPT, "weight"})
    if unknown:
        advice = _ADVICE.get(unknown[0], f"expected {', '.join(_KEPT)}, weight")
        raise ValueError(f"{where!r} has a message with the key {unknown[0][:100]!r}; {advice}")
    for key in ("name", "tool_call_id"):
        if key in message:
            read_text(message[key], f"{where}.{key}")
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = calls = _read_tool_calls(calls, message["role"], where)
    if type(message.get("cut_off", False)) is not bool:
        raise ValueError(f"{where!r} has 'cut_off' {show(given['cut_off'])}; true or false")
    if not message.get("cut_off"):
        message.pop("cut_off", None)
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
        raise ValueError(f"{where!r} has a message of weight {show(given['weight'])}; 0 or 1")
    content = given.get("content")
    if content is None and not calls:
        raise ValueError(f"{where!r} has a message of {message['role']!r} without content")
    return {**message, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """The text; of OpenAI's parts, line by line as the engine is served them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        for part in content
    ] if isinstance(content, list) else [None]  # fmt: skip
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where!r} has content other than text: {show(content)}")
    return str(join_parts(content))


def _read_tool_calls(calls: Any, role: str, where: str) -> list[Any]:
    """The calls as they were sent; arguments that are left out are none, as in serving."""
    if role != "assistant" or not isinstance(calls, list) or not calls:
        raise ValueError(f"{where!r} has 'tool_calls' that are no list, or not the assistant's")
    return [_read_tool_call(call, where) for call in calls]


def _read_tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name or not isinstance(function, dict):
        raise ValueError(f"{where!r} has the tool call {show(call)} without a function's name")
    arguments = function.get("arguments")
    if arguments in (None, ""):
        return {**call, "function": {**function, "arguments": "{}"}}
    read, why = arguments, ""
    if isinstance(arguments, str):
        try:
            read = parse_json(arguments)
        except ValueError as error:
            why = f" ({error})"
    if not isinstance(read, dict):
        raise ValueError(
            f"{where!r} has a call of {name[:100]!r} whose 'arguments' are {show(arguments)}{why}; "
            "expected a JSON object"
        )
    return dict(call)


def texts_of(content: Any) -> list[str]:
    """The texts of a message's `content`: of a string itself, of a list what its parts say.

    Refusals are said too. Parts that say nothing are left out, as an engine leaves them out.
    """
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    said = (
        part.get("refusal" if part.get("type") == "refusal" else "text")
        for part in parts
        if isinstance(part, Mapping)
    )
    return [text for text in said if isinstance(text, str) and text]


def join_parts(content: Any) -> Any:
    """A list of parts as one text, part by line; any other content as it is."""
    return "\n".join(texts_of(content)) if isinstance(content, list) else content


def as_sent(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in the one form in which an engine is sent them, whatever way they came.

    Parts are one text, thoughts are `reasoning`, and a tool call has an id, a type, and its
    arguments as JSON text. A message that has this form already stays as it is.
    """
    calls = 0
    made: list[Message] = []
    for message in messages:
        sent = dict(message)
        if isinstance(sent.get("content"), list):
            sent["content"] = join_parts(sent["content"])
        thoughts = sent.pop("reasoning_content", None)
        if thoughts is not None and sent.get("reasoning") is None:
            sent["reasoning"] = thoughts
        if isinstance(sent.get("tool_calls"), list):
            sent["tool_calls"] = [
                _call_as_sent(call, number)
                for number, call in enumerate(sent["tool_calls"], start=calls)
            ]
            calls += len(sent["tool_calls"])
        made.append(sent)
    return made


def _call_as_sent(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        said = function.get("arguments") or {}
        function["arguments"] = json.dumps(said, ensure_ascii=False)
    sent = {"id": f"call_{number}", "type": "function", **call, "function": function}
    return sent if sent["id"] else {**sent, "id": f"call_{number}"}


def parse_arguments(arguments: Any) -> dict[str, Any]:
    """A tool call's arguments as an object; what is no object's JSON counts as an empty one.

    An engine reads them so before a template sees them.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    return arguments if isinstance(arguments, dict) else {}


def read_turns(given: Any, where: str, role: str) -> list[Message]:
    """Messages, perhaps as JSON text; a plain text is one message of `role`."""
    if not isinstance(given, str) or _WRITTEN_TURNS.match(given):
        return read_messages(given, where)
    if not given.strip():
        raise ValueError(f"{where!r} is empty")
    if role == "user" and (found := find_dialogue(given)) is not None:
        raise ValueError(f"{where!r} is {found}; expected one turn, or a list of messages")
    return [{"role": role, "content": given}]


def find_dialogue(text: str) -> str | None:
    """What a text is that holds several turns; None for one turn."""
    if _SPEAKER.match(text) and _REPLY.search(text):
        return 'a whole dialogue as one text ("Human: … Assistant: …")'
    if _RENDERED.match(text):
        return "a text in which a chat template has marked the turns"
    return None


def split_answer(given: Any, where: str) -> tuple[Message, list[Message]]:
    """The last turn, which must be an answer, and what stands before it."""
    turns = read_turns(given, where, "assistant")
    check_answer(turns[-1], where)
    return turns[-1], turns[:-1]


def read_one_answer(messages: Sequence[Message], where: str) -> Message:
    """The one message that an answer is."""
    if len(messages) != 1:
        roles = [message["role"] for message in messages[:10]]
        raise ValueError(f"{where!r} must be one assistant message, found {roles}")
    check_answer(messages[0], where)
    check_taught(messages[0], where)
    return messages[0]


def read_answer(given: Any, where: str) -> Message:
    """A text as the assistant's message."""
    message = {"role": "assistant", "content": read_text(given, where)}
    check_answer(message, where)
    return message


def check_answer(message: Message, where: str) -> None:
    """The message is the assistant's and says or calls something."""
    if message["role"] != "assistant":
        raise ValueError(
            f"{where!r} must be one assistant message, found the role {message['role']!r}"
        )
    if not message["content"].strip() and not message.get("tool_calls"):
        raise ValueError(f"{where!r}: the answer is empty")


def check_taught(message: Message, where: str) -> None:
    """The only answer of a row is not weighted 0."""
    if not message.get("weight", 1):
        raise ValueError(f"{where!r}: the answer has the weight 0, so nothing is taught")


def strip_weights(messages: Sequence[Message]) -> list[Message]:
    """The messages with what is rendered alone."""
    return [{key: message[key] for key in _KEPT if key in message} for message in messages]


def read_text(given: Any, where: str) -> str:
    """A text, perhaps an empty one."""
    if not isinstance(given, str):
        raise ValueError(f"{where!r} is {show(given)}; expected a text")
    return given


def add_system(record: Fields, turns: Sequence[Message]) -> list[Message]:
    """Put the record's own `system` before its turns, where it has one.

    Raises ValueError where both have a system prompt and they differ.
    """
    given = record.get("system")
    text = "" if given is None else read_text(given, "system")
    if not text.strip():
        return list(turns)
    if turns and turns[0]["role"] in ("system", "developer"):
        if turns[0]["content"] == text:
            return list(turns)
        raise ValueError("'system' is not the system message that the turns begin with")
    return [{"role": "system", "content": text}, *turns]


def read_tools(record: Fields) -> list[Any] | None:
    """The functions that were offered, in OpenAI's form, from a list or (some data sets) JSON text.

    Raises ValueError for what is none.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"'tools' is a text that is no JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' is {show(tools)}; expected a list of objects")
    return [_read_tool(tool) for tool in tools]


def _read_tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return tool
    if function is None and isinstance(tool.get("name"), str):  # without its wrapping
        return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    raise ValueError(
        f"'tools' holds {show(tool)}; expected "
        '{"type": "function", "function": {"name": …, "parameters": …}}'
    )


def read_weight(record: Fields) -> float:
    """How much the row counts; 1 by default."""
    weight: Any = record.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, str):
        with suppress(ValueError):
            weight = float(weight or "1")
    if type(weight) not in (int, float) or not 0 < weight < 1e6:
        raise ValueError(f"'weight' is {show(weight)}; expected a number above 0")
    return float(weight)


def show(value: Any) -> str:
    """The beginning of what was found."""
    return reprlib.repr(value)[:100]
