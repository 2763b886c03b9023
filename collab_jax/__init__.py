"""collab_jax: train a small device LLM that knows when to ask the cloud (GAPG, arXiv 2509.24050)."""

import os
import sys

__version__ = "0.1.0"

# XLA's large temporaries would cost page faults at every step: glibc is to keep and reuse them, in huge pages.
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def _is_command_line() -> bool:
    """True in a process started as `python -m collab_jax.X`; never in a notebook, a test or a program that imports us."""
    options = sys.orig_argv[1:]
    return any(o == "-m" and module.startswith("collab_jax.") for o, module in zip(options, options[1:], strict=False))


# The allocator reads its variables at a process's start, so the command line starts itself once more, before it has
# loaded anything.
if sys.platform == "linux" and _is_command_line() and "MALLOC_MMAP_MAX_" not in os.environ:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_MALLOC})
