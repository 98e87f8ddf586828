"""The command line against a gateway: what it finds, prints and ends with."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli.app import app
from server.settings import load_settings
from tests.gateway_fixtures import RunningGateway
from tuner.deployments import get_deployment
from tuner.releases import create_release


def burnish(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def at_gateway(sqlite_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    """The environment of somebody who has the administrator's key."""
    monkeypatch.setenv("BURNISH_URL", sqlite_gateway.url)
    monkeypatch.setenv("BURNISH_API_KEY", sqlite_gateway.admin_key)
    return sqlite_gateway


def test_the_lists_are_tables_or_json(at_gateway: RunningGateway) -> None:
    assert "assistant@0" in burnish("deployments").stdout
    found = json.loads(burnish("releases", "--json").stdout)
    assert [release["name"] for release in found] == ["assistant@0"]
    assert "no data sets" in burnish("datasets").stdout


def test_what_people_wrote_stands_in_a_table_as_it_is(at_gateway: RunningGateway) -> None:
    suffix = "[/b]"
    with at_gateway.database.write() as session:
        deployment = get_deployment(session, "assistant")
        texts: dict[str, Any] = {"system_prompt": None, "sampling": {}}
        create_release(session, deployment, adapter=None, suffix=suffix, **texts)
    found = burnish("releases")
    assert (found.exit_code, suffix in found.stdout) == (0, True)
    assert f"suffix: {suffix}" in burnish("releases", "show", "assistant@1").stdout


def test_a_tuning_job_takes_a_suffix_and_a_validation_file(
    at_gateway: RunningGateway, tmp_path: Path
) -> None:
    client = at_gateway.client()
    files = [
        client.post(
            "/v1/files",
            files={"file": json.dumps({"prompt": question, "completion": "Yes."})},
            data={"purpose": "fine-tune"},
        ).json()["id"]
        for question in ("One?", "Two?")
    ]
    options = ("--dataset", files[0], "--validation", files[1], "--suffix", "short", "--json")
    job = json.loads(burnish("tune", "assistant", *options).stdout)
    assert (job["validation_file"], job["user_provided_suffix"]) == (files[1], "short")


def test_credentials_stand_in_for_the_environment(
    sqlite_gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(
        json.dumps({"url": sqlite_gateway.url, "api_key": sqlite_gateway.admin_key})
    )
    monkeypatch.setenv("BURNISH_DATA", str(tmp_path))
    assert burnish("deployments", "show", "assistant").exit_code == 0


def test_no_key_and_no_gateway_end_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_DATA", str(tmp_path))
    missing = burnish("releases")
    assert (missing.exit_code, "no key: set BURNISH_API_KEY" in missing.stderr) == (3, True)
    monkeypatch.setenv("BURNISH_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("BURNISH_API_KEY", "sk-any")
    away = burnish("releases")
    assert (away.exit_code, "no gateway answers at http://127.0.0.1:9" in away.stderr) == (3, True)


def test_a_key_is_taken_with_the_line_end_that_echo_wrote_and_not_with_one_inside(
    at_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_API_KEY", f"{at_gateway.admin_key}\n")
    assert burnish("releases").exit_code == 0
    monkeypatch.setenv("BURNISH_API_KEY", "sk-burnish\n-cut")
    cut = burnish("releases")
    assert (cut.exit_code, "holds a blank, a line break" in cut.stderr) == (3, True)


def test_a_refusal_ends_with_1_and_the_gateways_words(at_gateway: RunningGateway) -> None:
    refused = burnish("promote", "assistant@9")
    assert refused.exit_code == 1
    assert "no release 'assistant@9'" in refused.stderr
    nothing = burnish("rollback")
    assert nothing.exit_code == 1
    assert "has no previous release" in nothing.stderr


def test_something_that_is_no_release_is_wrong_usage(at_gateway: RunningGateway) -> None:
    wrong = burnish("promote", "assistant")
    assert (wrong.exit_code, "give one like assistant@3" in wrong.stderr) == (2, True)


def test_a_key_is_shown_once_and_works_until_it_is_revoked(
    at_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = json.loads(burnish("keys", "create", "anna", "--scope", "curate", "--json").stdout)
    assert made["key"] not in burnish("keys", "--json").stdout
    with monkeypatch.context() as context:
        context.setenv("BURNISH_API_KEY", made["key"])
        assert burnish("releases").exit_code == 0
        assert burnish("keys").exit_code == 1
    assert burnish("keys", "revoke", made["id"]).exit_code == 0
    monkeypatch.setenv("BURNISH_API_KEY", made["key"])
    assert "unknown or was revoked" in burnish("releases").stderr


def test_a_new_system_prompt_is_a_candidate_and_answers_nobody_yet(
    at_gateway: RunningGateway,
) -> None:
    changed = burnish("deployments", "set", "assistant", "--system-prompt", "Be brief.", "--json")
    assert json.loads(changed.stdout)["candidate"] == "assistant@1"
    shown = json.loads(burnish("deployments", "show", "assistant", "--json").stdout)
    assert (shown["production"], shown["system_prompt"]) == ("assistant@0", None)
    assert burnish("promote", "assistant@1").exit_code == 1  # not evaluated
    moved = burnish("promote", "assistant@1", "--force", "--note", "a prompt, no weights")
    assert "production assistant@1, previous assistant@0" in moved.stdout
    assert "production assistant@0" in burnish("rollback").stdout


def test_an_answer_explains_itself(at_gateway: RunningGateway) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "A secret?"}]}
    answer = at_gateway.client().post("/v1/chat/completions", json=body).json()
    explained = burnish("explain", answer["id"])
    assert "assistant@0" in explained.stdout
    assert "secret" not in explained.stdout


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("BURNISH_PROT", "1", "unknown setting BURNISH_PROT"),
        ("BURNISH_ENGINE__MAX_LORRAS", "4", "unknown setting BURNISH_ENGINE__MAX_LORRAS"),
        ("BURNISH_PORT", "none", "setting 'port'"),
    ],
)
def test_a_wrong_setting_in_the_environment_is_named(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=said):
        load_settings()


def test_flags_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "burnish.toml"
    file.write_text("port = 1001\nhost = '0.0.0.0'\n[engine.args]\nmax-num-seqs = 3\n")
    monkeypatch.setenv("BURNISH_CONFIG", str(file))
    monkeypatch.setenv("BURNISH_PORT", "1002")
    settings = load_settings(data=tmp_path, model={"path": "/models/other"})
    assert (settings.host, settings.port, settings.data) == ("0.0.0.0", 1002, tmp_path)
    assert load_settings(port=1003).port == 1003
    assert settings.engine.args == {"max-num-seqs": 3}
    file.write_text("prot = 1\n")
    with pytest.raises(SystemExit, match="unknown setting 'prot'"):
        load_settings()


def test_doctor_ends_with_1_where_something_will_not_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = burnish("doctor", "--data", str(tmp_path / "file"), "--json")
    problems = {f["topic"] for f in json.loads(found.stdout) if f["level"] == "problem"}
    assert (found.exit_code, "data" in problems) == (1, True)


def test_credentials_are_for_this_user_alone(tmp_path: Path) -> None:
    from server.processes.children import write_private_json

    write_private_json(tmp_path / "credentials", {"api_key": "x"})
    assert stat.S_IMODE(os.stat(tmp_path / "credentials").st_mode) == 0o600


def test_limits_of_a_key_are_given_one_by_one(at_gateway: RunningGateway) -> None:
    given = ("--limit", "requests-per-minute=60", "--limit", "tokens_per_minute=none", "--json")
    made = json.loads(burnish("keys", "create", "bot", *given).stdout)
    assert made["limits"] == {"requests_per_minute": 60, "tokens_per_minute": None}
    assert burnish("keys", "create", "bot", "--limit", "requests_per_minute").exit_code == 2
    assert burnish("keys", "create", "bot", "--limit", "dogs=1").exit_code == 1


def test_a_tuning_job_is_paused_resumed_and_cancelled(at_gateway: RunningGateway) -> None:
    upload = {"file": ("rows.jsonl", b'{"prompt": "Hi?", "completion": "Hello."}\n')}
    client = at_gateway.client()
    file = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
    made = burnish("tune", "assistant", "--dataset", file["id"], "--json")
    job = json.loads(made.stdout)["id"]
    for command, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert f"{job} is {status}" in burnish("jobs", command, job).stdout
    assert burnish("jobs", "watch", job).exit_code == 1
