"""The training loop: sample, judge, update, and keep the metrics and checkpoints of a run."""

import functools
import signal
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from collab_jax import gapg
from collab_jax.cloud import BudgetSpent
from collab_jax.rl import algorithms, experiment, rollout, step
from collab_jax.rl.experiment import Run
from collab_jax.rl.unknown import Unknown
from collab_jax.runtime import metrics, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, mix

NONFINITE_LIMIT = 10  # updates in a row whose gradient is not finite before the run stops


class GracefulStop:
    """SIGTERM and Ctrl-C: exit at once with status 0, or, inside `with stop:`, when the block asks
    `requested`.
    """

    def __init__(self):
        self.requested = self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.requested = True
        if not self._deferred:
            sys.exit(0)

    def __enter__(self):
        self._deferred = True
        return self

    def __exit__(self, *_):
        self._deferred = False


def prompt_indices(seed: int, step: int, count: int, total: int) -> np.ndarray:
    """Which of `total` training prompts step number `step` uses, [count]: a new order each epoch, a
    function of (seed, step).
    """
    return _in_order(seed, np.arange(step * count, (step + 1) * count), total)


def _in_order(seed: int, place: np.ndarray, total: int) -> np.ndarray:
    """Which of `total` prompts stand at these places of an endless sequence, in which each epoch
    has an order of its own.
    """
    orders = {
        epoch: np.random.default_rng([seed, int(epoch)]).permutation(total)
        for epoch in np.unique(place // total)
    }
    return np.array([orders[p // total][p % total] for p in place], np.int64)


def chooser(run: Run, examples: list[Example]) -> Callable[[int, int], np.ndarray]:
    """choose(step, count) -> which of the training examples step number `step` uses, i64[count]; of
    a mix by its weights.
    """
    seed, task = run.config.seed, run.task
    if task.weights is None:
        return lambda step, count: prompt_indices(seed, step, count, len(examples))
    pools, weights = mix.pools(task, examples), list(task.weights.values())

    def choose(step: int, count: int) -> np.ndarray:
        return mix.indices(
            seed, np.arange(step * count, (step + 1) * count), pools, weights, _in_order
        )

    return choose


def fit_examples(run: Run) -> list[Example]:
    """`config.eval.fit_prompts` training prompts that no step of this run uses, for routers that
    are learned.
    """
    config = run.config
    if not config.eval.fit_prompts:
        return []
    examples = experiment.examples(run, "train")
    used = chooser(run, examples)(0, config.prompts_per_step * config.train.steps)
    unused = np.setdiff1d(np.arange(len(examples)), used)
    if len(unused) < config.eval.fit_prompts:
        raise UserError(
            f"config.eval.fit_prompts={config.eval.fit_prompts}, but training leaves {len(unused)} of {len(examples)} training "
            "prompts unused: lower it, or raise config.task.train_examples"
        )
    return [examples[i] for i in unused[: config.eval.fit_prompts]]


def make_step(run: Run):
    """The compiled update: step(state, rollout) -> state, metrics, all with axis D; the state is
    donated.
    """
    config = run.config
    body = step.make_step(
        run.cfg,
        run.optimizer,
        algorithms.make_algorithm(config),
        axis=parallel.AXIS,
        micro_rows=config.train.micro_rows,
        lengths=step.cut_lengths(config.max_new_tokens, config.train.lengths),
        temperature=config.temperature,
        chunk=config.train.logprob_chunk,
        average=config.optim.average,
    )

    def keyed(state, rollout):
        # The filter's key is a function of (seed, step), apart from the samples' keys, and the same
        # on all devices.
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(config.seed), state.step), 0x66696C74
        )
        return body(state, rollout, key)

    return parallel.pmap(keyed, donate=(0,))


def check_health(row: dict, run: Run) -> None:
    """Raises UserError where going on is pointless; the state is saved by then."""
    if row["nonfinite_streak"] >= NONFINITE_LIMIT:
        raise UserError(
            f"the gradient was not finite {NONFINITE_LIMIT} steps in a row; the state is saved in {run.checkpoints.folder}: "
            "lower config.optim.learning_rate, and check the model's weights"
        )
    if row["empty_d1_streak"] >= run.config.train.empty_d1_limit:
        raise UserError(
            f"no prompt was solved on the device {row['empty_d1_streak']} steps in a row, so nothing can be learnt; the state is "
            f"saved in {run.checkpoints.folder}: warm the model up (python -m collab_jax.sft), or choose easier prompts"
        )


def save(run: Run, step: int, state: gapg.TrainState) -> None:
    """Keeps the state (with axis D) before step number `step`, without what is frozen: that is the
    model folder's.
    """
    run.checkpoints.save(step, parallel.unreplicate(state.replace(frozen=None)))


def train(run: Run, stop: GracefulStop) -> gapg.TrainState | None:
    """Trains to `config.train.steps`; the final state with axis D, or None where it was asked to
    stop.
    """
    # ------------------------------------------------------------------------------------------------ set-up
    config, Q = run.config, run.config.prompts_per_step
    state = parallel.replicate(experiment.load_state(run))
    first = int(parallel.unreplicate(state.step))
    if first >= config.train.steps:
        return state
    examples = experiment.examples(run, "train")
    prompts = run.text.prompt_batch([run.task.prompt(e) for e in examples], config.prompt_length)
    choose = chooser(run, examples)
    kinds = {"group": config.group, "solo": config.algorithm.solo}
    sample = rollout.make_sampler(
        run.cfg, run.text, config, **kinds, temperature=config.temperature
    )
    step = make_step(run)
    cloud = run.cloud if algorithms.needs_cloud(config) else None
    unknown = Unknown(run.workdir / "unknown.jsonl")
    run.cloud.take_tally()  # what an evaluation bought is not a step's
    # A replay may lack what no step needed, and what a step did without.
    ahead = config.cloud.prefetch if cloud and config.cloud.mode != "replay" else 0
    prefetched = first  # steps before it whose prompts the cloud has been asked ahead of time
    writer = metrics.MetricsWriter(run.workdir, first)
    warned: set[str] = set()
    ready = time.monotonic()  # when the devices were done with the last update
    with (
        stop,
        tqdm(
            total=config.train.steps, initial=first, desc="train", unit="step", mininterval=1
        ) as bar,
    ):

        def close(
            i: int, out: dict, collected: rollout.Collected, sampled: float, last: bool
        ) -> None:
            """What is left of step `i` when its update runs: its metrics, its checkpoint. Raises
            where going on is pointless.
            """
            nonlocal ready
            out = parallel.unreplicate(out)  # waits for the update
            row = {"step": i + 1, **{name: value.item() for name, value in out.items()}}
            row |= {"cut_off": collected.cut_off, "cloud_asked": collected.cloud_asked}
            row |= {"cloud_unknown": len(collected.unknown)}
            row |= {
                f"cloud_{name}": value for name, value in run.cloud.take_tally()._asdict().items()
            }
            row |= {
                "verifier_timeouts": collected.verifier_timeouts,
                "verifier_failures": collected.verifier_failures,
            }
            row |= {
                "seconds_rollout": sampled - ready,
                "seconds": (now := time.monotonic()) - ready,
            }
            ready = now
            writer.write(row)
            bar.set_postfix_str(progress(row, config.budget), refresh=False)
            bar.update()
            if (message := metrics.collapse_warning(writer.rows)) and message not in warned:
                warned.add(message)
                bar.write(f"warning, step {i + 1}: {message}", file=sys.stderr)
            ill = (
                row["nonfinite_streak"] >= NONFINITE_LIMIT
                or row["empty_d1_streak"] >= config.train.empty_d1_limit
            )
            if ill or last or (i + 1) % config.train.checkpoint_every == 0:
                save(run, i + 1, state)
            check_health(row, run)

        previous: Callable[[], None] = lambda: None  # noqa: E731
        for i in range(first, config.train.steps):
            # ------------------------------------------------------------------------------ the cloud, ahead of time
            for j in range(max(i, prefetched), min(i + ahead, config.train.steps)):
                coming = [examples[k] for k in choose(j, Q)]
                cloud.submit(*rollout.cloud_prompts(run.task, coming))
                prefetched = j + 1
            # ---------------------------------------------------------------------------------------- rollout
            chosen = choose(i, Q)
            batch = [examples[j] for j in chosen], *(x[chosen] for x in prompts)
            late = {"wait": config.cloud.wait, "skip": unknown.at(i)}
            parts = state.sampling_model, run.text, run.task, cloud, *batch, config.seed, i
            try:
                collected = rollout.collect(sample, *parts, meanwhile=previous, **late)
            except BudgetSpent:
                save(run, i, state)
                raise
            unknown.write(i, collected.unknown)
            sampled = time.monotonic()
            # ----------------------------------------------------------------------------------------- update
            state, out = step(state, collected.rollout)
            # -------------------------------------------------------- metrics, checkpoint: during the next rollout
            asked = stop.requested  # once: a signal may come between the save and the return
            last = asked or i + 1 == config.train.steps
            previous = functools.partial(close, i, out, collected, sampled, last)
            if last:
                previous()
            if asked:
                writer.close()
                return None
    writer.close()
    unknown.close()
    return state


def progress(row: dict, budget: float) -> str:
    """The live figures beside the bar."""
    return (
        f"reward {row['reward']:.2f}, local {row['local_accuracy']:.0%}, calls {row['call_rate']:.0%} (budget {budget:.0%}), "
        f"D1/D2/dropped {row['d1']}/{row['d2']}/{row['dropped']}, {row['tokens'] / row['seconds']:.0f} tok/s"
    )
