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
) -> SamplerSettings:
    """Returns how a run samples `group` responses to each prompt, with these tokens."""
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
    )


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
        keys = sampler.prompt_keys(seed, step, index)
        return sampler.start(params, cfg, prompts, prompt_mask, keys, marker_bias, settings)

    return begin
