"""Two host devices for every test, and programs that are compiled fast and kept between the
processes of one test session (pytest-xdist's workers and the commands that tests start).
"""

import os
import pathlib
import runpy
import shutil
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "prompts_per_step": 8,
    "group": 4,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    "eval.prompts": 24,
    "eval.batch_size": 16,
    "task.train_examples": 64,
    "task.test_examples": 32,
    "sft.batch_size": 8,
    "sft.steps": 2,
    "sft.check_prompts": 0,
    "decode.slot_counts": 2,  # fewer programs to compile
    "decode.segments": 1,
}

_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it has the environment of what started it
if not _WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="collab_jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what small tests take
os.environ["OMP_NUM_THREADS"] = "1"  # scikit-learn's threads wait for each other on busy cores

import jax  # noqa: E402

from collab_jax.models import published  # noqa: E402
from collab_jax.runtime.errors import UserError  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")


def pytest_sessionfinish():
    if not _WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Each compiled program is mapped into memory piece by piece, and Linux allows a process 65,530
    maps: the programs of the whole suite would exceed them, and LLVM aborts the process then.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where the tests' small data sets are built once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def small(data_dir):
    """small(file, **overrides): a config from configs/, shrunk to run in seconds; dots in keys are
    written __.
    """

    def make(file="countdown_tiny.py", **overrides):
        config = runpy.run_path(str(ROOT / "configs" / file))["get_config"]()
        config.update_from_flattened_dict(SMALL | {"task.data_dir": str(data_dir)})
        config.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in overrides.items()}
        )
        return config.lock()

    return make


@pytest.fixture(scope="session")
def smollm2_file():
    """The GGUF file of SmolLM2; where its package is absent the test is skipped."""
    try:
        return published.packaged_file("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(provider, margins, **changes): a running server; all end with the test."""
    from serving import starter  # it imports what few tests need

    from collab_jax.cloud import attempts

    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with starter(tmp_path) as start:
        yield start
