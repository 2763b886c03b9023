"""The server's promises at full size, on this machine.

`python -m collab_jax.bench serve [--requests 10000] [--clients 16] [--seed 0]`

Serves the embedded model at a port of the loopback interface, with `faults.py` as its cloud, and
sends it the requests of `fuzz.py`: a third as they should be, a third mangled, a third cut. No
response is an error of the server, each text comes under the name of the model that wrote it, every
slot is free afterwards, and nothing is bought twice: the ledger, what clients were told, and what
the provider has counted are the same sum. A promise that does not hold is an error.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import runpy
import socket
import tempfile
import threading
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from collab_jax.bench import fuzz
from collab_jax.bench.faults import USAGE, FaultServer
from collab_jax.runtime.errors import UserError
from collab_jax.serve.__main__ import CONFIG, make_service
from collab_jax.serve.answer import Service
from collab_jax.serve.api import Api

PRICES = (1.0, 2.0)  # USD per million tokens
PRICE = (USAGE["prompt_tokens"] * PRICES[0] + USAGE["completion_tokens"] * PRICES[1]) / 1e6
READY_SECONDS = 600.0


def make_config(url: str) -> ConfigDict:
    """The embedded model's config, with the cloud at `url`."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.cloud.update(
        kind="openai",
        model="big",
        base_url=url,
        key_env="",
        prices=(("big", *PRICES),),
        parameters=ConfigDict({"max_tokens": 50}),
    )
    return config.lock()


@contextlib.contextmanager
def served(service: Service) -> Iterator[tuple[Api, tuple[str, int]]]:
    """(the application, its address) while it is served in a thread."""
    import uvicorn

    api = Api(service, "")
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield api, listening.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def run_serve_bench(argv: list[str]) -> int:
    """Runs it as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench serve", description="Checks the server's promises."
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ["NO_PROXY"] = "127.0.0.1"
    logging.getLogger("collab_jax").setLevel(logging.ERROR)
    answer = lambda content: f"{fuzz.CLOUD} {len(content)} characters"  # noqa: E731
    with (
        tempfile.TemporaryDirectory() as name,
        FaultServer(answer, delay=0.02) as provider,
    ):
        service = make_service(make_config(provider.url), pathlib.Path(name))
        if not service.engine.ready.wait(READY_SECONDS):
            raise UserError(f"the engine is not ready: {service.engine.broken or 'too slow'}")
        with served(service) as (api, address):
            api.telemetry = books = fuzz.Books()
            models = {service.model: False, service.upstream.model: True}
            begin = time.monotonic()
            requests = list(fuzz.cases(args.requests, args.seed))
            seen = fuzz.fuzz(address, models, requests, args.clients)
            seconds = time.monotonic() - begin
            faults = fuzz.verdict(api, books, provider, PRICE, seen)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(fuzz.statuses(seen).items()))
    bought = provider.whole.total()
    print(
        f"serve: {len(seen):,} requests in {seconds:.0f} s: {counts}; {bought} answers bought for "
        f"{bought * PRICE:.6f} USD; {fuzz.ended(provider)} calls ended, whose clients had left"
    )
    if faults:
        raise UserError(f"this does not hold: {faults[0]} ({len(faults)} faults)")
    return 0
