"""Routers compared from records, with intervals: the figures, and their report."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from collab_jax import records
from collab_jax.records import Records
from collab_jax.reports import figures, page
from collab_jax.reports.summary import BUDGETS
from collab_jax.routing import costs, curves, measures, response, routers
from collab_jax.routing.curves import Frontiers, Runs, estimate
from collab_jax.runtime import files, markdown
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent, points


class Model(NamedTuple):
    """A model's records, one table for each seed, and what its learned routers are fitted on."""

    seeds: Sequence[Records]
    fit_on: Sequence[Records | None]  # one for each seed


def aligned(models: Mapping[str, Model]) -> dict[str, Model]:
    """The models with their prompts in the order of the first table.

    Raises UserError where the prompts are others.
    """
    first = next(iter(models.values())).seeds[0]
    return {
        name: model._replace(
            seeds=[
                records.align(first, table, "the first table", f"{name}, seed {i}")
                for i, table in enumerate(model.seeds)
            ]
        )
        for name, model in models.items()
    }


def score_all(models: Mapping[str, Model]) -> dict[str, Runs]:
    """(records, score) of each seed by "MODEL: ROUTER", of models that are aligned.

    A router is among them where all seeds of the model have the columns that it needs.
    """
    methods: dict[str, Runs] = {}
    for name, model in models.items():
        pairs = list(zip(model.seeds, model.fit_on, strict=True))
        possible = [routers.possible(table, fit_on) for table, fit_on in pairs]
        for router in possible[0]:
            if all(router in others for others in possible):
                methods[f"{name}: {router}"] = [
                    (table, routers.score(router, table, fit_on)) for table, fit_on in pairs
                ]
    return methods


def compare(
    models: Mapping[str, Model],
    budgets: Sequence[float] = BUDGETS,
    resamples: int = 1000,
    reference: str = "",
    prices: costs.Prices | None = None,
) -> dict[str, Any]:
    """The figures of compare.json, for every "MODEL: ROUTER".

    These are accuracy at each budget with the paired difference of the reference to it (reference -
    method), APGR, CPT, AUC and counts. reference: a method; by default the first model's margin, or
    its first router where it has none. prices: adds what each budget costs a prompt, in USD,
    seconds and device tokens (`costs.cost_frontier`). Raises UserError for an unknown reference.
    """
    tables = [table for model in models.values() for table in model.seeds]
    everything = len(tables[0]["id"])
    models = {
        name: model._replace(seeds=[records.known(table, also=tables) for table in model.seeds])
        for name, model in models.items()
    }
    models = aligned(models)
    methods = score_all(models)
    default = f"{next(iter(models))}: margin"
    reference = reference or (default if default in methods else next(iter(methods)))
    if reference not in methods:
        raise UserError(f"no method {reference!r} to compare with: use one of {sorted(methods)}")
    frontiers = curves.frontiers(methods, sorted({*curves.GRID, *budgets}), resamples)
    return {
        "prompts": len(next(iter(models.values())).seeds[0]["id"]),
        "split": records.split_of(tables[0]),
        "cloud_unknown": everything - len(next(iter(models.values())).seeds[0]["id"]),
        "seeds": {name: len(model.seeds) for name, model in models.items()},
        "resamples": resamples,
        "budgets": list(budgets),
        "call_rates": [float(x) for x in frontiers.rates],
        "reference": reference,
        "models": {
            name: model_figures(name, model, frontiers, reference) for name, model in models.items()
        },
        "methods": {
            name: method_figures(name, runs, frontiers, reference, budgets, prices)
            for name, runs in methods.items()
        },
    }


def method_figures(
    name: str,
    runs: Runs,
    frontiers: Frontiers,
    reference: str,
    budgets: Sequence[float],
    prices: costs.Prices | None,
) -> dict[str, Any]:
    """The figures of one "MODEL: ROUTER"."""
    model, _, router = name.partition(": ")
    rates, curve = frontiers.rates, frontiers.accuracy[name]
    share = curves.gain_share(rates, curve, frontiers.accuracy[f"{model}: reachable"])
    at_budget = {}
    for budget in budgets:
        lead = frontiers.at(reference, budget) - frontiers.at(name, budget)
        counts = [measures.sent_counts(table, score, budget) for table, score in runs]
        at_budget[str(budget)] = {
            "accuracy": _share(frontiers.at(name, budget)),
            "reference_minus_this": estimate(lead),
            "reachable_share": estimate(share[:, frontiers.column(budget)]),
            **{key: float(np.mean([count[key] for count in counts])) for key in counts[0]},
        }
    if prices:
        for budget, cost in zip(budgets, _costs(router, runs, prices, budgets), strict=True):
            at_budget[str(budget)] |= cost
    return {
        "at_budget": at_budget,
        "area": estimate(curves.area(rates, curve)),
        "apgr": estimate(curves.apgr(rates, curve)),
        "cpt_50": estimate(curves.cpt(rates, curve, 0.5)),
        "cpt_80": estimate(curves.cpt(rates, curve, 0.8)),
        "auc": _mean([_auc_of(table, score) for table, score in runs]),
        "auc_by_stratum": _mean_by_key(
            [measures.auc_by_stratum(table, score) for table, score in runs]
        ),
        "frontier": _bands(curve),
    }


def _bands(curve: np.ndarray) -> dict[str, list[float]]:
    """A frontier f64[1 + R, K] with its 95 % band: "value", "low", "high", each [K].

    Rounded to a hundredth of a percent.
    """
    # A t interval of few seeds may pass the ends of what an accuracy can be.
    low, high = np.clip(np.quantile(curve[1:], [0.025, 0.975], axis=0), 0, 1)
    return {
        key: [round(float(x), 4) for x in line]
        for key, line in zip(("value", "low", "high"), (curve[0], low, high), strict=True)
    }


def model_figures(name: str, model: Model, frontiers: Frontiers, reference: str) -> dict[str, Any]:
    """The figures of a model that no router changes.

    These are the device alone, the cloud alone, and the natural pass where it is recorded.
    """
    resamples = len(frontiers.accuracy[reference]) - 1
    curve, reference_curve = frontiers.accuracy[f"{name}: random"], frontiers.accuracy[reference]
    alone = {
        "local_accuracy": _share(curve[:, 0]),
        "cloud_accuracy": _share(curve[:, -1]),
        "reference_minus_this": estimate(reference_curve[:, 0] - curve[:, 0]),  # local accuracies
        "no_answer": _share_of([response.no_answer(table) for table in model.seeds], resamples),
    }
    if not all("natural_called" in table for table in model.seeds):
        return alone
    called = [table["natural_called"] for table in model.seeds]
    right = [
        np.where(
            table["natural_called"],
            records.outcomes(table, "cloud"),
            records.outcomes(table, "natural"),
        )
        for table in model.seeds
    ]
    figures = alone | {
        "natural_call_rate": _share_of(called, resamples),
        "natural_accuracy": _share_of(right, resamples),
    }
    if not all("logprob" in routers.possible(table) for table in model.seeds):
        return figures
    # Beside the margin there is nothing to compare: its calls are the natural ones.
    beyond = [
        r - measures.replay(table, routers.score("logprob", table), float(c.mean()))
        for table, c, r in zip(model.seeds, called, right, strict=True)
    ]
    return figures | {"natural_minus_gate": estimate(curves.mean(beyond, resamples))}


def _share(values: np.ndarray) -> dict[str, float | None]:
    """A share f64[1 + R] with its interval."""
    # A t interval of few seeds may pass the ends of what a share can be.
    return estimate(np.clip(values, 0, 1))


def _share_of(values: Sequence[np.ndarray], resamples: int) -> dict[str, float | None]:
    """The mean of values [n] in [0, 1] of each seed, with its interval."""
    interval = _share(curves.mean(values, resamples))
    alike = interval["value"] in (0, 1)  # drawn again they show no spread
    if alike or (len(values) == 1 and values[0].dtype == bool):
        return measures.rate(values[0].astype(bool))
    return interval


def _costs(
    router: str, runs: Runs, prices: costs.Prices, budgets: Sequence[float]
) -> list[dict[str, float]]:
    """What each budget costs a prompt, mean over seeds.

    A recorded router that is not in ROUTERS is taken to have read the response.
    """
    reads = routers.router_of(router).reads
    of_seeds = [
        costs.cost_frontier(
            table, score, prices, reads, own_tokens=table.get(f"tokens_{router}", 0.0),
            budgets=budgets,
        )
        for table, score in runs
    ]  # fmt: skip
    return [
        {
            key: float(np.mean([getattr(cost, key)[i] for cost in of_seeds]))
            for key in ("usd", "seconds", "device_tokens")
        }
        for i in range(len(budgets))
    ]


def _auc_of(table: Records, score: np.ndarray) -> float | None:
    right = table["local_correct"]
    return measures.auc(table, score) if right.any() and not right.all() else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _mean_by_key(tables: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {key: _mean([table.get(key) for table in tables]) for table in tables for key in table}


def render(result: dict[str, Any]) -> str:
    """compare.md: accuracy at each budget, other figures, and by how much the reference leads."""
    budgets = [f"{100 * b:g} % calls" for b in result["budgets"]]
    seeds = ", ".join(f"{name} {count}" for name, count in result["seeds"].items())
    single = [name for name, count in result["seeds"].items() if count == 1]
    alone = f" Of one seed ({', '.join(single)}) they are over prompts alone." if single else ""
    unknown = result["cloud_unknown"]
    left_out = f" Left out: {unknown} whose cloud verdict is not known." if unknown else ""
    sections = [
        "# Routers compared",
        f"{result['prompts']} {result['split']} prompts; seeds: {seeds}. "
        "Accuracy in percent of all prompts, with 95 % intervals: t over seeds and, at once, "
        f"{result['resamples']} resamples of the prompts.{alone} APGR, CPT: "
        f'RouteLLM\'s; AUC: of "the device is wrong".{left_out}',
        _accuracy_table(result, budgets),
        f"## {result['reference']} against the others, points",
        markdown.table(
            ["method", *budgets],
            [
                [name, *(points(at["reference_minus_this"]) for at in m["at_budget"].values())]
                for name, m in result["methods"].items()
            ],
        ),
    ]
    if "usd" in next(iter(next(iter(result["methods"].values()))["at_budget"].values())):
        sections += ["## Cost of a prompt: USD / seconds / device tokens", _cost_table(result)]
    return "\n\n".join([*sections, "![accuracy against call rate](frontier.png)"]) + "\n"


def _accuracy_table(result: dict[str, Any], budgets: Sequence[str]) -> str:
    rows = []
    for name, method in result["methods"].items():
        thresholds = [method[key]["value"] for key in ("cpt_50", "cpt_80")]
        rows.append(
            [
                name,
                *(percent(at["accuracy"]) for at in method["at_budget"].values()),
                _number(method["apgr"]["value"], 3),
                " / ".join(_number(None if x is None else 100 * x, 1) for x in thresholds),
                _number(method["auc"], 3),
            ]
        )
    return markdown.table(["method", *budgets, "APGR", "CPT 50 / 80 %", "AUC"], rows)


def _cost_table(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(
                f"{at['usd']:.3g} / {at['seconds']:.3g} / {at['device_tokens']:.3g}"
                for at in method["at_budget"].values()
            ),
        ]
        for name, method in result["methods"].items()
    ]
    return markdown.table(["method", *(f"{100 * b:g} % calls" for b in result["budgets"])], rows)


def _number(x: float | None, digits: int) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def write(out: pathlib.Path, result: dict[str, Any]) -> str:
    """Writes the comparison to the folder `out`; returns what to print.

    The files are compare.json, compare.md, compare.html and frontier.png (and .svg).
    """
    out.mkdir(parents=True, exist_ok=True)
    text = render(result)
    files.write_text(out / "compare.json", json.dumps(result, indent=2) + "\n")
    drawn = {
        name: method["frontier"]
        for name, method in result["methods"].items()
        if is_drawn(name, result)
    }
    figures.curves(out / "frontier.png", result["call_rates"], drawn)
    page.save(out, "compare", text)
    return (
        text.split("![")[0] + f"wrote {out}: compare.html, compare.md, compare.json, frontier.png"
    )


def is_drawn(method: str, result: dict[str, Any]) -> bool:
    """Whether a method has a line in frontier.png.

    These are all routers of the reference's model, and the trained marker of the others.
    """
    model, _, router = method.partition(": ")
    return router == "margin" or model == result["reference"].partition(": ")[0]
