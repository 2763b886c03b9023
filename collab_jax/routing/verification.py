"""Self-verification: the device judges its own answer (as in AutoMix, arXiv 2310.12963)."""

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
            "router verification needs config.routers.verify_prompt, with {response} in it, and "
            f"{{prompt}} if wanted, that asks for {r.yes!r} or {r.no!r}; a model that reads no "
            "instructions cannot do it"
        )
    yes, no = (
        run.text.tokenizer.encode(word, add_special_tokens=False)[:1] for word in (r.yes, r.no)
    )
    if yes == no or not yes or not no:
        raise UserError(
            f"config.routers.yes={r.yes!r} and no={r.no!r} must begin with different tokens: use "
            "other words"
        )
    return yes[0], no[0]


def question(template: str, prompt: str, response: str) -> str:
    """`config.routers.verify_prompt` with {prompt} and {response} filled in, each once."""
    values = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{(prompt|response)\}", lambda match: values[match[0]], template)


def score(
    device: Device, fit_on: Records | None, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of `config.routers.no` against `yes`, and the question's device tokens; f64[n].

    They are those of the first token of the device's reply to `config.routers.verify_prompt`:
    AutoMix's share of sampled verifications, for infinitely many samples. The tokens include that
    one reply token.
    """
    del fit_on
    run, config = device.run, device.run.config
    yes, no = check(run)
    template = config.routers.verify_prompt
    questions = [
        [{"role": "user", "content": question(template, prompt, response)}]
        for prompt, response in zip(records["prompt"], records["text"], strict=True)
    ]
    longest = max(len(run.text.prompt_ids(messages)) for messages in questions)
    tokens, mask = run.text.prompt_batch(questions, -(-longest // 64) * 64)

    def body(params, tokens, mask):
        params = decoder.with_ends(params, run.cfg)
        last, _ = decoder.prefill(params, run.cfg, tokens, mask)
        logits = decoder.logits(params, run.cfg, last)
        return jnp.take(logits, no, axis=-1) - jnp.take(logits, yes, axis=-1)

    compiled = parallel.pmap(body)
    odds = by_batch(
        lambda *rows: compiled(device.params, *rows), (tokens, mask), config.eval.batch_size
    )
    return odds.astype(float), mask.sum(1) + 1.0
