"""A load that others have written: guidellm's, on our server, beside that of our own clients.

guidellm (a package of the package index) measures servers that speak OpenAI's API. It runs by
itself, from an environment of its own, since it brings torch. What it says of the same server at
the same load shows whether our own clients measure what they claim. At its end it does not wait, as
ours do, for the last responses; the tokens that it has seen of them count.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from collab_jax.bench import load, measure, served, throughput
from collab_jax.bench.load import Plan
from collab_jax.bench.served import Server
from collab_jax.bench.throughput import Question
from collab_jax.runtime import markdown
from collab_jax.runtime.errors import UserError

START_SECONDS = 600.0  # on top of its own seconds: it imports torch, and starts workers
HEADER = ("clients", "program", "answered", "tokens/s", "first token ms p50", "p95")


def compare(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Measures the embedded model's server by both programs, round by round; prints a table.

    Returns every figure. Raises UserError where a request has failed; where guidellm is not there,
    says so and measures nothing.
    """
    if not shutil.which(args.guidellm):
        print(f"without guidellm: --guidellm={args.guidellm} is not there", file=sys.stderr)
        return []
    data = scratch / "questions.jsonl"
    prompts = throughput.contents(questions)
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    everything = []
    slots = f"--config.serve.slots={max(args.clients)}"
    with served.ours(scratch, slots) as server:
        requests = throughput.bodies(prompts, **server.fields)
        for clients in args.clients:
            plan = Plan(server.address, requests, clients, args.seconds)
            load.run(plan._replace(count=clients))  # to settle
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "guidellm": []}
            for _ in range(args.rounds):
                found["ours"].append(of_ours(throughput.figures(load.run(plan))))
                report = run(args.guidellm, server, data, clients, args.seconds)
                found["guidellm"].append(of_guidellm(report))
            everything += [
                {"clients": clients, "program": name, "rounds": rounds}
                for name, rounds in found.items()
            ]
    print(markdown.table(HEADER, [row(one) for one in everything]), flush=True)
    if failed := sum(r["failed"] for one in everything for r in one["rounds"]):
        raise UserError(f"{failed} requests had no whole answer")
    return everything


def run(
    program: str, server: Server, data: pathlib.Path, clients: int, seconds: float
) -> dict[str, Any]:
    """Returns guidellm's own report of so many clients for so many seconds.

    Raises UserError, with its last line, where it fails.
    """
    host, port = server.address
    target, report = f"http://{host}:{port}", data.with_name("report.json")
    model, limit = server.fields["model"], throughput.LIMIT
    backend = f"kind=openai_http,target={target},model={model},max_tokens={limit}"
    command = [program, "run", "--disable-console"]
    command += ["--backend", f"{backend},request_format=/v1/chat/completions"]
    command += ["--profile", f"kind=concurrent,streams={clients}"]
    command += ["--constraint", f"kind=max_duration,seconds={seconds:g}"]
    command += ["--data", f"kind=json_file,path={data}"]
    command += ["--output", f"kind=json,path={report}"]
    report.unlink(missing_ok=True)  # of the round before
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + START_SECONDS, env=offline
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{program} did not end") from None
    if done.returncode or not report.exists():
        said = (done.stdout + done.stderr).strip().splitlines() or ["no word"]
        raise UserError(f"{program} failed: {said[-1]}")
    return json.loads(report.read_text())


def of_guidellm(report: dict[str, Any]) -> dict[str, float]:
    """The figures of guidellm's report. Times are in seconds, as everywhere."""
    [benchmark] = report["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    first = metrics["time_to_first_token_ms"]["successful"]["percentiles"]
    tokens = metrics["output_token_count"]["total"]["total_sum"]
    return {
        "answered": totals["successful"],
        "failed": totals["errored"],  # those that its end cut off are none
        "tokens_per_s": tokens / benchmark["duration"],
        "first_token_p50": first["p50"] / 1000,
        "first_token_p95": first["p95"] / 1000,
    }


def of_ours(figures: throughput.Figures) -> dict[str, float]:
    """The same figures of our clients."""
    return {
        "answered": len(figures.first),
        "failed": figures.failed,
        "tokens_per_s": figures.tokens_per_s,
        "first_token_p50": throughput.quantile(figures.first, 0.5),
        "first_token_p95": throughput.quantile(figures.first, 0.95),
    }


def row(one: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table with HEADER: medians of the rounds, and all that was answered."""
    median = lambda name: statistics.median(r[name] for r in one["rounds"])  # noqa: E731
    return (
        str(one["clients"]),
        one["program"],
        f"{sum(r['answered'] for r in one['rounds']):,}",
        measure.number(median("tokens_per_s")),
        throughput.ms(median("first_token_p50")),
        throughput.ms(median("first_token_p95")),
    )
