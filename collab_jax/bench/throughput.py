"""How fast a server answers, ours and its peers', by the same clients in turn."""

import argparse
import contextlib
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax.bench import load, measure, served
from collab_jax.bench.load import Plan, Report
from collab_jax.bench.served import Server
from collab_jax.runtime import markdown

LIMIT = 96  # tokens of a response, at most: what the embedded model was trained for
COLUMNS = 136  # of a peer's slot: a prompt and a response, and some that its template may add
HEADER = (
    "model",
    "clients",
    "server",
    "tokens/s",
    "ours, times as many (quartiles)",
    "first token ms p50",
    "p95",
    "between arrivals ms p95",
    "clients' share of a core",
)


class Question(NamedTuple):
    """What is asked, in one message, and how hard it is: the stratum of its example."""

    content: str
    stratum: str


class Figures(NamedTuple):
    """What reports of clients say: true tokens a second, and times in seconds.

    first: until the first text of each response. gaps: between two arrivals of text. busy: the
    clients' share of a core. failed: requests that had no whole answer.
    """

    tokens_per_s: float
    first: list[float]
    gaps: list[float]
    busy: float
    failed: int


def figures(report: Report) -> Figures:
    """The figures of a report."""
    good = [one for one in report.seen if one.status == 200 and not one.problem]
    return Figures(
        tokens_per_s=sum(one.tokens for one in good) / report.seconds,
        first=[one.arrivals[0] for one in good if one.arrivals],
        gaps=[float(gap) for one in good for gap in np.diff(one.arrivals)],
        busy=report.busy,
        failed=len(report.seen) - len(good),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile; NaN of nothing."""
    return float(np.quantile(values, share)) if values else float("nan")


def ms(seconds: float) -> str:
    """Seconds as milliseconds in words."""
    return f"{1000 * seconds:,.1f}"


def contents(questions: Sequence[Question]) -> list[str]:
    """The messages alone."""
    return [question.content for question in questions]


def bodies(prompts: Sequence[str], **fields: Any) -> list[dict[str, Any]]:
    """Streamed chat requests of one message each, with these fields."""
    common = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    common |= {"max_tokens": LIMIT, **fields}
    return [{"messages": [{"role": "user", "content": p}], **common} for p in prompts]


def compare(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Measures each model of `args.shapes` at each number of clients; prints a table.

    Returns every figure, a list of one for each model, number of clients and server.
    """
    rows, everything, prompts = [], [], contents(questions)
    for shape in args.shapes:
        with servers(args, shape, scratch) as there:
            for clients in args.clients:
                rounds = measured(there, prompts, clients, args.seconds, args.rounds)
                for server in there:
                    figures_of = summary(rounds, server.name)
                    name = {"model": shape, "clients": clients, "server": server.name}
                    everything.append(name | figures_of)
                    rows.append(row(everything[-1]))
    print(markdown.table(HEADER, rows), flush=True)
    if failed := sum(one["failed"] for one in everything):
        print(f"{failed} requests had no whole answer; --json has them by server")
    return everything


@contextlib.contextmanager
def servers(args: argparse.Namespace, shape: str, scratch: pathlib.Path) -> Iterator[list[Server]]:
    """Ours and the peers that are there, ready and paused, with a model of a shape."""
    folder = scratch / shape
    served.write_model(shape, folder)
    there, slots = [], max(args.clients)
    candidates = (
        ("ours", "", served.ours(scratch, f"--config.serve.slots={slots}", model=folder)),
        (
            "transformers",
            served.why_no_transformers(args.python),
            served.transformers(args.python, folder, scratch, slots, COLUMNS),
        ),
        (
            "llama.cpp",
            served.why_no_llama(args.llama_server),
            served.llama(args.llama_server, folder, scratch, slots, COLUMNS),
        ),
    )
    with contextlib.ExitStack() as stack:
        for name, why, server in candidates:  # entered, it starts
            if why:
                print(f"{shape}: without {name}: {why}", file=sys.stderr)
                continue
            there.append(stack.enter_context(server))
            there[-1].pause()
        yield there


def measured(
    there: Sequence[Server], prompts: Sequence[str], clients: int, seconds: float, rounds: int
) -> dict[str, list[Figures]]:
    """The figures of each round by server: all are asked in turn, and run in their turn alone."""
    found: dict[str, list[Figures]] = {server.name: [] for server in there}
    for number in range(rounds + 1):  # the first one is to settle
        for server in there:
            count = 0 if number else clients
            asked = bodies(prompts, **server.fields)
            server.go_on()
            plan = Plan(server.address, asked, clients, seconds, count=count, keep=server.keeps)
            report = load.run(plan)
            server.pause()
            if number:
                found[server.name].append(figures(report))
    return found


def summary(rounds: dict[str, list[Figures]], name: str) -> dict[str, Any]:
    """The figures of one server over all rounds, times in seconds, and how ours compares."""
    mine, first = rounds[name], [x for one in rounds[name] for x in one.first]
    gaps = [x for one in mine for x in one.gaps]
    ratios = [
        ours.tokens_per_s / one.tokens_per_s
        for ours, one in zip(rounds["ours"], mine, strict=True)
        if one.tokens_per_s
    ]
    return {
        "tokens_per_s": statistics.median(one.tokens_per_s for one in mine),
        "tokens_per_s_by_round": [one.tokens_per_s for one in mine],
        "ratio": quantile(ratios, 0.5),
        "ratio_quartiles": [quantile(ratios, 0.25), quantile(ratios, 0.75)],
        "first_token_p50": quantile(first, 0.5),
        "first_token_p95": quantile(first, 0.95),
        "gap_p95": quantile(gaps, 0.95),
        "client_busy": statistics.median(one.busy for one in mine),
        "failed": sum(one.failed for one in mine),
    }


def row(one: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table with HEADER."""
    low, high = one["ratio_quartiles"]
    return (
        one["model"],
        str(one["clients"]),
        one["server"],
        measure.number(one["tokens_per_s"]),
        "" if one["server"] == "ours" else f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})",
        ms(one["first_token_p50"]),
        ms(one["first_token_p95"]),
        ms(one["gap_p95"]),
        f"{one['client_busy']:.2f}",
    )
