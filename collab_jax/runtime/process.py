"""Settings of the process that a command line makes before jax is first used, and its end.

Allocator. XLA's large temporaries cost page faults at each step: glibc is told to keep and reuse
them, in huge pages. It reads its variables when a process starts, so the commands that compute
start themselves once more. Not done beside an accelerator, where the host allocates little, nor
where MALLOC_MMAP_MAX_ is set already. What the compiler freed is given back (`return_free_memory`).
Threads still map arrays above 64 MiB anew, as their own arenas have no room for them: one arena for
all (MALLOC_ARENA_MAX=1) saves these page faults, but the process then keeps far more memory than
its plan says, and spends most of the gain on searching it.

Host devices. Two devices of one core each keep both cores busy between the matrix products, which
alone are spread over threads.

Compiled programs are kept on disk, so that only the first start on a machine compiles. Of several
hosts jax lets host 0 alone write there.

`GracefulStop` lets a command end where its work is saved.

`python -m collab_jax.bench settings` measures the first two.
"""

import ctypes
import hashlib
import os
import pathlib
import platform
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from collab_jax.runtime.errors import UserError
from collab_jax.runtime.files import cache_folder

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# libtpu would ask the network where it runs, and complain without an answer. What it compiles for
# is said at each call.
TPU_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # loaded before any fork
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def restart_with_allocator(module: str) -> None:
    """Starts the command line once more, with ALLOCATOR; does nothing in an imported module.

    module: the caller's `__name__`. A command calls this before it imports what takes seconds to
    load and would otherwise be loaded twice.
    """
    if module != "__main__" or sys.platform != "linux" or "MALLOC_MMAP_MAX_" in os.environ:
        return
    if not any(map(os.path.exists, ACCELERATORS)):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def return_free_memory() -> None:
    """Gives memory that was freed back to the system, where glibc keeps it; elsewhere does nothing.

    A compiler leaves much of it, in pieces that no large array fits into.
    """
    trim = getattr(LIBC, "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def stop_with_parent() -> None:
    """Sends this process SIGTERM when the one that started it ends, however that ends; on Linux.

    Called between fork and exec: a run of a sweep that was killed saves itself, and is not at work
    beside the one that the sweep's next start makes.
    """
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def set_up(cpu_devices: int) -> None:
    """Sets the number of host devices and the folder of compiled programs, before jax is used.

    cpu_devices: for a machine without an accelerator. JAX_COMPILATION_CACHE_DIR chooses another
    folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none. Raises UserError below one device.
    """
    import jax

    if cpu_devices < 1:
        raise UserError(f"config.cpu_devices={cpu_devices} must be at least 1")
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def without_accelerator() -> None:
    """Keeps jax to host devices, and libtpu from looking for chips, before jax is used.

    For work that only compiles for chips that are not there.
    """
    import jax

    os.environ |= TPU_COMPILER
    jax.config.update("jax_platforms", "cpu")


def compiled_folder() -> pathlib.Path:
    """Returns the folder of compiled programs for this kind of processor.

    Kinds have folders of their own, since machines of several kinds may share a home.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = "".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        kind = platform.processor()
    digest = hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
    return cache_folder() / f"compiled-{digest}"


def code() -> str:
    """Returns a hash of this package's modules."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def machine() -> dict[str, str]:
    """Returns what stands beside a measured figure: date, processor, devices, versions."""
    import jax

    try:
        with open("/proc/cpuinfo") as lines:
            processor = next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{os.cpu_count()} cores of {processor}",
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


STOPPED = 75  # exit status of a command that was asked to stop: the same command goes on


class GracefulStop:
    """Handles SIGTERM and Ctrl-C: exits at once with status STOPPED, or after the step that runs.

    Inside `with stop:` a signal only sets `requested`, and the block asks for it.
    """

    def __init__(self):
        self.requested = self._in_block = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._in_block:
            sys.exit(STOPPED)

    def __enter__(self) -> "GracefulStop":
        self._in_block = True
        return self

    def __exit__(self, *_: object) -> None:
        self._in_block = False

    def exit(self, message: str) -> NoReturn:
        """Ends the process as was asked, after a line that says what is saved."""
        print(message)
        sys.exit(STOPPED)
