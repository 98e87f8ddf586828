"""The secret that this installation signs with: feedback tokens, and the entries of the audit log.

Owns: `DATA/secret` (0600), the setting that takes its place, and the keys that are derived from it.
It is never in the database: whoever has a copy of that can neither make a token nor alter the log
unseen. A new secret is a new first line: it signs from then on, and the older ones below it go on
verifying the audit log. Does not own: what is signed (`tokens.py`, `feedback/audit.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.orm import Session

from feedback import audit
from feedback.db import Database, DatabaseUnfit
from server.settings import Settings

LEAST_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Signing:
    """The keys that were derived from the secret."""

    tokens: str = field(repr=False)  #: of the newest secret alone
    seal: audit.Seal

    @property
    def name(self) -> str:
        """What the newest secret is called in the audit log; it tells nothing of the secret."""
        return next(iter(self.seal.keys))


def find_signing(settings: Settings) -> Signing | None:
    """What the settings or `DATA/secret` say; None where there is no secret yet.

    Raises DatabaseUnfit for one that is too short to be one.
    """
    given = settings.secret
    if given is not None:
        return _derive(settings, given.get_secret_value().split(","), "the setting `secret`")
    path = secret_path(settings)
    try:
        lines = path.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise DatabaseUnfit(f"{path} holds letters beyond ASCII: no secret does") from None
    return _derive(settings, lines, str(path))


def open_signing(settings: Settings, database: Database, session: Session) -> Signing:
    """Sign with the secret of this installation, in all sessions from now on; make it if needed.

    Raises DatabaseUnfit where the audit log was signed with one that is not here.
    """
    signing, newest = find_signing(settings), audit.newest_name(session)
    if newest is not None and (signing is None or newest not in signing.seal.keys):
        raise DatabaseUnfit(
            f"the audit log of this database is signed with the secret {newest!r}, which is not "
            f"here: copy {secret_path(settings)} from the machine or the backup that has it, or "
            "set `secret`; where it is lost, `burnish db upgrade --new-secret` makes another, and "
            "what was signed until now can't be verified any more"
        )
    return attach(database, signing or create_secret(settings))


def attach(database: Database, signing: Signing) -> Signing:
    """Have all sessions of a database sign and verify with this."""
    audit.seal(database, signing.seal)
    return signing


def get_signing(settings: Settings) -> Signing:
    """As `find_signing`. Raises DatabaseUnfit where there is no secret yet."""
    signing = find_signing(settings)
    if signing is None:
        raise DatabaseUnfit(
            f"there is no {secret_path(settings)}, with which the audit log is signed: run "
            "`burnish db upgrade`, copy it from the machine that has it, or set `secret`"
        )
    return signing


def create_secret(settings: Settings) -> Signing:
    """Make `DATA/secret`. Two processes that do so at once agree on one."""
    path = secret_path(settings)
    with _written(path, [secrets.token_urlsafe(32)]) as temporary, suppress(FileExistsError):
        os.link(temporary, path)  # where another was first, its secret is the one
    return get_signing(settings)


def renew_secret(settings: Settings) -> Signing:
    """Write a new secret above those that are there.

    Raises DatabaseUnfit where a setting has them.
    """
    if settings.secret is not None:
        raise DatabaseUnfit(
            "the secret is in the setting `secret`: put a new one there, before the old one and a "
            "comma"
        )
    path = secret_path(settings)
    older = path.read_text(encoding="ascii").split() if path.exists() else []
    with _written(path, [secrets.token_urlsafe(32), *older]) as temporary:
        temporary.replace(path)
    return get_signing(settings)


@contextmanager
def _written(path: Path, lines: list[str]) -> Iterator[Path]:
    """A file beside `path` with these lines, for this user alone; gone after the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def secret_path(settings: Settings) -> Path:
    return settings.data / "secret"


def _derive(settings: Settings, lines: list[str], where: str) -> Signing:
    if not lines or any(len(line) < LEAST_CHARACTERS for line in lines):
        raise DatabaseUnfit(
            f"{where} holds a secret of fewer than {LEAST_CHARACTERS} characters: take "
            f"`openssl rand -base64 32`"
        )
    keys = {_key(line, "name").hex()[:12]: _key(line, "audit log") for line in lines}
    return Signing(
        tokens=_key(lines[0], "feedback tokens").hex(),
        seal=audit.Seal(keys, settings.data / "audit.head"),
    )


def _key(secret: str, purpose: str) -> bytes:
    """A key of its own for each purpose: none of them tells another."""
    return hmac.new(secret.encode(), f"burnish {purpose}".encode(), hashlib.sha256).digest()
