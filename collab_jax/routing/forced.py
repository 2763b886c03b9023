"""Routers that read the finished response once more, token by token, as it was written.

Both are measures of how sure the model was, without its marker: the gap between the two likeliest
tokens (the token-level margin of UCCI, arXiv 2605.18796, whose calibration by isotonic regression
changes no order), and the log-probability at the temperature at which the policy was trained.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.models import decoder, logprobs
from collab_jax.models.decoder import DecoderConfig
from collab_jax.records import Records
from collab_jax.routing import response
from collab_jax.routing.device import Device, by_batch
from collab_jax.runtime import parallel


def token_margin(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the mean gap in probability between the two likeliest tokens; no device tokens.

    Both f64[n]; responses without an answer come first.
    """
    del fit_on
    return _score(records, -_read(device, records)[:, 0])


def policy_logprob(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the response's summed log-probability at `config.temperature`; no device tokens.

    Both f64[n]; responses without an answer come first.
    """
    del fit_on
    return _score(records, -_read(device, records)[:, 1])


def _score(records: Records, unsure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = response.FIRST * response.no_answer(records)
    return unsure.astype(np.float64) + first, np.zeros(len(unsure))


def _read(device: Device, records: Records) -> np.ndarray:
    """`gap_and_logprob` of the rows, f32[n, 2]."""
    run = device.run
    body = functools.partial(
        gap_and_logprob,
        cfg=run.cfg,
        temperature=run.config.temperature,
        barred=run.text.decision_id,
    )
    compiled = parallel.pmap(lambda params, *rows: body(params, *rows))
    return by_batch(
        lambda *rows: compiled(device.params, *rows),
        (*device.prompts_of(records), *device.responses_of(records)),
        run.config.eval.batch_size,
    )


def gap_and_logprob(
    params: decoder.Params,
    prompts: jax.Array,
    mask: jax.Array,
    responses: jax.Array,
    length: jax.Array,
    *,
    cfg: DecoderConfig,
    temperature: float,
    barred: int | None,
) -> jax.Array:
    """f32[B, 2]: the mean gap between the two largest probabilities, and the sum of log p.

    prompts i32[B, L] with mask bool[B, L]; responses i32[B, T], of which the first `length` i32[B]
    tokens count. The gap is at temperature 1, log p at `temperature`; `barred` is the token that
    was disallowed, if one was.
    """
    params = decoder.with_ends(params, cfg)
    hidden, cache = decoder.prefill(params, cfg, prompts, mask)
    states = logprobs.continued_hidden(params, cfg, hidden, cache, mask, responses)

    def column(of_column: tuple[jax.Array, jax.Array]) -> jax.Array:
        state, target = of_column
        logits = decoder.logits(params, cfg, state)
        if barred is not None:
            logits = logits.at[:, barred].set(-jnp.inf)
        two = jax.lax.top_k(jax.nn.softmax(logits), 2)[0]
        logp = jax.nn.log_softmax(logits / temperature)
        chosen = jnp.take_along_axis(logp, target[:, None], axis=1)[:, 0]
        return jnp.stack([two[:, 0] - two[:, 1], chosen], axis=1)

    # A column at a time: logits [B, T, V] would not fit.
    found = jax.lax.map(column, (states.swapaxes(0, 1), responses.T))  # [T, B, 2]
    counts = jnp.arange(responses.shape[1])[:, None] < length
    gap, logp = jnp.where(counts[..., None], found, 0.0).sum(0).T
    return jnp.stack([gap / length, logp], axis=1).astype(jnp.float32)
