"""API keys: made, listed, revoked by `dml keys`, and recognised by the service.

A key is `dml_ID_SECRET`: 12 hex digits by which it is listed and revoked, and 256 random bits that only its
holder has. What is kept is SHA-256 over all of it. A slow password hash would be no better here: it protects
secrets that can be guessed, and 256 random bits cannot; it would cost every request a tenth of a second of
computing, and a stranger's just as much. The ID in front is the salt: no two digests are of the same text.
"""

import base64
import hashlib
import hmac
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from pathlib import Path

from dml.errors import ConfigError, UsageError
from service.limits import Rate
from service.state import Drawer, Section, State, StateFile

SECTION = Section(
    "keys",
    (
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            scope TEXT NOT NULL,
            digest BLOB NOT NULL,
            created REAL NOT NULL,
            expires REAL,
            revoked REAL,
            rate TEXT
        );
        CREATE UNIQUE INDEX keys_name ON keys (name) WHERE revoked IS NULL
        """,
    ),
)
COLUMNS = "id, name, scope, digest, created, expires, revoked, rate"

KEY = re.compile(r"dml_([0-9a-f]{12})_[a-z2-7]{52}")
"""What a key looks like; scanners for leaked secrets may look for it."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LIFETIME = re.compile(r"([0-9]{1,5}) ?(min|h|d|w)")
UNITS = {
    "min": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
LONGEST = timedelta(days=3650)


class Scope(IntEnum):
    """What a key allows; each allows what the ones before it do."""

    SEARCH = 1
    """Read: search, embed, look at items and their pictures."""
    WRITE = 2
    """Add, change and delete items."""
    ADMIN = 3
    """Make, rebuild and delete collections, switch aliases."""

    @classmethod
    def parse(cls, text: str) -> "Scope":
        """Raises ConfigError."""
        if text.lower() not in {str(scope) for scope in cls}:
            raise ConfigError(f'A scope is one of {", ".join(map(str, cls))}, got "{text}".')
        return cls[text.upper()]

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Key:
    """A key as it is kept: everything but the secret."""

    id: str
    name: str
    scope: Scope
    digest: bytes = field(repr=False)
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    rate: Rate | None = None

    def state(self, now: datetime | None = None) -> str:
        """ "usable", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and self.expires <= (now or datetime.now(UTC)):
            return "expired"
        return "usable"


class Keys:
    """The keys in a state folder. Any thread may ask; what another process changes is seen at once.

    A service without keys may come before its state folder does, so reading makes no files.

    Args:
        state: the state file that is shared, or the state folder.

    Raises:
        StorageError, DamagedFile, UsageError: by every method, as `State` does.
    """

    def __init__(self, state: StateFile | Path) -> None:
        self._drawer = Drawer(state, SECTION)
        self.folder = self._drawer.folder
        self._lock = threading.Lock()
        self._known: dict[str, Key] = {}
        self._moment: tuple[State, int] | None = None

    def add(
        self, name: str, *, scope: Scope, lifetime: timedelta | None = None, rate: Rate | None = None
    ) -> tuple[str, Key]:
        """Make a key. Its text is returned here and never again.

        Raises:
            UsageError: a name that is taken by a key that is not revoked, or that could not be written in a
                log line.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f'The name of a key has 1 to 64 letters, digits, ".", "_" or "-", got "{name}".')
        if lifetime is not None and not timedelta() < lifetime <= LONGEST:
            raise UsageError(f"A key may last up to {LONGEST.days} days, got {lifetime}.")
        id, now = secrets.token_hex(6), time.time()
        text = f"dml_{id}_{base64.b32encode(secrets.token_bytes(32)).decode().rstrip('=').lower()}"
        expires = now + lifetime.total_seconds() if lifetime else None
        row = (id, name, str(scope), digest_of(text), now, expires, None, str(rate) if rate else None)
        with self._drawer.made().writing() as db:
            if db.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone():
                raise UsageError(
                    f'There is a key "{name}" already. Choose another name, so that both can be told apart '
                    f"in the log, or revoke it first: dml keys revoke {name}"
                )
            db.execute(f"INSERT INTO keys ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return text, key_of(row)

    def revoke(self, name: str) -> Key:
        """Revoke a key by its name or its id, from this moment on. One that is revoked stays so.

        Raises:
            UsageError: there is no such key.
        """
        newest_first = "ORDER BY revoked IS NULL DESC, created DESC"
        state = self._drawer.if_there()
        if state is not None:
            with state.writing() as db:
                found = db.execute(
                    f"SELECT id FROM keys WHERE id = ? OR name = ? {newest_first}", (name, name)
                ).fetchone()
                if found is not None:
                    now = time.time()
                    db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, *found))
                    return key_of(db.execute(f"SELECT {COLUMNS} FROM keys WHERE id = ?", found).fetchone())
        raise UsageError(f'There is no key "{name}" in {self.folder}. `dml keys list` shows those there are.')

    def list(self) -> list[Key]:
        """All keys, revoked and expired ones too, oldest first."""
        return sorted(self._current().values(), key=lambda key: (key.created, key.id))

    def any(self) -> bool:
        """Whether a key was ever added. Revoking the last one must not open the service to everybody."""
        return bool(self._current())

    def find(self, text: str) -> Key | None:
        """The key of this text, when it may be used now. All texts that look like keys take the same time."""
        id = id_of(text)
        if id is None:
            return None
        key = self._current().get(id)
        same = hmac.compare_digest(digest_of(text), key.digest if key else bytes(32))
        return key if key is not None and same and key.state() == "usable" else None

    def __enter__(self) -> "Keys":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        self._drawer.close()

    def _current(self) -> dict[str, Key]:
        """id -> key, read again when anything was written since the last time, or another file is there."""
        with self._lock:
            state = self._drawer.if_there()
            if state is None:
                return {}
            moment = (state, state.moment())
            if moment != self._moment:
                with state.reading() as db:
                    rows = db.execute(f"SELECT {COLUMNS} FROM keys").fetchall()
                self._known = {row[0]: key_of(row) for row in rows}
                self._moment = moment
            return self._known


def id_of(text: str) -> str | None:
    """The id in a text that looks like a key, known or not: it is no secret, and may be logged."""
    found = KEY.fullmatch(text)
    return None if found is None else found[1]


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def key_of(row: tuple) -> Key:
    id, name, scope, digest, created, expires, revoked, rate = row
    return Key(
        id,
        name,
        Scope.parse(scope),
        digest,
        created=datetime.fromtimestamp(created, UTC),
        expires=None if expires is None else datetime.fromtimestamp(expires, UTC),
        revoked=None if revoked is None else datetime.fromtimestamp(revoked, UTC),
        rate=None if rate is None else Rate.parse(rate),
    )


def parse_lifetime(text: str) -> timedelta:
    """ "90d" -> 90 days. Raises ConfigError."""
    found = LIFETIME.fullmatch(text.strip())
    if found is None or not timedelta() < int(found[1]) * UNITS[found[2]] <= LONGEST:
        raise ConfigError(
            f'A lifetime is a number and min, h, d or w, up to {LONGEST.days}d, such as 90d; got "{text}".'
        )
    return int(found[1]) * UNITS[found[2]]
