"""The training loop: sample, judge, update; and what a run writes: metrics and checkpoints."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.gapg import Rollout, TrainState
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.rl import algorithms, experiment, prompt_order, rollout, shares, step
from collab_jax.rl.batch import Batch, make_batch
from collab_jax.rl.experiment import Run
from collab_jax.rl.missing_verdicts import (
    NOTHING_MISSING,
    MissingVerdicts,
    MissingVerdictsFile,
)
from collab_jax.rl.rollout import Collected
from collab_jax.runtime import hosts, metrics, parallel, split
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.process import GracefulStop

NONFINITE_LIMIT = 10  # updates in a row whose gradient is not finite before the run stops


# --------------------------------------------------------------------------- the steps


Update = Callable[[TrainState, Rollout], tuple[TrainState, dict[str, jax.Array]]]


def update_body(
    cfg: DecoderConfig, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Update:
    """Returns the body (state, rollout) -> state, metrics of one device; state may be donated."""
    body = step.make_step(
        cfg,
        optimizer,
        algorithms.make_algorithm(config),
        axis=parallel.AXIS,
        micro_rows=config.train.micro_rows,
        temperature=config.temperature,
        chunk=config.train.logprob_chunk,
        average=config.optim.average,
    )

    def keyed(state: TrainState, rollout: Rollout) -> tuple[TrainState, dict[str, jax.Array]]:
        assert (rollout.hidden is not None) == algorithms.decision_alone(config)
        # The filter's key is a function of (seed, step), differs from the samples' keys, and is the
        # same on all devices.
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(config.seed), state.step), 0x66696C74
        )
        return body(state, rollout, key)

    return keyed


def compile_update(run: Run) -> Update:
    """Returns update(state, rollout) -> state, metrics, compiled at its first call.

    Arguments and results have the axis D; the state is donated.
    """
    return parallel.Program(update_body(run.cfg, run.optimizer, run.config), donate=(0,))


class TrainingSteps:
    """The wiring of a run's steps: choose prompts, sample and judge, update, read the metrics.

    update(state, rollout) -> state, metrics is that of `compile_update`. Of several hosts each
    samples its share of a step's prompts, and all update together.
    """

    def __init__(self, run: Run):
        config = run.config
        self.run, self.examples = run, experiment.examples(run, "train")
        self._prompts, self._mask = run.text.prompt_batch(
            [run.task.prompt(e) for e in self.examples], config.prompt_length
        )
        self._choose = prompt_order.chooser(run, self.examples)
        self.sampler = rollout.make_sampler(
            run.cfg,
            run.text,
            config,
            group=config.group,
            temperature=config.temperature,
            keep_hidden=algorithms.decision_alone(config),
        )
        self.update: Update = compile_update(run)
        self._gathered = experiment.gathering(run.cfg)
        # A replay may lack answers that no step needed, and those that a step did without.
        prefetches = algorithms.needs_cloud(config) and config.cloud.mode != "replay"
        prefetches = prefetches and hosts.is_first()
        self._steps_ahead = config.cloud.prefetch if prefetches else 0
        self._prefetched = 0  # the cloud has been asked on the prompts of all steps before it

    def batch(self, step: int) -> Batch:
        """Returns the prompts of step number `step` (from 0)."""
        chosen = self._choose(step, self.run.config.prompts_per_step)
        examples = [self.examples[i] for i in chosen]
        return make_batch(examples, self._prompts[chosen], self._mask[chosen])

    def collect(
        self,
        params: Params,
        step: int,
        *,
        skip: MissingVerdicts = NOTHING_MISSING,
        while_sampling: Callable[[], None] | None = None,
    ) -> Collected:
        """Returns `rollout.collect` of step number `step`; asks the cloud on coming steps first.

        params has axis D; it is gathered where devices have parts of it. Of several hosts each
        collects its own share.
        """
        params = self._gathered(params)  # first: where a host fails, no other waits for it in there
        config = self.run.config
        end = min(step + self._steps_ahead, config.train.steps)
        for coming in range(max(step, self._prefetched), end):
            prompts, ids = rollout.cloud_prompts(self.run.task, self.batch(coming).examples)
            self.run.cloud.submit(prompts, ids)
            self._prefetched = coming + 1
        return rollout.collect(
            self.run,
            self.sampler,
            params,
            shares.own(self.batch(step)),
            step=step,
            wait=config.cloud.wait,
            skip=skip,
            while_sampling=while_sampling,
        )

    def row(
        self, step: int, update_metrics: dict[str, jax.Array], collected: Collected
    ) -> dict[str, Any]:
        """Returns a step's metrics as plain numbers by name; waits for its update.

        update_metrics has axis D. Of the cloud: what was bought since the last call.
        """
        values = parallel.unreplicate(update_metrics)
        bought = self.run.cloud.take_tally()._asdict()
        undecided = collected.missing.responses.values()
        return {
            "step": step + 1,
            **{name: value.item() for name, value in values.items()},
            "cut_off": collected.cut_off,
            "cloud_asked": collected.cloud_asked,
            "cloud_unknown": len(collected.missing.prompts),
            **{f"cloud_{name}": value for name, value in bought.items()},
            "verifier_timeouts": sum(verdict.timed_out for verdict in undecided),
            "verifier_failures": sum(verdict.unjudged for verdict in undecided),
        }


# --------------------------------------------------------------------------- what a run writes


def save_state(run: Run, step: int, state: TrainState) -> None:
    """Saves the state (with axis D) before step number `step`, without its frozen parameters.

    Those are in the model's folder. A step that is saved already is left as it is. Of several hosts
    the first saves; where parameters are divided, all call this.
    """
    trained = state.replace(frozen=None)
    divided = split.over(trained) is not None
    if divided:  # in the collective a host would wait for another one without hearing why it fails
        hosts.gathered(f"that it saves step {step}", None)
    if divided or hosts.is_first():
        whole = parallel.unreplicate(trained)
        if hosts.is_first() and not run.checkpoints.has(step):
            run.checkpoints.save(step, whole)


def health_problem(row: dict[str, Any], run: Run) -> str | None:
    """Returns why going on is pointless after a step with these metrics; None where it is not."""
    saved = f"the state is saved in {run.checkpoints.folder}"
    if row["nonfinite_streak"] >= NONFINITE_LIMIT:
        return (
            f"the gradient was not finite {NONFINITE_LIMIT} steps in a row; {saved}: "
            "lower config.optim.learning_rate, and check the model's weights"
        )
    if row["empty_d1_streak"] >= run.config.train.empty_d1_limit:
        return (
            f"no prompt was solved on the device {row['empty_d1_streak']} steps in a row, so "
            f"nothing can be learnt; {saved}: warm the model up (python -m collab_jax.sft), or "
            "choose easier prompts"
        )
    return None


class StepResult(NamedTuple):
    """A step whose update has been started, and may still run on the devices."""

    step: int  # from 0
    metrics: dict[str, jax.Array]  # of the update, with axis D
    collected: Collected
    sampled: float  # time.monotonic() when its rollout was complete
    last: bool  # no step of this process follows


class RunLog:
    """What a run writes beside its updates: metrics, checkpoints, the progress bar, warnings."""

    def __init__(self, steps: TrainingSteps, first: int, bar: tqdm):
        self._steps, self._run, self._bar = steps, steps.run, bar
        self._writer = metrics.MetricsWriter(self._run.workdir, first, hosts.is_first())
        self._warned: set[str] = set()
        self._ready = time.monotonic()  # when the devices were done with the latest update
        self._begun = self._written = first  # steps whose finishing has begun; that have a row

    def finish_step(self, state: TrainState, result: StepResult) -> None:
        """Writes a step's metrics and, when it is due, the state after it (with axis D).

        It waits for the step's update. A second call for one step does nothing. Raises UserError
        where going on is pointless; the state is saved by then.
        """
        if result.step < self._begun:
            return
        self._begun = result.step + 1
        config = self._run.config
        row = self._steps.row(result.step, result.metrics, result.collected)
        now = time.monotonic()
        row |= {"seconds_rollout": result.sampled - self._ready, "seconds": now - self._ready}
        self._ready = now
        self._writer.write(row)
        self._written = result.step + 1
        self._bar.set_postfix_str(progress(row, config.budget), refresh=False)
        self._bar.update()
        sampled = not algorithms.scores_decisions(config)
        message = metrics.collapse_warning(self._writer.rows, sampled)
        if message and message not in self._warned:
            self._warned.add(message)
            self._bar.write(f"warning, step {result.step + 1}: {message}", file=sys.stderr)
        problem = health_problem(row, self._run)
        due = (result.step + 1) % config.train.checkpoint_every == 0
        if problem or result.last or due:
            save_state(self._run, result.step + 1, state)
        if problem:
            raise UserError(problem)

    def save_after_error(
        self,
        error: Exception,
        step: int,
        state: TrainState,
        finish_previous: Callable[[], None],
    ) -> None:
        """Saves the state before step number `step`, whose rollout ended with `error`.

        The previous step's metrics are written first, if they are not yet; where that is not
        possible, no state is saved, since a resumed run would lack them. Nor is one of which other
        hosts have parts: the run goes on from its last checkpoint. An error in here becomes a note
        of `error`.
        """
        apart = hosts.count() > 1 and split.over(state) is not None
        try:
            finish_previous()
            if self._written == step and not apart:
                save_state(self._run, step, state)
        except Exception as failure:
            error.add_note(f"the state before step {step + 1} was not saved: {failure}")

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


def progress(row: dict[str, Any], budget: float) -> str:
    """Returns the live figures beside the progress bar."""
    return (
        f"reward {row['reward']:.2f}, local {row['local_accuracy']:.0%}, "
        f"calls {row['call_rate']:.0%} (budget {budget:.0%}), "
        f"D1/D2/dropped {row['d1']}/{row['d2']}/{row['dropped']}, "
        f"{row['tokens'] / row['seconds']:.0f} tok/s"
    )


def progress_bar(first: int, last: int) -> tqdm:
    """Returns the bar of the steps from `first` to `last`; of several hosts the first shows it."""
    return tqdm(
        total=last,
        initial=first,
        desc="train",
        unit="step",
        mininterval=1,
        disable=not hosts.is_first(),
    )


# --------------------------------------------------------------------------- the loop


def train(run: Run, stop: GracefulStop | None = None) -> TrainState | None:
    """Trains to `config.train.steps`; returns the final state with axis D, or None if stopped.

    stop: may ask the run to stop after a step, with the state saved. Where an error ends a rollout,
    the state before that step is saved, if this host has all of it, and the error is raised;
    interrupts save nothing.
    """
    last_step = run.config.train.steps
    state = experiment.state_on_devices(run)
    first = int(parallel.unreplicate(state.step))
    if first >= last_step:
        return state
    steps, missing = TrainingSteps(run), MissingVerdictsFile(run.workdir, hosts.is_first())
    run.cloud.take_tally()  # what an evaluation bought is not a step's
    asked_to_stop = False
    finish_previous: Callable[[], None] = lambda: None  # noqa: E731
    with (
        stop or contextlib.nullcontext(),
        progress_bar(first, last_step) as bar,
    ):
        log = RunLog(steps, first, bar)
        for i in range(first, last_step):
            try:
                # The previous step's metrics and checkpoint are written while the devices sample.
                collected = steps.collect(
                    state.sampling_model, i, skip=missing.at(i), while_sampling=finish_previous
                )
                # Asked once: a signal may come between the save and the return.
                requested = stop is not None and stop.requested
                collected, asked_to_stop = shares.agreed(i, collected, requested)
                missing.write(i, collected.missing)
            except Exception as error:
                log.save_after_error(error, i, state, finish_previous)
                raise
            sampled = time.monotonic()
            state, update_metrics = steps.update(state, collected.rollout)
            last = asked_to_stop or i + 1 == last_step
            result = StepResult(i, update_metrics, collected, sampled, last)
            finish_previous = functools.partial(log.finish_step, state, result)
            if last:
                finish_previous()
                break
    log.close()
    missing.close()
    return None if asked_to_stop else state
