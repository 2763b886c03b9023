"""A router learned on the model's last hidden state.

It is a logistic regression on what the model knows once its response is written.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from collab_jax.models import decoder, logprobs
from collab_jax.models.decoder import DecoderConfig
from collab_jax.records import Records
from collab_jax.routing import learned
from collab_jax.routing.device import Device, by_batch
from collab_jax.runtime import parallel


def score(device: Device, fit_on: Records, records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Probability that the device is wrong, and device tokens, which are none; both f64[n].

    It is read from the state after the response's last token but EOS.
    """
    cfg = device.run.cfg
    compiled = parallel.pmap(lambda params, *rows: last_hidden(params, cfg, *rows))
    fitted, routed = (_features(device, compiled, table) for table in (fit_on, records))
    wrong = learned.fit(learned.logistic(), fitted, fit_on, routed)
    return wrong, np.zeros(len(wrong))


def _features(device: Device, compiled: Callable, records: Records) -> np.ndarray:
    """The hidden states f32[n, E]."""
    responses, length = device.responses_of(records)
    return by_batch(
        lambda *rows: compiled(device.params, *rows),
        (*device.prompts_of(records), responses, length - 1),
        device.run.config.eval.batch_size,
    )


def last_hidden(
    params: decoder.Params,
    cfg: DecoderConfig,
    prompts: jax.Array,
    mask: jax.Array,
    responses: jax.Array,
    last: jax.Array,
) -> jax.Array:
    """Hidden state f32[B, E] that predicts token number `last` i32[B] of each response.

    prompts i32[B, L] with mask bool[B, L]; responses i32[B, T].
    """
    hidden, cache = decoder.prefill(params, cfg, prompts, mask)
    states = logprobs.continued_hidden(params, cfg, hidden, cache, mask, responses)
    return states[jnp.arange(len(last)), last].astype(jnp.float32)
