"""A server's load figures and promises at full size, on this machine.

    python -m collab_jax.bench serve
        [--only load guidellm fairness overload dead_cloud rate fuzz]

    load        tokens/s, time to the first token and between arrivals at 1, 8 and 32 clients, in
                turn with `transformers serve` and llama.cpp's server where they are (`throughput`)
    guidellm    the same server and load measured by guidellm, where it is, and by our clients in
                turn (`outside`)
    fairness    waits of equal requests, and what one of 1,024 tokens costs the others
    overload    four times as many requests as can be answered, for a minute
    dead_cloud  64 clients, and a cloud that refuses or never answers
    rate        the share of calls in 2,000 requests at four targets, also where the mix changes
    fuzz        10,000 requests: a third as they should be, a third mangled, a third cut

All but the last start servers in processes of their own (`served.py`), asked by clients in another
(`load.py`), and are in `promises.py`. The fuzzed requests go to the embedded model's server with
`faults.py` as its cloud: no response is an error of the server, each text comes under the name of
the model that wrote it, every slot is free afterwards, and nothing is bought twice: the ledger,
what clients were told, and what the provider has counted are the same sum. A promise that does not
hold is an error.
"""

import argparse
import contextlib
import json
import logging
import os
import pathlib
import runpy
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from collab_jax.bench import fuzz, outside, promises, served, throughput
from collab_jax.bench.faults import USAGE, FaultServer
from collab_jax.bench.throughput import Question
from collab_jax.runtime import process
from collab_jax.runtime.errors import UserError
from collab_jax.serve.__main__ import CONFIG, make_service
from collab_jax.serve.answer import Service
from collab_jax.serve.api import Api
from collab_jax.tasks import make_task

PRICES = (1.0, 2.0)  # USD per million tokens
PRICE = (USAGE["prompt_tokens"] * PRICES[0] + USAGE["completion_tokens"] * PRICES[1]) / 1e6
READY_SECONDS = 600.0
FUZZ_CLIENTS = 16  # requests at a time


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
def in_thread(service: Service) -> Iterator[tuple[Api, tuple[str, int]]]:
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


def fuzzed(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Checks that the server tells the truth to odd clients; returns counts of responses."""
    answer = lambda content: f"{fuzz.CLOUD} {len(content)} characters"  # noqa: E731
    with FaultServer(answer, delay=0.02) as provider:
        service = make_service(make_config(provider.url), scratch / "fuzz")
        if not service.engine.ready.wait(READY_SECONDS):
            raise UserError(f"the engine is not ready: {service.engine.broken or 'too slow'}")
        with in_thread(service) as (api, address):
            api.telemetry = books = fuzz.Books()
            models = {service.model: False, service.upstream.model: True}
            begin = time.monotonic()
            requests = list(fuzz.cases(args.requests, args.seed))
            seen = fuzz.fuzz(address, models, requests, FUZZ_CLIENTS)
            seconds = time.monotonic() - begin
            faults = fuzz.verdict(api, books, provider, PRICE, seen)
    found, bought = fuzz.statuses(seen), provider.whole.total()
    counts = ", ".join(f"{n} {status}" for status, n in sorted(found.items()))
    print(
        f"fuzz: {len(seen):,} requests in {seconds:.0f} s: {counts}; {bought} answers bought for "
        f"{bought * PRICE:.6f} USD; {fuzz.ended(provider)} calls ended, whose clients had left"
    )
    if faults:
        raise UserError(f"this does not hold: {faults[0]} ({len(faults)} faults)")
    return {"seconds": seconds, "statuses": found, "bought": bought}


PARTS = {
    "load": throughput.compare,
    "guidellm": outside.compare,
    "fairness": promises.fairness,
    "overload": promises.overload,
    "dead_cloud": promises.dead_cloud,
    "rate": promises.rate,
    "fuzz": fuzzed,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench serve",
        description="Measures a server, and checks its promises.",
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", type=pathlib.Path, help="file for every figure")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of load, guidellm and fairness, a turn"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of load and guidellm, all in turn")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 32], help="of load and guidellm"
    )
    parser.add_argument(
        "--shapes", nargs="+", default=list(served.SHAPES), choices=served.SHAPES, help="of load"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter with transformers[serving] and torch"
    )
    parser.add_argument("--llama_server", default="llama-server", help="llama.cpp's program")
    parser.add_argument("--guidellm", default="guidellm", help="the load generator's program")
    parser.add_argument("--overload_seconds", type=float, default=60.0)
    parser.add_argument("--queries", type=int, default=2000, help="of rate, at each target")
    parser.add_argument("--requests", type=int, default=10_000, help="of fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz")
    return parser.parse_args(argv)


def ask_countdown() -> list[Question]:
    """Returns the validation problems of the embedded model's task."""
    task = make_task(runpy.run_path(str(CONFIG))["get_config"]())
    return [
        Question(task.prompt(example)[-1]["content"], example.stratum)
        for example in task.load("validation")
    ]


def run_serve_bench(argv: list[str]) -> int:
    """Runs the parts that the command line names; returns the exit status."""
    args = parse(argv)
    os.environ["NO_PROXY"] = served.HOST
    logging.getLogger("collab_jax").setLevel(logging.ERROR)
    questions, figures = ask_countdown(), {}
    with tempfile.TemporaryDirectory() as name:
        for part in args.only:
            scratch = pathlib.Path(name) / part
            scratch.mkdir()
            figures[part] = PARTS[part](args, questions, scratch)
            shutil.rmtree(scratch)
    if args.json:
        report = {"argv": argv, "machine": process.machine(), "figures": figures}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0
