"""The answers ever bought, in one SQLite file that the processes of one machine share.

An answer is durable before it is used, and filed under a hash of (model, prompt, parameters,
provider). The first one stays; nothing is changed or deleted. Beside the answers lie the keys that
some process is about to buy (`leases.py`) and what has been spent (`budget.py`).

Before version 3 the provider was no part of the key, so two servers of one model name shared their
answers. Those answers belong to the first provider that asks for them after the migration
(`adopt`); the simulated cloud and local models have no provider, and their keys are what they were.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from collab_jax.cloud.protocol import Reply
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 3  # PRAGMA user_version
APPLICATION_ID = 0x636A6178  # PRAGMA application_id, "cjax": no other SQLite file has it
BUSY_SECONDS = 60.0  # how long to wait for another process's write
CHUNK = 500  # keys in one SELECT; older SQLite takes 999 at most

# An ordinary rowid table: rows are long (whole texts), which WITHOUT ROWID does badly. The small
# columns come first, so that summing them does not read a long row's overflow pages; the last two
# are those that version 1 did not have.
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
    checksum      TEXT NOT NULL DEFAULT '',   -- of key and reply, see checksum()
    provider      TEXT                        -- NULL: of a store before version 3, see adopt()
)"""
SINCE_VERSION_2 = (
    # A key is held until `expires`, in seconds of the Unix clock, which the holder moves on.
    "CREATE TABLE leases (key TEXT PRIMARY KEY NOT NULL, owner TEXT NOT NULL,"
    " expires REAL NOT NULL) WITHOUT ROWID",
    # One row. Calls sent, and USD; a call in flight stands in it with its highest price.
    "CREATE TABLE spent (calls INTEGER NOT NULL, usd REAL NOT NULL)",
    "INSERT INTO spent SELECT COUNT(*), TOTAL(usd) FROM answers",
)
# Finds what may be adopted without a look at every row; new answers are not in it.
SINCE_VERSION_3 = "CREATE INDEX answers_to_adopt ON answers (model) WHERE provider IS NULL"

# In the order of Reply's fields.
REPLY_COLUMNS = "text, input_tokens, output_tokens, seconds, usd, reasoning, finish_reason"

ADVICE = {
    sqlite3.SQLITE_NOTADB: "it is not a store: name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: (
        "it is damaged: put back a copy, or salvage it with `sqlite3 FILE .recover`"
    ),
    sqlite3.SQLITE_BUSY: "another process holds it: end that one, or wait and start again",
    sqlite3.SQLITE_CANTOPEN: "check the path and its permissions",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable",
    sqlite3.SQLITE_FULL: "free some disk space and start again",
    sqlite3.SQLITE_IOERR: "check the disk: space, quota, health",
}


class StoreError(UserError):
    """The store file cannot be used, and is left as it was: the file, why, and what to do."""


def key(model: str, messages: Messages, parameters: dict, provider: str = "") -> str:
    """Returns the name that an answer is filed under: sha256 of canonical JSON, 64 hex digits.

    It does not depend on the order of dict keys. Raises TypeError or ValueError when something is
    not JSON-able (NaN included).
    """
    named = [model, messages, parameters] + [provider] * bool(provider)
    return hashlib.sha256(_canonical(named).encode()).hexdigest()


def checksum(name: str, *reply) -> str:
    """Returns 16 hex digits over an answer's key and the columns of REPLY_COLUMNS."""
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
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._errors():
                _prepare(self._db, self.path)
        except StoreError:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file; without it nothing is lost, as nothing is ever pending."""
        self._db.close()

    def query(self, sql: str, values: Sequence = ()) -> list[tuple]:
        """Returns the rows of one SELECT."""
        with self._lock, self._errors():
            return self._db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Writes what is done inside to the disk when the block ends, or nothing if it raises.

        Without `durable` it outlives the process, but perhaps not a power cut, which saves a wait
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
        """Returns the stored replies among `keys`; a key without an answer is absent."""
        keys = list(keys)
        replies = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            marks = ",".join("?" * len(chunk))
            rows = self.query(
                f"SELECT checksum, key, {REPLY_COLUMNS} FROM answers WHERE key IN ({marks})", chunk
            )
            for stored, name, *reply in rows:
                if stored != checksum(name, *reply):
                    raise _damaged(self.path, f"the answer {name[:12]} is not what was stored")
                replies[name] = Reply(*reply)
        return replies

    def put_many(
        self,
        model: str,
        parameters: dict,
        answers: Iterable[tuple[Messages, Reply]],
        provider: str = "",
    ) -> dict[str, Reply]:
        """Stores answers, durable when it returns, and returns what is now stored, by key.

        Where an answer was there already, that one stays and is returned.
        """
        rows = [row(model, parameters, messages, reply, provider) for messages, reply in answers]
        with self.transaction() as db:
            insert(db, rows)
        return self.get_many(values[0] for values in rows)

    def adopt(self, model: str, parameters: dict, provider: str) -> int:
        """Files answers whose provider is not known under `provider`; returns how many.

        They are those of this model and these parameters that were bought before version 3, or
        imported from an export of that time. Where the provider has an answer to the same prompt,
        the old one stays as it is.
        """
        described = model, _canonical(parameters)
        old = "FROM answers WHERE provider IS NULL AND model = ? AND parameters = ?"
        if not self.query(f"SELECT 1 {old} LIMIT 1", described):
            return 0
        renamed = []
        with self.transaction() as db:
            for name, prompt, *reply in db.execute(
                f"SELECT key, prompt, {REPLY_COLUMNS} {old}", described
            ):
                if name == key(model, json.loads(prompt), parameters):  # else it is damaged
                    new = key(model, json.loads(prompt), parameters, provider)
                    renamed.append((new, provider, checksum(new, *reply), name))
            before = db.total_changes
            db.executemany(
                "UPDATE OR IGNORE answers SET key = ?, provider = ?, checksum = ? WHERE key = ?",
                renamed,
            )
            adopted = db.total_changes - before
        if adopted:
            log.warning(
                "answer store %s: %d answers of %s, bought when stores did not note the provider, "
                "are now those of %s; another provider is asked anew",
                self.path, adopted, model, provider,
            )  # fmt: skip
        return adopted

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
    """Raises StoreError in two cases that SQLite takes for a sound file, losing answers."""
    size = path.stat().st_size if path.exists() else 0
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        if not size:
            raise _damaged(path, f"empty or missing beside {wal.name}, which SQLite would delete")
        return  # the log may hold what the file lacks
    if path.is_file():
        with path.open("rb") as file:
            header = file.read(18)
        size_field = int.from_bytes(header[16:], "big")
        page = {0: 1, 1: 65536}.get(size_field, size_field)  # bytes; 1 is how 65536 is written
        if header.startswith(b"SQLite format 3\0") and size % page:
            raise _damaged(path, "cut off inside a page")  # the missing part would be read as zeros


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"answer store {path}: {why}; {ADVICE[sqlite3.SQLITE_CORRUPT]}")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Sets up a new file, migrates an old one, and makes every commit durable."""
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
        if version in (1, 2):
            db.execute("ALTER TABLE answers ADD COLUMN provider TEXT")
        if version < 3:
            db.execute(SINCE_VERSION_3)
        # Written at every opening, so that a file that cannot be written is found out before an
        # answer is paid for.
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _switch_to_wal(db)
    db.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns


def _switch_to_wal(db: sqlite3.Connection) -> None:
    """Turns the write-ahead log on, and waits for other processes, which SQLite does not here."""
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
    """Returns a store's schema version, 0 for an empty database; StoreError for another file.

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
            f"answer store {path}: schema version {version}, and this collab_jax reads up to "
            f"{SCHEMA_VERSION}; install a newer collab_jax, or name another file"
        )
    return version


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # The write lock is taken at once: a later upgrade could fail without waiting.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def row(
    model: str,
    parameters: dict,
    messages: Messages,
    reply: Reply,
    provider: str | None,
    created: str | None = None,
) -> tuple:
    """Returns a row of `answers`.

    provider: None where it is not known (an import), which `adopt` then decides. created: UTC in
    ISO 8601, now where it is None. Raises ValueError for a number that is not finite.
    """
    name = key(model, messages, parameters, provider or "")
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
        provider,
    )


def insert(db: sqlite3.Connection, rows: Sequence[tuple]) -> int:
    """Adds rows of `answers` whose keys are new, inside a transaction; returns how many were."""
    marks, before = ",".join("?" * 14), db.total_changes
    db.executemany(f"INSERT INTO answers VALUES ({marks}) ON CONFLICT (key) DO NOTHING", rows)
    return db.total_changes - before


def _storable(text: str) -> str:
    """Returns `text` with a question mark for each lone surrogate, which has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()


# Made once, which is quick.
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
