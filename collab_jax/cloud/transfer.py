"""A store's answers as JSON lines, to publish and to take over; and checks of a store.

Lines of an export from before version 3 have no `provider`; their answers are those of the first
provider that asks for them afterwards (`Store.adopt`). To move answers from one provider to
another, export them, change `provider` in the lines, and import those.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from collab_jax.cloud.protocol import Reply
from collab_jax.cloud.store import REPLY_COLUMNS, Store, StoreError, checksum, insert, key, row
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import replacing

CHUNK = 1000  # rows in memory
FIELDS = {  # of a line; the types are those of JSON
    "model": str,
    "parameters": dict,
    "messages": list,
    "text": str,
    "reasoning": str,
    "finish_reason": str,
    "input_tokens": int,
    "output_tokens": int,
    "seconds": (int, float),
    "usd": (int, float),
    "created": str,
}
OPTIONAL_FIELDS = {"provider": (str, type(None))}  # null: not known


class Imported(NamedTuple):
    """How many answers were new, and how many the store had already, which it keeps."""

    added: int
    kept: int


def export_answers(store: Store, path: Path) -> int:
    """Writes every answer as one JSON object a line, in the order of the keys; returns how many.

    The file is complete or not there. It holds prompts and answers, and neither keys nor prices of
    the provider's account.
    """
    columns = f"model, parameters, prompt, created, provider, {REPLY_COLUMNS}"
    count = 0
    try:
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            for _, model, parameters, prompt, created, provider, *reply in _rows(store, columns):
                line = {
                    "model": model,
                    "parameters": json.loads(parameters),
                    "messages": json.loads(prompt),
                }
                line |= Reply(*reply).__dict__ | {"created": created, "provider": provider}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --file") from None
    return count


def import_answers(store: Store, path: Path) -> Imported:
    """Adds the answers of a file that `export_answers` wrote; nothing is booked as spent.

    Raises UserError, naming the line.
    """
    imported = Imported(0, 0)
    try:
        with path.open(encoding="utf-8") as file:
            chunk: list[tuple] = []
            for number, line in enumerate(file, 1):
                chunk.append(_parse(path, number, line))
                if len(chunk) == CHUNK:
                    imported, chunk = _add(store, chunk, imported), []
            return _add(store, chunk, imported)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}): is it a file that `export` wrote?"
        ) from None


def verify_store(store: Store) -> list[str]:
    """Returns what is wrong with the file, a line each; an empty list if nothing is.

    SQLite's own check comes first, then the key and the checksum of every answer.
    """
    problems = [
        f"SQLite: {text}" for (text,) in store.query("PRAGMA integrity_check(20)") if text != "ok"
    ]
    columns = f"checksum, model, parameters, prompt, provider, {REPLY_COLUMNS}"
    try:
        for name, stored, model, parameters, prompt, provider, *reply in _rows(store, columns):
            if stored != checksum(name, *reply):
                problems.append(f"answer {name[:12]}: not what was stored")
            elif name != _key_of(model, parameters, prompt, provider or ""):
                problems.append(f"answer {name[:12]}: not of this prompt")
    except StoreError as error:
        problems.append(str(error))
    return problems


def compact_store(store: Store) -> int:
    """Gives unused space back to the disk; returns the bytes of the file afterwards.

    Raises StoreError while another process writes.
    """
    store.query("VACUUM")
    store.query("PRAGMA wal_checkpoint(TRUNCATE)")
    return store.path.stat().st_size


def _rows(store: Store, columns: str) -> Iterator[tuple]:
    """Yields (key, *columns) of every answer, in the order of the keys."""
    last = ""
    while rows := store.query(
        f"SELECT key, {columns} FROM answers WHERE key > ? ORDER BY key LIMIT {CHUNK}", [last]
    ):
        yield from rows
        last = rows[-1][0]


def _key_of(model: str, parameters: str, prompt: str, provider: str) -> str | None:
    try:
        return key(model, json.loads(prompt), json.loads(parameters), provider)
    except ValueError:
        return None


def _parse(path: Path, number: int, line: str) -> tuple:
    """Returns the row of `answers` that a line describes."""
    try:
        data = json.loads(line)
    except ValueError:
        raise UserError(f"{path}, line {number} is not JSON: export it again") from None
    if not isinstance(data, dict):
        data = {}
    data: dict[str, Any] = {**dict.fromkeys(OPTIONAL_FIELDS), **data}
    for name, kind in (FIELDS | OPTIONAL_FIELDS).items():
        if not isinstance(data.get(name, ...), kind) or isinstance(data[name], bool):
            raise UserError(
                f"{path}, line {number}: {name} is missing or of another type: export it again"
            )
    reply = Reply(**{name: data[name] for name in Reply.__dataclass_fields__})
    try:
        return row(
            model=data["model"],
            parameters=data["parameters"],
            messages=data["messages"],
            reply=reply,
            provider=data["provider"],
            created=data["created"],
        )
    except ValueError:  # NaN, which JSON does not have
        raise UserError(
            f"{path}, line {number} holds a number that is not finite: export it again"
        ) from None


def _add(store: Store, rows: list[tuple], before: Imported) -> Imported:
    """Returns `before` with these rows counted, once they are stored."""
    with store.transaction() as db:
        added = insert(db, rows)
    return Imported(before.added + added, before.kept + len(rows) - added)
