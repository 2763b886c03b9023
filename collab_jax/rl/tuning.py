"""Supervised tuning: the mean loss of demonstrations, packed in rows, and its updates.

The gradient of one micro-batch of rows and the update are two programs. A step adds up as many
micro-batches as its demonstrations fill, so that nothing is compiled again when their lengths
differ, and the head is computed for taught tokens only. A tuning is a function of its seed and
settings: what a kill interrupts goes on from its last checkpoint with the same bits.
"""

import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.attention import Sight
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.text import Text
from collab_jax.rl import demonstrations, experiment, optim, packing
from collab_jax.rl.demonstrations import Demonstration, Encoded
from collab_jax.rl.packing import PackedRows
from collab_jax.runtime import hosts, metrics, parallel, split
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.process import GracefulStop

Source = Callable[[], Iterator[Demonstration]]  # starts a stream without end, always the same


class TuningState(NamedTuple):
    """What changes between updates and is saved."""

    step: Any  # i32[], updates made; on the host
    params: Params
    opt_state: optax.OptState


class Sums(NamedTuple):
    """What is summed over the micro-batches of a step."""

    loss: jax.Array  # f32[], nats
    grads: Params  # f32
    taught: jax.Array  # i32[], tokens


def loss(
    params: Params,
    frozen: Params | None,
    cfg: DecoderConfig,
    rows: PackedRows,
    chunk: int,
    chance: float,
    call: int | None,
) -> jax.Array:
    """The sum of -log p over the taught tokens of the rows, f32[], in nats.

    chance: that of the call, whose token is `call`, at each decision state; 0: demonstrations alone
    teach the call. It is taught by itself: the log-odds of the call are drawn to those of the
    chance, and tokens are taught as what the model says where it does not call. Demonstrations that
    call by chance teach the same on average, but the odds that come of so few calls vary from state
    to state by as much as the margin does with how sure the model is.
    """
    whole = decoder.with_ends(lora.join(frozen, params), cfg)
    sight = Sight(rows.segment, rows.segment)
    hidden, _ = decoder.forward(whole, cfg, rows.tokens, rows.positions, sight)
    hidden = jnp.take_along_axis(hidden, rows.at[..., None], axis=1)
    if not chance:
        logp = logprobs.token_logprobs(whole, cfg, hidden, rows.targets, 1.0, chunk)
        return -jnp.sum(logp * rows.taught)
    assert call is not None
    is_call = rows.states & (rows.targets == call)
    barred = jnp.where(rows.states, call, -1)
    other = 1 if call == 0 else 0  # any other token: a barred one has no logp
    said = jnp.where(is_call, other, rows.targets)
    scores = logprobs.barred_scores(whole, cfg, hidden, said, barred, 1.0, chunk)
    off = jnp.where(rows.states, scores.odds - math.log(chance / (1 - chance)), 0)
    wrong = optax.huber_loss(off, jnp.zeros_like(off))
    return jnp.sum(wrong) - jnp.sum(jnp.where(rows.taught & ~is_call, scores.logp, 0))


def zero_sums(params: Params) -> Sums:
    """The sums before the first micro-batch; params: trained ones, without the axis D."""
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return Sums(jnp.float32(0), grads, jnp.int32(0))


# Of a state on the host nothing stays when it has been copied to the devices or saved.


def _start(
    config: ConfigDict,
    params: Params,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> TuningState:
    """The state of the last checkpoint, or the one before the first step, with the axis D."""
    opt_state = jax.device_get(optimizer.init(cast(Any, params)))
    state = TuningState(np.int32(0), params, opt_state)
    if checkpoints.latest() is not None:
        state = checkpoints.restore(like=state)
    parts = experiment.cut_for_devices(config, (state.params, state.opt_state))
    params, opt_state = parallel.replicate(parts)
    return TuningState(state.step, params, opt_state)


def _save(checkpoints: Checkpoints, state: TuningState) -> None:
    """Saves a state that has the axis D; all hosts call this, and the first saves."""
    if hosts.is_first() or split.over(state) is not None:
        params, opt_state = parallel.unreplicate((state.params, state.opt_state))
        if hosts.is_first():
            checkpoints.save(int(state.step), TuningState(state.step, params, opt_state))
    # The next gradient may gather parameters: in there a host would not hear that this one failed.
    hosts.gathered(f"that step {state.step} is saved", None)


class Tuner:
    """Tunes one model, or one adapter of it, as often as wanted; each program is compiled once.

    frozen: the model that an adapter belongs to, with the axis D; None where all of it is tuned.
    `stop` may ask for an end, after the step that runs; the process then ends with status STOPPED.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        frozen: Params | None,
        text: Text,
        config: ConfigDict,
        stop: GracefulStop,
    ):
        self._frozen, self._text, self._config, self._stop = frozen, text, config, stop
        chunk, chance = config.train.logprob_chunk, float(config.sft.call_chance)

        def add(sums: Sums, params: Params, frozen: Params | None, rows: PackedRows) -> Sums:
            value, grads = jax.value_and_grad(loss)(
                params, frozen, cfg, rows, chunk, chance, text.decision_id
            )
            grads = jax.tree.map(jnp.add, sums.grads, grads)
            return Sums(sums.loss + value, grads, sums.taught + rows.taught.sum())

        self._add = parallel.Program(add, donate=(0,))
        self._update = parallel.Program(self._updated, donate=(0, 1, 2))
        self._zero = parallel.pmap(zero_sums)

    def micro_batches(self, encoded: list[Encoded]) -> list[PackedRows]:
        """The packed rows of a step's demonstrations, in parts of [D, sft.micro_rows, ...].

        D counts the devices of this host, which has its part of the rows.
        """
        D, m = jax.device_count(), self._config.sft.micro_rows
        width, teaches = packing.columns(self._config), packing.taught_tokens(self._config)
        rows = packing.pack(encoded, width, teaches, self._text.pad_id, multiple=D * m)
        parts = rows.tokens.shape[0] // (D * m)
        own = hosts.part(D * m)
        return [
            parallel.shard(
                jax.tree.map(lambda x: x[i * D * m : (i + 1) * D * m][own], rows),  # noqa: B023
                jax.local_device_count(),
            )
            for i in range(parts)
        ]

    def tune(self, folder: pathlib.Path, params: Params, source: Source, steps: int) -> Params:
        """The params after so many updates on the demonstrations of `source`; on the host.

        Step i learns from number i * sft.batch_size and those that follow, without those that are
        too long. metrics.jsonl and checkpoints go to `folder`; what these hold is not done again.
        Raises UserError where the loss is not finite.
        """
        checkpoints = Checkpoints(folder / "checkpoints")
        state, stops = _start(self._config, params, self._optimizer(steps), checkpoints), False
        if state.step < steps:
            state, stops = self._steps(folder, state, source, steps, checkpoints)
        stops = stops or self._stop.requested  # a signal may have come since it was asked
        if any(hosts.gathered("whether it stops", stops)):
            self._stop.exit(f"stopped and saved in {folder}; the same command goes on from there")
        return parallel.unreplicate(state.params)

    def _steps(
        self,
        folder: pathlib.Path,
        state: TuningState,
        source: Source,
        steps: int,
        checkpoints: Checkpoints,
    ) -> tuple[TuningState, bool]:
        """The state (with the axis D) after step number `steps`, and whether an end was asked for.

        Then it is that after the step that ran; any host may be asked.
        """
        first, every = int(state.step), self._config.sft.checkpoint_every
        params, opt_state = state.params, state.opt_state
        batches, length = self._batches(source, first), parallel.replicate(np.int32(steps))
        encoded = next(batches)
        sums = self._zero(params)
        writer = metrics.MetricsWriter(folder, first, hosts.is_first())
        bar = tqdm(
            total=steps,
            initial=first,
            desc=folder.name,
            unit="step",
            disable=not hosts.is_first(),
        )
        stops = False
        with self._stop, bar:
            print(self._plan(encoded, params, steps - first, folder.name))
            for step in range(first + 1, steps + 1):
                started = time.monotonic()
                for rows in self.micro_batches(encoded):
                    sums = self._add(sums, params, self._frozen, rows)
                # In the update a host would wait for another one without hearing why it fails.
                hosts.gathered(f"that it has the gradient of step {step}", None)
                params, opt_state, sums, losses, norms = self._update(
                    params, opt_state, sums, length
                )
                if step < steps:
                    encoded = next(batches)  # while the devices work
                # One update at a time: queued updates of host devices can lock in the collective.
                mean, norm = (float(x) for x in parallel.unreplicate((losses, norms)))
                seconds = time.monotonic() - started
                writer.write({"step": step, "loss": mean, "grad_norm": norm, "seconds": seconds})
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                bar.update()
                if not (math.isfinite(mean) and math.isfinite(norm)):
                    raise UserError(
                        f"loss {mean} or its gradient is not finite in step {step}: check the "
                        "model's weights, or lower config.sft.learning_rate, in another --workdir"
                    )
                state = TuningState(np.int32(step), params, opt_state)
                # Asked once: a signal may come between the save and the return.
                stops = any(hosts.gathered("whether it is to stop", self._stop.requested))
                last = step == steps or stops
                if last or step % every == 0:
                    _save(checkpoints, state)
                if last:
                    break
        writer.close()
        return state, stops

    def _optimizer(self, steps: int | jax.Array) -> optax.GradientTransformation:
        sft = self._config.sft
        schedule = optim.make_schedule(sft.learning_rate, sft.warmup_steps, decay_steps=steps)
        return optim.make_optimizer(
            schedule, sft.weight_decay, optim.clipped(), self._config.model.param_dtype
        )

    def _updated(self, params: Params, opt_state: optax.OptState, sums: Sums, steps: jax.Array):
        """(params, opt_state, zero sums, mean loss, norm) after one step of `steps`.

        The loss is in nats a taught token, the norm that of its gradient before clipping.
        """
        # Sums and counts travel apart and are divided once: devices have different numbers.
        loss, taught = jax.lax.psum((sums.loss, sums.taught), parallel.AXIS)
        grads = split.summed(sums.grads, parallel.AXIS)
        grads = jax.tree.map(lambda g: g / taught, grads)
        norm = split.norm(grads)
        updates, opt_state = self._optimizer(steps).update(grads, opt_state, params)
        new = cast(Params, optax.apply_updates(params, updates))
        return new, opt_state, jax.tree.map(jnp.zeros_like, sums), loss / taught, norm

    def _batches(self, source: Source, first: int) -> Iterator[list[Encoded]]:
        """The demonstrations of each step from `first` on, those that fit."""
        size = self._config.sft.batch_size
        encoded = (demonstrations.encode(one, self._text) for one in source())
        fitting = (one for one in encoded if demonstrations.fits(one, self._config))
        wanted = itertools.islice(fitting, first * size, None)
        while True:
            yield list(itertools.islice(wanted, size))

    def _plan(self, encoded: list[Encoded], params: Params, steps: int, name: str) -> str:
        """A line on what is ahead, with an estimate of its time by a micro-batch that is timed.

        The program is compiled here.
        """
        parts = self.micro_batches(encoded)
        started = time.monotonic()
        sums = self._add(self._zero(params), params, self._frozen, parts[0])
        jax.block_until_ready(sums)
        compiled = time.monotonic()
        jax.block_until_ready(self._add(sums, params, self._frozen, parts[0]))
        seconds = (time.monotonic() - compiled) * len(parts) * steps
        columns = sum(one.columns for one in encoded)
        share = columns / sum(part.tokens.size * hosts.count() for part in parts)
        return (
            f"{name}: {steps} steps of {len(encoded)} demonstrations ({columns} tokens in "
            f"{len(parts)} micro-batches, {1 - share:.0%} padding); compiled in "
            f"{compiled - started:.0f} s, about {seconds / 60:.1f} minutes to go"
        )
