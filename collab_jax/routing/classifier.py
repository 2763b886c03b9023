"""A prompt classifier: a decoder, fine-tuned to tell from the prompt if the device will be wrong.

It has one output. It stands for the paper's fine-tuned DeBERTa router and RouteLLM's causal-LLM
router (arXiv 2406.18665, section 4.2).
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from collab_jax.models import decoder, hf
from collab_jax.models.decoder import DecoderConfig
from collab_jax.records import Records
from collab_jax.rl import optim
from collab_jax.rl.experiment import Run
from collab_jax.routing import learned
from collab_jax.routing.device import Device, by_batch
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError

Weights = dict[str, Any]  # "decoder": its parameters, "head": f32[E]
LogOdds = Callable[[Weights, jax.Array, jax.Array], jax.Array]  # of prompts and mask [B, L]: [B]


def check(run: Run) -> tuple[pathlib.Path, DecoderConfig]:
    """The decoder's folder and shape.

    Raises UserError where the decoder cannot read the device model's tokens.
    """
    config = run.config
    folder = hf.locate(config.routers.classifier) if config.routers.classifier else run.folder
    cfg = hf.config_from_hf(hf.read_config(folder), config.model.dtype, remat=config.train.remat)
    if cfg.vocab_size != run.cfg.vocab_size:
        raise UserError(
            f"config.routers.classifier={config.routers.classifier!r} has {cfg.vocab_size} tokens, "
            f"the device model {run.cfg.vocab_size}: it must share the device model's tokenizer"
        )
    return folder, cfg


def score(device: Device, fit_on: Records, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds that the device is wrong, and tokens of the device model, which are none; f64[n].

    The decoder that is fine-tuned for it is `config.routers.classifier`, a folder with the device
    model's vocabulary, or the model that the run started from. It sees each prompt of `fit_on`
    `config.routers.epochs` times.
    """
    run, config = device.run, device.run.config
    learned.check_classes(fit_on)
    folder, cfg = check(run)

    def log_odds(weights: Weights, prompts: jax.Array, mask: jax.Array) -> jax.Array:
        last, _ = decoder.prefill(weights["decoder"], cfg, prompts, mask)
        return last.astype(jnp.float32) @ weights["head"]

    start = {
        "decoder": hf.load(folder, cfg, config.model.param_dtype),
        "head": np.zeros(cfg.hidden_size, np.float32),
    }
    prompts, mask = device.prompts_of(fit_on)
    weights = _tune(log_odds, start, prompts, mask, ~fit_on["local_correct"], config)
    compiled = parallel.pmap(log_odds)
    wrong = by_batch(
        lambda *rows: compiled(weights, *rows), device.prompts_of(records), config.eval.batch_size
    )
    return wrong.astype(float), np.zeros(len(wrong))


def _tune(
    log_odds: LogOdds,
    weights: Weights,
    prompts: np.ndarray,
    mask: np.ndarray,
    wrong: np.ndarray,
    config: ConfigDict,
) -> Weights:
    """Weights, with axis D, after cross-entropy on prompts and mask [n, L] and wrong bool[n].

    There are `config.routers.epochs` passes.
    """
    r, D, n = config.routers, jax.local_device_count(), len(wrong)
    size = min(r.batch_size, n // D * D)
    if size < D:
        raise UserError(
            f"the classifier has {n} prompts to be fitted on: raise config.eval.fit_prompts"
        )
    steps = n // size * r.epochs
    optimizer = optim.make_optimizer(
        optim.make_schedule(r.learning_rate, steps // 10, decay_steps=steps),
        config.optim.weight_decay,
        optim.clipped(),
    )

    def body(weights, opt_state, prompts, mask, wrong):
        def loss(weights):
            return optax.sigmoid_binary_cross_entropy(
                log_odds(weights, prompts, mask), wrong.astype(jnp.float32)
            ).mean()

        # A mean of means is right here: every device holds as many prompts.
        grads = jax.lax.pmean(jax.grad(loss)(weights), parallel.AXIS)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state

    step = parallel.pmap(body, donate=(0, 1))
    weights, opt_state = parallel.replicate(weights), parallel.replicate(optimizer.init(weights))
    rng = np.random.default_rng(config.seed)
    for _ in range(r.epochs):
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            rows = order[start : start + size]
            shares = parallel.shard((prompts[rows], mask[rows], wrong[rows]), D)
            # Waited for: host devices share their threads, and updates queued behind each other can
            # lock in the collective.
            weights, opt_state = jax.block_until_ready(step(weights, opt_state, *shares))
    return weights
