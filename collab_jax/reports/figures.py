"""All figures: accuracy against call rate, and training curves. Each is saved as PNG, and beside it
as SVG. No jax.
"""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from collab_jax.records import Records  # noqa: E402
from collab_jax.routing import measures  # noqa: E402
from collab_jax.routing.routers import ROUTERS, score  # noqa: E402

plt.rcParams["svg.hashsalt"] = "collab_jax"  # the same figure, the same file

_COLOURS = {"margin": "#c0392b", "logprob": "#2874a6", "random": "#7f8c8d", "perfect": "#1e8449"}


def _save(path: pathlib.Path, figure) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def _finish_frontier(path: pathlib.Path, figure, axes) -> None:
    axes.set(
        xlabel="queries sent to the cloud (%)",
        ylabel="overall accuracy (%)",
        title="Accuracy against call rate",
    )
    axes.set_xlim(0, 100)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.25)
    _save(path, figure)


def frontier(path: pathlib.Path, before: Records, after: Records, report: dict) -> None:
    """Overall accuracy against call rate, every router; the start's margin frontier dashed."""
    figure, axes = plt.subplots(figsize=(7, 5))

    def line(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
        f = measures.frontiers({name: [(records, score(name, records))]}, resamples=1)
        return 100 * f.rates, 100 * f.accuracy[name][0]

    for name in ("perfect", "margin", "logprob", "random"):
        width = 2 if name == "margin" else 1.3
        axes.plot(
            *line(after, name),
            color=_COLOURS[name],
            label=f"after: {ROUTERS[name].title}",
            lw=width,
        )
    axes.plot(
        *line(before, "margin"), color=_COLOURS["margin"], ls="--", lw=1.2, label="before: margin"
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
    _finish_frontier(path, figure, axes)


def curves(
    path: pathlib.Path, rates: Sequence[float], lines: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """Overall accuracy against call rate, a line for each method with its 95 % band.

    lines: by method "value", "low", "high", each [K] at the call rates [K].
    """
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for name, line in lines.items():
        value, low, high = (100 * np.array(line[key], float) for key in ("value", "low", "high"))
        (drawn,) = axes.plot(100 * np.array(rates), value, lw=1.4, label=name)
        axes.fill_between(
            100 * np.array(rates), low, high, color=drawn.get_color(), alpha=0.12, lw=0
        )
    _finish_frontier(path, figure, axes)


def training(path: pathlib.Path, rows: list[dict], budget: float) -> None:
    """Six training curves; thin: each step, thick: mean over ten steps."""
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
    _save(path, figure)


def sweep_training(path: pathlib.Path, cells: Mapping[str, Sequence[list[dict]]]) -> None:
    """Training of each cell, mean over its seeds and ten steps: against steps, and against the
    cloud answers bought until then.
    """
    panels = [
        ("local_accuracy", "right on the device (%)"),
        ("call_rate", "called (%)"),
        ("reward", "mean reward"),
    ]
    figure, grid = plt.subplots(2, 3, figsize=(13, 7))
    for column, (key, title) in enumerate(panels):
        for name, runs in cells.items():
            steps = min(map(len, runs))
            window = min(10, steps)
            mean = lambda of, runs=runs, steps=steps: np.mean(
                [[row[of] for row in rows[:steps]] for rows in runs], 0
            )  # noqa: E731
            values = np.convolve(mean(key), np.ones(window) / window, "valid") * (
                100 if "%" in title else 1
            )
            bought = np.cumsum(mean("cloud_bought"))[window - 1 :]
            for axes, x in zip(
                grid[:, column], (np.arange(window, steps + 1), bought), strict=True
            ):
                axes.plot(x, values, lw=1.3, label=name)
        for axes, label in zip(grid[:, column], ("step", "cloud answers bought"), strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(label, fontsize=8)
            axes.grid(alpha=0.25)
    grid[0, 0].legend(fontsize=7)
    _save(path, figure)
