"""One batch of experience: sample on the devices, decode, judge, look up the cloud's verdicts.

Layout of a Rollout (Q = D * P prompts in order; device d holds prompts d * P .. (d + 1) * P - 1):

    prompts [Q, L]      |pad pad  the prompt |
    tokens  [Q, G, T]                        | a response EOS pad pad |   mask: True to EOS, EOS in
    verdicts [Q, G]     correct, called, formatted: what the text is
    cloud [Q]           cloud_correct, cloud_known: the cloud's verdict, where needed and known

The cloud's verdict on a prompt is constant. It is needed where a response called, or where no
response was right (the filter must know D2), and where decisions are scored, where one is wrong; on
other prompts the cloud is not asked.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from collab_jax.cloud import Answers, CachedCloud, Pending, far
from collab_jax.gapg import Rollout
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import Messages, Text
from collab_jax.rl import algorithms, sampling
from collab_jax.rl.batch import Batch
from collab_jax.rl.experiment import Run
from collab_jax.rl.missing_verdicts import NOTHING_MISSING, MissingVerdicts
from collab_jax.runtime import hosts, parallel
from collab_jax.tasks import Example, Task, Verdict, base, budgets

FLAGS = "correct", "called", "formatted", "timed_out", "unjudged"  # of a Verdict


class Verdicts(NamedTuple):
    """The texts of R responses, and what each response is, bool[R] each; grade f32[R]."""

    texts: list[str]
    correct: np.ndarray
    called: np.ndarray
    formatted: np.ndarray
    timed_out: np.ndarray  # the verifier ran out of time
    unjudged: np.ndarray  # the verifier could not tell
    grade: np.ndarray  # how right it is, in [0, 1]

    def of(self, row: int) -> Verdict:
        """Returns the verdict of a response that was not judged, which has no grade."""
        return Verdict(**{name: bool(getattr(self, name)[row]) for name in FLAGS})


class CloudVerdicts(NamedTuple):
    """Whether the cloud's answers to n prompts are correct, and whether that is known, bool[n]."""

    correct: np.ndarray  # False where it is not known
    known: np.ndarray
    grade: np.ndarray  # f32[n], how right they are, in [0, 1]; 0 where it is not known


class CloudAnswers(NamedTuple):
    """The cloud's answers to n prompts, and its verdicts on them."""

    verdicts: CloudVerdicts
    answers: Answers


class Collected(NamedTuple):
    """A Rollout with axis D, the texts of its responses, and which verdicts were asked for."""

    rollout: Rollout
    texts: list[str]  # by row: G texts of the first prompt, then those of the next
    cut_off: float  # share of responses that hit the length limit
    cloud_asked: int  # prompts on which the cloud's verdict was needed
    missing: MissingVerdicts  # the verdicts that were needed and are not known


def make_sampler(
    cfg: DecoderConfig,
    text: Text,
    config: ConfigDict,
    *,
    group: int,
    temperature: float,
    keep_hidden: bool = False,
) -> Sampler:
    """Returns sampler(params, prompts, prompt_mask, seed, step, bias=marker_bias) -> Samples.

    Every argument and result has the axis D, as i32[D] for seed and step. `draw` calls the sampler.
    """
    settings = sampling.sampler_settings(
        config,
        eos_ids=text.eos_ids,
        pad_id=text.pad_id,
        marker=text.decision,
        group=group,
        temperature=temperature,
        keep_hidden=keep_hidden,
    )
    return Sampler(cfg, settings, sampling.begin_body(cfg, settings), parallel.pmap)


def draw(
    sampler: Callable[..., Samples],
    params: Params | None,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    *,
    seed: int,
    step: int,
    bias: float = 0.0,
    finished: Callable | None = None,
) -> Samples:
    """Returns samples of Q prompts on all local devices, with the keys of (seed, step).

    prompts i32[Q, L], prompt_mask bool[Q, L], where D must divide Q; params and the samples have
    the axis D. bias: what is added to the decision token's logit at decision states; -inf disallows
    the marker. finished: see `Sampler.__call__`.
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


def judge(
    task: Task,
    text: Text,
    examples: Sequence[Example],
    tokens: np.ndarray,
    mask: np.ndarray,
    ended: np.ndarray,
    given: Mapping[int, Verdict] | None = None,
) -> Verdicts:
    """Returns the verdicts of R responses: tokens i32[R, T], mask bool[R, T], ended bool[R].

    `examples` has one example for each response. given: verdicts by row, which the verifier is not
    asked for. A response that was cut off is neither correct, nor a call, nor well formed. A call
    needs the decision token where there is one: a marker in other tokens would escape every bias.
    """
    texts = text.decode(tokens, mask)
    if text.decide_after_answer:
        texts = [base.taken_back(response, text.marker) for response in texts]
    verdicts = dict(given or {})
    if rows := [row for row in np.flatnonzero(ended).tolist() if row not in verdicts]:
        judged = task.verify([examples[i] for i in rows], [texts[i] for i in rows])
        verdicts.update(zip(rows, judged, strict=True))
    found = [verdicts.get(row, Verdict(False, False, False)) for row in range(len(texts))]
    flags = {name: np.array([getattr(verdict, name) for verdict in found], bool) for name in FLAGS}
    if text.plain is None:
        flags["called"] &= ((np.asarray(tokens) == text.decision_id) & mask).any(axis=1)
    grade = np.array([verdict.value for verdict in found], np.float32)
    return Verdicts(texts=texts, grade=grade, **flags)


def ask_cloud(task: Task, cloud: CachedCloud, examples: Sequence[Example]) -> CloudAnswers:
    """Returns the cloud's answers to n examples and the verdicts on them, through the store."""
    prompts, ids = cloud_prompts(task, examples)
    answers = cloud.answer(prompts, ids)
    return CloudAnswers(cloud_verdicts(task, examples, answers), answers)


def cloud_prompts(task: Task, examples: Sequence[Example]) -> tuple[list[Messages], list[str]]:
    """Returns what the cloud is asked on each example, and the examples' ids for messages."""
    return [task.cloud_prompt(e) for e in examples], [e.id for e in examples]


def cloud_verdicts(task: Task, examples: Sequence[Example], answers: Answers) -> CloudVerdicts:
    """Returns whether each of the cloud's answers is correct, and whether that is known.

    It is not where the call failed, the verifier ran out of time, or could not judge the answer.
    """
    texts = ["" if reply is None else reply.text for reply in answers.replies]
    verdicts = task.verify(examples, texts)
    known = np.array(
        [
            reply is not None and not verdict.timed_out and not verdict.unjudged
            for reply, verdict in zip(answers.replies, verdicts, strict=True)
        ],
        bool,
    )
    correct = np.array([v.correct for v in verdicts], bool)
    grade = np.array([v.value for v in verdicts], np.float32)
    return CloudVerdicts(correct & known, known, grade * known)


class LiveJudging:
    """Judges the responses of a batch as they end, and the cloud's answers as they come.

    The sampler calls `judge_responses` while the devices go on. The cloud is asked on a prompt once
    all its responses have ended, and only where its verdict is needed.
    """

    def __init__(
        self,
        run: Run,
        batch: Batch,
        group: int,
        skip: MissingVerdicts,
        while_sampling: Callable[[], None] | None,
    ):
        Q, G = len(batch.examples), group
        self._while_sampling = while_sampling
        self._task, self._text, self._examples = run.task, run.text, batch.examples
        self._skip = skip
        self._scored = algorithms.scores_decisions(run.config)
        self._cloud = run.cloud if algorithms.needs_cloud(run.config) else None
        self.correct, self.called, self.formatted = (np.zeros((Q, G), bool) for _ in range(3))
        self.texts = np.empty((Q, G), object)
        self.cloud_correct, self.cloud_known = np.zeros(Q, bool), np.ones(Q, bool)
        self.grade, self.cloud_grade = np.zeros((Q, G), np.float32), np.zeros(Q, np.float32)
        self.asked: list[int] = []  # prompts on which the cloud's verdict was needed
        self._open = np.full(Q, G)  # responses of each prompt that have not ended
        self._pending: list[tuple[np.ndarray, Pending]] = []  # prompts, and the cloud's answers
        self._missing: dict[tuple[str, int], Verdict] = {}  # MissingVerdicts.responses
        # Of each prompt, how many responses to the same come before its own.
        self._earlier = [G * n for n in batch.earlier]

    def judge_responses(
        self, tokens: np.ndarray, mask: np.ndarray, ended: np.ndarray, now: np.ndarray
    ) -> None:
        """Judges the responses that have just ended, `now`; see `finished` of `Sampler.__call__`.

        tokens i32[D, P, G, T], mask bool[D, P, G, T], ended, now bool[D, P, G].
        """
        if self._while_sampling is not None:
            while_sampling, self._while_sampling = self._while_sampling, None
            while_sampling()
        Q, G = self.correct.shape
        now = now.reshape(Q, G)
        if not now.any():
            return
        places = np.argwhere(now).tolist()  # (prompt, place in its group)
        keys = [(self._examples[q].id, self._earlier[q] + i) for q, i in places]
        skipped = self._skip.responses
        verdicts = judge(
            self._task,
            self._text,
            [self._examples[q] for q, _ in places],
            tokens.reshape(Q, G, -1)[now],
            mask.reshape(Q, G, -1)[now],
            ended.reshape(Q, G)[now],
            given={row: skipped[key] for row, key in enumerate(keys) if key in skipped},
        )
        self.correct[now] = verdicts.correct
        self.called[now] = verdicts.called
        self.formatted[now] = verdicts.formatted
        self.grade[now] = verdicts.grade
        self.texts[now] = verdicts.texts
        for row in np.flatnonzero(verdicts.timed_out | verdicts.unjudged).tolist():
            self._missing[keys[row]] = verdicts.of(row)
        self._open -= now.sum(1)
        self._ask_cloud(np.flatnonzero((self._open == 0) & now.any(1)))
        self._judge_replies()

    def _ask_cloud(self, complete: np.ndarray) -> None:
        """Asks the cloud on those prompts, i[n], where its verdict is needed and not skipped."""
        if self._scored:
            needed = complete[~self.correct[complete].all(1)]
        else:
            called, solved = self.called[complete].any(1), self.correct[complete].any(1)
            needed = complete[called | ~solved]
        if not needed.size or self._cloud is None:
            return
        self.asked.extend(needed)
        skipped = np.array([self._examples[q].id in self._skip.prompts for q in needed])
        self.cloud_known[needed[skipped]] = False
        if (wanted := needed[~skipped]).size:
            prompts, ids = cloud_prompts(self._task, [self._examples[q] for q in wanted])
            self._pending.append((wanted, self._cloud.submit(prompts, ids)))

    def _judge_replies(self) -> None:
        """Judges the cloud's answers that have come."""
        still_pending = []
        for prompts, pending in self._pending:
            if pending.done():
                self._judge_answers(prompts, pending.answers())
            else:
                still_pending.append((prompts, pending))
        self._pending = still_pending

    def wait_for_replies(self, seconds: float | None) -> None:
        """Judges the cloud's answers that come within `seconds`; None: waits for all of them."""
        end = None if seconds is None else time.monotonic() + seconds
        for prompts, pending in self._pending:
            left = None if end is None else max(0.0, end - time.monotonic())
            self._judge_answers(prompts, pending.answers(left))
        self._pending = []

    def _judge_answers(self, prompts: np.ndarray, answers: Answers) -> None:
        verdicts = cloud_verdicts(self._task, [self._examples[q] for q in prompts], answers)
        self.cloud_correct[prompts] = verdicts.correct
        self.cloud_known[prompts] = verdicts.known
        self.cloud_grade[prompts] = verdicts.grade

    def missing(self) -> MissingVerdicts:
        """Returns the verdicts that were needed and are not known."""
        unknown = frozenset(self._examples[q].id for q in self.asked if not self.cloud_known[q])
        return MissingVerdicts(unknown, self._missing)


def collect(
    run: Run,
    sampler: Sampler,
    params: Params,
    batch: Batch,
    *,
    step: int,
    wait: float | None = None,
    skip: MissingVerdicts = NOTHING_MISSING,
    while_sampling: Callable[[], None] | None = None,
) -> Collected:
    """Returns the rollout of a batch under `params` (with axis D): sampled, and judged meanwhile.

    Of several hosts each has its share of the step's batch, and all call this at once. Sampling has
    the key of (config.seed, step). Where the run's algorithm does not need the cloud, it is not
    asked, and it counts as never right.
    wait: seconds after sampling until a verdict of the cloud counts as unknown; None: until it is
    known, or its call has failed.
    skip: verdicts that are not asked for and count as missing.
    while_sampling: called once, when the devices have just begun.
    """
    scored = algorithms.scores_decisions(run.config)
    judging = LiveJudging(run, batch, sampler.settings.group, skip, while_sampling)
    samples = draw(
        sampler,
        params,
        batch.prompts,
        batch.mask,
        seed=run.config.seed,
        step=step,
        bias=-np.inf if scored else 0.0,
        finished=judging.judge_responses,
    )
    end = time.monotonic() + (math.inf if wait is None else wait)
    if hosts.count() > 1:
        far.settle(run.cloud, wait)
    judging.wait_for_replies(None if wait is None else max(0.0, end - time.monotonic()))
    D = jax.local_device_count()
    prompts, prompt_mask = parallel.shard((batch.prompts, batch.mask), D)
    levels = budgets.levels(batch.examples, run.config.task.budgets)
    rollout = Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=samples.tokens,
        logp=samples.logp,
        mask=samples.mask,
        barred=barred_tokens(run.text, samples) if scored else None,
        margin=samples.margins.max(-1) if scored else None,
        hidden=samples.hidden,
        correct=parallel.shard(judging.correct, D),
        called=parallel.shard(judging.called, D),
        formatted=parallel.shard(judging.formatted, D),
        cloud_correct=parallel.shard(judging.cloud_correct, D),
        cloud_known=parallel.shard(judging.cloud_known, D),
        grade=parallel.shard(judging.grade, D) if run.task.graded else None,
        cloud_grade=parallel.shard(judging.cloud_grade, D) if run.task.graded else None,
        level=None if levels is None else parallel.shard(levels, D),
    )
    return Collected(
        rollout=rollout,
        texts=list(judging.texts.reshape(-1)),
        cut_off=float(1 - np.asarray(samples.ended).mean()),
        cloud_asked=len(judging.asked),
        missing=judging.missing(),
    )


def barred_tokens(text: Text, samples: Samples) -> jax.Array:
    """Returns the decision token at decision states, where it was disallowed, or -1.

    i32[D, P, G, T].
    """
    assert text.decision_id is not None  # experiment.check_config requires it
    return jnp.where(samples.margins > -jnp.inf, text.decision_id, -1)
