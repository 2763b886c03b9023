"""All figures: accuracy against call rate, and training curves. No jax.

Each is saved as PNG, and beside it as SVG.
"""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from collab_jax.records import Records  # noqa: E402
from collab_jax.routing.curves import frontiers  # noqa: E402
from collab_jax.routing.routers import ROUTERS, score  # noqa: E402
from collab_jax.runtime import files  # noqa: E402

plt.rcParams["svg.hashsalt"] = "collab_jax"  # the same figure gives the same file

_COLOURS = {
    "margin": "#c0392b",
    "logprob": "#2874a6",
    "random": "#7f8c8d",
    "reachable": "#82c39b",
    "perfect": "#1e8449",
}
_SMOOTHING = 10  # steps


def frontier(path: pathlib.Path, before: Records, after: Records, report: dict) -> None:
    """Draws overall accuracy against call rate: every router, and the start's margin dashed."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for name in ("perfect", "reachable", "margin", "logprob", "random"):
        axes.plot(
            *_frontier_of(after, name),
            color=_COLOURS[name],
            label=f"after: {ROUTERS[name].title}",
            lw=2 if name == "margin" else 1.3,
        )
    axes.plot(
        *_frontier_of(before, "margin"),
        color=_COLOURS["margin"],
        ls="--",
        lw=1.2,
        label="before: margin",
    )
    natural = report["after"]["natural"]
    axes.plot(
        100 * natural["call_rate"]["value"],
        100 * natural["overall_accuracy"]["value"],
        "o",
        color=_COLOURS["margin"],
        label="after: natural",
    )
    axes.axhline(
        100 * report["after"]["cloud_accuracy"]["value"],
        color="black",
        ls=":",
        lw=1,
        label="cloud alone",
    )
    axes.axvline(100 * report["budget"], color="#aaaaaa", lw=0.8)
    _save_frontier(path, figure, axes)


def _frontier_of(records: Records, router: str) -> tuple[np.ndarray, np.ndarray]:
    """Call rates f64[K] and accuracies f64[K], in percent."""
    f = frontiers({router: [(records, score(router, records))]}, resamples=1)
    return 100 * f.rates, 100 * f.accuracy[router][0]


def curves(
    path: pathlib.Path, rates: Sequence[float], lines: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Draws overall accuracy against call rate: a line for each method, with its 95 % band.

    lines: by method "value", "low", "high", each [K] at the call rates [K].
    """
    figure, axes = plt.subplots(figsize=(8, 5.5))
    x = 100 * np.array(rates)
    for name, line in lines.items():
        value, low, high = (100 * np.array(line[key], float) for key in ("value", "low", "high"))
        (drawn,) = axes.plot(x, value, lw=1.4, label=name)
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12, lw=0)
    _save_frontier(path, figure, axes)


def training(path: pathlib.Path, rows: list[dict], budget: float) -> None:
    """Draws six training curves; thin: each step, thick: the mean over ten steps."""
    steps = np.array([row["step"] for row in rows])
    panels = [
        ("reward", [("reward", "mean reward")]),
        (
            "responses (%)",
            [
                ("local_accuracy", "right on the device"),
                ("call_rate", "called"),
                ("cut_off", "cut off"),
            ],
        ),
        (
            "prompts of a step",
            [("d1", "D1"), ("d2", "D2"), ("dropped", "dropped"), ("no_signal", "no signal")],
        ),
        ("entropy (nats a token)", [("entropy", "entropy")]),
        ("gradient norm", [("grad_norm", "norm")]),
        ("seconds a step", [("seconds", "step"), ("seconds_rollout", "of which rollout")]),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(12, 6))
    for axes, (title, series) in zip(grid.flat, panels, strict=True):
        scale = 100 if "%" in title else 1
        for name, label in series:
            values = scale * np.array([row[name] for row in rows], float)
            (line,) = axes.plot(steps, values, lw=0.6, alpha=0.35)
            smooth = _smooth(values)
            late = steps[len(steps) - len(smooth) :]
            axes.plot(late, smooth, color=line.get_color(), lw=1.6, label=label)
        if title == "responses (%)":
            axes.axhline(100 * budget, color="black", ls=":", lw=1, label="budget")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.25)
    _save(path, figure)


def sweep_training(path: pathlib.Path, cells: Mapping[str, Sequence[list[dict]]]) -> None:
    """Draws the training of each cell, mean over its seeds and ten steps.

    The first row is against steps, the second against the cloud answers bought until then.
    """
    panels = [
        ("local_accuracy", "right on the device (%)"),
        ("call_rate", "called (%)"),
        ("reward", "mean reward"),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(13, 7))
    for column, (key, title) in enumerate(panels):
        for name, runs in cells.items():
            values = _smooth(_mean_over_runs(runs, key)) * (100 if "%" in title else 1)
            bought = np.cumsum(_mean_over_runs(runs, "cloud_bought"))
            steps = np.arange(1, len(bought) + 1)
            for axes, x in zip(grid[:, column], (steps, bought), strict=True):
                axes.plot(x[len(x) - len(values) :], values, lw=1.3, label=name)
        for axes, label in zip(grid[:, column], ("step", "cloud answers bought"), strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(label, fontsize=8)
            axes.grid(alpha=0.25)
    grid[0, 0].legend(fontsize=7)
    _save(path, figure)


def _mean_over_runs(runs: Sequence[list[dict]], key: str) -> np.ndarray:
    """Mean of a metric over runs at each step that all of them have, f64[steps]."""
    steps = min(map(len, runs))
    return np.mean([[row[key] for row in rows[:steps]] for rows in runs], 0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over ten steps (or over all, if there are fewer), at each step that ends ten."""
    window = min(_SMOOTHING, len(values))
    return np.convolve(values, np.ones(window) / window, "valid")


def _save_frontier(path: pathlib.Path, figure: Figure, axes: Axes) -> None:
    axes.set(
        xlabel="queries sent to the cloud (%)",
        ylabel="overall accuracy (%)",
        title="Accuracy against call rate",
    )
    axes.set_xlim(0, 100)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)
    _save(path, figure)


def _save(path: pathlib.Path, figure: Figure) -> None:
    figure.tight_layout()
    with files.replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    with files.replacing(path.with_suffix(".svg")) as scratch:
        figure.savefig(scratch, format="svg", metadata={"Date": None})
    plt.close(figure)
