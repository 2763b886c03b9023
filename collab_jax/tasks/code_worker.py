"""Both processes of a verdict on code (`sandbox.py`): the solution's, and that of its tests.

Run as a script; imports the standard library alone. `solution` executes what a model wrote, once,
and then does what it is asked: it gives names of it, calls them, and reads and sets attributes.
`checker` executes the tests, and says whether they hold. All that passes between the two is plain
data, in JSON: what is no plain data stays with the solution, as an object that the tests can only
call, or give back to it. So a test compares data alone, in a process in which no solution runs.

A message is its length, four bytes, and JSON.
"""

import array
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

MAX_MESSAGE = 4 << 20  # bytes
MAX_DIGITS = 20_000  # of an integer in a message
READY = b"+"  # what a process says first
RIGHT, WRONG = b"1", b"0"  # what a checker says of each job

# ---- messages


def send(channel: socket.socket, message: Any) -> None:
    """Sends a message."""
    data = json.dumps(message).encode()
    channel.sendall(len(data).to_bytes(4, "big") + data)


def receive(channel: socket.socket) -> Any:
    """The next message. Raises ValueError for one that is too long, EOFError at the end."""
    length = int.from_bytes(_read(channel, 4), "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(channel, length))


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (piece := channel.recv(size - len(data))):
            raise EOFError
        data += piece
    return bytes(data)


# ---- plain data

SCALARS = (type(None), bool, int, float, str)
OBJECT = "object"
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, dict, *SEQUENCES.values())
}


def encode(value: Any, reference: Callable[[Any], int]) -> Any:
    """A value as JSON can write it: a scalar, or [its type, its content].

    A value of a subclass is written as one of its plain type. reference(value) -> the number that
    stands for a value that is no plain data.
    """

    def inner(value: Any) -> Any:
        if isinstance(value, SCALARS):
            return value
        if isinstance(value, dict):
            return ["dict", [[inner(key), inner(item)] for key, item in value.items()]]
        for name, kind in SEQUENCES.items():
            if isinstance(value, kind):
                return [name, [inner(item) for item in value]]
        if isinstance(value, complex):
            return ["complex", [value.real, value.imag]]
        if isinstance(value, bytes | bytearray):
            return ["bytes", value.decode("latin-1")]
        if isinstance(value, array.array):
            return ["array", [value.typecode, value.tolist()]]
        if isinstance(value, type) and value in TYPES.values():
            return ["type", value.__name__]
        return [OBJECT, reference(value)]

    return inner(value)


def decode(value: Any, referred: Callable[[int], Any]) -> Any:
    """The value that `encode` wrote; referred(number) -> what stands for one that is no plain data.

    Raises whatever a value that `encode` did not write leads to.
    """

    def inner(value: Any) -> Any:
        if isinstance(value, SCALARS):
            return value
        kind, content = value
        if kind == "dict":
            return {inner(key): inner(item) for key, item in content}
        if kind in SEQUENCES:
            return SEQUENCES[kind](inner(item) for item in content)
        if kind == "complex":
            return complex(*content)
        if kind == "bytes":
            return content.encode("latin-1")
        if kind == "array":
            return array.array(*content)
        if kind == "type":
            return TYPES[content]
        if kind == OBJECT:
            return referred(content)
        raise ValueError(f"unknown type {kind!r}")

    return inner(value)


# ---- the solution's process


def serve_solution(channel: socket.socket, seconds: int) -> None:
    """Answers each request by [whether it worked, value]; it has so many seconds of CPU in all.

    A request is [name, arguments ...]: run SOURCE, which comes first; then get NAME, call OBJECT
    ARGS KWARGS, getattr OBJECT NAME, setattr OBJECT NAME VALUE.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # hard: no handler helps
    objects: list[Any] = []
    scope: dict[str, Any] = {"__name__": "solution"}

    def reference(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    requests = {
        "run": lambda source: exec(compile(source, "solution", "exec"), scope),
        "get": lambda name: scope[name],
        "call": lambda function, args, kwargs: function(*args, **kwargs),
        "getattr": getattr,
        "setattr": setattr,
    }
    while True:
        request, *args = receive(channel)
        try:
            value = requests[request](*(decode(arg, objects.__getitem__) for arg in args))
            answer = [True, encode(value, reference)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt are no way out either
            answer = [False, type(error).__name__]
        send(channel, answer)


# ---- the process of the tests


class Remote:
    """An object of the solution that is no plain data: to be called, or given back.

    It compares to nothing, and is neither true nor false: a test learns nothing from it but through
    plain data.
    """

    def __init__(self, ask: Callable[..., Any], number: int):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def _refuse(self, *_: Any) -> bool:
        raise TypeError("the solution's objects compare to nothing")

    __eq__ = __ne__ = __bool__ = _refuse
    __hash__ = None  # pyright: ignore[reportAssignmentType] (what has no equal has no hash)


def _asker(channel: socket.socket) -> Callable[..., Any]:
    """ask(request, *arguments) -> the value that the solution's process answers."""

    def number(value: Any) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"a test cannot give a {type(value).__name__} to a solution")
        return value._number

    def ask(request: str, *args: Any) -> Any:
        send(channel, [request, *(encode(arg, number) for arg in args)])
        worked, value = receive(channel)
        if worked is not True:
            raise RuntimeError(f"the solution raised {value!r}")
        return decode(value, lambda of: Remote(ask, of))

    return ask


def holds(job: dict[str, Any], channel: socket.socket) -> bool:
    """Whether a solution passes the tests of a job; `channel` leads to its process.

    job: `source`, the solution; `prelude`, what tests have of their own; `names`, what they take
    from the solution; `tests`, executed in turn.
    """
    ask, scope = _asker(channel), {"__name__": "tests"}
    try:
        ask("run", job["source"])
        exec(compile(job["prelude"], "prelude", "exec"), scope)
        scope.update({name: ask("get", name) for name in job["names"]})
        for test in job["tests"]:
            exec(compile(test, "test", "exec"), scope)
    except BaseException:  # a failed assertion, and whatever hostile data leads to
        return False
    return True


def serve_checker(host: socket.socket, seconds: int) -> None:
    """Judges one job after the other; each comes with the channel to its solution's process.

    seconds: of CPU for each job. Where what a solution answers takes more, the process ends.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    while True:
        _, descriptors, _, _ = socket.recv_fds(host, 1, 1)
        with socket.socket(fileno=descriptors[0]) as channel:
            last = math.ceil(time.process_time()) + seconds
            resource.setrlimit(resource.RLIMIT_CPU, (last, hard))
            host.sendall(RIGHT if holds(receive(host), channel) else WRONG)


def main(role: str, limits: Sequence[str]) -> None:
    """Serves standard input, a socket, under `limits`: as CPU=3, one for each resource."""
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # /dev/null: there is nothing to read
    sys.set_int_max_str_digits(MAX_DIGITS)
    bounds = {name: int(value) for name, value in (limit.split("=") for limit in limits)}
    seconds = bounds.pop("CPU")  # of one verdict
    for name, value in bounds.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    channel.sendall(READY)
    try:
        {"solution": serve_solution, "checker": serve_checker}[role](channel, seconds)
    except (EOFError, OSError, IndexError):  # the other end is gone
        pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
