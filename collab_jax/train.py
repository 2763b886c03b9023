"""Training: GAPG from a warm-started device model.

    python -m collab_jax.train --config configs/countdown_tiny.py --workdir DIR [--config.KEY=VALUE ...]

evaluates, trains, evaluates again and writes a report to DIR. The same command resumes, bit for bit
on a CPU, whatever stopped it; SIGTERM or Ctrl-C saves and exits 0. DIR then holds config.json,
metrics.jsonl (with TensorBoard events beside it), checkpoints/, cloud.sqlite, unknown.jsonl (cloud
verdicts that a step did without), before.parquet, after.parquet (and fit.parquet) and the report
(report.json, report.md, report.html, figures).
"""

import pathlib
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from collab_jax import gapg, records
from collab_jax.cloud import ledger
from collab_jax.reports import run as run_report
from collab_jax.reports import summary
from collab_jax.rl import evaluation, experiment, memory_plan, rollout, training
from collab_jax.rl.experiment import Run
from collab_jax.routing import recorded
from collab_jax.runtime import cli, metrics, parallel, process
from collab_jax.runtime.errors import UserError


def costs_of_cloud(run: Run) -> run_report.CloudCosts:
    """What the cloud has cost: all of it, and the answers to training prompts, whoever bought them."""
    training, _ = rollout.cloud_prompts(run.task, experiment.examples(run, "train"))
    of_training = ledger(run.cloud.store, map(run.cloud.key, training))
    return run_report.CloudCosts(ledger(run.cloud.store), of_training, run.cloud.budget.spent())


def read_or_make(path: pathlib.Path, make: Callable[[], records.Records]) -> records.Records:
    """The records in `path`, made by `make()` where no earlier start of this run has left them."""
    if not path.exists():
        records.write(path, make())
    return records.read(path)


def main(config: ConfigDict, workdir: pathlib.Path) -> int:
    """The command line."""
    stop = training.GracefulStop()
    run = experiment.prepare(config, workdir)
    print(memory_plan.check_fits_here(run.cfg, config))
    print(
        f"{workdir}: {run.folder.name}, {config.task.name}, budget {config.budget:g} (rho {gapg.rho_of(config.budget)}), "
        f"{jax.local_device_count()} {jax.default_backend()} devices, step {run.checkpoints.latest() or 0} of {config.train.steps}"
    )
    recorded.check(run)
    before, greedy, held, fit = (
        None,
        evaluation.greedy_sampler(run),
        evaluation.held_out(run),
        training.fit_examples(run),
    )
    if config.eval.prompts:
        if not (workdir / "before.parquet").exists() and run.checkpoints.latest() is not None:
            raise UserError(
                f"{workdir} has checkpoints but no before.parquet: restore that file, or use another --workdir"
            )
        start = lambda: parallel.replicate(experiment.load_state(run))  # noqa: E731
        before = read_or_make(
            workdir / "before.parquet",
            lambda: evaluation.evaluate_state(run, greedy, start(), held, "before"),
        )
    state = training.train(run, stop)
    if state is None:
        print(f"stopped and saved; the same command goes on from step {run.checkpoints.latest()}")
        return 0
    if before is not None:
        fit_table = None
        if fit:  # routers are fitted on the device's verdicts: no cloud answer is bought
            parts = greedy, state.final_model, run.text, run.task, None, fit, config, "fit"
            fit_table = read_or_make(
                workdir / "fit.parquet", lambda: evaluation.evaluate(*parts, natural=False)
            )

        def final() -> records.Records:
            table = evaluation.evaluate_state(run, greedy, state, held, "after")
            return recorded.with_routers(run, state, table, held + fit, fit_table)

        after = read_or_make(workdir / "after.parquet", final)
        for kind, i in summary.examples_to_show(after):
            print(f"  {kind}: {after['prompt'][i]} -> {after['natural_text'][i]}")
        filter_state = parallel.unreplicate(state.filter)
        rows = metrics.read(workdir / "metrics.jsonl")
        machine = process.machine()
        print(
            run_report.write(
                workdir, config, filter_state, rows, before, after, costs_of_cloud(run), machine
            )
        )
    return 0


if __name__ == "__main__":
    cli.main(main)
