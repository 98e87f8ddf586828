"""The database: engine, sessions, column types, identifiers.

Owns: how a connection is set up on SQLite and PostgreSQL, and what a read and a write transaction
are. Does not own: tables (`tables.py` of each package) or the schema's history
(`server/migrations`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ExceptionContext,
    MetaData,
    PoolProxiedConnection,
    Text,
    TypeDecorator,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

from feedback.canonical import canonical_json as canonical_json
from feedback.canonical import json_in_order as json_in_order

KEPT_SECONDS = 1.0  #: an idle connection to PostgreSQL is looked at after that before it is used

BUSY_MILLISECONDS = 10_000
TRUNCATE_MILLISECONDS = 50  #: nobody else can write for so long

MINIMUM_SQLITE = (3, 51, 3)
"""Older releases can corrupt a WAL with several writers (SQLite's WAL-reset defect)."""

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_CROCKFORD_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]
_chance: list[bytes] = []  #: each is used once; a list's pop is one step for all threads


class DatabaseUnfit(Exception):
    """The database cannot be used.

    The message says what was found, what is needed and what to do.
    """


class Base(DeclarativeBase):
    """Parent of every table of the three packages."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC; a naive one is refused. SQLite keeps it as text without the offset."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone cannot be stored: {value!r}")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CanonicalJson(TypeDecorator[Any]):
    """A JSON value as canonical text. Text and not JSONB, so that bytes survive as given."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else canonical_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class JsonInOrder(CanonicalJson):
    """A JSON value whose keys keep their order: what chat templates write into a prompt."""

    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json_in_order(value)


def now() -> datetime:
    """The present, aware, in UTC."""
    return datetime.now(UTC)


def _take_chance() -> bytes:
    """80 bits out of the kernel's, which are asked for in larger pieces."""
    try:
        return _chance.pop()
    except IndexError:
        piece = os.urandom(10 * 256)
        _chance.extend(piece[at : at + 10] for at in range(0, len(piece), 10))
        return os.urandom(10)


def new_id(prefix: str) -> str:
    """A fresh identifier that sorts by time: `prefix` and a ULID.

    A ULID has 48 bits of milliseconds and 80 of chance.
    """
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(_take_chance())
    return prefix + "".join(
        [_CROCKFORD_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)]
    )


def show_url(url: str) -> str:
    """A database's address without what is secret in it, for messages."""
    return make_url(url).set(query={}).render_as_string(hide_password=True)


def insert_into(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An insertion in the words of the session's database, which may pass over conflicts."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    return postgresql.insert(table) if is_postgresql else sqlite.insert(table)


class Driver:
    """Statements as the driver takes them, on its cursor.

    They are written with `?`. Values are what the driver knows: text, numbers, None.
    """

    def __init__(self, cursor: Any, *, is_sqlite: bool) -> None:
        self._cursor = cursor
        self.is_sqlite = is_sqlite

    @classmethod
    def of(cls, session: Session) -> Driver:
        """In the transaction of a session."""
        connection = session.connection()
        is_sqlite = connection.dialect.name == "sqlite"
        return cls(connection.connection.cursor(), is_sqlite=is_sqlite)

    def run(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Once for each of `rows`."""
        if rows:
            self._cursor.executemany(self._own(statement), rows)

    def insert(
        self, table: type[Base], rows: Sequence[dict[str, Any]], *, unless_there: bool = False
    ) -> None:
        """All have the same columns. `unless_there` passes over rows that a unique key refuses."""
        if rows:
            statement = _insertion(table, tuple(rows[0]))
            if unless_there:
                statement += " ON CONFLICT DO NOTHING"
            self.run(statement, [tuple(row.values()) for row in rows])

    def rows(self, statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        """What a query finds."""
        self._cursor.execute(self._own(statement), values)
        found: Sequence[Any] = self._cursor.fetchall()
        return found

    def time(self, value: datetime | None) -> Any:
        """As `UtcDateTime` keeps it: text without the offset on SQLite."""
        if value is None or not self.is_sqlite:
            return value
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")

    def _own(self, statement: str) -> str:
        return statement if self.is_sqlite else statement.replace("?", "%s")


@cache
def _insertion(table: type[Base], columns: tuple[str, ...]) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    return f"INSERT INTO {table.__tablename__} ({names}) VALUES ({', '.join('?' * len(columns))})"


class Database:
    """Sessions on one database. Synchronous; asynchronous code calls it from threads.

    `read()` sees one snapshot and never commits. `write()` takes the write lock at once
    (`BEGIN IMMEDIATE` on SQLite), commits at the end of the block and rolls back when it raises.
    `direct_url` leads past any pooler, for what belongs to a session of PostgreSQL.
    """

    def __init__(self, url: str, *, direct_url: str | None = None, pool_size: int = 10) -> None:
        self.url = _with_driver(make_url(url))
        self.direct_url = self.url if direct_url is None else _with_driver(make_url(direct_url))
        self.info: dict[str, Any] = {}  #: goes with every session
        if self.is_sqlite:
            self.engine = _create_sqlite_engine(url)
        else:
            self.engine = create_engine(
                self.url,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_pre_ping=True,
                hide_parameters=True,
            )
            event.listen(self.engine, "handle_error", _leave_values_out)
        self._write_engine = self.engine.execution_options(burnish_write=True)
        # PostgreSQL's default takes a new snapshot for each statement.
        self._read_engine = (
            self.engine
            if self.is_sqlite
            else self.engine.execution_options(isolation_level="REPEATABLE READ")
        )

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading, at one snapshot."""
        with Session(self._read_engine, expire_on_commit=False, info=self.info) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose block is one write transaction."""
        session = Session(self._write_engine, expire_on_commit=False, info=self.info)
        with session, session.begin():
            yield session

    def truncate_log(self) -> bool:
        """Empty SQLite's write-ahead log, which has what was deleted; whether that was done.

        Hardly waits for others: where one reads or writes it is to be tried again.
        """
        if not self.is_sqlite:
            return True
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            try:
                cursor.execute(f"PRAGMA busy_timeout={TRUNCATE_MILLISECONDS}")
                busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:  # whoever has the connection next waits as long as everybody
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
            return not busy
        except self.engine.dialect.loaded_dbapi.OperationalError:
            return False
        finally:
            connection.close()

    def dispose(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


class Writing:
    """The write transactions of one thread that writes all the time, on a connection of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: PoolProxiedConnection | None = None
        self._used_at = 0.0
        self._is_durable = True

    @contextmanager
    def transaction(self, *, durable: bool) -> Iterator[Driver]:
        """A transaction of the driver's own. Errors are the driver's, without values.

        On SQLite what is not `durable` survives every crash of a process; one of the machine only
        once a later commit that is durable has been made, by anybody. PostgreSQL always waits for
        its disk: it can crash by itself, and whoever waits for an answer does not notice.
        """
        connection = self._connect()
        cursor, is_sqlite = connection.cursor(), self._database.is_sqlite
        try:
            if is_sqlite:
                if durable is not self._is_durable:
                    cursor.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                    self._is_durable = durable
                cursor.execute("BEGIN IMMEDIATE")
            yield Driver(cursor, is_sqlite=is_sqlite)
            connection.commit()
        except BaseException as error:
            _leave_details_out(error)
            try:
                connection.rollback()
            except Exception:  # whatever it is, the next transaction has a new connection
                connection.invalidate()
                self._connection = None
            raise
        self._used_at = time.monotonic()

    def close(self) -> None:
        """Close the connection, or give it back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> PoolProxiedConnection:
        if not self._database.is_sqlite and time.monotonic() - self._used_at > KEPT_SECONDS:
            self.close()  # the pool looks whether the server is still there
        if self._connection is None:
            self._connection, self._is_durable = self._database.engine.raw_connection(), True
            if self._database.is_sqlite:
                self._connection.detach()  # whoever has it next should not get it less durable
        return self._connection


def _leave_values_out(context: ExceptionContext) -> None:
    """Strip details from a database error, so that nothing that people wrote gets into logs.

    PostgreSQL repeats a row that it refuses in the error's details. Statement parameters are left
    out by an option of SQLAlchemy.
    """
    for error in (context.original_exception, context.sqlalchemy_exception):
        _leave_details_out(error)


def _leave_details_out(error: BaseException | None) -> None:
    if error is not None and error.args and isinstance(error.args[0], str):
        error.args = (error.args[0].partition("\nDETAIL:")[0], *error.args[1:])


def _with_driver(url: URL) -> URL:
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _create_sqlite_engine(url: str) -> Engine:
    from pysqlite3 import dbapi2

    if dbapi2.sqlite_version_info < MINIMUM_SQLITE:
        raise DatabaseUnfit(
            f"SQLite {dbapi2.sqlite_version} was found, {'.'.join(map(str, MINIMUM_SQLITE))} or "
            "newer is needed (older ones can corrupt a write-ahead log); upgrade the package "
            "'pysqlite3'"
        )
    # The writer's statements come in as many lengths as its groups.
    options = {"timeout": 10.0, "cached_statements": 256}
    engine = create_engine(url, module=dbapi2, connect_args=options, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={BUSY_MILLISECONDS}",
            "foreign_keys=ON",
            "secure_delete=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("burnish_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
