"""A prompt classifier: a decoder with one output, fine-tuned to tell from the prompt alone whether
the device will be wrong.

Stands for the paper's fine-tuned DeBERTa router and RouteLLM's causal-LLM router (arXiv 2406.18665,
section 4.2).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from collab_jax.models import decoder, hf
from collab_jax.models.decoder import DecoderConfig
from collab_jax.records import Records
from collab_jax.rl import optim
from collab_jax.rl.experiment import Run
from collab_jax.routing import learned
from collab_jax.routing.device import Device, by_batch
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError


def check(run: Run) -> tuple[pathlib.Path, DecoderConfig]:
    """The decoder's folder and shape. Raises UserError where it cannot read the device model's
    tokens.
    """
    config = run.config
    folder = hf.locate(config.routers.classifier) if config.routers.classifier else run.folder
    cfg = hf.config_from_hf(hf.read_config(folder), config.model.dtype, remat=config.train.remat)
    if cfg.vocab_size != run.cfg.vocab_size:
        raise UserError(
            f"config.routers.classifier={config.routers.classifier!r} has {cfg.vocab_size} tokens, the device model "
            f"{run.cfg.vocab_size}: it must share the device model's tokenizer"
        )
    return folder, cfg


def score(device: Device, fit_on: Records, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds f64[n] that the device is wrong, by a decoder that is fine-tuned here; no tokens of
    the device model.

    The decoder is `config.routers.classifier`, a folder with the device model's vocabulary, or the
    model that the run started from; it sees each prompt of `fit_on` `config.routers.epochs` times.
    """
    run, config = device.run, device.run.config
    learned.check_classes(fit_on)
    folder, cfg = check(run)
    params = {
        "decoder": hf.load(folder, cfg, config.model.param_dtype),
        "head": np.zeros(cfg.hidden_size, np.float32),
    }

    def log_odds(params, prompts, mask):
        last, _ = decoder.prefill(params["decoder"], cfg, prompts, mask)
        return last.astype(jnp.float32) @ params["head"]

    prompts = lambda table: run.text.prompt_batch(
        [run.task.prompt(e) for e in device.of(table)], config.prompt_length
    )  # noqa: E731
    params = _tune(log_odds, params, (*prompts(fit_on), ~fit_on["local_correct"]), config)
    compiled = parallel.pmap(log_odds)
    wrong = by_batch(
        lambda *rows: compiled(params, *rows), prompts(records), config.eval.batch_size
    )
    return wrong.astype(float), np.zeros(len(wrong))


def _tune(log_odds, params, table: tuple[np.ndarray, ...], config):
    """Params, with axis D, after `config.routers.epochs` passes over (prompts, mask, wrong bool[n])
    of cross-entropy.
    """
    r, D = config.routers, jax.local_device_count()
    size = min(r.batch_size, len(table[0]) // D * D)
    if size < D:
        raise UserError(
            f"the classifier has {len(table[0])} prompts to be fitted on: raise config.eval.fit_prompts"
        )
    steps = len(table[0]) // size * r.epochs
    optimizer = optim.make_optimizer(
        optim.make_schedule(r.learning_rate, steps // 10, decay_steps=steps),
        config.optim.weight_decay,
        config.optim.clip_norm,
    )

    def body(params, opt_state, prompts, mask, wrong):
        def loss(params):
            return optax.sigmoid_binary_cross_entropy(
                log_odds(params, prompts, mask), wrong.astype(jnp.float32)
            ).mean()

        grads = jax.lax.pmean(
            jax.grad(loss)(params), parallel.AXIS
        )  # every device holds as many prompts
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = parallel.pmap(body, donate=(0, 1))
    state = parallel.replicate(params), parallel.replicate(optimizer.init(params))
    rng = np.random.default_rng(config.seed)
    for _ in range(r.epochs):
        order = rng.permutation(len(table[0]))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            # Waited for: host devices share their threads, and updates queued behind each other can
            # lock in the collective.
            state = jax.block_until_ready(
                step(*state, *parallel.shard(tuple(x[rows] for x in table), D))
            )
    return state[0]
