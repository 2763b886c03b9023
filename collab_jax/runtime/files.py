"""Files that are whole or absent: written beside their place, then renamed; folders that one
process at a time works in; caches, fingerprints.

A process that is killed at any moment leaves the old file or the new one, never half of either. A
kill may leave a scratch file as well, named NAME.PID.tmp, which nothing reads.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator

from collab_jax.runtime.errors import UserError

LOCK = ".lock"
log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of a scratch file, which takes the place of `path` when the block ends.

    The block must write the scratch file. Its content is on disk before it is renamed, so that a
    power cut, too, leaves the old content or the new. Where the block raises, the scratch file is
    removed and `path` stays what it was.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """No other process holds `folder` while the block runs, by a lock on its file LOCK.

    Whatever ends a process ends its hold. Raises UserError where another process has it. A file
    system without locks is told of by a warning.
    """
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder}: wait until it ends, or use another folder"
            ) from None
        except OSError as error:
            log.warning("two processes in %s would not be noticed (%s)", folder, error.strerror)
        yield


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def cache_folder() -> pathlib.Path:
    """Returns the folder for what can be made again; XDG_CACHE_HOME sets where it lies."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "collab_jax"


def fingerprint(lines: Iterable[str], unit: str) -> dict[str, int | str]:
    """Returns how many lines there are, by the name of their unit, and the SHA-256 of them all."""
    digest, count = hashlib.sha256(), 0
    for line in lines:
        digest.update(f"{len(line)}:{line}".encode())
        count += 1
    return {unit: count, "sha256": digest.hexdigest()}
