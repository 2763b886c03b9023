"""How a run samples: the settings by its config, and the first program, on many devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from collab_jax.models import sampler
from collab_jax.models.decision import Marker
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.sampler import Context, SamplerSettings, SampleState
from collab_jax.runtime import parallel


def sampler_settings(
    config: ConfigDict,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    marker: Marker,
    group: int,
    temperature: float,
    keep_hidden: bool = False,
) -> SamplerSettings:
    """Returns how a run samples `group` responses to each prompt, with these tokens.

    keep_hidden: whether `Samples.hidden` is wanted.
    """
    return SamplerSettings(
        group=group,
        max_new=config.max_new_tokens,
        temperature=temperature,
        top_p=1.0,
        eos_ids=eos_ids,
        pad_id=pad_id,
        marker=marker,
        segments=config.decode.segments,
        # One greedy pass holds the decision at every bias, bit for bit, only where all passes run
        # the same programs; if slots were given up at different columns, the programs would differ.
        slot_counts=config.decode.slot_counts if temperature > 0 else 1,
        cache_dtype=config.decode.cache_dtype,
        keep_hidden=keep_hidden,
    )


def prompt_keys(seed: int | jax.Array, step: int | jax.Array, index: jax.Array) -> jax.Array:
    """Returns a key for each prompt, [P], from its *global* index i32[P].

    So samples are the same on any number of devices and in any slot.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def begin_body(
    cfg: DecoderConfig, settings: SamplerSettings
) -> Callable[..., tuple[Context, SampleState]]:
    """Returns the body (params, prompts, prompt_mask, seed, step, bias) of `sampler.start`.

    A row's key depends on seed and step, i32[], and on its global index alone.
    """

    def begin(params, prompts, prompt_mask, seed, step, marker_bias):
        P = prompts.shape[0]
        device = parallel.first_device() + jax.lax.axis_index(parallel.AXIS)
        index = device * P + jnp.arange(P)
        keys = prompt_keys(seed, step, index)
        return sampler.start(params, cfg, prompts, prompt_mask, keys, marker_bias, settings)

    return begin
