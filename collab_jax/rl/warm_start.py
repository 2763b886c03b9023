"""Supervised tuning on demonstrations, and what the tuned model does on some training prompts."""

import itertools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models import decoder, logprobs, lora
from collab_jax.models.sampler import Sampler
from collab_jax.models.text import Text
from collab_jax.rl import demonstrations, experiment, optim, rollout
from collab_jax.rl.demonstrations import Demonstration
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task

SOURCES = ("task", "file", "self")


CHECK = 1 << 20  # the step whose keys the last check samples with: none of training's


class Batch(NamedTuple):
    """Demonstrations. prompts, prompt_mask: [B, L]; responses, response_mask: [B, T], EOS in."""

    prompts: np.ndarray
    prompt_mask: np.ndarray
    responses: np.ndarray
    response_mask: np.ndarray


def batches(source: Iterator[Demonstration], text: Text, config: ConfigDict) -> Iterator[Batch]:
    """Endless Batches of `config.sft.batch_size` demonstrations that fit `max_new_tokens`; the
    others are left out.
    """
    T = config.max_new_tokens
    fitting = ((messages, ids) for messages, r in source if len(ids := text.response_ids(r)) <= T)
    while True:
        pairs = list(itertools.islice(fitting, config.sft.batch_size))
        prompts, prompt_mask = text.prompt_batch(
            [messages for messages, _ in pairs], config.prompt_length
        )
        responses = np.full((len(pairs), T), text.pad_id, np.int32)
        mask = np.zeros((len(pairs), T), bool)
        for i, (_, ids) in enumerate(pairs):
            responses[i, : len(ids)], mask[i, : len(ids)] = ids, True
        yield Batch(prompts, prompt_mask, responses, mask)


def make_step(
    cfg: decoder.DecoderConfig, optimizer: optax.GradientTransformation, config: ConfigDict
):
    """step(params, opt_state, frozen, Batch) -> params, opt_state, mean loss in nats a response
    token; all with axis D.
    """

    def body(params, opt_state, frozen, batch: Batch):
        def loss(params, part: Batch):
            model, chunk = lora.join(frozen, params), config.train.logprob_chunk
            logp = logprobs.response_logprobs(model, cfg, *part[:3], temperature=1.0, chunk=chunk)
            return -jnp.sum(logp * part.response_mask)

        def micro(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        rows = batch.prompts.shape[0]
        parts = math.gcd(rows, max(rows // config.sft.micro_rows, 1))  # as even as the batch allows
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zeros = jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (total, grads), _ = jax.lax.scan(micro, zeros, split)
        total, grads, count = jax.lax.psum((total, grads, batch.response_mask.sum()), parallel.AXIS)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / count

    return parallel.pmap(body, donate=(0, 1))


def check(config: ConfigDict) -> None:
    """Raises UserError for settings that no warm start could use, with the fix."""
    experiment.check_config(config)
    sft = config.sft

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    need(sft.source in SOURCES, f"config.sft.source={sft.source!r}: use one of {SOURCES}")
    need(
        (sft.source == "file") == bool(sft.demonstrations),
        f"config.sft.source={sft.source!r}, demonstrations={sft.demonstrations!r}: source=file names a file, the others none",
    )
    need(
        sft.steps >= 1,
        "config.sft.steps must be at least 1: start from a config such as configs/countdown_tiny_sft.py",
    )
    devices = jax.local_device_count()
    need(
        sft.batch_size >= 1 and sft.batch_size % devices == 0,
        f"config.sft.batch_size={sft.batch_size} must be a positive multiple of the {devices} devices",
    )
    need(min(sft.micro_rows, sft.keep) >= 1, "config.sft.micro_rows and keep must be at least 1")
    need(
        0 <= sft.learning_rate < math.inf,
        f"config.sft.learning_rate={sft.learning_rate} must be finite, at least 0",
    )
    need(
        0 <= sft.marker_share < 1, f"config.sft.marker_share={sft.marker_share} must lie in [0, 1)"
    )
    need(
        min(sft.prompts, sft.check_prompts) >= 0,
        "config.sft.prompts and check_prompts must be at least 0",
    )


def demonstration_stream(
    sample: Sampler, params, text: Text, task: Task, config: ConfigDict, workdir: pathlib.Path
) -> Iterator[Demonstration]:
    """The demonstrations of `config.sft.source`, endless."""
    if config.sft.source == "task":
        return (
            (task.prompt(example), response)
            for example, response in task.demonstrations(config.seed)
        )
    path = pathlib.Path(config.sft.demonstrations).expanduser()
    if config.sft.source == "self":
        examples = experiment.load_examples(task, text, config, "train")[
            : config.sft.prompts or None
        ]
        path = demonstrations.own(
            sample, parallel.replicate(params), text, task, examples, config, workdir
        )
    prompts = lambda: {e.id: task.prompt(e) for e in task.load("train")}  # noqa: E731
    found = demonstrations.fitting(demonstrations.read(path, prompts), text, config)
    return demonstrations.endless(found, config.seed)


def reach(
    sample: Sampler, params, text: Text, task: Task, examples: Sequence[Example], config: ConfigDict
) -> dict[str, float | None]:
    """What training would start from: `config.group` natural responses to each of the examples, in
    shares of responses.

    margin: mean over responses of max_t m_t (sampler.py), by how many nats the call loses where it
    is nearest; best_margin: the largest. unsolved_called: of the prompts that no response solves,
    the share with a call; None without such prompts.
    """
    found, margins = [], []
    for batch, s in demonstrations.draw(
        sample, parallel.replicate(params), text, task, examples, config, CHECK, 0.0
    ):
        P, G, T = s.tokens.shape
        each = [example for example in batch for _ in range(G)]
        v = rollout.judge(
            task, text, each, s.tokens.reshape(-1, T), s.mask.reshape(-1, T), s.ended.reshape(-1)
        )
        found.append(
            np.stack([v.correct, v.called, v.formatted, ~s.ended.reshape(-1)]).reshape(4, P, G)
        )
        margins.append(s.margins.max(-1).reshape(-1))
    correct, called, formatted, cut_off = np.concatenate(found, axis=1)
    margin = np.concatenate(margins)
    margin = margin[
        np.isfinite(margin)
    ]  # -inf: a response without a decision state, of a marker in plain text
    unsolved = ~correct.any(1)
    return {
        "prompts": len(correct),
        "responses": correct.size,
        "local_accuracy": float(correct.mean()),
        "called": float(called.mean()),
        "formatted": float(formatted.mean()),
        "cut_off": float(cut_off.mean()),
        "margin": float(margin.mean()) if margin.size else None,
        "best_margin": float(margin.max()) if margin.size else None,
        "unsolved_called": float(called[unsolved].any(1).mean()) if unsolved.any() else None,
    }


def format_reach(figures: dict) -> str:
    """The figures of `reach` as a line."""
    margin = (
        "no decision state"
        if figures["margin"] is None
        else f"the call's margin {figures['margin']:+.1f}"
    )
    return (
        f"{figures['responses']} responses to {figures['prompts']} training prompts: {figures['formatted']:.1%} well formed, "
        f"{figures['called']:.1%} calls, {figures['cut_off']:.1%} cut off, {figures['local_accuracy']:.1%} right on the device; {margin}"
    )


def warnings(figures: dict) -> list[str]:
    """What would keep training from learning, with what to do."""
    found = []
    if figures["called"] == 0:
        found.append(
            "no response calls, so training will find no call to learn from: show more calls (config.sft.marker_share), "
            "or raise config.sft.steps or learning_rate"
        )
    if figures["formatted"] + figures["called"] < 0.5:
        found.append(
            "most responses neither answer in the format nor call: raise config.sft.steps, or max_new_tokens if they are cut off"
        )
    if figures["local_accuracy"] == 0:
        found.append(
            "no response is right, so training will stop for want of a solved prompt: choose easier prompts"
        )
    return found


def tune(params, cfg, source, config: ConfigDict):
    """Params after `config.sft.steps` updates on the batches of `source`; of an adapter, which is
    then merged, under LoRA.
    """
    cfg, base, frozen = lora.configure(cfg, config.lora), params, None
    if config.lora.rank:
        params = lora.init(cfg, config.lora, jax.random.key(config.seed), config.model.param_dtype)
        frozen = parallel.replicate(jax.tree.map(lambda x: np.asarray(x).astype(cfg.dtype), base))
    sft, D = config.sft, jax.local_device_count()
    schedule = optim.make_schedule(sft.learning_rate, sft.warmup_steps, decay_steps=sft.steps)
    optimizer = optim.make_optimizer(
        schedule, sft.weight_decay, config.optim.clip_norm, config.model.param_dtype
    )
    state = parallel.replicate(params), parallel.replicate(optimizer.init(params))
    step, started = make_step(cfg, optimizer, config), time.monotonic()
    with tqdm(total=sft.steps, desc="warm start", unit="step") as bar:
        for i in range(sft.steps):
            batch = parallel.shard(next(source), D)
            jax.block_until_ready(
                state
            )  # one at a time: updates of host devices, queued, can lock in the collective
            *state, loss = step(*state, frozen, batch)
            if i % 20 == 0 or i == sft.steps - 1:
                bar.set_postfix(loss=f"{float(loss[0]):.3f}", refresh=False)
            bar.update()
    print(
        f"{sft.steps} steps in {time.monotonic() - started:.0f} s, last loss {float(loss[0]):.3f} nats a token"
    )
    tuned = parallel.unreplicate(state[0])
    return lora.merge(base, tuned, cfg.lora_scale) if config.lora.rank else tuned
