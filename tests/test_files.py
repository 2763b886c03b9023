"""Files that are whole or absent, whatever happens while they are written."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from collab_jax.runtime import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_comes_back_in_utf_8_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("é ⏎\n", ""):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode() and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_what_was_there(tmp_path, exists, error):
    path = tmp_path / "a.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(error), files.replacing(path) as scratch:
        scratch.write_text("half of the n")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * exists


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_it_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (seen.append(path.read_text()), fsync(n)))
    files.write_text(path, "new")
    assert seen == ["old"] and path.read_text() == "new"


def test_a_folder_that_is_not_there_or_is_a_file_is_an_error_of_the_systems(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "none" / "a.txt", "x")
    (tmp_path / "file").write_text("old")
    with pytest.raises(NotADirectoryError):
        files.write_text(tmp_path / "file" / "a.txt", "x")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_may_not_be_written_to_is_left_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            files.write_text(path, "new")
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "old"


def test_a_block_that_writes_nothing_replaces_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), files.replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_process_that_is_killed_halfway_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, pathlib, signal, sys; from collab_jax.runtime import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as scratch:\n"
        "    scratch.write_text('half of the n'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code, str(path)], env=env, timeout=60)
    assert child.returncode == -signal.SIGKILL and path.read_text() == "old"
    files.write_text(path, "new")  # the dead process's scratch file is in nobody's way
    assert path.read_text() == "new" and len(names(tmp_path)) == 2
