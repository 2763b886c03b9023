"""Servers in processes of their own, with the same model: ours, and the peers that are there.

A peer is `transformers serve --continuous-batching`, from an interpreter that has
`transformers[serving]` and torch, or llama.cpp's `llama-server`. All compute in float32 and answer
OpenAI's chat completions.
"""

import contextlib
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax.bench import work
from collab_jax.models import gguf_export, hf
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import Params
from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError
from collab_jax.serve.__main__ import BUNDLED, CONFIG, KEY_ENV

HOST = "127.0.0.1"
START_SECONDS = 900.0  # until a server is ready; ours compiles first
STOP_SECONDS = 60.0
EMBEDDED = "embedded"
SHAPES = (EMBEDDED, "25m", "smollm2-135m")
OPERATOR_KEY = "bench"  # of servers on the loopback interface that live for minutes
RECITED = "7"  # what a model without training writes, token by token
BLOCK, BATCH_TOKENS = 32, 256  # tokens, of a page of transformers' cache and of one pass
GGUF = "model.gguf"  # in a model's folder
# Tells whether an interpreter can run the peer.
PROBE = "import torch, fastapi, uvicorn, transformers; print(transformers.__version__)"
TRANSFORMERS = "import sys; from transformers.cli.transformers import main; sys.exit(main())"


class Server(NamedTuple):
    """A server that is ready.

    fields: what its requests have beside messages. keeps: its connections, for another request.
    """

    name: str
    address: tuple[str, int]
    fields: dict[str, Any]
    process: subprocess.Popen[bytes]
    keeps: bool = True

    def pause(self) -> None:
        """Stops it, so that it takes nothing from another that is measured."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undoes `pause`."""
        self.process.send_signal(signal.SIGCONT)

    def memory(self) -> float:
        """Its resident set in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    ready: str,
    fields: dict[str, Any],
    log: pathlib.Path,
    keeps: bool = True,
) -> Iterator[Server]:
    """A server while its process runs. ready: the path that answers 200 once it can be asked.

    Raises UserError, with the last line of its log, where it ends or takes too long.
    """
    # As when started by hand: the allocator's settings are ours, which our server makes itself.
    plain = {key: value for key, value in os.environ.items() if key not in process.ALLOCATOR}
    environment = plain | {KEY_ENV: OPERATOR_KEY, "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(name, (HOST, port), fields, child, keeps)
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(f"http://{HOST}:{port}{ready}"):
            if child.poll() is not None or time.monotonic() > end:
                last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
                raise UserError(f"{name} did not start: {last}")
            time.sleep(0.2)
        yield server
    finally:
        server.go_on()
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server((HOST, 0)) as listening:
        return listening.getsockname()[1]


# ------------------------------------------------------------------------------------ the servers


def ours(
    scratch: pathlib.Path, *settings: str, model: pathlib.Path | None = None
) -> contextlib.AbstractContextManager[Server]:
    """Our server of a model's folder, or of the embedded model.

    settings: arguments `--config.KEY=VALUE`. scratch: a folder for the log and a new workdir.
    """
    port = free_port()
    command = [sys.executable, "-m", "collab_jax.serve", "--config", str(CONFIG)]
    command += ["--model", str(model) if model else BUNDLED, "--port", str(port)]
    command += ["--workdir", str(scratch / f"work-{port}"), *settings]
    fields = {"model": "collab-device"}
    return started("ours", command, port, "/ready", fields, scratch / f"ours-{port}.log")


def transformers(
    python: str, model: pathlib.Path, scratch: pathlib.Path, slots: int, columns: int
) -> contextlib.AbstractContextManager[Server]:
    """`transformers serve` of a model's folder, by an interpreter that has it.

    Its cache is that of so many slots and columns: left alone it takes most of the memory.
    """
    port, name = free_port(), "transformers"
    blocks = -(-slots * columns // BLOCK)
    command = [python, "-c", TRANSFORMERS, "serve", str(model), "--continuous-batching"]
    command += ["--cb-block-size", str(BLOCK), "--cb-num-blocks", str(blocks)]
    command += ["--cb-max-batch-tokens", str(BATCH_TOKENS)]
    command += ["--device", "cpu", "--dtype", "float32", "--host", HOST, "--port", str(port)]
    fields = {"model": str(model)}
    return started(name, command, port, "/health", fields, scratch / f"{name}-{port}.log")


def llama(
    binary: str, model: pathlib.Path, scratch: pathlib.Path, slots: int, columns: int
) -> contextlib.AbstractContextManager[Server]:
    """llama.cpp's server of the GGUF file in a model's folder, with slots of so many columns."""
    port, name = free_port(), "llama.cpp"
    command = [binary, "--model", str(model / GGUF), "--host", HOST, "--port", str(port)]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * columns)]
    command += ["--threads", str(os.cpu_count()), "--cache-type-k", "f32", "--cache-type-v", "f32"]
    fields, log = {"model": name}, scratch / f"{name}-{port}.log"
    # It says that it keeps connections, and closes them after each stream.
    return started(name, command, port, "/health", fields, log, keeps=False)


def why_no_transformers(python: str) -> str:
    """Why an interpreter cannot run `transformers serve`; "": it can."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    except OSError as error:
        return f"--python={python}: {error.strerror}"
    if done.returncode:
        return f"{python}: {done.stderr.strip().splitlines()[-1]}"
    return ""


def why_no_llama(binary: str) -> str:
    """Why llama.cpp's server cannot be run; "": it can."""
    return "" if shutil.which(binary) else f"--llama_server={binary} is not there"


# ------------------------------------------------------------------------------------- the models


def write_model(shape: str, folder: pathlib.Path) -> None:
    """Writes a model for all servers: a Hugging Face folder with a GGUF file in it.

    shape: of SHAPES. The embedded model is the trained one, and ends where it wants to. The others
    recite one token, to the limit of every request, and have the embedded one's tokenizer.
    """
    embedded = hf.locate(BUNDLED)
    text = text_lib.load(embedded, runpy.run_path(str(CONFIG))["get_config"]().text)
    if shape == EMBEDDED:
        hf_config = hf.read_config(embedded)
        cfg = hf.config_from_hf(hf_config)
        params = hf.load(embedded, cfg, "float32")
    else:
        load = work.Load(shape, "long_tail", 1, 1, 1, 1, "float32", 1)  # its head is not tied
        hf_config = work.hf_config(load)
        cfg = hf.config_from_hf(hf_config)
        [token] = text.tokenizer.encode(RECITED, add_special_tokens=False)
        params = reciter(work.random_params(cfg, "float32"), token)
    hf.save(folder, params, hf_config, "float32", embedded)
    if shape == EMBEDDED:
        hf.save_generation_config(folder, text.eos_ids, text.pad_id)
    gguf_export.write(folder / GGUF, params, cfg, hf_config, text, kind="f32", name=shape)


def reciter(params: Params, token: int) -> Params:
    """`params` as those of a model that writes `token`, whatever it reads.

    The first column of the residual stream is large for every token, and only `token` listens.
    """
    params = work.without_blocks(params)
    embedding = params["embed_tokens"]["embedding"].copy()
    embedding[:, 0] = 1.0
    head = np.zeros_like(params["lm_head"]["kernel"])
    head[0, token] = 1.0
    return {**params, "embed_tokens": {"embedding": embedding}, "lm_head": {"kernel": head}}
