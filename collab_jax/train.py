"""Training: GAPG from a warm-started device model.

    python -m collab_jax.train --config configs/countdown_tiny.py --workdir DIR [--config.KEY=VALUE]

evaluates, trains, evaluates again and writes a report to DIR. The same command resumes, bit for bit
on a CPU, whatever stopped it; SIGTERM or Ctrl-C saves and exits with status 75. DIR then holds
config.json, metrics.jsonl (with TensorBoard events beside it), checkpoints/, cloud.sqlite,
missing_verdicts.jsonl (verdicts that a step did without), before.parquet, after.parquet (and
fit.parquet) and the report (report.json, report.md, report.html, figures).

Several hosts, with DIR on a file system that all share, run the same command with --hosts=N and,
where no scheduler tells them, --host=I --coordinator=ADDRESS:PORT (docs/scale.md).
"""

from collab_jax.runtime import process

process.restart_with_allocator(__name__)

import pathlib
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from collab_jax import gapg, records
from collab_jax.cloud import ledger
from collab_jax.gapg import TrainState
from collab_jax.models.sampler import Sampler
from collab_jax.records import Records
from collab_jax.reports import run as run_report
from collab_jax.reports import summary
from collab_jax.rl import (
    cloud_columns,
    evaluation,
    experiment,
    memory_check,
    prompt_order,
    rollout,
    training,
)
from collab_jax.rl.experiment import Run
from collab_jax.routing import recorded
from collab_jax.runtime import cli, hosts, metrics, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example


def main(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Trains the run in `workdir`, evaluates it before and after; returns the exit status.

    All hosts train and evaluate; the first writes what comes of it.
    """
    stop = process.GracefulStop()
    with experiment.prepared_in_turn(config, workdir):
        run = experiment.prepare(config, workdir)
        print(memory_check.check_fits(run.cfg, config, memory_check.this_machine()))
        print(_where_it_stands(run))
        recorded.check(run)
        held_out = evaluation.held_out(run, config.eval.split)
        fit_examples = prompt_order.fit_examples(run)
    with experiment.held(workdir):
        completed = train(run, stop, held_out, fit_examples)
    hosts.gathered("that it is done", None, hosts.FOREVER)
    return 0 if completed else process.STOPPED


def train(
    run: Run,
    stop: process.GracefulStop,
    held_out: Sequence[Example],
    fit_examples: Sequence[Example],
) -> bool:
    """Trains and evaluates; returns whether the run was not stopped."""
    config = run.config
    sampler = evaluation.greedy_sampler(run)
    before = evaluate_before(run, sampler, held_out) if held_out else None
    state = training.train(run, stop)
    if state is None:
        print(f"stopped and saved; the same command goes on from step {run.checkpoints.latest()}")
        return False
    if before is None:
        return True
    # A signal may have come since it was asked, during the last update or its save.
    if any(hosts.gathered("whether it is to stop", stop.requested)):
        print("stopped and saved; the same command evaluates what is trained")
        return False
    after = evaluate_after(run, sampler, state, held_out, fit_examples)
    if not hosts.is_first():
        return True

    for kind, row in summary.examples_to_show(after):
        print(f"  {kind}: {after['prompt'][row]} -> {after['natural_text'][row]}")
    print(
        run_report.write_report(
            run.workdir,
            config,
            filter_state=parallel.unreplicate(state.filter),
            steps=metrics.read(run.workdir / "metrics.jsonl"),
            before=before,
            after=after,
            cloud_costs=cloud_costs(run),
            machine=process.machine(),
        )
    )
    return True


def evaluate_before(run: Run, sampler: Sampler, held_out: Sequence[Example]) -> Records:
    """Returns the records of the model that the run starts from, kept in before.parquet."""
    path = run.workdir / "before.parquet"
    if not path.exists() and run.checkpoints.latest() is not None:
        raise UserError(
            f"{run.workdir} has checkpoints but no before.parquet: restore that file, "
            "or use another --workdir"
        )

    def make() -> Records:
        start = experiment.state_on_devices(run)
        model = experiment.gathering(run.cfg)(start.final_model)
        return evaluation.evaluate(run, sampler, model, held_out, "before")

    return read_or_evaluate(run, path, held_out, make)


def evaluate_after(
    run: Run,
    sampler: Sampler,
    state: TrainState,
    held_out: Sequence[Example],
    fit_examples: Sequence[Example],
) -> Records:
    """Returns the records of the trained model, its routers' scores in them (after.parquet).

    state: with axis D. Learned routers are fitted on the device's verdicts on `fit_examples`
    (fit.parquet), for which no cloud answer is bought.
    """
    model, fit_on = experiment.gathering(run.cfg)(state.final_model), None
    if fit_examples:
        fit_on = read_or_make(
            run.workdir / "fit.parquet",
            lambda: evaluation.evaluate(
                run, sampler, model, fit_examples, "fit", natural=False, ask_cloud=False
            ),
        )

    def make() -> Records:
        table = evaluation.evaluate(run, sampler, model, held_out, "after")
        if not hosts.is_first():
            return table
        return recorded.with_routers(run, model, table, [*held_out, *fit_examples], fit_on)

    return read_or_evaluate(run, run.workdir / "after.parquet", held_out, make)


def read_or_make(path: pathlib.Path, make: Callable[[], Records]) -> Records:
    """Returns the records in `path`, which `make()` makes where no earlier start has left any.

    All hosts make them; the first one looks, and writes.
    """
    there = hosts.gathered(f"whether {path.name} is there", path.exists(), hosts.FOREVER)[0]
    if not there:
        table = make()
        if not hosts.is_first():
            return table
        records.write(path, table)
    return records.read(path)


def read_or_evaluate(
    run: Run, path: pathlib.Path, examples: Sequence[Example], make: Callable[[], Records]
) -> Records:
    """Returns the records of `examples` in `path`, as `read_or_make`, with enough cloud verdicts.

    Where an earlier start left more unknown ones than are allowed now, they are asked for again.
    """
    table = read_or_make(path, make)
    too_many = cloud_columns.too_many_unknown(run, table)
    # Host 0 may have run the model for its routers meanwhile.
    if hosts.gathered(f"whether {path.name} lacks verdicts", too_many, hosts.FOREVER)[0]:
        table = cloud_columns.ask_again(run, table, examples, path.stem)
        if hosts.is_first():
            records.write(path, table)
    return table


def cloud_costs(run: Run) -> run_report.CloudCosts:
    """Returns what the store's answers cost: all of them, and those to training prompts."""
    prompts, _ = rollout.cloud_prompts(run.task, experiment.examples(run, "train"))
    return run_report.CloudCosts(
        everything=ledger(run.cloud.store),
        training=ledger(run.cloud.store, map(run.cloud.key_of, prompts)),
        spent=run.cloud.budget.spent(),
    )


def _where_it_stands(run: Run) -> str:
    """Returns a line on the run: what it is, on which devices, and how far it is."""
    config = run.config
    return (
        f"{run.workdir}: {run.folder.name}, {config.task.name}, "
        f"budget {config.budget:g} (rho {gapg.rho_of(config.budget)}), "
        f"{jax.device_count()} {jax.default_backend()} devices"
        f"{f' of {hosts.count()} hosts' if hosts.count() > 1 else ''}, "
        f"step {run.checkpoints.latest() or 0} of {config.train.steps}"
    )


if __name__ == "__main__":
    cli.run_with_config(main, several_hosts=True)
