"""What a server promises beside speed: fairness, overload, a cloud that is down, and the budget.

Each part starts our server of the embedded model in a process of its own, asks it by the clients of
`load.py`, prints a table, and returns its figures.
"""

import argparse
import json
import pathlib
import random
import statistics
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from collab_jax.bench import load, measure, served
from collab_jax.bench.cloud import hold
from collab_jax.bench.faults import FaultServer
from collab_jax.bench.load import Plan, Report, Seen
from collab_jax.bench.served import Server
from collab_jax.bench.throughput import Question, bodies, contents, figures, ms, quantile
from collab_jax.models import hf
from collab_jax.runtime import markdown
from collab_jax.serve.__main__ import BUNDLED

SLOTS = 32
LONG = 1024  # tokens
OTHERS = 7  # clients beside the one with the long request
TIMES = 4  # as many requests as the server can answer
CLIENTS = 64  # of a dead cloud
DEADLINE = 5.0  # seconds that the cloud has for an answer
TARGETS = (0.1, 0.4, 0.2, 0.3)  # so that each follows one that is far from it
MOST_OFF = 40  # calls more or fewer than the target: two points of 2,000
SHARES_OF_THREE = (0.5, 0.1)  # prompts with three numbers, before and after the mix changes


# ----------------------------------------------------------------------------------- fairness


def fairness(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Measures the waits of equal requests, and what a long one costs the others."""
    eos = int(hf.read_config(hf.locate(BUNDLED))["eos_token_id"])
    one = contents(questions[:1])
    with served.ours(scratch) as server:
        equal = Plan(server.address, bodies(one, **server.fields), 2 * SLOTS, args.seconds)
        load.run(equal._replace(count=2 * SLOTS))  # to settle
        waits = figures(load.run(equal)).first
    with served.ours(scratch, f"--config.max_new_tokens={LONG}") as server:
        others = Plan(server.address, bodies(one, **server.fields), OTHERS, args.seconds)
        endless = bodies(one, **server.fields, logit_bias={str(eos): -100})
        endless[0]["max_tokens"] = LONG
        load.run(others._replace(count=OTHERS))  # to settle
        alone = figures(load.run(others)).gaps
        long = load.start(Plan(server.address, endless, 1, args.seconds))
        beside = figures(load.run(others)).gaps
        longest = load.finish(long).seen
    hold(all(seen.tokens == LONG for seen in longest), f"a request of {LONG} tokens has them")
    found = {
        "wait_p50": quantile(waits, 0.5),
        "wait_max": max(waits),
        "wait_ratio": max(waits) / quantile(waits, 0.5),
        "gap_p95_alone": quantile(alone, 0.95),
        "gap_p95_beside_a_long_one": quantile(beside, 0.95),
        "gap_ratio": quantile(beside, 0.95) / quantile(alone, 0.95),
    }
    rows = [
        (
            f"wait of {2 * SLOTS} equal clients at {SLOTS} slots: median, longest",
            f"{ms(found['wait_p50'])}, {ms(found['wait_max'])} ms",
            f"{found['wait_ratio']:.2f}",
        ),
        (
            f"between arrivals at {OTHERS} clients, p95: alone, beside {LONG} tokens",
            f"{ms(found['gap_p95_alone'])}, {ms(found['gap_p95_beside_a_long_one'])} ms",
            f"{found['gap_ratio']:.2f}",
        ),
    ]
    print(markdown.table(("fairness", "measured", "ratio"), rows), flush=True)
    return found


# ----------------------------------------------------------------------------------- overload


def overload(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Asks for TIMES as many answers as the server can give, and measures what comes of it."""
    prompts = contents(questions)
    with served.ours(scratch) as server:
        asked = bodies(prompts, **server.fields)
        peak = Plan(server.address, asked, SLOTS, max(args.seconds, args.overload_seconds / 6))
        load.run(peak._replace(count=SLOTS))  # to settle
        before = load.run(peak)
        rate = TIMES * len(before.seen) / before.seconds
        flood = Plan(server.address, asked, 0, args.overload_seconds, rate=rate)
        report, memory = watched(server, flood)
        after = load.run(peak)
    failed = sum(figures(one).failed for one in (before, after))
    hold(failed == 0, f"whoever asks no more than can be answered is answered ({failed} are not)")
    peaks = [figures(one).tokens_per_s for one in (before, after)]
    best = statistics.mean(peaks)  # the pace of a shared machine drifts
    refused = [one for one in report.seen if one.status == 429]
    served_well = [one for one in report.seen if one.status == 200 and not one.problem]
    others = len(report.seen) - len(refused) - len(served_well)
    hold(others == 0, f"under overload all are answered or refused with 429 ({others} were not)")
    goodput = sum(one.tokens for one in served_well) / report.seconds
    found = {
        "peak_tokens_per_s": peaks,
        "offered_per_s": rate,
        "answered": len(served_well),
        "refused": len(refused),
        "goodput_of_peak": goodput / best,
        "refusal_p95": quantile([one.took for one in refused], 0.95),
        "refusal_max": max((one.took for one in refused), default=float("nan")),
        "memory_mib": memory,
        "client_busy": report.busy,
    }
    rows = [
        ("answered, refused with 429", f"{len(served_well):,}, {len(refused):,}"),
        ("hangs, errors of the server", "0, 0"),
        ("peak tokens/s: before, after", ", ".join(map(measure.number, peaks))),
        ("tokens/s of the answered ones, of the peaks' mean", f"{found['goodput_of_peak']:.0%}"),
        ("until a 429: p95, longest", f"{ms(found['refusal_p95'])}, {ms(found['refusal_max'])} ms"),
        ("resident memory, MiB: before, at most, after", memory_of(memory)),
        ("clients' share of a core", f"{report.busy:.2f}"),
    ]
    head = f"{rate:.0f} requests/s for {args.overload_seconds:.0f} s, {TIMES} times the capacity"
    print(markdown.table((head, ""), rows), flush=True)
    return found


def watched(server: Server, plan: Plan) -> tuple[Report, list[float]]:
    """(what the clients saw, the server's memory in MiB each second meanwhile)."""
    memory, process = [server.memory()], load.start(plan)
    end = time.monotonic() + plan.seconds
    while time.monotonic() < end:
        time.sleep(1.0)
        memory.append(server.memory())
    return load.finish(process), [*memory, server.memory()]


def memory_of(values: Sequence[float]) -> str:
    """The first, the largest and the last, in words."""
    return f"{values[0]:.0f}, {max(values):.0f}, {values[-1]:.0f}"


# --------------------------------------------------------------------------------- dead cloud


def dead_cloud(
    args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path
) -> Any:
    """Checks that a cloud that refuses, or never answers, costs nobody more than its deadline."""
    prompts = contents(questions[: 2 * CLIENTS])
    found, rows = {}, []
    with FaultServer(str.upper, share=1.0, faults=("stall",), stall=3600.0) as silent:
        clouds = {
            "refuses connections": f"http://{served.HOST}:{served.free_port()}/v1",
            "never answers": silent.url,
        }
        for name, url in clouds.items():
            settings = [f"--config.serve.deadline={DEADLINE}", f"--config.cloud.base_url={url}"]
            settings += ["--config.cloud.kind=openai", "--config.cloud.model=deepseek-reasoner"]
            settings += ["--config.cloud.key_env="]
            with served.ours(scratch, *settings) as server:
                asked = bodies(prompts, model="collab")
                for i, body in enumerate(asked):
                    body["collab"] = {"threshold": -1e4, "allow_fallback": i % 2 == 0}
                report = load.run(Plan(server.address, asked, CLIENTS, 600.0, count=len(asked)))
            wrong = [one for one in report.seen if not as_asked(one)]
            late = max(one.took for one in report.seen)
            hold(not wrong, f"all are answered, or refused as asked ({len(wrong)} are not)")
            hold(late <= DEADLINE + 1, f"none is later than {DEADLINE + 1} s ({late:.1f} s)")
            half = len(report.seen) // 2
            found[name] = {"answered": half, "refused": half, "longest": late}
            rows.append((name, f"{half}", f"{half}", f"{late:.2f}"))
    head = ("the cloud", "answered by the device", "refused as asked (503)", "longest s")
    print(markdown.table(head, rows), flush=True)
    return found


def as_asked(one: Seen) -> bool:
    """Whether the device answered for a dead cloud, or the request was refused, as it wanted."""
    if one.body % 2:
        return one.status == 503
    about = one.about or {}
    return one.status == 200 and about.get("reason") == "device_fallback"


# --------------------------------------------------------------------------------------- rate


def rate(args: argparse.Namespace, questions: Sequence[Question], scratch: pathlib.Path) -> Any:
    """Checks the share of calls after each PUT of a target, for a steady mix and a changing one."""
    mixes = {"steady": questions, "changes in the middle": changing(questions, args.queries)}
    found, rows = {}, []
    with served.ours(scratch) as server:
        for target in TARGETS:
            for name, mix in mixes.items():
                put_budget(server, target)
                asked = bodies(contents(mix), model="collab")
                plan = Plan(server.address, asked, SLOTS, 3600.0, count=args.queries)
                seen = load.run(plan).seen
                wrong = [one for one in seen if one.status != 200 or one.problem or not one.about]
                hold(not wrong, f"all are answered ({len(wrong)} are not)")
                calls = sum((one.about or {})["answered_by"] == "cloud" for one in seen)
                off = calls - target * len(seen)
                hold(abs(off) <= MOST_OFF, f"{target:.0%} calls, where it was {calls}/{len(seen)}")
                found[f"{target}: {name}"] = calls / len(seen)
                rows.append((f"{target:.0%}", name, f"{100 * calls / len(seen):.1f} %"))
    head = ("target set by PUT", "mix", f"called of {args.queries:,}")
    print(markdown.table(head, rows), flush=True)
    return found


def changing(questions: Sequence[Question], count: int) -> list[Question]:
    """Questions of which half are one mix, and the others another, by SHARES_OF_THREE."""
    draw, mix = random.Random(0), []
    three, four = ([q for q in questions if q.stratum == f"{n} numbers"] for n in (3, 4))
    for share in SHARES_OF_THREE:
        easy = round(share * count / 2)
        half = [three.pop() for _ in range(easy)] + [four.pop() for _ in range(count // 2 - easy)]
        draw.shuffle(half)
        mix += half
    return mix


def put_budget(server: Server, target: float) -> None:
    """Sets the share of calls, as the operator."""
    request = urllib.request.Request(
        f"http://{server.address[0]}:{server.address[1]}/budget",
        data=json.dumps({"target_call_rate": target}).encode(),
        headers={"Authorization": f"Bearer {served.OPERATOR_KEY}"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=30):
        pass
