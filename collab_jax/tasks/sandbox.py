"""A sandbox in which code that a model wrote is judged by tests, by bubblewrap (Linux alone).

A verdict takes two processes, each in a sandbox of its own: the solution runs in the one, its tests
in the other, and only plain data passes between them (`code_worker.py`). A solution can therefore
give wrong data, or none, but neither see what a test expects nor say that it holds. Its process is
made for one verdict, and killed after it; that of the tests stays, unless something stops it.

In a sandbox there is no network, no other process and no file but the standard library and an empty
/tmp in memory, and nobody has a capability. No process, thread or socket can be made (seccomp), and
CPU seconds, memory, sizes and open files are limited. The wall clock is this process's: after
DEADLINE both processes are killed.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import platform
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

from collab_jax.tasks import code_worker
from collab_jax.tasks.base import TaskError

WORKER = pathlib.Path(code_worker.__file__)
WORKER_INSIDE = "/code_worker.py"  # in a sandbox, which is not to tell where the project is
DEADLINE = 30.0  # seconds of a verdict, by the wall clock
START = 60.0  # seconds a process may take to start, on a busy machine
MAX_SOURCE = 64 << 10  # characters; a longer solution is wrong, unread
TMP_BYTES = 16 << 20  # of /tmp
LIMITS = {  # of each role, by the names of setrlimit; CPU is of one verdict
    "solution": {
        "CPU": 6,  # seconds
        "AS": 512 << 20,  # bytes of memory
        "FSIZE": 4 << 20,  # bytes of a file
        "NOFILE": 64,  # open files
        "NPROC": 1,  # processes and threads
        "CORE": 0,
    },
    "checker": {"CPU": 6, "AS": 1 << 30, "FSIZE": 0, "NOFILE": 64, "NPROC": 1, "CORE": 0},
}


class Job(NamedTuple):
    """A solution and its tests.

    prelude: what the tests have of their own, executed before them. names: what they take from the
    solution. tests: statements, executed in turn; the solution is right where none of them raises.
    """

    source: str
    prelude: str
    names: tuple[str, ...]
    tests: tuple[str, ...]


# ---- how a process is confined

# System calls by machine, as {name: number}: what starts a process or a thread, opens a namespace
# or a socket (no network namespace confines those to the host of a virtual machine), takes memory
# beyond RLIMIT_AS (System V's, files in memory), reaches into another process, or is a part of the
# kernel that no solution needs.
_X86_64 = {
    "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "unshare": 272, "setns": 308, "socket": 41,
    "shmget": 29, "msgget": 68, "semget": 64, "memfd_create": 319, "memfd_secret": 447,
    "mount": 165, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "pidfd_getfd": 438, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321,
    "userfaultfd": 323, "perf_event_open": 298, "io_uring_setup": 425,
}  # fmt: skip
_AARCH64 = {
    "clone": 220, "clone3": 435, "unshare": 97, "setns": 268, "socket": 198,
    "shmget": 194, "msgget": 186, "semget": 190, "memfd_create": 279, "memfd_secret": 447,
    "mount": 40, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
    "pidfd_getfd": 438, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280,
    "userfaultfd": 282, "perf_event_open": 241, "io_uring_setup": 425,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}


def seccomp_filter(machine: str) -> bytes:
    """A BPF program that fails the denied system calls with EPERM, and kills on foreign ones.

    Raises TaskError for a machine whose system calls are not listed here.
    """
    if machine not in _MACHINES:
        raise TaskError(
            f"the sandbox knows the system calls of {' and '.join(_MACHINES)}, and this machine is "
            f"{machine}: judge code elsewhere, or set config.task.unsafe_code=True"
        )
    architecture, denied = _MACHINES[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, fail, allow = 0x80000000, 0x00050001, 0x7FFF0000
    program = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # its number
        (at_least, 0, 1, 0x40000000),  # of x32
        (give, 0, 0, kill),
    ]
    for number in denied.values():
        program += [(equal, 0, 1, number), (give, 0, 0, fail)]
    program.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _interpreter() -> str:
    """The Python under a virtual environment, which is all of it that the sandbox has."""
    return os.path.realpath(sys.executable)


def _confined(bwrap: str) -> list[str]:
    """The command line of bubblewrap, the program at `bwrap`, but for its --seccomp."""
    base, libraries = sys.base_prefix, sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    readable = dict.fromkeys(
        path
        for path in (
            *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"),
            *(f"{base}/lib", f"{base}/lib64", _interpreter()),
        )
        if os.path.exists(path)
    )
    hidden = [path for path in (libraries, "/usr/lib/python3/dist-packages") if os.path.isdir(path)]
    return [
        *(bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *("--cap-drop", "ALL"),  # root would keep its capabilities, in a namespace of its own
        *("--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),  # a Python may lie below
        *(word for path in readable for word in ("--ro-bind", path, path)),
        *("--ro-bind", str(WORKER), WORKER_INSIDE),
        *(word for path in hidden for word in ("--tmpfs", path, "--remount-ro", path)),
        *("--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"),
        *("--remount-ro", "/"),
    ]


def _bubblewrap() -> list[str]:
    """The command line of `_confined`. Raises TaskError, saying what to do, where it fails."""
    advice = (
        "code that a model writes runs in a sandbox, and there is none here: {}; "
        "or set config.task.unsafe_code=True to run it without one"
    )
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise TaskError(
            advice.format("install bubblewrap (Linux; Debian, Ubuntu: apt install bubblewrap)")
        )
    confined = _confined(bwrap)
    command = [*confined, _interpreter(), "-I", "-S", "-c", "pass"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START, env={})
    if done.returncode:
        cause = " ".join(done.stderr.split())[:200]
        raise TaskError(
            advice.format(
                f"bubblewrap does not start ({cause}): it must be 0.7 or newer, and unprivileged "
                "user namespaces allowed, in a container also by its security options"
            )
        )
    return confined


# ---- processes


class _Process:
    """A process of `code_worker` and the channel to it.

    confined: the command line of bubblewrap; empty: the process runs without.
    """

    def __init__(self, role: str, confined: Sequence[str]):
        self.channel, theirs = socket.socketpair()
        limits = [f"{name}={value}" for name, value in LIMITS[role].items()]
        place = WORKER_INSIDE if confined else str(WORKER)
        worker = [_interpreter(), "-I", "-S", place, role, *limits]
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            rules = []
            if confined:
                rules.append(_pipe_with(seccomp_filter(platform.machine())))
                stack.callback(os.close, rules[0])
                worker = [*confined, "--seccomp", str(rules[0]), *worker]
            self.process = subprocess.Popen(
                worker,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=rules,
                env={},
                cwd="/",
                start_new_session=True,  # Ctrl-C is not for it; what it leaves behind dies with it
            )

    def wait_until_ready(self) -> None:
        """Raises TaskError, and ends the process, where it does not start."""
        self.channel.settimeout(START)
        with contextlib.suppress(OSError):
            if self.channel.recv(1) == code_worker.READY:
                return
        self.kill()
        raise TaskError("a sandbox does not start: is the machine out of memory or processes?")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()


def _pipe_with(data: bytes) -> int:
    """The end of a pipe from which `data` can be read."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(data)
    return reader


def _alive(process: _Process | None) -> _Process | None:
    """A process; None where there is none, or somebody else ended it."""
    if process is None or process.process.poll() is None:
        return process
    process.kill()
    return None


class _Pair:
    """A checker, and the process of the next solution, which is started ahead."""

    def __init__(self, confined: Sequence[str]):
        self.confined = confined
        self.solution: _Process | None = None
        self.checker: _Process | None = None

    def judge(self, job: Job, deadline: float) -> bool | None:
        """Whether a solution is right; None where the deadline passed."""
        checker, solution = self._ready_checker(), self._take_solution()
        verdict = None
        try:
            checker.channel.settimeout(deadline)
            solution.channel.settimeout(None)  # or the checker's end would not wait either
            socket.send_fds(checker.channel, [b"j"], [solution.channel.fileno()])
            solution.channel.close()  # the checker has it: where that ends, so does the solution
            code_worker.send(checker.channel, job._asdict())
            verdict = checker.channel.recv(1)
        except TimeoutError:
            pass
        except OSError:  # the checker died of what it was sent
            verdict = b""
        finally:
            solution.kill()
            if not verdict:
                self.checker = None
                checker.kill()
        return None if verdict is None else verdict == code_worker.RIGHT

    def _take_solution(self) -> _Process:
        """A process for a solution; starts the next one, which boots while this one works."""
        taken, self.solution = _alive(self.solution), None
        if taken is None:
            taken = _Process("solution", self.confined)
        taken.wait_until_ready()
        self.solution = _Process("solution", self.confined)
        return taken

    def _ready_checker(self) -> _Process:
        self.checker = _alive(self.checker)
        if self.checker is None:
            checker = _Process("checker", self.confined)
            checker.wait_until_ready()
            self.checker = checker
        return self.checker

    def kill(self) -> None:
        for process in (self.solution, self.checker):
            if process:
                process.kill()
        self.solution = self.checker = None


class Sandbox:
    """Some pairs of processes, which judge jobs side by side. Raises TaskError where there is none.

    unsafe: without bubblewrap. The processes are started by threads that last: bubblewrap ends when
    the thread does that started it.
    """

    def __init__(
        self, unsafe: bool = False, workers: int | None = None, deadline: float = DEADLINE
    ):
        confined = [] if unsafe else _bubblewrap()
        size = workers or min(os.cpu_count() or 1, 8)
        self._deadline = deadline
        self._threads = concurrent.futures.ThreadPoolExecutor(size)
        self._idle: queue.SimpleQueue[_Pair] = queue.SimpleQueue()
        self._pairs = [_Pair(confined) for _ in range(size)]
        for pair in self._pairs:
            self._idle.put(pair)
        atexit.register(self.close)

    def judge(self, jobs: Sequence[Job]) -> list[bool | None]:
        """Whether each solution passes its tests; None where the deadline passed."""
        return list(self._threads.map(self._judge, jobs))

    def _judge(self, job: Job) -> bool | None:
        if len(job.source) > MAX_SOURCE:
            return False
        pair = self._idle.get()
        try:
            return pair.judge(job, self._deadline)
        finally:
            self._idle.put(pair)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(cancel_futures=True)
        for pair in self._pairs:
            pair.kill()


@functools.cache
def shared(unsafe: bool) -> Sandbox:
    """The sandbox of this process. Raises TaskError where none can be had."""
    return Sandbox(unsafe)
