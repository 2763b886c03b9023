"""The sandbox: what is right passes, and no attack does, nor leaves anything behind.

Where bubblewrap starts nothing the module is skipped, with the reason.
"""

import os
import pathlib
import resource
import socket
import time

import pytest

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import sandbox
from collab_jax.tasks.sandbox import Job, Sandbox

TESTS = ("assert f(3) == 4", "assert f(0) == 1")


def job(source: str, *tests: str, prelude: str = "", names: tuple[str, ...] = ("f",)) -> Job:
    return Job(source, prelude, names, tests or TESTS)


@pytest.fixture(scope="module")
def judge():
    """judge(job) -> its verdict, with one CPU second a solution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sandbox.LIMITS["solution"], "CPU", 1)
        try:
            box = Sandbox(workers=1, deadline=120.0)  # for a busy machine
        except UserError as error:
            pytest.skip(str(error))
        yield lambda *jobs: box.judge(jobs)[0]
        box.close()


RIGHT = "def f(x): return x + 1"


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

EQUAL = (
    "class Yes({base}):\n"
    "    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *_: True\n"
    "    __hash__ = lambda self: hash(4)\n"
    "    __bool__ = lambda self: True\n"
    "    __class__ = int\n"
    "    __getattr__ = lambda self, name: Yes()\n"
    "def f(x): return Yes()"
)
ATTACKS = {
    "os._exit": "import os\nos._exit(0)",
    "os._exit in f": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in f": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "AssertionError patched": (
        "import builtins\nbuiltins.AssertionError = AssertionError = type('E', (), {})\n"
        "def f(x): return 0"
    ),
    "builtins patched": (
        "import builtins\nfor name in ('isinstance', 'type', 'len', 'compile', 'exec'):\n"
        "    setattr(builtins, name, lambda *_: True)\ndef f(x): return 0"
    ),
    "json patched": ("import json\njson.dumps = lambda *_: '[true, true]'\ndef f(x): return 0"),
    "the worker patched": (
        "import sys\nworker = sys.modules['__main__']\nworker.holds = lambda *_: True\n"
        "worker.encode = lambda *_: True\ndef f(x): return 0"
    ),
    "excepthook": "import sys\nsys.excepthook = lambda *_: None\nassert False",
    "always equal": EQUAL.format(base="object"),
    "an equal int": EQUAL.format(base="int"),
    "an equal str": EQUAL.format(base="str"),
    "an equal list": EQUAL.format(base="list"),
    "an equal dict": EQUAL.format(base="dict"),
    "an equal type": EQUAL.format(base="type").replace("return Yes()", "return Yes('Y', (), {})"),
    "a function": "def f(x): return f",
    "a generator": "def f(x): yield 4",
    "verdict on each descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'1' * 100)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "verdict as a message": (
        "import os\nfor fd in range(64):\n"
        "    try: os.write(fd, b'\\0\\0\\0\\x0c[true, true]' * 9)\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "the channel closed": "import os\nos.closerange(0, 64)\ndef f(x): return x + 1",
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for value in list(frame.f_locals.values()):\n"
        "        if hasattr(value, 'sendall'): value.sendall(b'1'), value.close()\n"
        "    frame = frame.f_back\ndef f(x): return 0"
    ),
    "looking for the tests": (
        "import gc\ntest = chr(97) + 'ssert f('\n"
        "def f(x): return x + any(test + '3' in str(o)[:9999] for o in gc.get_objects())"
    ),
    "a signal to all": "import os\nos.kill(-1, 9)\ndef f(x): return x + 1",
    "a signal to the parent": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 0",
    "a process": "import subprocess\nsubprocess.run(['/usr/bin/true'])\ndef f(x): return x + 1",
    "a fork": "import os\nos.fork()\ndef f(x): return x + 1",
    "a spawn": "import os, sys\nos.posix_spawn(sys.executable, ['x'], {})\ndef f(x): return x + 1",
    "a thread left behind": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
        "def f(x): return x + 1"
    ),
    "namespaces": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(x): return x + 1 if libc.unshare(0x10000000) == 0 else 0"
    ),
    "memory of System V": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "def f(x): return x + 1 if libc.shmget(0, 1 << 20, 0o1600) >= 0 else 0"
    ),
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "deep data": "def f(x):\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "endless data": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "large data": "def f(x): return 'x' * (100 << 20)",
    "a long number": "def f(x): return 1 << 10 ** 7",
    "a deep source": "(" * 10_000 + ")" * 10_000,
    "a source of 10 MB": RIGHT + "\n#" + "x" * (10 << 20),
    "NUL": RIGHT + "\n\0",
    "NUL in a name": "def f\0(x): return x + 1",
    "half a character": RIGHT + "\n'\ud800'",
    "a debugger": "breakpoint()\ndef f(x): return x + 1",
    "standard input": "input()\ndef f(x): return x + 1",
    "environment": (
        "import os\ndef f(x): return x + 1 if set(os.environ) - {'PWD', 'LC_CTYPE'} else 0"
    ),
    "processes": "import os\ndef f(x): return x + 1 if os.path.exists('/proc') else 0",
    "the file system": (
        "import os\nfound = set(os.listdir('/'))\n"
        "def f(x): return x + 1 if found & {'var', 'proc', 'sys', 'run', 'mnt'} else 0"
    ),
    "network outside": (
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 5)\ndef f(x): return x + 1"
    ),
    "a large file": (
        "with open('/tmp/x', 'wb') as file:\n    file.write(bytes(8 << 20))\ndef f(x): return x + 1"
    ),
    "many large files": (
        "for i in range(32):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n"
        "def f(x): return x + 1"
    ),
    "open files": "files = [open('/dev/null') for _ in range(100)]\ndef f(x): return x + 1",
}
SLOW_ATTACKS = {  # they end at a second of CPU
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x + 1)"),
    "much data": "def f(x): return [[]] * 10 ** 6",
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a patient memory bomb": (
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass"
    ),
    "endless loop": "while True: pass",
    "endless loop in f": "def f(x):\n    while True: pass",
    "a stubborn loop": (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True:\n"
        "    try:\n        while True: pass\n    except BaseException: pass"
    ),
    "endless output": "while True: print('x' * 10_000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "endless output to the checker": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, bytes(1 << 16))\n        except OSError: pass"
    ),
    "a million files": (
        "for i in range(10 ** 6): open(f'/tmp/{i}', 'w').close()\ndef f(x): return x + 1"
    ),
    "a large power": "def f(x): return 9 ** 9 ** 9 ** 9",
    "a bad expression": "import re\ndef f(x): return re.match('(a+)+b', 'a' * 60)",
    "colliding keys": "def f(x): return {i * (2 ** 61 - 1): 0 for i in range(10 ** 5)}",
}
STOPPED = {
    "SIGSTOP": "import os\nos.kill(os.getpid(), 19)\ndef f(x): return x + 1",
    "sleep": "import time\ntime.sleep(1000)\ndef f(x): return x + 1",
}


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


def _children() -> list[int]:
    """The processes that this one started and that are there still, zombies included."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    return [child for child, parent in parents.items() if parent == os.getpid()]


def _check_nothing_stays(count: int) -> None:
    quick = [job(source) for source in ATTACKS.values()]
    before = _children()
    box = Sandbox(workers=2)
    box.judge(quick)  # caches and pools are filled
    descriptors = len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(0, count, len(quick)):
        assert True not in box.judge(quick[: count - start])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + (16 << 10)  # KiB
    assert len(_children()) == len(before) + 4  # two pairs
    box.close()
    assert sorted(_children()) == sorted(before)


@pytest.mark.slow
@pytest.mark.usefixtures("judge")
def test_nothing_stays_after_100_attacks():
    _check_nothing_stays(100)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("judge")
def test_nothing_stays_after_10_000_attacks():
    _check_nothing_stays(10_000)


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
