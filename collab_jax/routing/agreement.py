"""Agreement of samples: the device answers some times more; where it answers otherwise, it is
unsure (CARGO's idea).
"""

import jax
import numpy as np

from collab_jax.records import Records
from collab_jax.rl import rollout
from collab_jax.routing.device import Device, batches
from collab_jax.runtime import parallel
from collab_jax.tasks import base


def answer(response: str) -> str | None:
    """The answer without white space, by which two responses agree; None where there is none."""
    found = base.answer_of(response)
    return None if found is None else "".join(found.split())


def score(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the share of `config.routers.samples` sampled responses (marker disallowed) whose
    answer is the recorded one's.

    (f64[n], device tokens f64[n]). A response without an answer agrees with none. Answers are
    compared as text: two ways to write one answer differ.
    """
    del fit_on
    run, config, D = device.run, device.run.config, jax.local_device_count()
    k = config.routers.samples
    size = max(config.eval.batch_size // (k * D), 1) * D
    sample = rollout.make_sampler(
        run.cfg, run.text, config, group=k, temperature=config.temperature
    )
    examples = device.of(records)
    prompts = run.text.prompt_batch([run.task.prompt(e) for e in examples], config.prompt_length)
    agrees, tokens = [], []
    for i, (rows, count) in enumerate(batches(len(examples), size)):
        key = np.full(D, config.seed, np.int32), np.full(D, i, np.int32)
        shares = parallel.shard(tuple(x[rows] for x in prompts), D)
        samples = sample(device.params, *shares, *key, bias=np.full(D, -np.inf, np.float32))
        samples = parallel.gather(samples)
        for row, written, mask in zip(rows[:count], samples.tokens, samples.mask, strict=False):
            mine, others = answer(records["text"][row]), map(answer, run.text.decode(written, mask))
            agrees.append(np.mean([mine is not None and other == mine for other in others]))
            tokens.append(mask.sum())
    return -np.array(agrees), np.array(tokens, float)
