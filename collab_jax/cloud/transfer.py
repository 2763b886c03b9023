"""A store's answers as JSON lines, to publish and to take over; and whether every answer is what
was stored.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from collab_jax.cloud.protocol import Reply
from collab_jax.cloud.store import REPLY_COLUMNS, Store, StoreError, checksum, insert, key, row
from collab_jax.runtime.errors import UserError

CHUNK = 1000  # rows in memory
FIELDS = {  # of a line; the types are those of JSON
    "model": str, "parameters": dict, "messages": list, "text": str, "reasoning": str, "finish_reason": str,
    "input_tokens": int, "output_tokens": int, "seconds": (int, float), "usd": (int, float), "created": str,
}  # fmt: skip


class Imported(NamedTuple):
    """How many answers were new, and how many the store had already, which it keeps."""

    added: int
    kept: int


def export(store: Store, path: Path) -> int:
    """Writes every answer as one JSON object a line, in the order of the keys, with the FIELDS; how
    many.

    The file is complete or not there. Prompts and answers are in it, keys and prices of the
    provider's account are not.
    """
    columns = f"model, parameters, prompt, created, {REPLY_COLUMNS}"
    beside, count = path.with_name(path.name + ".tmp"), 0
    try:
        with beside.open("w", encoding="utf-8") as file:
            for _, model, parameters, prompt, created, *reply in _rows(store, columns):
                line = {
                    "model": model,
                    "parameters": json.loads(parameters),
                    "messages": json.loads(prompt),
                }
                line |= Reply(*reply).__dict__ | {"created": created}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --file") from None
    return count


def import_(store: Store, path: Path) -> Imported:
    """Adds the answers of a file that `export` wrote; nothing is booked as spent. Raises UserError,
    naming the line.
    """
    found = Imported(0, 0)
    try:
        with path.open(encoding="utf-8") as file:
            chunk: list[tuple] = []
            for number, line in enumerate(file, 1):
                chunk.append(_parse(path, number, line))
                if len(chunk) == CHUNK:
                    found, chunk = _add(store, chunk, found), []
            return _add(store, chunk, found)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}): is it a file that `export` wrote?"
        ) from None


def verify(store: Store) -> list[str]:
    """What is wrong with the file, a line each: SQLite's own check, then every answer's key and
    checksum. [] for nothing.
    """
    problems = [
        f"SQLite: {text}" for (text,) in store.query("PRAGMA integrity_check(20)") if text != "ok"
    ]
    try:
        for name, stored, model, parameters, prompt, *reply in _rows(
            store, f"checksum, model, parameters, prompt, {REPLY_COLUMNS}"
        ):
            if stored != checksum(name, *reply):
                problems.append(f"answer {name[:12]}: not what was stored")
            elif name != _key_of(model, parameters, prompt):
                problems.append(f"answer {name[:12]}: not of this prompt")
    except StoreError as error:
        problems.append(str(error))
    return problems


def compact(store: Store) -> int:
    """Gives unused space back to the disk; bytes of the file afterwards. Not while another process
    writes (StoreError).
    """
    store.query("VACUUM")
    store.query("PRAGMA wal_checkpoint(TRUNCATE)")
    return store.path.stat().st_size


def _rows(store: Store, columns: str) -> Iterator[tuple]:
    """(key, *columns) of every answer, in the order of the keys."""
    last = ""
    while rows := store.query(
        f"SELECT key, {columns} FROM answers WHERE key > ? ORDER BY key LIMIT {CHUNK}", [last]
    ):
        yield from rows
        last = rows[-1][0]


def _key_of(model: str, parameters: str, prompt: str) -> str | None:
    try:
        return key(model, json.loads(prompt), json.loads(parameters))
    except ValueError:
        return None


def _parse(path: Path, number: int, line: str) -> tuple:
    try:
        data = json.loads(line)
    except ValueError:
        raise UserError(f"{path}, line {number} is not JSON: export it again") from None
    wrong = [
        name
        for name, kind in FIELDS.items()
        if not isinstance(data, dict)
        or not isinstance(data.get(name), kind)
        or isinstance(data[name], bool)
    ]
    if wrong:
        raise UserError(
            f"{path}, line {number}: {wrong[0]} is missing or of another type: export it again"
        )
    reply = Reply(**{name: data[name] for name in Reply.__dataclass_fields__})
    try:
        return row(data["model"], data["parameters"], data["messages"], reply, data["created"])
    except ValueError:  # NaN, which JSON does not have
        raise UserError(
            f"{path}, line {number} holds a number that is not finite: export it again"
        ) from None


def _add(store: Store, rows: list[tuple], found: Imported) -> Imported:
    with store.transaction() as db:
        added = insert(db, rows)
    return Imported(found.added + added, found.kept + len(rows) - added)
