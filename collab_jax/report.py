"""The report of a run: report.json for scripts, report.md for people, two figures. No jax."""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from collab_jax import measures, summary  # noqa: E402
from collab_jax.cloud import Ledger  # noqa: E402
from collab_jax.records import Records  # noqa: E402
from collab_jax.routers import ROUTERS, score  # noqa: E402

_COLOURS = {"margin": "#c0392b", "logprob": "#2874a6", "random": "#7f8c8d", "perfect": "#1e8449"}


def write(
    workdir: pathlib.Path,
    config: ConfigDict,
    filter_state,
    rows: list[dict],
    before: Records,
    after: Records,
    cost: Ledger,
) -> str:
    """Writes the report's files into `workdir`; returns the summary for the screen."""
    prompts = int(filter_state.prompts)
    report = {
        "before": summary.summary(before),
        "after": summary.summary(after),
        "gain": summary.gains(before, after),
        "budget": config.budget,
        "steps": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "filter_dropped": 1 - int(filter_state.kept) / prompts,
        "filter": {name: int(getattr(filter_state, name)) for name in ("prompts", "d1", "d2", "kept", "kept_d2")},
        "cloud_calls": cost.calls,
        "cloud": {
            "usd": cost.usd,
            "seconds": cost.seconds,
            "input_tokens": cost.input_tokens,
            "output_tokens": cost.output_tokens,
        },
        "config": json.loads(config.to_json_best_effort()),
    }
    plot_training(workdir / "training.png", rows, config.budget)
    plot_frontier(workdir / "frontier.png", before, after, report)
    table = markdown_table(report)
    (workdir / "report.md").write_text(markdown(report, table, after))
    beside = workdir / "report.tmp"  # the last file, complete or not at all: a run that has it is finished
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(workdir / "report.json")
    return f"\n{table}\n\n{closing(report)}\nreport: {workdir / 'report.md'}, report.json, frontier.png, training.png"


def percent(rate: dict) -> str:
    """'63.1 (61.6 to 64.5)' from a rate."""
    return f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"  # noqa: E731
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def markdown_table(report: dict) -> str:
    """Before against after, in percent of all prompts, with 95 % intervals."""
    before, after = report["before"], report["after"]
    lines = [
        ("accuracy on the device (marker disallowed)", lambda m: percent(m["local_accuracy"])),
        ("of these responses, without an answer", lambda m: percent(m["no_answer"])),
        ("natural: share of calls", lambda m: percent(m["natural"]["call_rate"])),
        ("natural: overall accuracy", lambda m: percent(m["natural"]["overall_accuracy"])),
    ]
    for budget in summary.BUDGETS:
        for name in summary.SUMMARY_ROUTERS:
            lines.append(
                (
                    f"{100 * budget:.0f} % calls: {ROUTERS[name].title}",
                    lambda m, b=budget, r=name: percent(m["at_budget"][str(b)][r]),
                )
            )
    lines.append(("cloud alone (100 % calls)", lambda m: percent(m["cloud_accuracy"])))
    rows = [[title, get(before), get(after)] for title, get in lines]
    return table(["% of prompts (95 % interval)", "before", "after"], rows)


def closing(report: dict) -> str:
    """What changed, in three lines."""
    gain, at = report["gain"], report["after"]["at_budget"]["0.3"]
    first = report["after"]["no_answer"]["value"]
    ties = (
        f"\nWith the marker disallowed {first:.0%} of the responses have no answer. Margin and log-probability gate send these "
        "first, so up to that share of calls the two differ only in their order among these."
        if first > summary.BUDGETS[0]
        else ""
    )
    points = lambda r: f"{100 * r['value']:+.1f} points ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})"  # noqa: E731
    return (
        f"At 30 % calls by margin: {points(gain['margin_at_0.3'])} over the start; {points(at['margin_over_random'])} over random; "
        f"{'all' if at['perfect_gain_share']['value'] is None else format(at['perfect_gain_share']['value'], '.0%')} of the perfect router's gain.\n"
        f"On the device alone: {points(gain['local_accuracy'])}.\n"
        f"{report['steps']} steps in {report['seconds']:.0f} s; the filter dropped {report['filter_dropped']:.1%} of the prompts; "
        f"{report['cloud_calls']} cloud answers in the store, evaluation included ({report['cloud']['usd']:.2f} USD).{ties}"
    )


def markdown(report: dict, table: str, after: Records) -> str:
    """report.md."""
    config = report["config"]
    algorithm = ", ".join(f"{key} `{value}`" for key, value in config["algorithm"].items())
    examples = "\n".join(
        f"- **{kind}**: `{after['prompt'][i]}` -> `{after['natural_text'][i]}`".replace("\n", " ⏎ ")
        for kind, i in summary.examples_to_show(after)
    )
    return (
        f"# {config['task']['name']}, {config['model']['path']}, budget {report['budget']:g}, seed {config['seed']}\n\n"
        f"{algorithm}; {report['after']['n']} held-out prompts; every rate is a share of all prompts, with its 95 % interval.\n\n"
        f"{table}\n\n{closing(report)}\n\n"
        "![accuracy against call rate](frontier.png)\n\n![training](training.png)\n\n"
        f"## Examples after training (natural decoding)\n\n{examples}\n"
    )


def plot_frontier(path: pathlib.Path, before: Records, after: Records, report: dict) -> None:
    """Overall accuracy against call rate, every router; the start's margin frontier dashed."""
    figure, axes = plt.subplots(figsize=(7, 5))

    def line(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
        f = measures.frontiers({name: [(records, score(name, records))]}, resamples=1)
        return 100 * f.rates, 100 * f.accuracy[name][0]

    for name in ("perfect", "margin", "logprob", "random"):
        width = 2 if name == "margin" else 1.3
        axes.plot(*line(after, name), color=_COLOURS[name], label=f"after: {ROUTERS[name].title}", lw=width)
    axes.plot(*line(before, "margin"), color=_COLOURS["margin"], ls="--", lw=1.2, label="before: margin")
    natural = report["after"]["natural"]
    axes.plot(
        100 * natural["call_rate"]["value"],
        100 * natural["overall_accuracy"]["value"],
        "o",
        color=_COLOURS["margin"],
        label="after: natural",
    )
    axes.axhline(100 * report["after"]["cloud_accuracy"]["value"], color="black", ls=":", lw=1, label="cloud alone")
    axes.axvline(100 * report["budget"], color="#aaaaaa", lw=0.8)
    _save_frontier(path, figure, axes, 8)


def plot_curves(path: pathlib.Path, rates: list[float], curves: dict[str, list[float]]) -> None:
    """Overall accuracy against call rate, a line for each method."""
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for name, accuracy in curves.items():
        axes.plot(100 * np.array(rates), 100 * np.array(accuracy), lw=1.3, label=name)
    _save_frontier(path, figure, axes, 7)


def _save_frontier(path: pathlib.Path, figure, axes, fontsize: int) -> None:
    axes.set(xlabel="queries sent to the cloud (%)", ylabel="overall accuracy (%)", title="Accuracy against call rate")
    axes.set_xlim(0, 100)
    axes.legend(fontsize=fontsize, loc="lower right")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_training(path: pathlib.Path, rows: list[dict], budget: float) -> None:
    """Six training curves; thin: each step, thick: mean over ten steps."""
    steps = np.array([row["step"] for row in rows])
    panels = [
        ("reward", [("reward", "mean reward")]),
        ("responses (%)", [("local_accuracy", "right on the device"), ("call_rate", "called"), ("cut_off", "cut off")]),
        ("prompts of a step", [("d1", "D1"), ("d2", "D2"), ("dropped", "dropped"), ("no_signal", "no signal")]),
        ("entropy (nats a token)", [("entropy", "entropy")]),
        ("gradient norm before clipping", [("grad_norm", "norm")]),
        ("seconds a step", [("seconds", "step"), ("seconds_rollout", "of which rollout")]),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(12, 6))
    for axes, (title, series) in zip(grid.flat, panels, strict=True):
        scale = 100 if "%" in title else 1
        for name, label in series:
            values = scale * np.array([row[name] for row in rows], float)
            (line,) = axes.plot(steps, values, lw=0.6, alpha=0.35)
            window = min(10, len(values))
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=line.get_color(), lw=1.6, label=label)
        if title == "responses (%)":
            axes.axhline(100 * budget, color="black", ls=":", lw=1, label="budget")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
