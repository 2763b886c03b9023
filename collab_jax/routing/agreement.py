"""Agreement of samples: a device that answers differently when asked again is unsure (CARGO)."""

import jax
import numpy as np

from collab_jax.records import Records
from collab_jax.rl import rollout
from collab_jax.routing.device import Device, batches
from collab_jax.runtime import parallel
from collab_jax.tasks import base


def answer(response: str) -> str | None:
    """The answer without white space, by which two responses agree; None where there is none."""
    text = base.answer_of(response)
    return None if text is None else "".join(text.split())


def score(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the share of sampled responses that agree with the recorded one, and device tokens.

    Both are f64[n]. `config.routers.samples` responses are sampled with the marker disallowed; they
    agree where their answers are the same text, so two ways to write one answer differ. A response
    without an answer agrees with none.
    """
    del fit_on
    run, config, D = device.run, device.run.config, jax.local_device_count()
    k = config.routers.samples
    size = max(config.eval.batch_size // (k * D), 1) * D
    sample = rollout.make_sampler(
        run.cfg, run.text, config, group=k, temperature=config.temperature
    )
    prompts, mask = device.prompts_of(records)
    shares, tokens = [], []
    for i, (rows, count) in enumerate(batches(len(prompts), size)):
        samples = rollout.draw(
            sample, device.params, prompts[rows], mask[rows],
            seed=config.seed, step=i, bias=-np.inf,
        )  # fmt: skip
        samples = parallel.gather(samples)
        for row, written, real in zip(rows[:count], samples.tokens, samples.mask, strict=False):
            recorded = answer(str(records["text"][row]))
            answers = [answer(response) for response in run.text.decode(written, real)]
            shares.append(np.mean([recorded is not None and a == recorded for a in answers]))
            tokens.append(real.sum())
    return -np.array(shares), np.array(tokens, float)
