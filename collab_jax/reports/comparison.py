"""Routers compared from records, with intervals: the figures, and their report."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import figures, page
from collab_jax.reports.summary import BUDGETS
from collab_jax.routing import costs, measures, routers
from collab_jax.routing.measures import estimate
from collab_jax.runtime import markdown
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent, points


class Model(NamedTuple):
    """A model's records, a table for each seed, and what its learned routers are fitted on: a table
    each, or None.
    """

    seeds: list[Records]
    fit_on: list[Records | None]


def score_all(models: Mapping[str, Model]) -> dict[str, list[tuple[Records, np.ndarray]]]:
    """(records, score) of each seed by "MODEL: ROUTER", for every router that all of a model's
    seeds have columns for.
    """
    first = next(iter(models.values())).seeds[0]
    methods = {}
    for name, model in models.items():
        tables = [
            records.align(first, table, "the first table", f"{name}, seed {i}")
            for i, table in enumerate(model.seeds)
        ]
        pairs = list(zip(tables, model.fit_on, strict=True))
        shared = [
            router
            for router in routers.possible(*pairs[0])
            if all(router in routers.possible(*p) for p in pairs)
        ]
        for router in shared:
            methods[f"{name}: {router}"] = [
                (table, routers.score(router, table, fit)) for table, fit in pairs
            ]
    return methods


def compare(
    models: Mapping[str, Model],
    budgets: Sequence[float] = BUDGETS,
    resamples: int = 1000,
    reference: str = "",
    prices: costs.Prices | None = None,
) -> dict:
    """The figures of compare.json: of every "MODEL: ROUTER" its accuracy at each budget with the
    paired difference of the reference to it (reference - method), APGR, CPT, AUC, counts; the
    reference is the first model's margin, or its first router.

    prices: with what each budget costs a prompt, in USD, seconds and device tokens
    (`costs.cost_frontier`).
    """
    tables = [table for model in models.values() for table in model.seeds]
    everything = len(tables[0]["id"])
    models = {
        name: model._replace(seeds=[records.known(table, also=tables) for table in model.seeds])
        for name, model in models.items()
    }
    methods = score_all(models)
    default = f"{next(iter(models))}: margin"
    reference = reference or (default if default in methods else next(iter(methods)))
    if reference not in methods:
        raise UserError(f"no method {reference!r} to compare with: use one of {sorted(methods)}")
    f = measures.frontiers(methods, sorted({*measures.GRID, *budgets}), resamples)
    table = {}
    for name, runs in methods.items():
        perfect = f.accuracy.get(f"{name.partition(': ')[0]}: perfect")
        at = {}
        for b in budgets:
            counts = [measures.sent_counts(t, s, b) for t, s in runs]
            at[str(b)] = {
                "accuracy": estimate(f.at(name, b)),
                "reference_minus_this": estimate(f.at(reference, b) - f.at(name, b)),
                "perfect_share": estimate(
                    measures.perfect_share(f.rates, f.accuracy[name], perfect)[:, f.column(b)]
                ),
                **{key: float(np.mean([c[key] for c in counts])) for key in counts[0]},
            }
        if prices:
            for b, spent in zip(
                budgets, _costs(name.partition(": ")[2], runs, prices, budgets), strict=True
            ):
                at[str(b)] |= spent
        curve = f.accuracy[name]
        table[name] = {
            "at_budget": at,
            "area": estimate(measures.area(f.rates, curve)),
            "apgr": estimate(measures.apgr(f.rates, curve)),
            "cpt_50": estimate(measures.cpt(f.rates, curve, 0.5)),
            "cpt_80": estimate(measures.cpt(f.rates, curve, 0.8)),
            "auc": _mean([_auc_of(t, s) for t, s in runs]),
            "auc_by_stratum": _mean_by_key([measures.auc_by_stratum(t, s) for t, s in runs]),
            "frontier": _bands(curve),
        }
    return {
        "prompts": len(next(iter(models.values())).seeds[0]["id"]),
        "cloud_unknown": everything - len(next(iter(models.values())).seeds[0]["id"]),
        "seeds": {name: len(model.seeds) for name, model in models.items()},
        "resamples": resamples,
        "budgets": list(budgets),
        "call_rates": [float(x) for x in f.rates],
        "reference": reference,
        "models": {
            name: model_figures(name, model, f, reference) for name, model in models.items()
        },
        "methods": table,
    }


def _bands(curve: np.ndarray) -> dict[str, list[float]]:
    """A frontier f64[1 + R, K] with its 95 % band: "value", "low", "high" of [K] each, to a
    hundredth of a percent.
    """
    low, high = np.quantile(curve[1:], [0.025, 0.975], axis=0)
    return {
        key: [round(float(x), 4) for x in line]
        for key, line in zip(("value", "low", "high"), (curve[0], low, high), strict=True)
    }


def model_figures(name: str, model: Model, f: measures.Frontiers, reference: str) -> dict:
    """A model's figures that no router changes: the device alone, the cloud alone, and the natural
    pass where it is recorded.
    """
    curve, theirs = f.accuracy[f"{name}: random"], f.accuracy[reference]
    found = {
        "local_accuracy": estimate(curve[:, 0]),
        "cloud_accuracy": estimate(curve[:, -1]),
        "reference_minus_this": estimate(theirs[:, 0] - curve[:, 0]),  # of the local accuracies
    }
    if all("natural_called" in table for table in model.seeds):
        called = [table["natural_called"] for table in model.seeds]
        right = [
            np.where(c, t["cloud_correct"], t["natural_correct"])
            for c, t in zip(called, model.seeds, strict=True)
        ]
        found |= {
            "natural_call_rate": float(np.mean(called)),
            "natural_accuracy": float(np.mean(right)),
        }
    return found


def _costs(
    router: str, runs, prices: costs.Prices, budgets: Sequence[float]
) -> list[dict[str, float]]:
    """What each budget costs a prompt, mean over seeds; a recorded router not of ours is taken to
    have read the response.
    """
    reads = routers.router_of(router).reads
    found = []
    for table, score in runs:
        own = table.get(f"tokens_{router}", 0.0)
        found.append(costs.cost_frontier(table, score, prices, reads, own, budgets))
    figures = ("usd", "seconds", "device_tokens")
    return [
        {key: float(np.mean([getattr(f, key)[i] for f in found])) for key in figures}
        for i in range(len(budgets))
    ]


def _auc_of(table: Records, score: np.ndarray) -> float | None:
    right = table["local_correct"]
    return measures.auc(table, score) if right.any() and not right.all() else None


def _mean(values: list[float | None]) -> float | None:
    return None if any(v is None for v in values) else float(np.mean(values))


def _mean_by_key(tables: list[dict[str, float | None]]) -> dict[str, float | None]:
    return {key: _mean([table.get(key) for table in tables]) for table in tables for key in table}


def render(result: dict) -> str:
    """compare.md: accuracy of every method at each budget, its figures, and by how much the
    reference is ahead.
    """
    head = [
        "method",
        *(f"{100 * b:g} % calls" for b in result["budgets"]),
        "APGR",
        "CPT 50 / 80 %",
        "AUC",
    ]
    number = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"  # noqa: E731
    lines, ahead = [], []
    for name, method in result["methods"].items():
        at = method["at_budget"].values()
        cpt = " / ".join(number(_times(method[key]["value"])) for key in ("cpt_50", "cpt_80"))
        apgr = number(method["apgr"]["value"], 3)
        lines.append(
            [name, *(percent(a["accuracy"]) for a in at), apgr, cpt, number(method["auc"], 3)]
        )
        ahead.append([name, *(points(a["reference_minus_this"]) for a in at)])
    few = (
        " Few seeds tell little of the spread between seeds: with five the intervals cover some 88 %, with two about half."
        if any(1 < count < 10 for count in result["seeds"].values())
        else ""
    )
    cost = ""
    if "usd" in next(iter(result["methods"].values()))["at_budget"][str(result["budgets"][0])]:
        rows = [
            [
                name,
                *(
                    f"{a['usd']:.3g} / {a['seconds']:.3g} / {a['device_tokens']:.3g}"
                    for a in m["at_budget"].values()
                ),
            ]
            for name, m in result["methods"].items()
        ]
        columns = head[: 1 + len(result["budgets"])]
        cost = f"## Cost of a prompt: USD / seconds / device tokens\n\n{markdown.table(columns, rows)}\n\n"
    seeds = ", ".join(f"{name} {count}" for name, count in result["seeds"].items())
    return (
        f"# Routers compared\n\n{result['prompts']} prompts; seeds: {seeds}. Accuracy in percent of all prompts, with 95 % "
        f"intervals from {result['resamples']} resamples of seeds and prompts. APGR, CPT: RouteLLM's; AUC: of \"the device is "
        f'wrong".{few}\n\n{markdown.table(head, lines)}\n\n## {result["reference"]} against the others, points\n\n'
        f"{markdown.table(head[: 1 + len(result['budgets'])], ahead)}\n\n{cost}![accuracy against call rate](frontier.png)\n"
    )


def _times(x: float | None) -> float | None:
    return None if x is None else 100 * x


def write(out: pathlib.Path, result: dict) -> str:
    """Writes compare.json, compare.md, compare.html and frontier.png (and .svg) to the folder
    `out`; returns what to show on the screen.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = render(result)
    (out / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    home = result["reference"].partition(": ")[
        0
    ]  # of the other models the trained marker alone: a line each
    shown = {
        n: m
        for n, m in result["methods"].items()
        if n.partition(": ")[0] == home or n.endswith(": margin")
    }
    lines = {name: method["frontier"] for name, method in (shown or result["methods"]).items()}
    figures.curves(out / "frontier.png", result["call_rates"], lines)
    page.save(out, "compare", text)
    return (
        text.split("![")[0] + f"wrote {out}: compare.html, compare.md, compare.json, frontier.png"
    )
