"""The answers ever bought, in one SQLite file: durable before use, shared by the processes of one
machine.

An answer is filed under a hash of (model, prompt, parameters). The first one stays; nothing is
updated or deleted. Beside them lie the keys that some process is about to buy (`leases.py`) and
what has been spent (`budget.py`).
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
from collab_jax.runtime.errors import UserError

SCHEMA_VERSION = 2  # PRAGMA user_version
APPLICATION_ID = (
    0x636A6178  # PRAGMA application_id, "cjax": tells a store from any other SQLite file
)
BUSY_SECONDS = 60.0  # how long to wait for another process's write
CHUNK = 500  # keys in one SELECT; older SQLite takes 999 at most

# An ordinary rowid table: rows are long (whole texts), which WITHOUT ROWID does badly. The small
# columns come first, so that summing them does not read a long row's overflow pages; the checksum
# is last, as version 1 did not have it.
ANSWERS = """
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
    reasoning     TEXT NOT NULL,
    checksum      TEXT NOT NULL DEFAULT ''    -- of key and reply, see checksum()
)"""
SINCE_VERSION_2 = (
    # A key is held until `expires`, in seconds of the Unix clock, which the holder moves on.
    "CREATE TABLE leases (key TEXT PRIMARY KEY NOT NULL, owner TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID",
    # One row. Calls sent, and USD; a call in flight stands in it with its highest price.
    "CREATE TABLE spent (calls INTEGER NOT NULL, usd REAL NOT NULL)",
    "INSERT INTO spent SELECT COUNT(*), TOTAL(usd) FROM answers",
)

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
    """The store file cannot be used. One line: the file, why, and what to do. The file is left as
    it was.
    """


def key(model: str, messages: Messages, parameters: dict) -> str:
    """The name an answer is filed under: sha256 (64 hex digits) of canonical JSON, free of the
    order of dict keys.

    Raises TypeError or ValueError when something is not JSON-able (NaN included).
    """
    return hashlib.sha256(_canonical([model, messages, parameters]).encode()).hexdigest()


def checksum(name: str, *reply) -> str:
    """16 hex digits over an answer's key and the columns of REPLY_COLUMNS; the key covers model,
    prompt and parameters.
    """
    return hashlib.blake2b(_canonical([name, *reply]).encode(), digest_size=8).hexdigest()


class Store:
    """An open store file. Threads may share it; every process opens its own.

    Opening creates the file and its folder where they are missing. Opening and every method raise
    StoreError when the file is unreadable, unwritable, damaged, not a store, or written by a newer
    version.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = threading.Lock()  # one connection, one transaction at a time
        with self._errors():
            _refuse_damage(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
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

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """What is done inside is on disk, whole, when the block ends; nothing of it where the block
        raises.

        Without `durable` it outlives the process, but perhaps not a power cut; that spares waiting
        for the disk.
        """
        with self._lock, self._errors():
            if not durable:
                self._db.execute("PRAGMA synchronous = NORMAL")
            try:
                with _transaction(self._db):
                    yield self._db
            finally:
                if not durable:
                    self._db.execute("PRAGMA synchronous = FULL")

    def get_many(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The stored replies among `keys`; a key without an answer is absent."""
        keys = list(keys)
        found = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            marks = ",".join("?" * len(chunk))
            rows = self.query(
                f"SELECT checksum, key, {REPLY_COLUMNS} FROM answers WHERE key IN ({marks})", chunk
            )
            for stored, name, *reply in rows:
                if stored != checksum(name, *reply):
                    raise _damaged(self.path, f"the answer {name[:12]} is not what was stored")
                found[name] = Reply(*reply)
        return found

    def put_many(
        self, model: str, parameters: dict, answers: Iterable[tuple[Messages, Reply]]
    ) -> dict[str, Reply]:
        """Stores answers in one transaction, on disk when it returns, and gives what is now stored,
        by key.

        Where an answer was there already, that one stays and is returned.
        """
        rows = [row(model, parameters, messages, reply) for messages, reply in answers]
        with self.transaction() as db:
            insert(db, rows)
        return self.get_many(values[0] for values in rows)

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
        page = {0: 1, 1: 65536}.get(
            n := int.from_bytes(header[16:], "big"), n
        )  # bytes; 1 is how 65536 is written
        if header.startswith(b"SQLite format 3\0") and size % page:
            raise _damaged(path, "cut off inside a page")  # the missing part would be read as zeros


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"answer store {path}: {why}; {ADVICE[sqlite3.SQLITE_CORRUPT]}")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Sets up a new file, refuses one that is not a store of ours, and makes every commit durable."""
    with _transaction(db):
        version = _version(db, path)
        if version == 0:
            db.execute(ANSWERS)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        if version == 1:
            db.execute("ALTER TABLE answers ADD COLUMN checksum TEXT NOT NULL DEFAULT ''")
            db.create_function("checksum", -1, checksum, deterministic=True)
            db.execute(f"UPDATE answers SET checksum = checksum(key, {REPLY_COLUMNS})")
        if version < 2:
            for statement in SINCE_VERSION_2:
                db.execute(statement)
        # Written at every opening: a file that cannot be written is found out before an answer is
        # paid for.
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _switch_to_wal(db)
    db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns


def _switch_to_wal(db: sqlite3.Connection) -> None:
    """Turns the write-ahead log on. Alone among our statements this one does not wait for other
    processes by itself.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(db: sqlite3.Connection, path: Path) -> int:
    """The schema version of a store, 0 of an empty database; StoreError for any other file.

    To be called inside a transaction: the three reads belong together.
    """
    application, version, tables = (
        db.execute(sql).fetchone()[0]
        for sql in (
            "PRAGMA application_id",
            "PRAGMA user_version",
            "SELECT COUNT(*) FROM sqlite_master",
        )
    )
    if (application, version, tables) == (0, 0, 0):
        return 0
    if application != APPLICATION_ID:
        raise StoreError(
            f"answer store {path}: another program's SQLite file; {ADVICE[sqlite3.SQLITE_NOTADB]}"
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"answer store {path}: schema version {version}, and this collab_jax reads up to {SCHEMA_VERSION}; "
            "install a newer collab_jax, or name another file"
        )
    return version


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute(
        "BEGIN IMMEDIATE"
    )  # takes the write lock at once: a later upgrade could fail without waiting
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def row(
    model: str, parameters: dict, messages: Messages, reply: Reply, created: str | None = None
) -> tuple:
    """A row of `answers`; created: UTC in ISO 8601, now where it is None."""
    name = key(model, messages, parameters)
    text, reasoning, reason = map(_storable, (reply.text, reply.reasoning, reply.finish_reason))
    figures = reply.input_tokens, reply.output_tokens, float(reply.seconds), float(reply.usd)
    return (
        name,
        _storable(model),
        created or datetime.now(UTC).isoformat(timespec="seconds"),
        *figures,
        reason,
        _canonical(parameters),
        _canonical(messages),
        text,
        reasoning,
        checksum(name, text, *figures, reasoning, reason),  # in the order of REPLY_COLUMNS
    )


def insert(db: sqlite3.Connection, rows: Sequence[tuple]) -> int:
    """Adds rows of `answers` where their keys are new; how many were."""
    marks, before = ",".join("?" * 13), db.total_changes
    db.executemany(f"INSERT INTO answers VALUES ({marks}) ON CONFLICT (key) DO NOTHING", rows)
    return db.total_changes - before


def _storable(text: str) -> str:
    """A lone surrogate (possible in JSON from a server) has no UTF-8 form: it becomes a question
    mark.
    """
    return text.encode("utf-8", "replace").decode()


_canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False
).encode  # made once: it is quick
