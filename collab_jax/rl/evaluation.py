"""Evaluation: two greedy passes over held-out prompts, as records, one row a prompt."""

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax import records
from collab_jax.cloud import CachedCloud
from collab_jax.cloud.share import with_attempt
from collab_jax.gapg import TrainState
from collab_jax.models.text import Text
from collab_jax.records import Records
from collab_jax.rl import experiment, rollout
from collab_jax.rl.experiment import Run
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task


def evaluate(
    sample,
    params,
    text: Text,
    task: Task,
    cloud: CachedCloud | None,
    examples: list[Example],
    config: ConfigDict,
    name: str,
    natural: bool = True,
    seed: int | None = None,
) -> Records:
    """Records of `examples`; `sample` is a greedy `rollout.make_sampler` of group 1, `params` has
    axis D.

    seed: of a sampler with a temperature. In a drawn response a call is a marker that was written
    to its end.

    natural: with the natural pass too, and its columns. cloud None: none is asked, and no verdict
    of it is known.
    """
    D, size = jax.local_device_count(), config.eval.batch_size
    rows: list[dict] = []
    with tqdm(total=len(examples), desc=f"evaluate {name}", unit="prompt", mininterval=1) as bar:
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            padded = batch + batch[:1] * (size - len(batch))  # one shape, one compilation
            prompts = parallel.shard(
                text.prompt_batch([task.prompt(e) for e in padded], config.prompt_length), D
            )
            passes, key = {}, (np.full(D, seed or 0, np.int32), np.full(D, start // size, np.int32))
            for kind, bias in (("natural", 0.0), ("local", -np.inf))[not natural :]:
                samples = sample(params, *prompts, *key, bias=np.full(D, bias, np.float32))
                one = jax.tree.map(lambda x: x[:, 0], parallel.gather(samples))  # padding included
                passes[kind] = (
                    one,
                    rollout.judge(task, text, padded, one.tokens, one.mask, one.ended),
                )
            shared, drawn = [{}] * len(batch), seed is not None
            if config.cloud.share_attempt and natural and not drawn and cloud is not None:
                shared = shared_answers(task, cloud, text, batch, passes["natural"][0])
            columns = zip(batch, cloud_answers(task, cloud, batch), shared, strict=True)
            rows += [_row(task, e, i, passes, drawn) | c | s for i, (e, c, s) in enumerate(columns)]
            bar.update(len(batch))
    return records.check({column: [row[column] for row in rows] for column in rows[0]}, name)


def cloud_answers(task: Task, cloud: CachedCloud | None, examples: list[Example]) -> list[dict]:
    """The cloud's columns of each example; without a cloud nothing is known."""
    nothing = {"cloud_correct": False, "cloud_known": False, "cloud_tokens": 0, "cloud_usd": 0.0}
    if cloud is None:
        return [nothing] * len(examples)
    correct, known, answers = rollout.ask_cloud(task, cloud, examples)
    return [
        {
            "cloud_correct": c,
            "cloud_known": k,
            "cloud_tokens": reply.input_tokens + reply.output_tokens,
            "cloud_usd": reply.usd,
        }
        if reply
        else nothing
        for c, k, reply in zip(correct, known, answers.replies, strict=True)
    ]


def shared_answers(
    task: Task, cloud: CachedCloud, text: Text, examples: list[Example], natural
) -> list[dict]:
    """Columns of the cloud's answers with the device's attempt, where the natural pass called.

    The attempt is what was written before the decision token. `shared_extra_tokens`: input tokens
    more than without it.
    """
    calls = [i for i in range(len(examples)) if (natural.margins[i] > 0).any()]
    firsts = [int((natural.margins[i] > 0).argmax()) for i in calls]
    attempts = [
        text.decode(natural.tokens[i : i + 1, :t], natural.mask[i : i + 1, :t])[0]
        for i, t in zip(calls, firsts, strict=True)
    ]
    called = [examples[i] for i in calls]
    alone, names = rollout.cloud_prompts(task, called)
    answers = cloud.answer(
        [with_attempt(m, attempt) for m, attempt in zip(alone, attempts, strict=True)], names
    )
    correct, known = rollout.cloud_verdicts(task, called, answers)
    rows = [
        {"shared_known": False, "shared_correct": False, "shared_extra_tokens": 0} for _ in examples
    ]
    without = cloud.answer(alone).replies
    for i, c, k, reply, bare in zip(calls, correct, known, answers.replies, without, strict=True):
        if k and bare:
            extra = reply.input_tokens - bare.input_tokens
            rows[i] = {"shared_known": True, "shared_correct": c, "shared_extra_tokens": extra}
    return rows


def _row(task: Task, example: Example, i: int, passes, drawn: bool) -> dict:
    local, verdicts = passes["local"]
    row = {
        "id": example.id,
        "task": example.task,
        "stratum": example.stratum,
        "prompt": task.prompt(example)[-1]["content"],
        "text": verdicts.texts[i],
        "local_correct": bool(verdicts.correct[i]),
        "formatted": bool(verdicts.formatted[i]),
        "unjudged": bool(verdicts.timed_out[i] | verdicts.unjudged[i]),
        "ended": bool(local.ended[i]),
        "tokens": int(local.mask[i].sum()),
        "logp": float(local.logp[i].sum()),
        "margin": float(local.margins[i].max()),
        "margins": local.margins[i][local.mask[i]],
    }
    if "natural" not in passes:
        return row
    natural, natural_verdicts = passes["natural"]
    crossing = natural.margins[i] > 0
    called = bool(natural_verdicts.called[i] if drawn else crossing.any())
    return row | {
        "natural_text": natural_verdicts.texts[i],
        "natural_called": called,
        "natural_completed": bool(natural_verdicts.called[i]),
        "natural_correct": bool(natural_verdicts.correct[i]),
        "natural_ended": bool(natural.ended[i]),
        "natural_tokens": int(crossing.argmax()) + 1
        if called and not drawn
        else int(natural.mask[i].sum()),
    }


def greedy_sampler(run: Run):
    """The sampler of `evaluate_state`; made once, it is compiled once."""
    return rollout.make_sampler(run.cfg, run.text, run.config, group=1, temperature=0.0)


def held_out(run: Run) -> list[Example]:
    """The first `config.eval.prompts` test prompts."""
    if not run.config.eval.prompts:
        return []
    examples = experiment.examples(run, "test")[: run.config.eval.prompts]
    if len(examples) < run.config.eval.prompts:
        raise UserError(
            f"config.eval.prompts={run.config.eval.prompts}, but the test split has {len(examples)} that fit"
        )
    return examples


def evaluate_state(
    run: Run, sample, state: TrainState, examples: list[Example], name: str
) -> Records:
    """Records of `examples` under `state` (with axis D) by a `greedy_sampler`."""
    return evaluate(
        sample, state.final_model, run.text, run.task, run.cloud, examples, run.config, name
    )
