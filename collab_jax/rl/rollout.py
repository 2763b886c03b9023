"""One batch of experience: sample on the devices, decode, judge, look up the cloud.

Layout of a Rollout (Q = D * P prompts in order; device d holds prompts d * P .. (d + 1) * P - 1):

    prompts [Q, L]      |pad pad  the prompt |
    tokens  [Q, G, T]                        | a response EOS pad pad |   mask: True up to EOS, EOS in
    verdicts [Q, G]     correct, called, formatted: what the text is
    cloud [Q]           cloud_correct, cloud_known: the cloud's constant verdict on the prompt, where it was needed and came

The cloud's verdict is needed where a response called, or where none was right (the filter must know
D2); elsewhere the cloud is not asked.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from collab_jax.cloud import Answers, CachedCloud, Messages, Pending
from collab_jax.gapg import Rollout
from collab_jax.models import sampler
from collab_jax.models.decision import Marker, PlainMarker
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import Text
from collab_jax.runtime import parallel
from collab_jax.tasks import Example, Task, Verdict


class Verdicts(NamedTuple):
    """Of R responses: their text, and what they are, bool[R] each."""

    texts: list[str]
    correct: np.ndarray
    called: np.ndarray
    formatted: np.ndarray
    timed_out: np.ndarray  # the verifier did not get to an end
    unjudged: np.ndarray  # it could not tell


class Collected(NamedTuple):
    """A Rollout sharded over devices, its texts by row (prompt-major), and this batch's dealings
    with the cloud.
    """

    rollout: Rollout
    texts: list[str]
    cut_off: float  # share of responses that hit the length limit
    cloud_asked: int  # distinct prompts whose verdict was needed
    unknown: list[str]  # ids of those of them without one
    verifier_timeouts: int  # responses
    verifier_failures: int  # responses that could not be judged for another reason


def make_sampler(
    cfg: DecoderConfig,
    text: Text,
    config: ConfigDict,
    *,
    group: int,
    temperature: float,
    solo: int = 0,
) -> Sampler:
    """sample(params, prompts, prompt_mask, seed, step, bias=marker_bias) -> Samples, every argument
    and result with axis D.

    seed, step: i32[D]; a row's key depends on them and on its global index alone.
    """
    # That one greedy pass holds the decision at every bias, bit for bit, needs both passes to be of
    # the same programs; slots that went away at other columns would part them.
    slot_counts = config.decode.slot_counts if temperature > 0 else 1
    settings = sampler.SamplerSettings(
        group=group,
        max_new=config.max_new_tokens,
        temperature=temperature,
        top_p=1.0,
        eos_ids=text.eos_ids,
        pad_id=text.pad_id,
        marker=Marker(
            text.decision_id, text.answer_open, PlainMarker(*text.plain) if text.plain else None
        ),
        segments=config.decode.segments,
        slot_counts=slot_counts,
        cache_dtype=config.decode.cache_dtype,
        solo=solo,
    )

    def begin(params, prompts, prompt_mask, seed, step, marker_bias):
        P = prompts.shape[0]
        index = jax.lax.axis_index(parallel.AXIS) * P + jnp.arange(P)
        keys = sampler.prompt_keys(seed, step, index)
        return sampler.start(params, cfg, prompts, prompt_mask, keys, marker_bias, settings)

    return Sampler(cfg, settings, begin, parallel.pmap)


def draw(
    sampler: Sampler,
    params: Params,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    *,
    seed: int,
    step: int,
    bias: float = 0.0,
    finished: Callable | None = None,
) -> Samples:
    """Samples of Q prompts i32[Q, L] on all local devices, with the keys of (seed, step).

    params and the Samples have the axis D; D must divide Q. bias: what is added to the decision
    token's logit at decision states; -inf disallows the marker. finished: see `Sampler.__call__`.
    """
    D = jax.local_device_count()
    prompts, prompt_mask = parallel.shard((prompts, prompt_mask), D)
    return sampler(
        params,
        prompts,
        prompt_mask,
        np.full(D, seed, np.int32),
        np.full(D, step, np.int32),
        bias=np.full(D, bias, np.float32),
        finished=finished,
    )


def judge(task: Task, text: Text, examples: Sequence[Example], tokens, mask, ended) -> Verdicts:
    """Verdicts of responses [R, T], one example each. One that was cut off is nothing.

    A call needs the decision token, where there is one: the marker spelt out in other tokens would
    escape margins and biases.
    """
    texts = text.decode(tokens, mask)
    found = np.zeros((len(texts), len(Verdict._fields)), bool)
    if (rows := np.flatnonzero(ended)).size:
        found[rows] = task.verify([examples[i] for i in rows], [texts[i] for i in rows])
    correct, called, formatted, timed_out, unjudged = found.T
    decided = text.plain is not None or ((np.asarray(tokens) == text.decision_id) & mask).any(
        axis=1
    )
    return Verdicts(texts, correct, called & decided, formatted, timed_out, unjudged)


def ask_cloud(task: Task, cloud: CachedCloud, examples: Sequence[Example]):
    """(correct bool[n], known bool[n], Answers): the cloud's verdicts on `examples`, through the
    store.
    """
    answers = cloud.answer(*cloud_prompts(task, examples))
    return *cloud_verdicts(task, examples, answers), answers


def cloud_prompts(task: Task, examples: Sequence[Example]) -> tuple[list[Messages], list[str]]:
    """What the cloud is asked on `examples`, and what messages call these prompts."""
    return [task.cloud_prompt(example) for example in examples], [
        example.id for example in examples
    ]


def cloud_verdicts(
    task: Task, examples: Sequence[Example], answers: Answers
) -> tuple[np.ndarray, np.ndarray]:
    """(correct bool[n], known bool[n]) of the cloud's answers on `examples`; what is not known is
    not correct.

    Not known: the call failed, or its answer could not be judged.
    """
    known = np.array([reply is not None for reply in answers.replies], bool)
    found = task.verify(
        examples, ["" if reply is None else reply.text for reply in answers.replies]
    )
    known &= ~np.array([verdict.unjudged for verdict in found], bool)
    return np.array([verdict.correct for verdict in found], bool) & known, known


def collect(
    sample: Sampler,
    params,
    text: Text,
    task: Task,
    cloud: CachedCloud | None,
    examples: Sequence[Example],
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    seed: int,
    step: int,
    meanwhile: Callable[[], None] = lambda: None,
    wait: float | None = None,
    skip: Collection[str] = (),
) -> Collected:
    """Rollout of Q examples, whose prompts are i32[Q, L], under `params` (with axis D), sampled
    with the key of (seed, step).

    Responses are judged, and the cloud is asked on a prompt whose responses have all ended, while
    the devices sample the rest; without a cloud none is asked, and none is right. `meanwhile` is
    called once, when they have just begun.
    wait: seconds after sampling until a verdict is unknown to this batch (None: until it is there
    or has failed).
    skip: ids of prompts that are not asked and whose verdict is unknown.
    """
    D, Q, G = jax.local_device_count(), len(examples), sample.settings.group
    prompts, prompt_mask = parallel.shard((prompts, prompt_mask), D)
    verdicts = np.zeros((3, Q, G), bool)  # correct, called, formatted
    texts = np.empty((Q, G), object)
    cloud_correct, cloud_known, open_rows = np.zeros(Q, bool), np.ones(Q, bool), np.full(Q, G)
    asked, unsettled, todo = (
        [],
        np.zeros(2, int),
        [meanwhile],
    )  # unsettled: responses timed out, or else not judged
    on_their_way: list[tuple[np.ndarray, Pending]] = []  # which prompts, and their answers

    def hear(last: bool) -> None:
        """Judges the cloud's answers that are there; the last time, waits for the others."""
        end = None if wait is None else time.monotonic() + wait
        for entry in list(on_their_way):
            q, pending = entry
            if last or pending.done():
                answers = pending.answers(None if end is None else max(0.0, end - time.monotonic()))
                cloud_correct[q], cloud_known[q] = cloud_verdicts(
                    task, [examples[i] for i in q], answers
                )
                on_their_way[:] = [other for other in on_their_way if other is not entry]

    def finished(tokens, mask, ended, now):
        while todo:
            todo.pop()()
        tokens, mask, ended, now = (
            x.reshape(Q, G, *x.shape[3:]) for x in (tokens, mask, ended, now)
        )
        if not now.any():
            return
        found = judge(
            task,
            text,
            [examples[q] for q in np.nonzero(now)[0]],
            tokens[now],
            mask[now],
            ended[now],
        )
        verdicts[:, now] = found[1:4]
        unsettled[:] += found.timed_out.sum(), found.unjudged.sum()
        texts[now] = found.texts
        open_rows[:] -= now.sum(1)
        correct, called, _ = verdicts
        needed = np.flatnonzero((open_rows == 0) & now.any(1) & (called.any(1) | ~correct.any(1)))
        if needed.size and cloud:
            asked.extend(needed)
            skipped = np.array([examples[q].id in skip for q in needed])
            cloud_known[needed[skipped]] = False
            if len(needed := needed[~skipped]):
                on_their_way.append(
                    (needed, cloud.submit(*cloud_prompts(task, [examples[q] for q in needed])))
                )
        hear(last=False)

    zeros = np.zeros(D, np.float32)
    samples = sample(
        params,
        prompts,
        prompt_mask,
        np.full(D, seed, np.int32),
        np.full(D, step, np.int32),
        bias=zeros,
        finished=finished,
    )
    hear(last=True)
    s = sample.settings
    barred = None
    if s.solo:
        disallowed = (jnp.arange(G)[:, None] < s.solo) & (samples.margins > -jnp.inf)
        barred = jnp.where(disallowed, s.marker.decision_id, -1)
    correct, called, formatted = verdicts
    rollout = Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=samples.tokens,
        logp=samples.logp,
        mask=samples.mask,
        barred=barred,
        **parallel.shard(
            {
                "correct": correct,
                "called": called,
                "formatted": formatted,
                "cloud_correct": cloud_correct,
                "cloud_known": cloud_known,
            },
            D,
        ),
    )
    cut_off = 1 - np.asarray(samples.ended).mean()
    unknown = sorted({examples[q].id for q in asked if not cloud_known[q]})
    return Collected(
        rollout, list(texts.reshape(-1)), cut_off, len(asked), unknown, *map(int, unsettled)
    )
