"""Settings of the process: what a command line starts with, and what others are spared."""

import os
import subprocess
import sys

import pytest

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError

PRINT = "import os, sys, collab_jax; print(os.environ.get('MALLOC_MMAP_MAX_'))"


def environment(**extra):
    plain = {name: value for name, value in os.environ.items() if name not in process.ALLOCATOR}
    return plain | extra


def first_line(*command, **extra):
    out = subprocess.run(
        [sys.executable, *command],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return out.stdout.splitlines()[0], out.returncode


def test_a_program_that_imports_us_is_left_alone():
    assert first_line("-c", PRINT) == ("None", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the variables are glibc's")
@pytest.mark.skipif(
    any(map(os.path.exists, process.ACCELERATORS)), reason="there is an accelerator"
)
def test_a_command_line_starts_anew_once_and_a_setting_of_the_users_stands(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: started.append((argv, env)))
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-X", "dev", "-m", "collab_jax.train", "--config", "x"]
    )
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    process.restart_with_allocator()
    [(argv, env)] = started
    assert argv == [sys.executable, "-X", "dev", "-m", "collab_jax.train", "--config", "x"]
    assert env.items() >= process.ALLOCATOR.items()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    process.restart_with_allocator()
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    monkeypatch.setattr(process, "ACCELERATORS", ("/",))
    process.restart_with_allocator()  # beside an accelerator
    monkeypatch.setattr(process, "ACCELERATORS", ())
    for other in (["python", "-m", "pytest"], ["python", "-c", "import collab_jax"]):
        monkeypatch.setattr(sys, "orig_argv", other)
        process.restart_with_allocator()
    assert len(started) == 1


def test_host_devices_must_be_some():
    with pytest.raises(UserError, match="at least 1"):
        process.set_up(0)


def test_compiled_programs_have_a_folder_for_each_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = process.compiled_folder()
    assert here.parent == tmp_path / "collab_jax" and here == process.compiled_folder()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert process.compiled_folder() != here


def test_compiled_programs_are_kept_by_default_and_reused(tmp_path):
    """Two processes: the second finds every program of the first."""
    code = (
        "from collab_jax import process; process.set_up(1)\n"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "print(float(jax.jit(lambda x: x * 2 + 1)(3.0)))\n"
    )

    def files():
        return sorted(p.name for p in tmp_path.rglob("*-cache"))

    kept = []
    for _ in range(2):
        env = environment(XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu")
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert out.stdout.strip() == "7.0", out.stderr
        kept.append(files())
    assert kept[0] and kept[0] == kept[1]
