"""How fast code is judged: `python -m collab_jax.bench code`.

Verdicts a second of quick solutions, right and wrong in turn, in the sandbox and, for what that
costs, without one.
"""

import argparse
import os
import time

from collab_jax.runtime import markdown, process
from collab_jax.runtime.errors import UserError
from collab_jax.tasks.sandbox import Job, Sandbox

TESTS = ("assert f(3) == 4", "assert f(0) == 1", "assert f(-1) == 0")
RIGHT, WRONG = (
    Job(f"import math\ndef f(x): return x + {step}", "", ("f",), TESTS) for step in (1, 2)
)


def rate(sandbox: Sandbox, count: int) -> float:
    """Returns verdicts a second over `count` solutions. UserError where a verdict is wrong."""
    jobs = [RIGHT, WRONG] * (count // 2)
    started = time.perf_counter()
    verdicts = sandbox.judge(jobs)
    seconds = time.perf_counter() - started
    if verdicts != [True, False] * (count // 2):
        raise UserError("a verdict is wrong: is the machine so busy that solutions time out?")
    return len(jobs) / seconds


def run_code_bench(argv: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench code", description="Verdicts on code a second."
    )
    parser.add_argument("--verdicts", type=int, default=200, help="of each round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    args = parser.parse_args(argv)
    boxes = {"sandbox": Sandbox(), "without one": Sandbox(unsafe=True)}
    rates: dict[str, list[float]] = {name: [] for name in boxes}
    for box in boxes.values():
        rate(box, 8)  # the first processes are started
    for _ in range(args.repeats):
        for name, box in boxes.items():
            rates[name].append(rate(box, args.verdicts))
    machine = process.machine()
    print(
        " ".join(f"{k} {v}," for k, v in machine.items()),
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n",
    )
    rows = [
        [name, f"{sorted(found)[len(found) // 2]:.0f}", f"{min(found):.0f} to {max(found):.0f}"]
        for name, found in rates.items()
    ]
    print(markdown.table(["solutions run in", "verdicts/s, median", "of all rounds"], rows))
    return 0
