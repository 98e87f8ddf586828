"""Log lines are one JSON object each."""

from __future__ import annotations

import json
import logging

from server.logs import SELDOM_SECONDS, JsonFormatter, Seldom


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


def failure(action: str, error: Exception) -> logging.LogRecord:
    record = logging.makeLogRecord({"name": "server.x", "msg": "Failed"})
    record.exc_info, record.action = (type(error), error, None), action
    return record


def test_stack_traces_of_one_kind_are_written_once_a_second_and_counted() -> None:
    now = 0.0
    seldom = Seldom(lambda: now)
    failures = [failure("not_recorded", OSError()) for _ in range(4)]
    assert [seldom.filter(record) for record in failures[:3]] == [True, False, False]
    assert seldom.filter(failure("not_recorded", KeyError()))
    assert seldom.filter(failure("request_failed", OSError()))
    plain = [logging.makeLogRecord({"name": "server.x", "msg": "Done"}) for _ in range(2)]
    assert all(map(seldom.filter, plain))
    now = SELDOM_SECONDS
    assert seldom.filter(failures[3])
    assert json.loads(JsonFormatter().format(failures[3]))["held_back"] == 2
