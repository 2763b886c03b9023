"""Settings of the process and the runner of commands: importing changes nothing, a command starts
once more with its allocator, and the flags of one command are refused by the others.
"""

import ast
import os
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError

RESTARTING = ("train", "sft", "evaluate", "export", "bench/__main__", "cloud/__main__")
OTHERS = ("memory", "compare", "calibrate", "sweep")

no_restart_here = pytest.mark.skipif(
    sys.platform != "linux" or any(map(os.path.exists, process.ACCELERATORS)),
    reason="the allocator is glibc's, and is left alone beside an accelerator",
)


def environment(**extra):
    plain = {name: value for name, value in os.environ.items() if name not in process.ALLOCATOR}
    return plain | {"PYTHONPATH": str(ROOT)} | extra


PARENT = """
import subprocess, sys, time
from collab_jax.runtime import process
child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit()); print(1, flush=True)"
child += "; time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], preexec_fn=process.stop_with_parent)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
def test_what_a_killed_process_has_started_is_told_to_stop():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment()
    )
    assert parent.stdout.readline() == b"1\n"  # the child is there, which holds the pipe as well
    parent.kill()
    begin = time.monotonic()
    assert parent.stdout.read() == b"" and time.monotonic() - begin < 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system_though_it_lies_in_pieces():
    def resident():
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    pieces = [b"x" * 60_000 for _ in range(2000)]
    kept = pieces[::2]
    del pieces
    before = resident()
    process.return_free_memory()
    assert before - resident() > 30e6 and len(kept) == 1000


def run(*command, **extra):
    return subprocess.run(
        [sys.executable, *command],
        env=environment(**extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


IMPORT = """
import os, signal, sys
{before}
from absl import flags
state = lambda: (dict(os.environ), set(flags.FLAGS), [signal.getsignal(s) for s in (2, 15)])
first = state()
{imports}
last = state()
print("same" if first == last else "changed")
for a, b in zip(first, last):
    if a != b:
        print(a, b, file=sys.stderr)
"""


def test_importing_the_package_alone_imports_nothing_else():
    code = "import sys; old = set(sys.modules); import collab_jax; print(set(sys.modules) - old)"
    assert run("-c", code).stdout == "{'collab_jax'}\n"


@pytest.mark.slow
def test_importing_the_commands_has_no_effect_on_the_process():
    commands = [name for name in (*RESTARTING, *OTHERS) if "/" not in name]
    # What the libraries set when they are imported themselves is not this package's doing.
    libraries = (
        "jax, flax, orbax.checkpoint, sklearn, tensorboardX, tensorflow_datasets, transformers, "
        "matplotlib.pyplot, ml_collections.config_flags"
    )
    imports = "\n".join(f"import collab_jax.{name}" for name in commands)
    code = IMPORT.format(before=f"import {libraries}", imports=imports)
    # models/text.py has a default for this one, which spares the user the advice to install torch.
    out = run("-c", code, TRANSFORMERS_VERBOSITY="error")
    assert out.stdout == "same\n", out.stderr


@pytest.mark.parametrize("name", RESTARTING)
def test_a_command_that_computes_restarts_before_it_imports_anything_heavy(name):
    _, imported, call, *_ = ast.parse((ROOT / f"collab_jax/{name}.py").read_text()).body
    assert ast.unparse(imported) == "from collab_jax.runtime import process"
    assert ast.unparse(call) == "process.restart_with_allocator(__name__)"


@no_restart_here
def test_the_restart_keeps_the_command_line_and_is_made_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: started.append((argv, env)))
    words = ["-X", "dev", "-m", "collab_jax.train", "--config", "x"]
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    process.restart_with_allocator("collab_jax.train")  # imported
    assert started == []
    process.restart_with_allocator("__main__")
    [(argv, env)] = started
    assert argv == [sys.executable, *words] and env.items() >= process.ALLOCATOR.items()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")  # the user's own setting stays
    process.restart_with_allocator("__main__")
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    monkeypatch.setattr(process, "ACCELERATORS", ("/",))
    process.restart_with_allocator("__main__")  # beside an accelerator
    assert len(started) == 1


@no_restart_here
@pytest.mark.slow
def test_train_starts_twice_and_refuses_the_flag_of_another_command(tmp_path):
    log = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os; open({str(log)!r}, 'a').write(os.environ.get('MALLOC_MMAP_MAX_', '-') + ' ')"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    command = ("-m", "collab_jax.train", "--config=configs/countdown_tiny.py", "--workdir=runs/x")
    out = run(*command, "--gib=1", PYTHONPATH=path)
    assert out.returncode == 1 and out.stdout == ""
    assert out.stderr.startswith("error: Unknown command line flag 'gib'")
    assert log.read_text() == "- 0 "


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["memory"], "error: flag --config=None"),
        (["memory", "--config=none.py"], "error: "),
        (["memory", "--config=configs/countdown_tiny.py", "7"], "error: unexpected argument '7'"),
        (["memory", "--config=configs/countdown_tiny.py", "--config.sed=1"], "error: "),
        (["compare", "--records", "none.csv", "--out", "{tmp}"], "error: cannot read none.csv"),
    ],
)
def test_an_error_of_the_users_is_one_line(tmp_path, words, says):
    out = run("-m", f"collab_jax.{words[0]}", *(word.format(tmp=tmp_path) for word in words[1:]))
    assert out.returncode == 1 and out.stderr.startswith(says) and out.stderr.count("\n") == 1


def test_one_host_device_is_the_least():
    with pytest.raises(UserError, match="at least 1"):
        process.set_up(0)


def test_compiled_programs_have_a_folder_for_each_kind_of_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = process.compiled_folder()
    assert here.parent == tmp_path / "collab_jax" and here == process.compiled_folder()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert process.compiled_folder() != here


def test_compiled_programs_are_kept_by_default_and_reused(tmp_path):
    """Two processes: the second finds every program of the first."""
    code = (
        "from collab_jax.runtime import process; process.set_up(1)\n"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "print(float(jax.jit(lambda x: x * 2 + 1)(3.0)))\n"
    )
    programs = []
    for _ in range(2):
        env = environment(XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS="cpu")
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert out.stdout.strip() == "7.0", out.stderr
        programs.append(sorted(path.name for path in tmp_path.rglob("*-cache")))
    assert programs[0] and programs[0] == programs[1]
