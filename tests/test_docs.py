"""What the documents say exists: settings, routes, commands, links, and code that can be read.

Whoever adds a setting, a route or a command without a line in `docs/` finds out here.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel, SecretStr

from feedback.curation.examples import DropReason, ExampleKind
from feedback.curation.policy import Policy
from server.access.scopes import PUBLIC, ROUTES, Scope
from server.chat.engine_request import NOT_FORWARDED
from server.chat.request import REFUSED, ChatRequest, TextRequest
from server.cli import app
from server.settings import Settings
from tests.gateway_fixtures import RunningGateway
from tuner.methods import HYPERPARAMETERS, METHODS, Choice, Method, default_of
from tuner.training.rendering import WHAT_TO_DO

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTHING = "–"  #: an empty cell of a table

Command = Any  #: of typer's own copy of click


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted(DOCS.rglob("*.md")),
    ]


def section(name: str, heading: str) -> str:
    """The text of a document below `heading`, up to the next one of its rank or a higher one."""
    level = len(heading.split()[0])
    _, found, rest = read(DOCS / name).partition(f"\n{heading}\n")
    assert found, f"{name} has no heading {heading!r}"
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """All cells of all tables, headings and rules left out."""
    found: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        for line in table.splitlines()[2:]:
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def first_names(text: str) -> set[str]:
    """What stands as code in the first column of the tables."""
    return {name for row in rows(text) for name in names_in(row[0])}


def blocks(path: Path, *languages: str) -> Iterator[str]:
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", read(path), re.DOTALL | re.MULTILINE):
        if language in languages:
            yield code


def list_settings() -> dict[str, tuple[str, Any]]:
    """Key → (environment variable, default) of every setting."""
    found = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, BaseModel):
            for inner, value in type(field.default).model_fields.items():
                variable = f"BURNISH_{name}__{inner}".upper()
                found[f"{name}.{inner}"] = (variable, value.default)
        else:
            found[name] = (f"BURNISH_{name.upper()}", field.default)
    return found


def show_default(value: Any) -> str:
    if value is None or isinstance(value, SecretStr):
        return NOTHING
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


def test_every_setting_is_documented_with_its_default_and_nothing_else_is() -> None:
    settings = read(DOCS / "settings.md")
    documented = {
        names_in(row[0])[0]: (names_in(row[1])[0], row[2])
        for row in rows(settings)
        if len(row) == 4
    }
    assert documented == {
        key: (variable, show_default(default))
        for key, (variable, default) in list_settings().items()
    }


def test_every_route_is_documented_with_its_scope_and_nothing_else_is() -> None:
    documented: dict[tuple[str, str], str] = {}
    for name in ("api.md", "administration.md"):
        for row in rows(read(DOCS / name)):
            route = re.fullmatch(r"`(GET|POST|PATCH|PUT|DELETE) (/\S*)`", row[0])
            if route is not None:
                assert route.groups() not in documented, f"{row[0]} is documented twice"
                documented[route[1], route[2]] = row[1].strip("`")
    expected = dict.fromkeys(PUBLIC, NOTHING)
    expected |= {route: str(scope) for route, scope in ROUTES.items()}
    assert documented == {
        (method, path.replace(":path}", "}")): scope
        for (method, path), scope in expected.items()
        if scope != Scope.INTERNAL
    }


def test_every_scope_is_documented() -> None:
    text = section("administration.md", "## Keys and scopes")
    assert set(Scope) - {Scope.INTERNAL} <= first_names(text)


def test_every_field_of_chat_is_in_one_of_the_three_lists() -> None:
    fields = section("api.md", "### Fields")
    assert first_names(fields) == {*ChatRequest.model_fields, *TextRequest.model_fields, *REFUSED}
    refused = fields.partition("refused with 400")[2]
    ours = fields.partition("acts on itself")[2].partition("refused with 400")[0]
    assert first_names(refused) == set(REFUSED)
    assert first_names(ours) == set(NOT_FORWARDED)


def test_every_hyperparameter_is_documented_with_its_range_and_default() -> None:
    text = section("administration.md", "### Hyperparameters").partition("| Route")[0]
    documented = {names_in(row[0])[0]: row[1:3] for row in rows(text)}
    assert {name: span for name, (span, _) in documented.items()} == {
        name: " or ".join(f"`{choice}`" for choice in known.choices)
        if isinstance(known, Choice)
        else f"{known.minimum:g} to {known.maximum:g}"
        for name, known in HYPERPARAMETERS.items()
    }
    for name, (_, default) in documented.items():
        first, *others = default.split("; ")  # as in: 3; DPO 2
        said = {Method(other.split()[0].lower()): other.split()[1] for other in others}
        for method in HYPERPARAMETERS[name].methods:
            expected = default_of(name, method)
            shown = said.get(method, first)
            found = shown.strip("`") if isinstance(expected, str) else float(shown)
            assert found == expected, (name, method)


def test_every_method_is_documented_with_the_kinds_it_reads_and_its_defaults() -> None:
    text = section("administration.md", "## Tuning").partition("### ")[0]
    documented = {names_in(row[0])[0]: row[1:] for row in rows(text)}
    assert set(documented) == set(Method)
    for name, (reads, needs, rate, epochs, _) in documented.items():
        facts = METHODS[Method(name)]
        assert set(reads.split(", ")) == set(facts.reads)
        assert set(needs.split(" or ")) == set(facts.needs)
        assert (float(rate), int(epochs)) == (
            facts.defaults["learning_rate"], facts.defaults["epochs"],
        )  # fmt: skip


def test_every_kind_of_example_is_documented_with_the_methods_that_read_it() -> None:
    text = section("api.md", "## Feedback")
    documented = {row[0]: set(names_in(row[1])) for row in rows(text) if row[0] in set(ExampleKind)}
    assert documented == {
        str(kind): {str(method) for method in Method if kind in METHODS[method].reads}
        for kind in ExampleKind
    }


def test_every_choice_of_curation_is_documented_with_its_default() -> None:
    text = section("administration.md", "### Curation policy")
    documented = {names_in(row[0])[0]: json.loads(names_in(row[1])[0]) for row in rows(text)}
    assert documented == Policy().to_json()


def test_every_reason_to_leave_something_out_is_documented() -> None:
    assert first_names(section("administration.md", "### Why something is left out")) == {
        reason.value for reason in DropReason
    }


def test_every_reason_to_train_on_a_row_not_is_documented() -> None:
    assert set(WHAT_TO_DO) <= first_names(section("api.md", "## Files and tuning jobs"))


def test_every_metric_is_documented() -> None:
    source = "".join(
        read(ROOT / "server" / name) for name in ("metrics.py", "endpoints/metrics.py")
    )
    text = section("administration.md", "### Logs and metrics")
    assert first_names(text) == set(re.findall(r'"(burnish_[a-z_]+)"', source))


# Commands


@cache
def root_command() -> Command:
    return typer.main.get_command(app)


def list_commands(command: Command, name: str) -> Iterator[str]:
    """Every command by its whole name; a group counts where it does something by itself."""
    inner = getattr(command, "commands", None)
    if inner is None or (command.invoke_without_command and name != "burnish"):
        yield name
    for each, below in (inner or {}).items():
        yield from list_commands(below, f"{name} {each}")


def written_commands(path: Path) -> Iterator[str]:
    """`burnish …` as it stands in blocks of shell, and as code within a line."""
    for code in blocks(path, "sh", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[\s/])(burnish( .*)?)$", line.partition("  #")[0].rstrip())
            if found is not None and " -v " not in line:
                yield found[1]
    prose = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`(?:\.venv/bin/)?(burnish(?: [^`]*)?)`", prose)


def parse(line: str) -> None:
    """Read a command's arguments as running it would. Raises what typer raises."""
    command, name = root_command(), "burnish"
    arguments = shlex.split(line)[1:]
    while arguments and arguments[0] in getattr(command, "commands", {}):
        name = arguments.pop(0)
        command = command.commands[name]
    if getattr(command, "commands", None) is not None:
        unknown = [word for word in arguments if not word.startswith("-")]
        values = [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word[:2] == "--"]
        assert all(word in values for word in unknown), f"{line!r}: no such command"
    if not arguments and getattr(command, "no_args_is_help", False):
        return
    command.make_context(name, arguments)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_that_is_shown_can_be_parsed(path: Path) -> None:
    for line in written_commands(path):
        if "…" in line or line.endswith("|"):
            continue
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{line!r} in {path.name}: {type(error).__name__}: {error}")


def test_every_command_is_in_the_documents() -> None:
    written = {line for path in documents() for line in written_commands(path)}
    missing = [
        name
        for name in list_commands(root_command(), "burnish")
        if not any(line == name or line.startswith(f"{name} ") for line in written)
    ]
    assert missing == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_target_of_make_that_is_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    spans = re.findall(r"`make ([a-z-]+)", read(path))
    lines = [found for code in blocks(path, "sh") for found in re.findall(r"^make ([a-z-]+)", code)]
    assert {*spans, *lines} <= targets


# Links and code


def anchors(path: Path) -> set[str]:
    """Names by which headings are linked to, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name} links to {target!r}"
        assert not anchor or anchor in anchors(found), f"{path.name} links to {target!r}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_code_in_the_documents_can_be_read(path: Path) -> None:
    for code in blocks(path, "python"):
        ast.parse(code)
    for code in blocks(path, "json"):
        json.loads(code)
    for code in blocks(path, "sh"):
        done = subprocess.run(
            ["bash", "-n"], input=code, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for code in blocks(path, "toml"):
        Settings(**tomllib.loads(code))


def test_the_python_of_the_readme_runs(
    sqlite_gateway: RunningGateway,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KEY", sqlite_gateway.key("reader"))
    names: dict[str, Any] = {}
    for code in blocks(ROOT / "README.md", "python"):
        exec(code.replace("http://127.0.0.1:8000", sqlite_gateway.url), names)
    names["client"].close()
    assert re.match(r"chatcmpl-\w+ assistant@0\n", capsys.readouterr().out)
    given = sqlite_gateway.client().get("/v1/feedback").json()["data"]
    assert [(row["completion_id"], row["kind"]) for row in given] == [
        (names["answer"].id, "correction")
    ]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_no_placeholder_is_left(path: Path) -> None:
    assert re.findall(r"\{\{\w+\}\}", read(path)) == []


# Containers


def test_compose_names_stages_of_the_dockerfile_and_settings_that_exist() -> None:
    dockerfile, compose = read(ROOT / "Dockerfile"), read(ROOT / "compose.yaml")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    assert set(re.findall(r"target: (\w+)", compose)) == {"gateway", "cpu", "cuda"} <= stages
    known = {variable for variable, _ in list_settings().values()}
    used = set(re.findall(r"\bBURNISH_[A-Z_]+", dockerfile + compose))
    assert used <= known
    for words in re.findall(r'(?:CMD|command:) \["burnish", (.*)\]', dockerfile + compose):
        parse("burnish " + " ".join(json.loads(f"[{words}]")))
