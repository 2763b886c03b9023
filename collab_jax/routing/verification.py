"""Self-verification: the device is asked whether its own answer is right (as in AutoMix, arXiv
2310.12963).
"""

import re

import jax.numpy as jnp
import numpy as np

from collab_jax.models import decoder
from collab_jax.records import Records
from collab_jax.rl.experiment import Run
from collab_jax.routing.device import Device, by_batch
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError


def check(run: Run) -> tuple[int, int]:
    """The tokens of yes and no. Raises UserError where the question cannot be asked."""
    r = run.config.routers
    if "{response}" not in r.verify_prompt:
        raise UserError(
            "router verification needs config.routers.verify_prompt, with {response} in it, and {prompt} if wanted, "
            f"that asks for {r.yes!r} or {r.no!r}; a model that reads no instructions cannot do it"
        )
    yes, no = (
        run.text.tokenizer.encode(word, add_special_tokens=False)[:1] for word in (r.yes, r.no)
    )
    if yes == no or not yes or not no:
        raise UserError(
            f"config.routers.yes={r.yes!r} and no={r.no!r} must begin with different tokens: use other words"
        )
    return yes[0], no[0]


def score(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds f64[n] of `config.routers.no` against `yes` as the first token of the device's reply
    to `verify_prompt`.

    That is AutoMix's share of sampled verifications for infinitely many samples. The other result
    is the device tokens of the question, f64[n], one reply token included.
    """
    del fit_on
    run, r = device.run, device.run.config.routers
    yes, no = check(run)
    asked = []
    for row in zip(records["prompt"], records["text"], strict=True):
        filled = dict(zip(("{prompt}", "{response}"), row, strict=True))
        question = re.sub(
            r"\{(prompt|response)\}", lambda match, filled=filled: filled[match[0]], r.verify_prompt
        )
        asked.append([{"role": "user", "content": question}])
    longest = max(len(run.text.prompt_ids(messages)) for messages in asked)
    tokens, mask = run.text.prompt_batch(asked, -(-longest // 64) * 64)

    def body(params, tokens, mask):
        last, _ = decoder.prefill(params, run.cfg, tokens, mask)
        logits = decoder.logits(params, run.cfg, last)
        return jnp.take(logits, no, axis=-1) - jnp.take(logits, yes, axis=-1)

    compiled = parallel.pmap(body)
    odds = by_batch(
        lambda *rows: compiled(device.params, *rows), (tokens, mask), run.config.eval.batch_size
    )
    return odds.astype(float), mask.sum(1) + 1.0
