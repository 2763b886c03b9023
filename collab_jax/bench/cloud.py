"""The cloud's promises at full size, on this machine.

`python -m collab_jax.bench cloud [--only store faults outage kills budget training]`

    store      look-ups a second, one by one and by hundreds, in a store of up to a million answers
    faults     500 prompts, 64 calls in flight; 30 % of the requests fail, a sixth of those by a
               stall of 20 s
    outage     500 prompts, 16 calls in flight, five retries; every request fails for 3 s
    kills      500 prompts whose buyer is killed at 20 random moments and started again
    budget     64 workers against max_calls=100
    training   50 steps of a small run: prefetched behind the faults, without prefetch, resumed,
               and beside a healthy server

The server is `faults.py` on the loopback interface. A promise that does not hold is an error.
"""

import argparse
import logging
import os
import pathlib
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import numpy as np

from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import CachedCloud, Policy, Reply, Store, ledger
from collab_jax.cloud.openai import OpenAICloud
from collab_jax.models.text import Messages
from collab_jax.rl import experiment, prompt_order, rollout, training
from collab_jax.runtime import metrics, process
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import countdown

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "countdown_tiny.py"
PROMPTS_PER_STEP, CHECKPOINT_EVERY = 8, 10  # of the part "training"
QUICK_FAULTS = ("429", "500", "reset", "truncated", "empty")  # those that no time-out has to end


def hold(holds: bool, promise: str) -> None:
    """Raises UserError where `promise` does not hold."""
    if not holds:
        raise UserError(f"this does not hold: {promise}")


def make_prompts(first: int, end: int) -> list[Messages]:
    """Returns end - first different prompts."""
    return [[{"role": "user", "content": f"What is {i} + {i}?"}] for i in range(first, end)]


def make_client(
    url: str,
    path: pathlib.Path,
    workers: int,
    *,
    seconds: float = 60.0,
    retries: int = 20,
    max_calls: int | None = None,
) -> CachedCloud:
    """Returns a cloud at a bench's server, with its store at `path`.

    seconds: of a call, at most.
    """
    cloud = OpenAICloud(
        model="m",
        parameters={"max_tokens": 50},
        base_url=url,
        key_env="",
        prices=(1.0, 2.0),
        timeouts=(10.0, seconds, seconds),
        workers=workers,
        provider="bench",  # each start of the server has another address
    )
    return CachedCloud(cloud, Store(path), Policy(retries=retries, max_calls=max_calls))


def store(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Measures look-ups as the file grows to args.rows answers."""
    answers, reply = Store(folder / "store.sqlite"), Reply("x" * 400, 100, 100, 5.0, 0.001)
    draw, start = random.Random(0), time.perf_counter()
    keys: list[str] = []
    for size in (args.rows // 100, args.rows // 10, args.rows):
        for first in range(len(keys), size, 5000):
            new = make_prompts(first, min(first + 5000, size))
            keys += answers.put_many("m", {}, [(messages, reply) for messages in new])
        filled = time.perf_counter() - start
        one_by_one, by_500 = (look_ups(answers, draw.choices(keys, k=20_000), n) for n in (1, 500))
        mib = answers.path.stat().st_size / 2**20
        print(
            f"store of {size:9,} answers ({mib:6.0f} MiB, {filled:5.0f} s): {one_by_one:7,.0f} "
            f"look-ups/s one by one, {by_500:7,.0f} by 500"
        )
    begin = time.perf_counter()
    hold(ledger(answers).calls == args.rows, "every answer is in the ledger")
    print(f"ledger over all of them: {time.perf_counter() - begin:.1f} s")


def look_ups(answers: Store, keys: list[str], batch: int) -> float:
    """Returns look-ups a second of stored keys, `batch` at a time."""
    begin = time.perf_counter()
    for i in range(0, len(keys), batch):
        sought = keys[i : i + batch]
        hold(len(answers.get_many(sought)) == len(set(sought)), "what was stored is found")
    return len(keys) / (time.perf_counter() - begin)


def faults(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Checks that nothing is bought twice behind faults."""
    count = args.prompts
    with FaultServer(str.upper, share=0.3) as server:
        start = time.perf_counter()
        client = make_client(server.url, folder / "faults.sqlite", 64, seconds=10.0)
        answers = client.answer(make_prompts(0, count))
        seconds = time.perf_counter() - start
        hold(
            answers.bought == count and None not in answers.replies,
            "every prompt is answered behind faults",
        )
        hold(set(server.whole.values()) == {1}, "no reply that was sent whole is bought twice")
        print(
            f"faults: {count} answers for {server.requests} requests in {seconds:.1f} s; "
            f"{dict(server.met)}"
        )


def outage(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Checks that an outage of three seconds costs no answer."""
    count = args.prompts
    with FaultServer(str.upper, share=1.0, faults=("500",)) as server:
        client = make_client(server.url, folder / "outage.sqlite", 16, retries=5)
        threading.Timer(3.0, setattr, (server, "share", 0.0)).start()
        start = time.perf_counter()
        answers = client.answer(make_prompts(0, count))
        seconds = time.perf_counter() - start
        hold(answers.bought == count, "an outage of 3 s costs no answer")
        hold(set(server.whole.values()) == {1}, "no reply that was sent whole is bought twice")
        print(f"outage: {count} answers for {server.requests} requests in {seconds:.1f} s")


def kills(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Checks that a killed buyer loses at most what was in flight."""
    draw, count, workers = random.Random(0), args.prompts, 16
    with FaultServer(str.upper, share=0.3, faults=QUICK_FAULTS, delay=0.05) as server:
        command = [sys.executable, "-m", "collab_jax.bench", "cloud", "--buy", server.url]
        command += [str(folder / "kills.sqlite"), str(count), str(workers)]
        for _ in range(args.kills):
            child, before = subprocess.Popen(command), server.requests
            while server.requests == before and child.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.6))
            child.kill()
            child.wait()
        done = subprocess.run(command, timeout=300)
        hold(done.returncode == 0, "the last start answers everything")
        whole, allowed = server.whole.total(), count + args.kills * workers
        hold(
            len(server.whole) == count and whole <= allowed,
            "a kill loses no more than the calls in flight",
        )
        print(
            f"kills: {args.kills} kills; {count} answers, {whole} replies sent whole (allowed "
            f"{allowed})"
        )


def buy(url: str, path: str, count: str, workers: str) -> int:
    """Buys the answers to `count` prompts, as the process that `kills` kills; returns 0 if all."""
    client = make_client(url, pathlib.Path(path), int(workers))
    return int(None in client.answer(make_prompts(0, int(count))).replies)


def budget(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Checks that the server sees no request too many."""
    with FaultServer(str.upper, share=0.3, faults=("429", "500", "truncated", "empty")) as server:
        client = make_client(server.url, folder / "budget.sqlite", 64, max_calls=100)
        answers = client.answer(make_prompts(0, args.prompts))
        hold(server.requests <= 100, "64 workers stay within max_calls=100")
        print(
            f"budget: 64 workers, max_calls=100: {server.requests} requests, {answers.bought} "
            "answers"
        )


def solve(content: str) -> str:
    """Returns a right answer to a Countdown prompt."""
    return countdown.solve_prompt([{"role": "user", "content": content}])


def prepare_run(
    server: FaultServer, workdir: pathlib.Path, steps: int, **cloud: Any
) -> experiment.Run:
    """Returns a small run of CONFIG whose cloud is `server`, with these settings of the cloud."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    sizes = {"prompts_per_step": PROMPTS_PER_STEP, "group": 4, "eval.prompts": 0}
    times = {"train.steps": steps, "train.checkpoint_every": CHECKPOINT_EVERY}
    config.update_from_flattened_dict(sizes | times)
    config.cloud.update(
        kind="openai",
        model="deepseek-reasoner",
        base_url=server.url,
        key_env="",
        retries=20,
        timeouts=(10.0, 10.0, 10.0),
        concurrency=32,
    )
    config.cloud.update(cloud)
    return experiment.prepare(config.lock(), workdir)


def same_state(a: experiment.Run, b: experiment.Run) -> bool:
    """Returns whether the latest states of two runs are equal, bit for bit."""
    leaves = (jax.tree.leaves(experiment.load_state(run)) for run in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def training_behind_faults(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Behind faults, the state is that of a run with a healthy server, or the resume is exact."""
    process.set_up(2)
    steps = args.steps
    with FaultServer(solve) as server:
        healthy = prepare_run(server, folder / "healthy", steps)
        training.train(healthy)
    with FaultServer(solve, share=0.3) as server:
        run = prepare_run(server, folder / "prefetched", steps)
        examples = experiment.examples(run, "train")
        used = prompt_order.chooser(run, examples)(0, PROMPTS_PER_STEP * steps)
        prompts, ids = rollout.cloud_prompts(run.task, [examples[i] for i in used])
        hold(None not in run.cloud.answer(prompts, ids).replies, "prefetch completes")
        training.train(run)
        hold(
            same_state(run, healthy),
            "prefetched behind faults, the parameters are those of a healthy server",
        )
        hold(set(server.whole.values()) == {1}, "no reply that was sent whole is bought twice")
        print(
            f"training: {steps} steps, prefetched behind faults: the same parameters, bit for bit"
        )
    with FaultServer(solve, share=0.3) as server:
        straight = prepare_run(server, folder / "straight", steps, wait=0.2, retries=1)
        training.train(straight)
        rows = metrics.read(folder / "straight" / "metrics.jsonl")
        missing = sum(row["cloud_unknown"] for row in rows)
        shutil.copytree(folder / "straight", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / str(steps))
        resumed = prepare_run(server, folder / "resumed", steps, wait=0.2, retries=1)
        training.train(resumed)
        hold(
            same_state(resumed, straight),
            "without prefetch, the resumed run is the straight one",
        )
        print(
            f"training: without prefetch {missing} verdicts were unknown; "
            f"resumed at {steps - CHECKPOINT_EVERY}: the same, bit for bit"
        )


PARTS = {
    "store": store,
    "faults": faults,
    "outage": outage,
    "kills": kills,
    "budget": budget,
    "training": training_behind_faults,
}


def run_cloud_bench(argv: list[str]) -> int:
    """Runs the parts that the command line names; returns the exit status."""
    logging.getLogger("collab_jax").setLevel(logging.ERROR)  # failed calls are the exercise
    if argv[:1] == ["--buy"]:
        _, url, path, count, workers = argv
        return buy(url, path, count, workers)
    parser = argparse.ArgumentParser(
        prog="python -m collab_jax.bench cloud", description="Checks the cloud's promises."
    )
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rows", type=int, default=1_000_000, help="answers in the store")
    parser.add_argument("--prompts", type=int, default=500, help="of every part but training")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of training")
    args = parser.parse_args(argv)
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in args.only:
            PARTS[part](folder, args)
    return 0
