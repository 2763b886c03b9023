"""The answers ever bought, in one SQLite file: durable before use, shared by the processes of one machine.

An answer is filed under a hash of (model, prompt, parameters). The first one stays; nothing is updated or deleted.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from collab_jax.cloud.protocol import Messages, Reply
from collab_jax.errors import UserError

SCHEMA_VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x636A6178  # PRAGMA application_id, "cjax": tells a store from any other SQLite file
BUSY_SECONDS = 60.0  # how long to wait for another process's write
CHUNK = 500  # keys in one SELECT; older SQLite takes 999 at most

# An ordinary rowid table: rows are long (whole texts), which WITHOUT ROWID does badly. The small columns come first, so
# that summing them does not read a long row's overflow pages.
SCHEMA = """
CREATE TABLE answers (
    key           TEXT PRIMARY KEY NOT NULL,  -- sha256, see key()
    model         TEXT NOT NULL,
    created       TEXT NOT NULL,              -- UTC, ISO 8601
    input_tokens  INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    seconds       REAL NOT NULL,
    usd           REAL NOT NULL,
    finish_reason TEXT NOT NULL,
    parameters    TEXT NOT NULL,              -- JSON object
    prompt        TEXT NOT NULL,              -- JSON list of chat messages
    text          TEXT NOT NULL,
    reasoning     TEXT NOT NULL
)"""

REPLY_COLUMNS = "text, input_tokens, output_tokens, seconds, usd, reasoning, finish_reason"  # the order of Reply

ADVICE = {
    sqlite3.SQLITE_NOTADB: "it is not a store: name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: "it is damaged: put back a copy, or salvage it with `sqlite3 FILE .recover`",
    sqlite3.SQLITE_BUSY: "another process holds it: end that one, or wait and start again",
    sqlite3.SQLITE_CANTOPEN: "check the path and its permissions",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
    sqlite3.SQLITE_FULL: "free some disk space and start again",
    sqlite3.SQLITE_IOERR: "check the disk: space, quota, health",
}


class StoreError(UserError):
    """The store file cannot be used. One line: the file, why, and what to do. The file is left as it was."""


def key(model: str, messages: Messages, parameters: dict) -> str:
    """The name an answer is filed under: sha256 (64 hex digits) of canonical JSON, free of the order of dict keys.

    Raises TypeError or ValueError when something is not JSON-able (NaN included).
    """
    return hashlib.sha256(_canonical([model, messages, parameters]).encode()).hexdigest()


class Store:
    """An open store file. Threads may share it; every process opens its own.

    Opening creates the file and its folder where they are missing. Opening and every method raise StoreError when the
    file is unreadable, unwritable, damaged, not a store, or written by a newer version.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = threading.Lock()  # one connection, one transaction at a time
        with self._errors():
            _refuse_damage(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                _prepare(self._db, self.path)
        except StoreError:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file; nothing is pending, so nothing is lost without it."""
        self._db.close()

    def query(self, sql: str, values: Sequence = ()) -> list[tuple]:
        """Rows of one SELECT."""
        with self._lock, self._errors():
            return self._db.execute(sql, values).fetchall()

    def get_many(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The stored replies among `keys`; a key without an answer is absent."""
        keys = list(keys)
        found = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            marks = ",".join("?" * len(chunk))
            rows = self.query(f"SELECT key, {REPLY_COLUMNS} FROM answers WHERE key IN ({marks})", chunk)
            found.update((name, Reply(*reply)) for name, *reply in rows)
        return found

    def put_many(self, model: str, parameters: dict, answers: Iterable[tuple[Messages, Reply]]) -> dict[str, Reply]:
        """Stores answers in one transaction, on disk when it returns, and gives what is now stored, by key.

        Where an answer was there already, that one stays and is returned.
        """
        created = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [_row(model, parameters, messages, reply, created) for messages, reply in answers]
        with self._lock, self._errors(), _transaction(self._db):
            marks = ",".join("?" * 12)
            self._db.executemany(f"INSERT INTO answers VALUES ({marks}) ON CONFLICT (key) DO NOTHING", rows)
        return self.get_many(row[0] for row in rows)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
            advice = ADVICE.get(code, "name another file, or move this one away")
            raise StoreError(f"answer store {self.path}: {error}; {advice}") from error
        except OSError as error:
            advice = ADVICE[sqlite3.SQLITE_CANTOPEN]
            raise StoreError(f"answer store {self.path}: {error.strerror}; {advice}") from error


def _refuse_damage(path: Path) -> None:
    """Refuses two cases that SQLite takes for a sound file, and would lose answers by."""
    size = path.stat().st_size if path.exists() else 0
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        if not size:
            raise _damaged(path, f"empty or missing beside {wal.name}, which SQLite would delete")
        return  # the log may hold what the file lacks
    if path.is_file():
        with path.open("rb") as file:
            header = file.read(18)
        page = {0: 1, 1: 65536}.get(n := int.from_bytes(header[16:], "big"), n)  # bytes; 1 is how 65536 is written
        if header.startswith(b"SQLite format 3\0") and size % page:
            raise _damaged(path, "cut off inside a page")  # the missing part would be read as zeros


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"answer store {path}: {why}; {ADVICE[sqlite3.SQLITE_CORRUPT]}")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Sets up a new file, refuses one that is not a store of ours, and makes every commit durable."""
    with _transaction(db):
        if _is_new(db, path):
            db.execute(SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # Written at every opening: a file that cannot be written is found out before an answer is paid for.
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _switch_to_wal(db)
    db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns


def _switch_to_wal(db: sqlite3.Connection) -> None:
    """Turns the write-ahead log on. Alone among our statements this one does not wait for other processes by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    """True for an empty database, False for a store of this version; StoreError for any other file.

    To be called inside a transaction: the three reads belong together.
    """
    application, version, tables = (
        db.execute(sql).fetchone()[0]
        for sql in ("PRAGMA application_id", "PRAGMA user_version", "SELECT COUNT(*) FROM sqlite_master")
    )
    if (application, version, tables) == (0, 0, 0):
        return True
    if application != APPLICATION_ID:
        raise StoreError(f"answer store {path}: another program's SQLite file; {ADVICE[sqlite3.SQLITE_NOTADB]}")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"answer store {path}: schema version {version}, and this collab_jax reads up to {SCHEMA_VERSION}; "
            "install a newer collab_jax, or name another file"
        )
    return False


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")  # takes the write lock at once: a later upgrade could fail without waiting
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _row(model: str, parameters: dict, messages: Messages, reply: Reply, created: str) -> tuple:
    return (
        key(model, messages, parameters),
        model,
        created,
        reply.input_tokens,
        reply.output_tokens,
        reply.seconds,
        reply.usd,
        _storable(reply.finish_reason),
        _canonical(parameters),
        _canonical(messages),
        _storable(reply.text),
        _storable(reply.reasoning),
    )


def _storable(text: str) -> str:
    """A lone surrogate (possible in JSON from a server) has no UTF-8 form: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
