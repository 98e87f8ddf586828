"""Output for people: no control characters of others, and no reader that ends a service."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from server.cli.app import PlainConsole, fail, show_json
from server.terminal import as_json_escapes, printable

ESCAPE = "\x1b[2J\x9b31m\x07\u202egnp.exe\u2028\ud800"


@given(st.text())
def test_no_control_character_is_left_and_the_rest_is(text: str) -> None:
    left = printable(text)
    assert not [c for c in left if (ord(c) < 0x20 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0]
    assert printable(left) == left
    if text.isascii() and text.isprintable():
        assert left == text


@given(st.text())
def test_json_means_the_same_afterwards(text: str) -> None:
    escaped = as_json_escapes(json.dumps(text, ensure_ascii=False))
    assert json.loads(escaped) == text
    assert printable(escaped) == escaped


def test_what_commands_print_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole(highlight=False).print(f"a {ESCAPE}", markup=False)
    show_json({"name": ESCAPE})
    with pytest.raises(typer.Exit):
        fail(f"no {ESCAPE}")
    written = capsys.readouterr()
    for text in (written.out, written.err):
        assert "\\x1b[2J" in text or "\\u001b[2J" in text
        assert printable(text) == text


SAYS = """
import sys
from server.processes.supervisor import say
from server.terminal import prepare_output
prepare_output()
say("one …")
sys.stdin.readline()
for _ in range(3):
    say("nobody reads this")
sys.stderr.write("still here")
"""


def test_a_reader_that_leaves_ends_nothing() -> None:
    speaker = subprocess.Popen(
        [sys.executable, "-P", "-c", SAYS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert speaker.stdout is not None
    assert b"one \\u2026" in speaker.stdout.readline()
    speaker.stdout.close()
    speaker.stdout = None
    _, said = speaker.communicate(b"\n", timeout=60)
    assert (speaker.returncode, said) == (0, b"still here")


RUNS = """
import os, sys
from server.processes.children import Launch, run_guarded
code = "import sys; print('first', flush=True); sys.stdin.read(); [print(n) for n in range(9999)]"
sys.exit(run_guarded(Launch([sys.executable, "-c", code], os.environ)))
"""


def test_a_command_run_for_a_reader_that_leaves_comes_to_its_end() -> None:
    runner = subprocess.Popen([sys.executable, "-P", "-c", RUNS], stdout=subprocess.PIPE)
    assert runner.stdout is not None
    assert runner.stdout.readline() == b"first\n"
    runner.stdout.close()
    assert runner.wait(timeout=60) == 0
