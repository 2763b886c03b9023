"""A suite: one table over several benchmarks, `python -m collab_jax.evaluate --suite paper --config
... --workdir RUN`.

Evaluates the run's last checkpoint (in an empty workdir, the model of the config) on every
benchmark of the suite and writes RUN/suite-NAME/: the records of each (BENCHMARK.parquet), table.md
and table.json. `--suite` takes a name of SUITES or tasks with commas between them.

`paper` is the paper's table of five maths benchmarks. Its MATH column is `math500`, the 500
problems that others report: all 1,000 problems of `agieval_math` are MATH test problems, which
beside the whole test split would count twice, while MATH-500 shares 102 with it.

Responses are greedy, one a prompt. The benchmarks in SMALL have some 30 problems: there
`config.eval.samples` responses a prompt are drawn at `config.eval.temperature`, and every figure is
the mean over them (avg@k).

A budget is spent on each benchmark, and on each sample of it, apart: the top share of its own
prompts by margin goes to the cloud. So every cell stands for the same share of calls, and the
average does not depend on how large the benchmarks are. (One threshold over all of them would ask
more on the hard ones: `calibrate` on the records finds it.)

Intervals: a bootstrap over a benchmark's prompts, all samples of a prompt together; benchmarks are
drawn independently, and the average's interval is of the resamples' averages.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from collab_jax import records
from collab_jax.gapg import TrainState
from collab_jax.records import Records
from collab_jax.rl import evaluation, experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.routing import measures, routers
from collab_jax.runtime import markdown, parallel, process
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.markdown import percent
from collab_jax.tasks import TASKS, Example, task_shares, with_task

SUITES = {"paper": ("math500", "amc23", "aime24", "minerva_math", "agieval_math")}
SMALL = ("amc23", "aime24")
NOTES = {
    "math500": "math500 is a part of MATH's test split.",
    "agieval_math": "agieval_math is not out of MATH's distribution: its 1,000 rows are problems of MATH's test split, 102 of "
    "them in math500, so the two are not independent.",
    "minerva_math": "minerva_math: many gold answers need a tolerance, or are written oddly.",
    "mmlu": "mmlu: in high-school mathematics 74 rows are problems of MATH's training split and 81 of its test split.",
    "paper": "The paper's averages over five maths benchmarks at 30 % calls, as secondary notes give them (the benchmarks' "
    "exact choice is not known): Qwen2.5-1.5B 80.4, Llama-3.2-3B 79.5, the cloud alone 93.8.",
}
COLUMNS = {
    "device": "device alone",
    "calls": "natural: calls",
    "overall": "natural: overall",
    "margin": "{budget:.0f} % calls: margin",
    "random": "{budget:.0f} % calls: random",
    "cloud": "cloud alone",
}


def benchmarks(name: str) -> tuple[str, ...]:
    """The tasks of a suite, or those that `name` lists. Raises UserError for an unknown one."""
    names = SUITES.get(name) or tuple(name.split(","))
    if unknown := [n for n in names if n not in TASKS]:
        raise UserError(
            f"--suite {name}: no {unknown[0]!r} among the suites {sorted(SUITES)} and the tasks {sorted(TASKS)}"
        )
    return names


def figures(tables: Sequence[Records], budget: float, seed: int) -> dict[str, np.ndarray]:
    """The figures in COLUMNS of one benchmark, f64[1 + R] each: the mean over `tables`, one a
    sample of every prompt.

    Row 0 is the figure, the others are of resamples of the prompts, the same for all tables.
    """
    flat, methods = np.zeros(len(tables[0]["id"])), {}
    for i, t in enumerate(tables):
        overall = np.where(t["natural_called"], t["cloud_correct"], t["natural_correct"])
        methods |= {
            f"margin {i}": [(t, routers.score("margin", t))],
            f"random {i}": [(t, routers.score("random", t))],
            # At a budget of 0 a frontier is the mean of local_correct, whatever stands there.
            f"calls {i}": [(t | {"local_correct": t["natural_called"]}, flat)],
            f"overall {i}": [(t | {"local_correct": overall}, flat)],
        }
    f = measures.frontiers(methods, [budget], seed=seed)
    mean = lambda name, at: np.mean([f.at(f"{name} {i}", at) for i in range(len(tables))], axis=0)  # noqa: E731
    return {
        "device": mean("margin", 0),
        "calls": mean("calls", 0),
        "overall": mean("overall", 0),
        "margin": mean("margin", budget),
        "random": mean("random", budget),
        "cloud": mean("margin", 1),
    }


def by_sample(table: Records, samples: int) -> list[Records]:
    """The records of each sample, prompts in the same order and with the same ids."""
    n = len(table["id"]) // samples
    parts = [
        {name: column[i * n : (i + 1) * n] for name, column in table.items()}
        for i in range(samples)
    ]
    return [part | {"id": parts[0]["id"]} for part in parts]


def evaluate_benchmark(
    run: Run, state: TrainState, greedy, sampled, name: str, samples: int
) -> tuple[Records, dict[str, int]]:
    """(records, counts) of one benchmark: sample by sample, ids of several end in #1, #2 ...; state
    with axis D.
    """
    trained, config = task_shares(run.config), with_task(run.config, name)
    if name not in trained:
        config.task.update(reward="", judge="")  # they are for the run's own tasks
    bench = experiment.with_config(run, config)
    everything = bench.task.load("test")
    unseen = [e for e in everything if e.seen not in trained]
    examples = experiment.examples(
        bench._replace(task=dataclasses.replace(bench.task, load=lambda split: unseen)), "test"
    )
    repeated: list[Example] = [
        dataclasses.replace(e, id=f"{e.id}#{i + 1}") if samples > 1 else e
        for i in range(samples)
        for e in examples
    ]
    parts = bench.text, bench.task, bench.cloud, repeated, bench.config, name
    if samples > 1:
        table = evaluation.evaluate(sampled, state.final_model, *parts, seed=run.config.seed)
    else:
        table = evaluation.evaluate(greedy, state.final_model, *parts)
    counts = {
        "prompts": len(examples),
        "samples": samples,
        "seen_in_training": len(everything) - len(unseen),
        "too_long": len(unseen) - len(examples),
        "cloud_unknown": int((~table["cloud_known"]).sum()),
        "unjudged": int(table["unjudged"].sum()),
    }
    return table, counts


def summarize(tables: dict[str, tuple[Records, dict[str, int]]], budget: float) -> dict:
    """`benchmarks` (counts, and a Rate for each of COLUMNS) and their `average`."""
    found, all_figures = {}, []
    for seed, (name, (table, counts)) in enumerate(tables.items()):
        of = figures(
            by_sample(table, counts["samples"]), budget, seed
        )  # a seed each: independent draws
        all_figures.append(of)
        found[name] = counts | {column: measures.estimate(values) for column, values in of.items()}
    average = {
        c: measures.estimate(np.mean([of[c] for of in all_figures], axis=0)) for c in COLUMNS
    }
    return {"benchmarks": found, "average": average}


def notes(name: str, result: dict) -> list[str]:
    """The footnotes of a table: contamination, what was left out, what is not known."""
    found = [NOTES[key] for key in (*result["benchmarks"], name) if key in NOTES]
    for bench, of in result["benchmarks"].items():
        left = {
            "seen_in_training": f"problems that stand in the training data of this run ({', '.join(result['trained_on'])})",
            "too_long": "prompts over config.prompt_length",
        }
        found += [f"{bench}: left out {of[key]} {what}." for key, what in left.items() if of[key]]
        if of["cloud_unknown"]:
            found.append(
                f"{bench}: {of['cloud_unknown']} cloud answers are not known; they count as wrong."
            )
        if of["unjudged"]:
            found.append(
                f"{bench}: {of['unjudged']} responses could not be judged; they count as wrong."
            )
    return found


def render(result: dict) -> str:
    """table.md."""
    titles = [title.format(budget=100 * result["budget"]) for title in COLUMNS.values()]
    line = lambda of: [percent(of[column]) for column in COLUMNS]  # noqa: E731

    def size(of: dict) -> str:
        return str(of["prompts"]) if of["samples"] == 1 else f"{of['prompts']} x {of['samples']}"

    rows = [[name, size(of), *line(of)] for name, of in result["benchmarks"].items()]
    rows.append(["average", "", *line(result["average"])])
    several = any(of["samples"] > 1 for of in result["benchmarks"].values())
    drawn = (
        f"; x k: the mean of k responses at temperature {result['temperature']:g}"
        if several
        else ""
    )
    return (
        f"# Suite {result['suite']}: {result['model']}, step {result['step']}\n\n"
        f"In percent of a benchmark's prompts, with 95 % intervals (bootstrap over prompts). Greedy responses{drawn}. "
        "The budget is spent on each benchmark apart, by its own margins. "
        f"{', '.join(f'{key} {value}' for key, value in result['machine'].items())}.\n\n"
        f"{markdown.table(['benchmark', 'prompts', *titles], rows)}\n\n"
        + "".join(f"- {note}\n" for note in result["notes"])
    )


def main(config: ConfigDict, workdir: pathlib.Path, name: str) -> int:
    """The command line: evaluates the run in `workdir` on the suite `name`."""
    chosen = benchmarks(name)
    run = experiment.prepare(config, workdir)
    state = parallel.replicate(experiment.load_state(run))
    greedy = evaluation.greedy_sampler(run)
    sampled = rollout.make_sampler(
        run.cfg, run.text, config, group=1, temperature=config.eval.temperature
    )
    out = workdir / f"suite-{name.replace(',', '+')}"
    out.mkdir(exist_ok=True)
    tables = {}
    for task in chosen:
        samples = config.eval.samples if task in SMALL else 1
        tables[task] = evaluate_benchmark(run, state, greedy, sampled, task, samples)
        records.write(out / f"{task}.parquet", tables[task][0])
    result = {
        "suite": name,
        "model": config.model.path,
        "step": int(state.step[0]),
        "budget": config.budget,
        "temperature": config.eval.temperature,
        "trained_on": sorted(task_shares(config)),
        "machine": process.machine(),
        **summarize(tables, config.budget),
    }
    result["notes"] = notes(name, result)
    text = render(result)
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{text}\nwrote {out / 'table.md'}, table.json and the records beside them")
    return 0
