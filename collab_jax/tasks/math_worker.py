"""One worker of `verifier.py`: compares the pairs that it is sent, by math-verify.

Run as a script; imports no jax. It says "ready", then answers each line, a pair as JSON, by 1 or 0.
It may be killed at any moment; a pair that takes too long, or too much memory, costs its answer
alone.
"""

import functools
import json
import resource
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MEMORY = 4 << 30  # bytes; beyond, a pair is not equal
CONFIG = [LatexExtractionConfig(), ExprExtractionConfig()]


@functools.lru_cache(4096)  # a gold answer is compared with every response of its group
def read(answer: str) -> list:
    """What math-verify makes of an answer, written as the content of a box."""
    return parse(
        f"\\boxed{{{answer}}}",
        extraction_config=CONFIG,
        parsing_timeout=None,  # pyright: ignore[reportArgumentType] (None is its documented "off")
    )


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.set_int_max_str_digits(10_000)
    out = sys.stdout
    sys.stdout = sys.stderr  # what a library prints must not look like an answer
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        try:
            same = verify(read(gold), read(prediction), timeout_seconds=None)
        except Exception:  # sympy raises anything on odd input, even MemoryError, RecursionError
            same = False
        out.write(f"{int(same)}\n")
        out.flush()


if __name__ == "__main__":
    main()
