"""The warm start: supervised tuning on demonstrations, and a try of the tuned model.

`collab_jax/sft.py` is the command. Axis letters are those of `gapg.py`, with B demonstrations.
"""

import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models import decoder, hf, logprobs, lora
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler
from collab_jax.models.text import Text
from collab_jax.rl import demonstrations, experiment, optim, rollout
from collab_jax.rl.demonstrations import Demonstration
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task

SOURCES = ("task", "file", "self")
CHECK_STEP = 1 << 20  # the step whose keys `measure_reach` samples with: none of training's

# ----------------------------------------------------------------------------------------- settings


def check_warm_start(config: ConfigDict) -> None:
    """Raises UserError for settings that no warm start could use, with the fix."""
    experiment.check_config(config)
    _check_source(config.sft)
    _check_tuning(config.sft)


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_source(sft: ConfigDict) -> None:
    """Raises UserError for settings about where demonstrations come from."""
    _need(sft.source in SOURCES, f"config.sft.source={sft.source!r}: use one of {SOURCES}")
    _need(
        (sft.source == "file") == bool(sft.demonstrations),
        f"config.sft.source={sft.source!r}, demonstrations={sft.demonstrations!r}: "
        "source=file names a file, the others none",
    )
    _need(sft.keep >= 1, "config.sft.keep must be at least 1")
    _need(
        0 <= sft.marker_share < 1, f"config.sft.marker_share={sft.marker_share} must lie in [0, 1)"
    )
    _need(sft.prompts >= 0, "config.sft.prompts must be at least 0")


def _check_tuning(sft: ConfigDict) -> None:
    """Raises UserError for settings about the updates and the try after them."""
    _need(
        sft.steps >= 1,
        "config.sft.steps must be at least 1: start from a config such as "
        "configs/countdown_tiny_sft.py",
    )
    devices = jax.local_device_count()
    _need(
        sft.batch_size >= 1 and sft.batch_size % devices == 0,
        f"config.sft.batch_size={sft.batch_size} must be a positive multiple of the {devices} "
        "devices",
    )
    _need(sft.micro_rows >= 1, "config.sft.micro_rows must be at least 1")
    _need(
        0 <= sft.learning_rate < math.inf,
        f"config.sft.learning_rate={sft.learning_rate} must be finite, at least 0",
    )
    _need(sft.check_prompts >= 0, "config.sft.check_prompts must be at least 0")


# --------------------------------------------------------------------------- what is tuned, on what


class StartingModel(NamedTuple):
    """The model before the warm start."""

    tokenizer_folder: pathlib.Path
    hf_config: dict[str, Any]  # its config.json
    cfg: DecoderConfig
    params: Params


def starting_model(config: ConfigDict, scratch: pathlib.Path) -> StartingModel:
    """The model of `config.model.path`, or one from nothing by `config.sft.architecture`.

    The vocabulary of a model from nothing is `config.sft.words`; its tokenizer is written to the
    folder `scratch`. Raises UserError for an adapter that does not go with the model.
    """
    if config.sft.architecture:
        pad, eos = config.text.pad, config.text.eos[0]
        words = text_lib.word_tokenizer(config.sft.words, pad, eos, "<unk>")
        words.save_pretrained(scratch)
        hf_config = dict(config.sft.architecture)
        cfg = hf.config_from_hf(hf_config, config.model.dtype)
        params = decoder.init(cfg, jax.random.key(config.seed))
        return StartingModel(scratch, hf_config, cfg, params)
    folder = hf.locate(config.model.path)
    hf_config = hf.read_config(folder)
    cfg = hf.config_from_hf(hf_config, config.model.dtype, config.train.remat)
    lora.configure(cfg, config.lora)  # refused now, not after hours of sampling
    params = hf.load(folder, cfg, config.model.param_dtype)
    return StartingModel(folder, hf_config, cfg, params)


def demonstration_stream(
    sampler: Sampler | None,
    params: Params | None,
    text: Text,
    task: Task,
    config: ConfigDict,
    workdir: pathlib.Path,
) -> Iterator[Demonstration]:
    """The demonstrations of `config.sft.source`, without end.

    Only the source "self" needs the sampler and params (on the host), and writes to the workdir.
    """
    if config.sft.source == "task":
        assert task.demonstrations is not None  # the command has checked it
        pairs = task.demonstrations(config.seed)
        return ((task.prompt(example), response) for example, response in pairs)
    path = pathlib.Path(config.sft.demonstrations).expanduser()
    if config.sft.source == "self":
        assert sampler is not None and params is not None
        examples = experiment.load_examples(task, text, config, "train")[
            : config.sft.prompts or None
        ]
        path = demonstrations.write_own_demonstrations(
            sampler, parallel.replicate(params), text, task, examples, config, workdir
        )
    prompts = lambda: {e.id: task.prompt(e) for e in task.load("train")}  # noqa: E731
    read = demonstrations.read(path, prompts)
    return demonstrations.endless(demonstrations.drop_too_long(read, text, config), config.seed)


class DemonstrationBatch(NamedTuple):
    """A batch of B demonstrations, on the host or traced."""

    prompts: Any  # i32[B, L]
    prompt_mask: Any  # bool[B, L]
    responses: Any  # i32[B, T]
    response_mask: Any  # bool[B, T], EOS in


def batches(
    source: Iterator[Demonstration], text: Text, config: ConfigDict
) -> Iterator[DemonstrationBatch]:
    """Batches of `config.sft.batch_size` demonstrations, without end.

    Demonstrations of more than `max_new_tokens` tokens are left out.
    """
    T = config.max_new_tokens
    encoded = ((messages, text.response_ids(response)) for messages, response in source)
    short = ((messages, ids) for messages, ids in encoded if len(ids) <= T)
    while True:
        pairs = list(itertools.islice(short, config.sft.batch_size))
        chats = [messages for messages, _ in pairs]
        prompts, prompt_mask = text.prompt_batch(chats, config.prompt_length)
        responses = np.full((len(pairs), T), text.pad_id, np.int32)
        mask = np.zeros((len(pairs), T), bool)
        for i, (_, ids) in enumerate(pairs):
            responses[i, : len(ids)], mask[i, : len(ids)] = ids, True
        yield DemonstrationBatch(prompts, prompt_mask, responses, mask)


# ------------------------------------------------------------------------------------------- tuning


def make_step(
    cfg: DecoderConfig, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable:
    """step(params, opt_state, frozen, DemonstrationBatch) -> params, opt_state, mean loss.

    The loss is in nats a response token; all arguments and results have the axis D.
    """
    chunk, micro_rows = config.train.logprob_chunk, config.sft.micro_rows

    def body(params: Params, opt_state, frozen: Params | None, batch: DemonstrationBatch):
        def loss(params: Params, part: DemonstrationBatch) -> jax.Array:
            logp = logprobs.response_logprobs(
                lora.join(frozen, params),
                cfg,
                part.prompts,
                part.prompt_mask,
                part.responses,
                temperature=1.0,
                chunk=chunk,
            )
            return -jnp.sum(logp * part.response_mask)

        def add_micro_batch(sums, part: DemonstrationBatch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, part)), None

        rows = batch.prompts.shape[0]
        parts = math.gcd(rows, max(rows // micro_rows, 1))  # as even as the batch allows
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zeros = jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (total, grads), _ = jax.lax.scan(add_micro_batch, zeros, split)
        total, grads, count = jax.lax.psum((total, grads, batch.response_mask.sum()), parallel.AXIS)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / count

    return parallel.pmap(body, donate=(0, 1))


def tune(
    params: Params, cfg: DecoderConfig, source: Iterator[DemonstrationBatch], config: ConfigDict
) -> Params:
    """The params after `config.sft.steps` updates on the batches of `source`, on the host.

    Under LoRA an adapter is tuned, and then merged into them.
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
    opt_state = parallel.replicate(optimizer.init(params))
    params = parallel.replicate(params)
    step, started, loss = make_step(cfg, optimizer, config), time.monotonic(), math.nan
    with tqdm(total=sft.steps, desc="warm start", unit="step") as bar:
        for i in range(sft.steps):
            batch = parallel.shard(next(source), D)
            # One update at a time: queued updates of host devices can lock in the collective.
            jax.block_until_ready((params, opt_state))
            params, opt_state, losses = step(params, opt_state, frozen, batch)
            if i % 20 == 0 or i == sft.steps - 1:
                loss = float(losses[0])
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    seconds = time.monotonic() - started
    print(f"{sft.steps} steps in {seconds:.0f} s, last loss {loss:.3f} nats a token")
    tuned = parallel.unreplicate(params)
    return lora.merge(base, tuned, cfg.lora_scale) if config.lora.rank else tuned


# ------------------------------------------------------------------- what training would start from


def measure_reach(
    sampler: Sampler,
    params: Params,
    text: Text,
    task: Task,
    examples: Sequence[Example],
    config: ConfigDict,
) -> dict[str, float | None]:
    """What training would start from: figures of `config.group` responses to each example.

    The responses are natural ones; `called`, `formatted`, `cut_off` and `local_accuracy` are shares
    of them. margin: the mean over responses of max_t m_t (`decision.py`), by how many nats the call
    loses where it is nearest; best_margin: the largest; both None where no response has a decision
    state, as can be with a marker in plain text. unsolved_called: of the prompts that no response
    solves, the share with a call; None without such prompts.
    """
    verdicts, margins = [], []
    for batch, samples in demonstrations.sampled_batches(
        sampler,
        parallel.replicate(params),
        text,
        task,
        examples,
        config,
        first_step=CHECK_STEP,
        bias=0.0,
    ):
        P, G, T = samples.tokens.shape
        ended = np.asarray(samples.ended).reshape(P * G)
        of_batch = rollout.judge(
            task,
            text,
            [example for example in batch for _ in range(G)],
            np.asarray(samples.tokens).reshape(P * G, T),
            np.asarray(samples.mask).reshape(P * G, T),
            ended,
        )
        rows = [of_batch.correct, of_batch.called, of_batch.formatted, ~ended]
        verdicts.append(np.stack(rows).reshape(4, P, G))
        margins.append(np.asarray(samples.margins).max(-1).reshape(-1))
    correct, called, formatted, cut_off = np.concatenate(verdicts, axis=1)
    margin = np.concatenate(margins)
    margin = margin[np.isfinite(margin)]  # -inf: a response without a decision state
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


def format_reach(figures: dict[str, Any]) -> str:
    """The figures of `measure_reach` as a line."""
    margin = (
        "no decision state"
        if figures["margin"] is None
        else f"the call's margin {figures['margin']:+.1f}"
    )
    return (
        f"{figures['responses']} responses to {figures['prompts']} training prompts: "
        f"{figures['formatted']:.1%} well formed, {figures['called']:.1%} calls, "
        f"{figures['cut_off']:.1%} cut off, {figures['local_accuracy']:.1%} right on the device; "
        f"{margin}"
    )


def warnings(figures: dict[str, Any]) -> list[str]:
    """What in the figures of `measure_reach` would keep training from learning, with the fix."""
    messages = []
    if figures["called"] == 0:
        messages.append(
            "no response calls, so training will find no call to learn from: show more calls "
            "(config.sft.marker_share), or raise config.sft.steps or learning_rate"
        )
    if figures["formatted"] + figures["called"] < 0.5:
        messages.append(
            "most responses neither answer in the format nor call: raise config.sft.steps, or "
            "max_new_tokens if they are cut off"
        )
    if figures["local_accuracy"] == 0:
        messages.append(
            "no response is right, so training will stop because no prompt is solved: choose "
            "easier prompts"
        )
    return messages
