"""A suite: one table over several benchmarks.

    python -m collab_jax.evaluate --suite paper --config ... --workdir RUN

evaluates the run's last checkpoint (in an empty workdir, the model of the config) on every
benchmark of the suite and writes RUN/suite-NAME/: the records of each (BENCHMARK.parquet), table.md
and table.json. `--suite` takes a name of SUITES, or tasks with commas between them.

`paper` is the paper's table of five maths benchmarks. Its MATH column is `math500`, the 500
problems that others report: all 1,000 problems of `agieval_math` are MATH test problems, which
would count twice beside the whole test split, while MATH-500 shares 102 with it.

Responses are greedy, one a prompt. The benchmarks in SMALL have some 30 problems: there
`config.eval.samples` responses a prompt are drawn at `config.eval.temperature`, and every figure is
the mean over them (avg@k).

The budget is spent on each benchmark, and on each sample of it, separately: the top share of its
own prompts by margin goes to the cloud. So every cell stands for the same share of calls, and the
average does not depend on how large the benchmarks are. (One threshold over all of them would ask
more on the hard ones: `calibrate` finds it from the records.)

Intervals come from a bootstrap over a benchmark's prompts, all samples of a prompt together; the
benchmarks are resampled independently, and the average's interval is of the resamples' averages.
Figures that depend on the cloud are over the prompts whose cloud verdict is known.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler
from collab_jax.records import Records
from collab_jax.reports.summary import UNSAFE_CODE, natural_outcomes
from collab_jax.rl import evaluation, experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.routing import curves, routers
from collab_jax.runtime import files, hosts, markdown, process
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent
from collab_jax.tasks import TASKS, task_shares, with_task

SUITES = {"paper": ("math500", "amc23", "aime24", "minerva_math", "agieval_math")}
SMALL = ("amc23", "aime24")
NOTES = {
    "math500": "math500 is a part of MATH's test split.",
    "agieval_math": "agieval_math is not out of MATH's distribution: its 1,000 rows are problems "
    "of MATH's test split, 102 of them in math500, so the two are not independent.",
    "minerva_math": "minerva_math: many gold answers need a tolerance, or are written oddly.",
    "mmlu": "mmlu: in high-school mathematics 74 rows are problems of MATH's training split and 81 "
    "of its test split.",
    "paper": "The paper's averages over five maths benchmarks at 30 % calls, as secondary notes "
    "give them (the benchmarks' exact choice is not known): Qwen2.5-1.5B 80.4, Llama-3.2-3B 79.5, "
    "the cloud alone 93.8.",
}
COLUMNS = {
    "device": "device alone",
    "lenient": "device, tags or not",
    "calls": "natural: calls",
    "overall": "natural: overall",
    "margin": "{budget:.0f} % calls: margin",
    "random": "{budget:.0f} % calls: random",
    "cloud": "cloud alone",
}


def benchmarks(suite: str) -> tuple[str, ...]:
    """Returns the tasks of a suite, or those that `suite` lists. Raises UserError for others."""
    names = SUITES.get(suite) or tuple(suite.split(","))
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(
            f"--suite {suite}: no {unknown[0]!r} among the suites {sorted(SUITES)} and the tasks "
            f"{sorted(TASKS)}"
        )
    return names


# ---- figures


def figures(samples: Sequence[Records], budget: float, seed: int) -> dict[str, np.ndarray]:
    """Returns the figures in COLUMNS of one benchmark, f64[1 + R] each: the means over `samples`.

    samples: a table each, of the same prompts in the same order. Row 0 is the figure, the others
    are of R resamples of the prompts, the same for all tables.
    """
    known = [records.known(table, also=samples) for table in samples]
    at_budget = curves.frontiers(
        {
            **{f"margin {i}": [(t, routers.score("margin", t))] for i, t in enumerate(known)},
            **{f"random {i}": [(t, routers.score("random", t))] for i, t in enumerate(known)},
        },
        [budget],
        seed=seed,
    )

    def mean(method: str, at: float) -> np.ndarray:
        return np.mean([at_budget.at(f"{method} {i}", at) for i in range(len(known))], axis=0)

    return {
        "device": mean_outcome([records.outcomes(t, "local") for t in samples], seed),
        "lenient": mean_outcome([records.outcomes(t, "lenient") for t in samples], seed),
        "calls": mean_outcome([t["natural_called"] for t in samples], seed),
        "overall": mean_outcome([natural_outcomes(t) for t in known], seed),
        "margin": mean("margin", budget),
        "random": mean("random", budget),
        "cloud": mean("margin", 1),
    }


def mean_outcome(outcomes: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Returns the mean of outcomes, bool[n] or grades f64[n] for each sample, and of R resamples.

    f64[1 + R], the mean over the samples, whose prompts are resampled as by `curves.frontiers`.
    """
    return np.mean([curves.mean([outcome], seed=seed) for outcome in outcomes], axis=0)


def by_sample(table: Records, samples: int) -> list[Records]:
    """Returns the records of each sample, prompts in the same order and with the same ids."""
    n = len(table["id"]) // samples
    tables = [
        {name: column[i * n : (i + 1) * n] for name, column in table.items()}
        for i in range(samples)
    ]
    return [one | {"id": tables[0]["id"]} for one in tables]


def summarize(
    tables: Mapping[str, Records], counts: Mapping[str, dict[str, int]], budget: float
) -> dict[str, Any]:
    """Returns `benchmarks` (counts, and a Rate for each of COLUMNS) and their `average`."""
    found = {
        name: figures(by_sample(table, counts[name]["samples"]), budget, seed)
        for seed, (name, table) in enumerate(tables.items())  # a seed each: independent resamples
    }
    rates = {
        name: counts[name] | {column: curves.estimate(x) for column, x in values.items()}
        for name, values in found.items()
    }
    average = {
        column: curves.estimate(np.mean([values[column] for values in found.values()], axis=0))
        for column in COLUMNS
    }
    return {"benchmarks": rates, "average": average}


# ---- evaluation


def evaluate_benchmark(
    run: Run, params: Params, greedy: Sampler, sampled: Sampler, name: str, samples: int
) -> tuple[Records, dict[str, int]]:
    """Returns (records, counts) of one benchmark under `params` (with axis D).

    The records are sample by sample; with several samples the ids end in #1, #2 ...
    """
    trained, config = task_shares(run.config), with_task(run.config, name)
    if name not in trained:
        config.task.update(reward="", judge="", rubric="")  # they are for the run's own tasks
    bench = experiment.with_task_and_cloud_of(run, config)
    with hosts.first_alone(f"that {name} is loaded"):  # which may write the data set
        everything = bench.task.load("test")
    unseen = [example for example in everything if example.seen not in trained]
    examples = experiment.drop_too_long(
        unseen, bench.task, bench.text, config.prompt_length, "test"
    )
    if samples > 1:
        repeated = [
            dataclasses.replace(example, id=f"{example.id}#{i + 1}")
            for i in range(samples)
            for example in examples
        ]
        table = evaluation.evaluate(bench, sampled, params, repeated, name, seed=run.config.seed)
    else:
        table = evaluation.evaluate(bench, greedy, params, examples, name)
    return table, {
        "prompts": len(examples),
        "samples": samples,
        "seen_in_training": len(everything) - len(unseen),
        "too_long": len(unseen) - len(examples),
        "cloud_unknown": int((~table["cloud_known"]).sum()),
        "unjudged": int(table["unjudged"].sum()),
    }


def evaluate_suite(config: ConfigDict, workdir: pathlib.Path, suite: str) -> int:
    """Evaluates the run in `workdir` on `suite` and writes its table; returns the exit status.

    All hosts evaluate; the first writes.
    """
    names = benchmarks(suite)
    with experiment.prepared_in_turn(config, workdir):
        run = experiment.prepare(config, workdir)
    state = evaluation.state_on_all_hosts(run)
    model = experiment.gathering(run.cfg)(state.final_model)
    greedy = evaluation.greedy_sampler(run)
    sampled = rollout.make_sampler(
        run.cfg, run.text, config, group=1, temperature=config.eval.temperature
    )
    out = workdir / f"suite-{suite.replace(',', '+')}"
    out.mkdir(exist_ok=True)
    tables: dict[str, Records] = {}
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        samples = config.eval.samples if name in SMALL else 1
        tables[name], counts[name] = evaluate_benchmark(run, model, greedy, sampled, name, samples)
        if hosts.is_first():
            records.write(out / f"{name}.parquet", tables[name])
    if hosts.is_first():
        _write(out, suite, config, int(state.step[0]), tables, counts)
    hosts.gathered("that it is done", None, hosts.FOREVER)
    return 0


def _write(
    out: pathlib.Path,
    suite: str,
    config: ConfigDict,
    step: int,
    tables: Mapping[str, Records],
    counts: Mapping[str, dict[str, int]],
) -> None:
    """Writes and prints the table; step: the model's."""
    result = {
        "suite": suite,
        "model": config.model.path,
        "step": step,
        "budget": config.budget,
        "temperature": config.eval.temperature,
        "trained_on": sorted(task_shares(config)),
        "unsafe_code": config.task.unsafe_code,
        "machine": process.machine(),
        **summarize(tables, counts, config.budget),
    }
    result["notes"] = notes(suite, result)
    text = render(result)
    files.write_text(out / "table.md", text)
    files.write_text(out / "table.json", json.dumps(result, indent=2) + "\n")
    print(f"{text}\nwrote {out / 'table.md'}, table.json and the records beside them")


# ---- the table


def notes(suite: str, result: Mapping[str, Any]) -> list[str]:
    """Returns the footnotes: contamination, what was left out, what is not known or not safe."""
    lines = [NOTES[key] for key in (*result["benchmarks"], suite) if key in NOTES]
    if result["unsafe_code"]:
        lines.append(UNSAFE_CODE)
    trained_on = ", ".join(result["trained_on"])
    for name, figure in result["benchmarks"].items():
        responses = figure["prompts"] * figure["samples"]
        if figure["seen_in_training"]:
            lines.append(
                f"{name}: left out {figure['seen_in_training']} problems that stand in the "
                f"training data of this run ({trained_on})."
            )
        if figure["too_long"]:
            lines.append(
                f"{name}: left out {figure['too_long']} prompts over config.prompt_length."
            )
        if figure["cloud_unknown"]:
            lines.append(
                f"{name}: the cloud's verdict is not known on {figure['cloud_unknown']} of "
                f"{responses} responses; figures that depend on it are without their prompts."
            )
        if figure["unjudged"]:
            lines.append(
                f"{name}: {figure['unjudged']} of {responses} responses could not be judged; they "
                "count as wrong."
            )
    return lines


def render(result: Mapping[str, Any]) -> str:
    """Returns the text of table.md."""
    titles = [title.format(budget=100 * result["budget"]) for title in COLUMNS.values()]
    rows = [
        [name, _size(figure), *(percent(figure[column]) for column in COLUMNS)]
        for name, figure in result["benchmarks"].items()
    ]
    rows.append(["average", "", *(percent(result["average"][column]) for column in COLUMNS)])
    several = any(figure["samples"] > 1 for figure in result["benchmarks"].values())
    drawn = ""
    if several:
        drawn = f"; x k: the mean of k responses at temperature {result['temperature']:g}"
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return (
        f"# Suite {result['suite']}: {result['model']}, step {result['step']}\n\n"
        "In percent of a benchmark's prompts, with 95 % intervals (bootstrap over prompts). "
        f"Greedy responses{drawn}. The budget is spent on each benchmark separately, by its own "
        f"margins. {machine}.\n\n"
        f"{markdown.table(['benchmark', 'prompts', *titles], rows)}\n\n"
        + "".join(f"- {note}\n" for note in result["notes"])
    )


def _size(figure: Mapping[str, Any]) -> str:
    if figure["samples"] == 1:
        return str(figure["prompts"])
    return f"{figure['prompts']} x {figure['samples']}"
