"""Log lines are one JSON object each."""

from __future__ import annotations

import json
import logging

from server.logs import JsonFormatter


def test_a_line_has_its_action_and_what_stands_beside_it() -> None:
    record = logging.makeLogRecord(
        {"name": "server.x", "levelname": "INFO", "msg": "Done\n%s", "args": ("é",)}
    )
    record.action, record.release = "done", "assistant@1"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("at").endswith("+00:00")
    assert found == {
        "level": "info",
        "logger": "server.x",
        "message": "Done\né",
        "action": "done",
        "release": "assistant@1",
    }


def test_an_exception_stays_in_its_line() -> None:
    try:
        raise KeyError("gone")
    except KeyError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.makeLogRecord({"msg": "Failed", "exc_info": info})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "KeyError: 'gone'" in json.loads(line)["exception"]
