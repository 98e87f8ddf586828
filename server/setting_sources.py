"""Where settings are read from, and how a fault in one is told.

Owns: `burnish.toml` and `BURNISH_…` variables as sources, the checks of values that people write by
hand (paths, addresses, keys), and one line for each fault: key, source, found, expected. Does not
own: which settings there are (`settings.py`).
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource

PREFIX = "BURNISH_"
DEFAULT_FILE = "burnish.toml"

NOT_SETTINGS = frozenset(
    {
        "BURNISH_CONFIG",
        "BURNISH_URL",
        "BURNISH_API_KEY",
        "BURNISH_PROMISES",
        "BURNISH_TEST_DATA",
        "BURNISH_TRAINER_PARENT",
    }
)
"""Variables of this name space that are no settings: the file's path, the client's, the tests', the
trainer's.
"""

SECRETS = frozenset({"secret", "bootstrap_key", "engine.api_key", "worker.api_key"})
LONGEST_SHOWN = 80  #: characters of a value that a message repeats

S = TypeVar("S", bound=BaseSettings)


class SettingsFault(SystemExit):
    """A setting that can't be used; the message names it and says what to do."""


def refuse(fault: str) -> NoReturn:
    raise SettingsFault(f"burnish: {fault}")


def build(settings: type[S], flags: Mapping[str, Any]) -> S:
    """The settings of flags, environment and file. Raises `SettingsFault`."""
    _check_environment(settings)
    try:
        return settings(**{key: value for key, value in flags.items() if value is not None})
    except ValidationError as error:
        file = _read_file()
        lines = [_describe(dict(problem), flags, file) for problem in error.errors()]
    raise SettingsFault("burnish: " + "\n         ".join(dict.fromkeys(lines)))


def _describe(problem: Mapping[str, Any], flags: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    where = _where(key, flags, file)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {key!r}{where}; docs/settings.md lists them"
    expected = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return expected
    found = _shown(key, problem["input"])
    return f"setting {key!r}{where}: {expected[:1].lower()}{expected[1:]} (found {found})"


def _where(key: str, flags: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    """Where a setting was read, for a message: ` (BURNISH_PORT)`."""
    parts = re.sub(r"\.\d+$", "", key).split(".")
    for length in range(len(parts), 0, -1):
        given: Any = flags
        for part in parts[:length]:
            given = given.get(part) if isinstance(given, Mapping) else None
        if given is not None:
            return f" (--{parts[0]})"
        if (variable := PREFIX + "__".join(parts[:length]).upper()) in os.environ:
            return f" ({variable})"
        given = file
        for part in parts[:length]:
            given = given.get(part) if isinstance(given, Mapping) else None
        if given is not None:
            return f" ({config_file()})"
    return ""


def _shown(key: str, value: Any) -> str:
    """A value for a message: short, without what is secret."""
    if key in SECRETS or isinstance(value, SecretStr):
        return "a value that is not shown"
    if isinstance(value, Mapping):
        return "a table" if value else "an empty table"
    if isinstance(value, list):
        return "a list"
    text = repr(str(value) if isinstance(value, Path) else value)
    # To the last @: a password that is not encoded may hold any sign.
    text = re.sub(r"(:?//|:).*@", r"\1…@", text)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"


# The file


def config_file() -> Path:
    """The settings file: `BURNISH_CONFIG`, else `burnish.toml` in this directory."""
    return as_path(Path(os.environ.get("BURNISH_CONFIG") or DEFAULT_FILE))


class File(InitSettingsSource):
    """`burnish.toml`, with or without the byte-order mark that some editors write."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings, _read_file())


def _read_file() -> dict[str, Any]:
    try:
        path = config_file()
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if "BURNISH_CONFIG" in os.environ:
            refuse(f"BURNISH_CONFIG names {str(path)!r}, and there is no such file")
        return {}
    except OSError as error:
        refuse(f"the settings file {str(path)!r} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        refuse(
            f"the settings file {str(path)!r} is not UTF-8 (byte {error.start + 1}): "
            "save it as UTF-8"
        )
    except tomllib.TOMLDecodeError as error:
        refuse(f"the settings file {str(path)!r} is no TOML: {error}")
    except ValueError as error:  # of the path
        refuse(f"BURNISH_CONFIG: {error}")


# The environment


class Environment(EnvSettingsSource):
    """`BURNISH_…` variables; a list may be written as JSON or with commas."""

    def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:
        try:
            return json.loads(value)
        except ValueError as error:
            annotation = str(None if field is None else field.annotation)
            if annotation.startswith("list["):
                return [part.strip() for part in str(value).split(",")]
            if annotation.startswith("typing.Any"):
                return value
            fault = str(error)
        variables = [
            name
            for name, given in os.environ.items()
            if given == value and name.upper().startswith(PREFIX)
        ]
        name = variables[0] if variables else f"{PREFIX}{field_name.upper()}"
        if field is not None and isinstance(field.annotation, type):
            section = field.annotation
            if issubclass(section, BaseModel):
                first = next(iter(section.model_fields))
                refuse(
                    f"{name} is no JSON object ({fault}): give one setting of it, "
                    f"as in {name}__{first.upper()}=…"
                )
        refuse(f"{name} is no JSON object ({fault})")


def _check_environment(settings: type[BaseSettings]) -> None:
    """Name variables that look like settings and are none: pydantic-settings passes over them."""
    for variable in sorted(os.environ):
        if not variable.startswith(PREFIX) or variable in NOT_SETTINGS:
            continue
        first, *rest = variable.removeprefix(PREFIX).lower().split("__")
        field = settings.model_fields.get(first)
        known = field is not None
        if field is not None and rest:
            fields = getattr(field.annotation, "model_fields", {})
            known = rest[0] in fields and (len(rest) == 1 or rest[0] == "args")
        if not known:
            refuse(f"unknown setting {variable} in the environment; docs/settings.md lists them")


# Values that people write by hand: each returns the value to use, or raises ValueError


def as_lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def as_whole_number(value: object) -> object:
    """A number that a variable of the environment holds as text."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else value


def as_path(path: Path) -> Path:
    """A path with `~` for the home directory."""
    if "\x00" in str(path):
        raise ValueError("a path can't hold a NUL character")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("'~' stands for a home directory, and this user has none") from None


def as_secret(value: SecretStr) -> SecretStr:
    """A key without the white space that `echo` and editors leave around it."""
    text = value.get_secret_value().strip()
    if not text:
        raise ValueError("is empty: leave it out, or give a key")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds a blank, a line break or a letter beyond ASCII: no key does")
    return SecretStr(text)


def as_host(host: str) -> str:
    """An address or name to listen on; `[::1]` and `::1` are the same."""
    bare = host.strip()
    if bare.startswith("[") and bare.endswith("]"):
        bare = bare[1:-1]
    if ":" in bare:
        try:
            ipaddress.IPv6Address(bare.partition("%")[0])
        except ValueError:
            raise ValueError(
                "expected an address such as 127.0.0.1, ::1 or a host name; "
                "the port is a setting of its own"
            ) from None
    elif re.fullmatch(r"[A-Za-z0-9._-]+", bare) is None:
        raise ValueError("expected an address such as 127.0.0.1, ::1 or a host name")
    return bare


def as_engine_url(url: str) -> str:
    """The address of a vLLM server, with or without the `/v1` that its clients are given."""
    text = _as_http_url(url, "a vLLM server, as in http://gpu-host:8000")
    return text.removesuffix("/v1").rstrip("/")


def as_gateway_url(url: str) -> str:
    """The address of a gateway, without the `/v1` of its clients."""
    text = _as_http_url(url, "a gateway, as in http://127.0.0.1:8000")
    return text.removesuffix("/v1").rstrip("/")


def _as_http_url(url: str, whose: str) -> str:
    text = url.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address or re.search(r"[\s?#\x00-\x1f]", text):
        raise ValueError(f"expected the address of {whose}")
    if parts.username or parts.password:
        raise ValueError("a name or password in an address isn't used: give the key as api_key")
    return text


def as_database_url(url: str) -> str:
    """A database's address; `postgres://`, as hosters write it, is PostgreSQL's."""
    text = url.strip()
    scheme, _, rest = text.partition("://")
    if scheme == "postgres":
        scheme = "postgresql"
    if not rest or scheme not in ("sqlite", "postgresql", "postgresql+psycopg"):
        raise ValueError(
            "expected postgresql://user:password@host/database, or sqlite:///path/to/file"
        )
    if scheme == "sqlite" and not rest.startswith("/"):
        raise ValueError("a file's address has three slashes (four, where its path is absolute)")
    if scheme != "sqlite" and not _is_address(f"{scheme}://{rest}"):
        raise ValueError(
            "expected postgresql://user:password@host:port/database, with each / : @ in the "
            "password written as %2F %3A %40"
        )
    return f"{scheme}://{rest}"


def _is_address(url: str) -> bool:
    from sqlalchemy.engine import make_url  # the command line does without it as long as it can
    from sqlalchemy.exc import ArgumentError

    try:
        found = make_url(url)
    except (ArgumentError, ValueError):  # the second of a port
        return False
    return "@" not in (found.host or "") and "@" not in (found.database or "")
