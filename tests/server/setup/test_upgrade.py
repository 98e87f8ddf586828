"""What `burnish db upgrade` leaves: the schema of the models, keys, the first deployment."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, Table, inspect, select, text

from feedback import audit
from feedback.db import Base, CanonicalJson, Database, DatabaseUnfit, UtcDateTime, now
from server.access.keyring import hash_key, load_keyring
from server.access.keys import revoke_key
from server.access.scopes import Scope
from server.schema import MIGRATIONS, UpgradeError, check_schema, migrate
from server.settings import Settings, WorkerSettings
from server.setup.upgrade import read_internal_key, recover_admin_key, upgrade
from server.tables import Key
from tests.gateway_fixtures import BASE
from tuner.deployments import list_aliases, list_deployments
from tuner.releases import get_release

URL = "http://127.0.0.1:8000"


@pytest.fixture
def empty(database: Database) -> Database:
    """A database without any table."""
    Base.metadata.drop_all(database.engine)
    return database


def _settings(folder: Path, **more: Any) -> Settings:
    return Settings(data=folder / "data", **more)


def _rows(database: Database) -> dict[str, list[str]]:
    with database.read() as session:
        return {
            table.name: sorted(map(repr, session.execute(select(table))))
            for table in Base.metadata.sorted_tables
        }


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_migrations_make_exactly_the_schema_of_the_models(empty: Database) -> None:
    migrate(empty)
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def _fill(database: Database) -> None:
    """A row in every table of the schema as it is, each column with a value of its own."""
    found = MetaData()
    found.reflect(database.engine)
    values: dict[tuple[str, str], Any] = {}
    with database.write() as session:
        for table in Base.metadata.sorted_tables:
            if table.name not in found.tables:
                continue  # a later migration's
            row: dict[str, Any] = {}
            for column in table.columns:
                if column.name not in found.tables[table.name].c:
                    continue
                owner = next(iter(column.foreign_keys), None)
                if owner is not None:
                    row[column.name] = values.get((owner.column.table.name, owner.column.name))
                elif isinstance(column.type, CanonicalJson):
                    row[column.name] = {"in": [table.name, column.name]}
                elif isinstance(column.type, UtcDateTime):
                    row[column.name] = now()
                elif column.type.python_type is str:
                    row[column.name] = f"{table.name}.{column.name} é"
                else:
                    row[column.name] = column.type.python_type(1)
                values[table.name, column.name] = row[column.name]
            session.execute(table.insert().values(**row))


def _known_rows(database: Database) -> dict[str, list[dict[str, Any]]]:
    """All rows, of the columns that the database has."""
    known = inspect(database.engine)
    rows = {}
    with database.read() as session:
        for table in Base.metadata.sorted_tables:
            if not known.has_table(table.name):
                continue
            names = {column["name"] for column in known.get_columns(table.name)}
            query = select(*(column for column in table.columns if column.name in names))
            rows[table.name] = [dict(row) for row in session.execute(query).mappings()]
    return rows


def test_the_first_versions_database_migrates_with_its_rows(
    empty: Database, tmp_path: Path
) -> None:
    migrate(empty, "0001")
    _fill(empty)
    before = _known_rows(empty)
    assert all(len(rows) == 1 for rows in before.values())
    with pytest.raises(DatabaseUnfit, match=r"has the schema 0001, .*run `burnish db upgrade`"):
        check_schema(empty)

    migrate(empty)

    after = _known_rows(empty)
    for name, rows in before.items():
        assert [{key: row[key] for key in rows[0]} for row in after[name]] == rows, name
    assert after["releases"][0]["suffix"] is None
    check_schema(empty)
    migrate(empty)
    assert _known_rows(empty) == after


def test_a_newer_burnishs_database_is_left_alone(empty: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    with pytest.raises(DatabaseUnfit, match="has no schema"):
        check_schema(empty)
    upgrade(settings, empty, BASE, url=URL)
    with empty.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UpgradeError, match="schema 9999, which a newer Burnish made"):
        upgrade(settings, empty, BASE, url=URL)
    with pytest.raises(DatabaseUnfit, match="schema 9999, which a newer Burnish made"):
        check_schema(empty)


def test_a_first_upgrade_makes_what_a_gateway_needs(empty: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    made = upgrade(settings, empty, BASE, url=URL)

    assert made.deployment == "assistant"
    assert made.admin_key is not None
    with empty.read() as session:
        assert [row.name for row in list_deployments(session)] == ["assistant"]
        assert list_aliases(session, "assistant") == ["gpt-4o-mini"]
        origin = get_release(session, "assistant@0")
        assert (origin.base_model, origin.base_revision) == (BASE.name, BASE.revision)
        assert origin.template_hash == BASE.template_hash
        keyring = load_keyring(session)
        assert keyring.authenticate(f"Bearer {made.admin_key}").scopes == {Scope.ADMIN}
        internal = keyring.authenticate(f"Bearer {read_internal_key(settings)}")
        assert internal.scopes == {Scope.INTERNAL}
        assert audit.verify(session) == audit.Verified(3, 1)
    assert _mode(settings.run_dir / "internal.key") == 0o600
    assert _mode(settings.data / "credentials") == 0o600
    assert _mode(settings.run_dir) == 0o700
    written = json.loads((settings.data / "credentials").read_text())
    assert written == {"url": URL, "api_key": made.admin_key}


def test_a_base_whose_template_has_changed_is_not_started(empty: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    upgrade(settings, empty, BASE, url=URL)
    with pytest.raises(UpgradeError, match="the chat template of 'tiny' has changed"):
        upgrade(settings, empty, replace(BASE, template_hash="another"), url=URL)


def test_a_second_upgrade_changes_nothing(empty: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    upgrade(settings, empty, BASE, url=URL)
    rows = _rows(empty)
    files = [(settings.data / name).read_bytes() for name in ("credentials", "run/internal.key")]

    made = upgrade(settings, empty, BASE, url=URL)

    assert (made.admin_key, made.deployment) == (None, None)
    assert _rows(empty) == rows
    assert files == [
        (settings.data / name).read_bytes() for name in ("credentials", "run/internal.key")
    ]


@pytest.fixture
def empty_sqlite(sqlite_database: Database) -> Database:
    """An SQLite database without any table."""
    Base.metadata.drop_all(sqlite_database.engine)
    return sqlite_database


def test_the_first_keys_may_be_given(empty_sqlite: Database, tmp_path: Path) -> None:
    settings = _settings(
        tmp_path,
        bootstrap_key="sk-mine",
        deployment="helper",
        worker=WorkerSettings(api_key="sk-worker"),
    )
    made = upgrade(settings, empty_sqlite, BASE, url=URL)
    assert (made.admin_key, made.deployment) == ("sk-mine", "helper")
    with empty_sqlite.read() as session:
        hashes = {row.sha256: row.scopes for row in session.scalars(select(Key))}
    assert hashes == {hash_key("sk-mine"): ["admin"], hash_key("sk-worker"): ["internal"]}
    assert read_internal_key(settings) is None


def test_a_lost_internal_key_is_made_again(empty_sqlite: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    upgrade(settings, empty_sqlite, BASE, url=URL)
    lost = read_internal_key(settings)
    (settings.run_dir / "internal.key").unlink()

    upgrade(settings, empty_sqlite, BASE, url=URL)

    found = read_internal_key(settings)
    assert found not in (None, lost)
    with empty_sqlite.read() as session:
        assert load_keyring(session).authenticate(f"Bearer {found}").scopes == {Scope.INTERNAL}


def test_another_base_than_the_deployments_is_refused_and_changes_nothing(
    empty_sqlite: Database, tmp_path: Path
) -> None:
    settings = _settings(tmp_path)
    upgrade(settings, empty_sqlite, BASE, url=URL)
    rows = _rows(empty_sqlite)
    for other in (replace(BASE, name="small"), replace(BASE, revision="sha256-other")):
        with pytest.raises(UpgradeError, match="'assistant' stands on 'tiny'"):
            upgrade(settings, empty_sqlite, other, url=URL)
        secrets = (settings.data / "secret").read_bytes()
        with pytest.raises(UpgradeError, match="'assistant' stands on 'tiny'"):
            upgrade(settings, empty_sqlite, other, url=URL, new_secret=True)
        assert (settings.data / "secret").read_bytes() == secrets
    assert _rows(empty_sqlite) == rows


def test_a_deployment_may_be_called_as_an_alias_is(empty_sqlite: Database, tmp_path: Path) -> None:
    settings = _settings(tmp_path, deployment="gpt-4o-mini")
    assert upgrade(settings, empty_sqlite, BASE, url=URL).deployment == "gpt-4o-mini"


def test_a_revoked_first_key_does_not_come_back_but_is_recovered(
    empty_sqlite: Database, tmp_path: Path
) -> None:
    settings = _settings(tmp_path)
    upgrade(settings, empty_sqlite, BASE, url=URL)
    with empty_sqlite.write() as session:
        first = session.scalars(select(Key).where(Key.name == "first")).one()
        revoke_key(session, first.id)

    assert upgrade(settings, empty_sqlite, BASE, url=URL).admin_key is None
    token = recover_admin_key(settings, empty_sqlite, url=URL)

    with empty_sqlite.read() as session:
        assert load_keyring(session).authenticate(f"Bearer {token}").scopes == {Scope.ADMIN}
    assert json.loads((settings.data / "credentials").read_text())["api_key"] == token


def test_several_verdicts_of_one_person_become_one_with_a_history(empty: Database) -> None:
    migrate(empty, "0004")
    _fill(empty)
    moments = [now() + timedelta(seconds=second) for second in range(4)]
    with empty.write() as session:
        for name in ("judgement", "comparison"):
            row = session.execute(text(f"SELECT * FROM {name}s")).mappings().one()
            said = session.execute(text(f"SELECT * FROM {name}_revisions")).mappings().one()
            session.execute(text(f"DELETE FROM {name}s"))
            # One was said twice; the one said last stands, whatever its number.
            for number, source, at in ((1, "web", (0, 3)), (2, "app", (1,)), (3, "", (2,))):
                more = {"source_type": "human", "source_id": source, "revision": len(at)}
                own = {"id": f"{name}-{number}", "client_id": f"c{number}", **more}
                table = Base.metadata.tables[f"{name}s"]
                times = {"created_at": moments[at[0]], "updated_at": moments[at[-1]]}
                session.execute(table.insert().values({**_stored(table, row), **own, **times}))
                history = Base.metadata.tables[f"{name}_revisions"]
                for revision, second in enumerate(at, start=1):
                    of = {f"{name}_id": own["id"], "revision": revision, "at": moments[second]}
                    values = {**_stored(history, said), "comment": f"{source} {second}", **of}
                    session.execute(history.insert().values(values))
        session.execute(text("UPDATE dataset_rows SET judgement_id = 'judgement-2'"))
        session.execute(text("UPDATE judgements SET target_id = answer_id"))
        before = session.execute(text("SELECT revision FROM answers")).scalar_one()

    migrate(empty)

    with empty.read() as session:
        for name in ("judgement", "comparison"):
            row = session.execute(text(f"SELECT id, revision, source_id FROM {name}s")).one()
            assert tuple(row) == (f"{name}-1", 4, "web")
            history = text(
                f"SELECT {name}_id, revision, comment FROM {name}_revisions ORDER BY revision"
            )
            comments = ["web 0", "app 1", " 2", "web 3"]
            assert [tuple(said) for said in session.execute(history)] == [
                (f"{name}-1", number, comment) for number, comment in enumerate(comments, start=1)
            ]
        learned = session.execute(text("SELECT judgement_id FROM dataset_rows")).scalar_one()
        assert learned == "judgement-1"
        assert session.execute(text("SELECT revision FROM answers")).scalar_one() > before


def test_the_prompts_that_evaluations_had_kept_go_and_others_stay(empty: Database) -> None:
    migrate(empty, "0006")
    _fill(empty)
    with empty.write() as session:
        answer = session.execute(text("SELECT * FROM answers")).mappings().one()
        kept = session.execute(text("SELECT * FROM answer_texts")).mappings().one()
        answers, texts = (Base.metadata.tables[name] for name in ("answers", "answer_texts"))
        own = {"id": "asked", "kind": "internal", "stored": True, "started_at": now()}
        session.execute(answers.insert().values({**_stored(answers, answer), **own}))
        session.execute(texts.insert().values({**_stored(texts, kept), "answer_id": "asked"}))

    migrate(empty)

    with empty.read() as session:
        left = session.execute(text("SELECT answer_id FROM answer_texts")).scalars().all()
        stored = session.execute(text("SELECT id FROM answers WHERE stored")).scalars().all()
    assert left == stored == [answer["id"]]


def test_going_back_keeps_every_answer(empty_sqlite: Database) -> None:
    """A table that SQLite copies to change it takes along what refers to it when it goes."""
    migrate(empty_sqlite)
    _fill(empty_sqlite)
    before = _known_rows(empty_sqlite)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with empty_sqlite.write() as session:
        config.attributes["connection"] = session.connection()
        command.downgrade(config, "0001")
    after = _known_rows(empty_sqlite)
    assert set(before) - set(after) == {"control", "idempotent_subjects"}
    assert {name for name, rows in after.items() if not rows} == set()


def _stored(table: Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that was read as text and numbers, as the table's types take it."""
    texts = {
        key: json.loads(row[key])
        for key, column in table.columns.items()
        if key in row and isinstance(column.type, CanonicalJson) and row[key] is not None
    }
    plain = {key: value for key, value in row.items() if key in table.columns}
    return {key: value for key, value in (plain | texts).items() if not key.endswith("_at")}
