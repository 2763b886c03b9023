"""The sandbox: what is right passes, and no attack does, nor leaves anything behind.

Where bubblewrap starts nothing the module is skipped, with the reason.
"""

import contextlib
import os
import pathlib
import resource
import socket
import time

import pytest
from attacks import ATTACKS, RIGHT, SLOW_ATTACKS, STOPPED

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import sandbox
from collab_jax.tasks.sandbox import Job, Sandbox

TESTS = ("assert f(3) == 4", "assert f(0) == 1")


def job(source: str, *tests: str, prelude: str = "", names: tuple[str, ...] = ("f",)) -> Job:
    return Job(source, prelude, names, tests or TESTS)


@pytest.fixture(scope="module")
def judge():
    """judge(job) -> its verdict, with one CPU second for each of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        for limits in sandbox.LIMITS.values():
            patch.setitem(limits, "CPU", 1)
        try:
            box = Sandbox(workers=1, deadline=120.0)  # for a busy machine
        except UserError as error:
            pytest.skip(str(error))
        yield lambda *jobs: box.judge(jobs)[0]
        box.close()


# ---- verdicts


@pytest.mark.parametrize(
    "source",
    [
        RIGHT,
        "f = lambda x: x + 1",
        "import math, re, collections, heapq, itertools\ndef f(x): return math.floor(x + 1.5)",
        "print('hello')\ndef f(x):\n    print(x)\n    return x + 1",
        "import tempfile\ndef f(x):\n    file = tempfile.TemporaryFile()\n    file.write(b'x')\n"
        "    return x + file.tell()",
        "class F:\n    def __call__(self, x): return x + 1\nf = F()",
        "def f(x): return float(x + 1)",  # 4.0 == 4
    ],
)
def test_right(judge, source):
    assert judge(job(source)) is True


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return x + 2",
        "def f(x): return 4",  # right on the first test alone
        "def f(x): return str(x + 1)",
        "def f(x): pass",
        "def g(x): return x + 1",
        "def f(x) return x + 1",
        "def f(x): raise ValueError",
        "",
        "def f(): return 4",
        "import numpy\ndef f(x): return x + 1",
        "def f(x): return [x + 1]",
        "f = 4",
        "def f(x): return float('nan')",
    ],
)
def test_wrong(judge, source):
    assert judge(job(source)) is False


VALUES = [
    *("None", "True", "10 ** 50", "-0.0", "float('inf')", "'\\x00\\ud800é'", "b'\\xff\\x00'"),
    *("(1, [2, (3,)])", "{1, 2}", "frozenset({(1, 2)})", "{(1, 2): [3], None: {4: {5}}}", "1 + 2j"),
    *(
        "[]",
        "()",
        "set()",
        "{}",
        "[(1, 'a'), (2.5, None)]",
        "int",
        "__import__('array').array('i')",
    ),
]


@pytest.mark.parametrize("value", VALUES)
def test_plain_data_keeps_value_and_type_both_ways(judge, value):
    test = (
        f"assert f({value}) == {value}",
        f"assert type(f({value})) == type({value})",
        f"assert repr(f({value})) == repr({value})",
    )
    assert judge(job("def f(x): return x", *test)) is True


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("import collections\nf = collections.Counter", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "import collections\nP = collections.namedtuple('P', 'a b')\nf = lambda: P(1, 2)",
            "assert f() == (1, 2)",
        ),
        ("f = lambda: (1, 2)", "assert f() != [1, 2]"),
        ("f = lambda x: x * 1.0001", "assert math.isclose(f(2), 2, rel_tol=0.001)"),
        ("f = lambda x: [3, 1, 2]", "assert sorted(f(0)) == [1, 2, 3] and set(f(0)) == {1, 2, 3}"),
        ("f = lambda *, key=1: key + 1", "assert f(key=3) == 4"),
    ],
)
def test_a_test_has_all_of_python(judge, source, test):
    assert judge(job(source, test, prelude="import math")) is True


def test_what_is_no_plain_data_can_be_built_changed_and_given_back(judge):
    tree = (
        "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
        "def depth(node): return 1 + depth(node.left) if node else 0"
    )
    tests = (
        "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)",
        "assert depth(root) == 3 and root.left.value == 2 and root.left.left.left is None",
    )
    assert judge(job(tree, *tests, names=("Node", "depth"))) is True
    assert judge(job(tree, *tests, "assert depth(root) == 4", names=("Node", "depth"))) is False


def test_a_checker_goes_on_after_a_failure_and_keeps_nothing(judge):
    assert judge(job(RIGHT, "seen = 1", "assert f(1) == 2", "raise SystemExit")) is False
    assert judge(job(RIGHT, "assert f(1) == 2", "assert 'seen' not in globals()")) is True


# ---- attacks


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(judge, attack):
    assert judge(job(ATTACKS[attack])) is False


@pytest.mark.slow
@pytest.mark.parametrize("attack", SLOW_ATTACKS)
def test_attack_on_time_or_memory(judge, attack):
    assert judge(job(SLOW_ATTACKS[attack])) is False


@pytest.mark.slow
@pytest.mark.parametrize("attack", STOPPED)
@pytest.mark.usefixtures("judge")
def test_past_the_deadline_nobody_knows(attack):
    box = Sandbox(workers=1, deadline=3.0)
    assert box.judge([job(STOPPED[attack])]) == [None]
    box.close()


@pytest.mark.parametrize("test", ["assert f(3)", "assert not f(3)", "assert f(3) != 5"])
def test_an_object_is_neither_true_nor_different(judge, test):
    assert judge(job("def f(x): return object()", test)) is False


def test_network_of_this_machine(judge):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"socket.create_connection(('127.0.0.1', {port}), 5)"
        assert judge(job(f"import socket\n{call}\n{RIGHT}")) is False
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_files_of_this_machine(judge, tmp_path):
    secret = tmp_path / "cloud.sqlite"
    secret.write_text("4")
    for path in (secret, "/etc/passwd", __file__, "/proc/1/environ", "/dev/mem"):
        assert judge(job(f"open({str(path)!r})\n{RIGHT}")) is False
    worker = str(sandbox.WORKER)
    for path in (tmp_path / "new", secret, "/new", "/usr/lib/new", "/dev/new", worker):
        assert judge(job(f"open({str(path)!r}, 'w')\n{RIGHT}")) is False
    assert secret.read_text() == "4" and list(tmp_path.iterdir()) == [secret]


def test_files_of_another_solution(judge):
    assert judge(job(f"open('/tmp/found', 'w').close()\n{RIGHT}")) is True
    assert judge(job(f"open('/tmp/found')\n{RIGHT}")) is False


# ---- what stays behind


def _processes(mark: str) -> int:
    """How many processes of this machine have `mark` among their arguments."""
    count = 0
    for arguments in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended
            count += mark.encode() in arguments.read_bytes().split(b"\0")
    return count


def _wait_until(holds) -> None:
    """Fails where `holds()` is not true within 20 seconds."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def _memory() -> int:
    """The bytes of memory that this process has now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _check_nothing_stays(monkeypatch, attacks, count: int) -> None:
    """Judges `count` attacks, all of `attacks` in turn: none passes, and nothing grows.

    Of memory 16 MiB may, which of 10,000 attacks is 1.7 kB each.
    """
    size = (4 << 20) + os.getpid()  # by which the processes of this sandbox can be told
    for limits in sandbox.LIMITS.values():
        monkeypatch.setitem(limits, "FSIZE", size)
    jobs = [job(source) for source in attacks.values()]
    box = Sandbox(workers=2, deadline=5.0)
    box.judge(jobs)  # caches and pools are filled
    descriptors, memory = len(os.listdir("/proc/self/fd")), _memory()
    running = _processes(f"FSIZE={size}")
    assert running > 0
    for start in range(0, count, len(jobs)):
        assert True not in box.judge(jobs[: count - start])
    # Two pairs, bubblewrap has two beside each; what was killed a moment ago is let go of.
    _wait_until(lambda: _processes(f"FSIZE={size}") <= 12)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4  # of two pairs' next processes
    assert _memory() < memory + (16 << 20)
    box.close()
    _wait_until(lambda: _processes(f"FSIZE={size}") == 0)


@pytest.mark.slow
@pytest.mark.usefixtures("judge")
def test_nothing_stays_after_100_attacks(monkeypatch):
    _check_nothing_stays(monkeypatch, ATTACKS, 100)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("judge")
@pytest.mark.parametrize("count", [300, 10_000])
def test_nothing_stays_after_attacks_of_all_kinds(monkeypatch, count):
    _check_nothing_stays(monkeypatch, ATTACKS | SLOW_ATTACKS | STOPPED, count)


def test_a_sandbox_that_was_killed_is_replaced(judge):
    box = Sandbox(workers=1)
    assert box.judge([job(RIGHT)]) == [True]
    (pair,) = box._pairs
    for process in (pair.solution, pair.checker):
        process.process.kill()
    time.sleep(0.2)
    assert box.judge([job(RIGHT)] * 2) == [True, True]
    box.close()


# ---- where there is none


def test_without_bubblewrap_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="apt install bubblewrap.*config.task.unsafe_code"):
        Sandbox()
    box = Sandbox(unsafe=True, workers=1)
    wrong = job("def f(x): return 0")
    assert box.judge([job(RIGHT), wrong]) == [True, False]
    box.close()


def test_where_bubblewrap_fails_the_reason_is_told(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="No permissions to create new namespace.*user namespaces"):
        Sandbox()


def test_other_machines_are_refused_by_name():
    with pytest.raises(UserError, match="x86_64 and aarch64.*riscv64"):
        sandbox.seccomp_filter("riscv64")
