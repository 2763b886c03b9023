"""One batch of experience: sample on the devices, decode, judge, look up the cloud.

Layout of a Rollout (Q = D * P prompts in order; device d holds prompts d * P .. (d + 1) * P - 1):

    prompts [Q, L]      |pad pad  the prompt |
    tokens  [Q, G, T]                        | a response EOS pad pad |   mask: True up to EOS, EOS in
    verdicts [Q, G]     correct, called, formatted: what the text is
    cloud [Q]           cloud_correct, cloud_known: the cloud's constant verdict on the prompt, where it was needed

The cloud's verdict is needed where a response called, or where none was right (the filter must know D2); elsewhere the
cloud is not asked.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from collab_jax import parallel, sampler
from collab_jax.cloud import CachedCloud
from collab_jax.gapg import Rollout
from collab_jax.models.decoder import DecoderConfig
from collab_jax.models.text import Text
from collab_jax.sampler import Marker
from collab_jax.tasks import Example, Task


class Verdicts(NamedTuple):
    """Of R responses: their text, and what they are, bool[R] each."""

    texts: list[str]
    correct: np.ndarray
    called: np.ndarray
    formatted: np.ndarray


class Collected(NamedTuple):
    """A Rollout sharded over devices, its texts by row (prompt-major), and this batch's dealings with the cloud."""

    rollout: Rollout
    texts: list[str]
    cut_off: float  # share of responses that hit the length limit
    cloud_asked: int  # distinct prompts whose verdict was needed
    cloud_bought: int  # of those, not in the store yet
    cloud_failed: int


def make_sampler(cfg: DecoderConfig, text: Text, config: ConfigDict, *, group: int, temperature: float) -> Callable:
    """sample(params, prompts, prompt_mask, seed, step, marker_bias) -> Samples, every argument and result with axis D.

    seed, step: i32[D]; a row's key depends on them and on its global index alone.
    """

    def body(params, prompts, prompt_mask, seed, step, marker_bias):
        P = prompts.shape[0]
        index = jax.lax.axis_index(parallel.AXIS) * P + jnp.arange(P)
        return sampler.sample(
            params,
            cfg,
            prompts,
            prompt_mask,
            sampler.prompt_keys(seed, step, index),
            marker_bias,
            group=group,
            max_new=config.max_new_tokens,
            temperature=temperature,
            top_p=1.0,
            eos_ids=text.eos_ids,
            pad_id=text.pad_id,
            marker=Marker(text.decision_id, text.answer_open),
        )

    return parallel.pmap(body)


def judge(task: Task, text: Text, examples: Sequence[Example], tokens, mask, ended) -> Verdicts:
    """Verdicts of responses [R, T], one example each. One that was cut off is nothing.

    A call needs the decision token: the marker spelt out in other tokens would escape margins and biases.
    """
    texts = text.decode(tokens, mask)
    found = [task.verify(example, response) for example, response in zip(examples, texts, strict=True)]
    correct, called, formatted = np.array(found, bool).reshape(-1, 3).T
    decided = ((np.asarray(tokens) == text.decision_id) & mask).any(axis=1)
    return Verdicts(texts, correct & ended, called & ended & decided, formatted & ended)


def ask_cloud(task: Task, cloud: CachedCloud, examples: Sequence[Example]):
    """(correct bool[n], known bool[n], bought, failed): the cloud's verdicts on `examples`, through the store."""
    answers = cloud.answer([task.cloud_prompt(example) for example in examples])
    known = np.array([reply is not None for reply in answers.replies], bool)
    correct = np.array(
        [r is not None and task.verify(e, r.text).correct for e, r in zip(examples, answers.replies, strict=True)], bool
    )
    return correct, known, answers.bought, answers.failed


def collect(
    sample: Callable,
    params,
    text: Text,
    task: Task,
    cloud: CachedCloud,
    examples: Sequence[Example],
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    seed: int,
    step: int,
) -> Collected:
    """Rollout of Q examples, whose prompts are i32[Q, L], under `params` (with axis D), sampled with the key of (seed, step)."""
    D, Q = jax.local_device_count(), len(examples)
    prompts, prompt_mask = parallel.shard((prompts, prompt_mask), D)
    scalar = lambda x, dtype: np.full(D, x, dtype)  # noqa: E731
    samples = sample(
        params, prompts, prompt_mask, scalar(seed, np.int32), scalar(step, np.int32), scalar(0, np.float32)
    )
    host = parallel.gather({"tokens": samples.tokens, "mask": samples.mask, "ended": samples.ended})
    G = host["tokens"].shape[1]
    rows = {name: x.reshape(Q * G, *x.shape[2:]) for name, x in host.items()}
    verdicts = judge(task, text, [e for e in examples for _ in range(G)], **rows)
    by_group = {name: getattr(verdicts, name).reshape(Q, G) for name in ("correct", "called", "formatted")}

    needed = np.flatnonzero(by_group["called"].any(1) | ~by_group["correct"].any(1))
    cloud_correct, cloud_known = np.zeros(Q, bool), np.ones(Q, bool)
    cloud_correct[needed], cloud_known[needed], bought, failed = ask_cloud(task, cloud, [examples[i] for i in needed])
    rollout = Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=samples.tokens,
        logp=samples.logp,
        mask=samples.mask,
        **parallel.shard({**by_group, "cloud_correct": cloud_correct, "cloud_known": cloud_known}, D),
    )
    return Collected(rollout, verdicts.texts, 1 - rows["ended"].mean(), len(needed), bought, failed)
