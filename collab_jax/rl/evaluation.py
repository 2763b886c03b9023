"""Evaluation: a pass or two over held-out prompts, written down as records, one row a prompt.

One pass decodes with the marker disallowed; its trace of margins holds the call decision at every
budget (`sampler.py`). The natural pass leaves the marker allowed; of greedy responses it is over
those alone that call.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from collab_jax import records
from collab_jax.gapg import TrainState
from collab_jax.models.decision import Opening
from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import Text
from collab_jax.records import Records
from collab_jax.rl import cloud_columns, experiment, rollout
from collab_jax.rl.cloud_columns import Row
from collab_jax.rl.experiment import Run
from collab_jax.rl.rollout import Verdicts
from collab_jax.runtime import hosts, parallel
from collab_jax.tasks import Example, Task
from collab_jax.tasks.base import lenient_verdicts


class Pass(NamedTuple):
    """One response to each of n prompts, and the verdicts on them."""

    samples: Samples  # on the host, [n, ...], without the axes D and G
    verdicts: Verdicts


def greedy_sampler(run: Run) -> Sampler:
    """Returns the sampler of greedy evaluations. Make it once: each new one is compiled again."""
    return rollout.make_sampler(run.cfg, run.text, run.config, group=1, temperature=0.0)


def state_on_all_hosts(run: Run) -> TrainState:
    """Returns `experiment.state_on_devices`. Raises UserError where hosts have read two of them.

    A run that trains meanwhile may save another one between the first host's look and the last's.
    """
    state = experiment.state_on_devices(run)
    hosts.check_same("its checkpoint", {"step": int(np.asarray(state.step)[0])})
    return state


def held_out(run: Run, split: str) -> list[Example]:
    """Returns the first `config.eval.prompts` prompts of a split, which may have fewer.

    For a test split that is said, since otherwise only the intervals would show its size.
    """
    wanted = run.config.eval.prompts
    if not wanted:
        return []
    examples = experiment.examples(run, split)[:wanted]
    if split == "test" and len(examples) < wanted:
        print(
            f"the test split has {len(examples)} prompts that fit, fewer than "
            f"config.eval.prompts={wanted}: all of them are evaluated"
        )
    return examples


def evaluate(
    run: Run,
    sampler: Callable[..., Samples],
    params: Params | None,
    examples: Sequence[Example],
    name: str,
    *,
    natural: bool = True,
    ask_cloud: bool = True,
    seed: int | None = None,
) -> Records:
    """Returns the records of `examples` under `params` (with axis D); `name` is for messages.

    sampler: a Sampler of group 1, or another program that is called as one, which may do without
    params; greedy, or with a temperature and a `seed`. In a drawn response a call is the decision
    token at a decision state (a marker in plain text: all of it), in a greedy one a crossing of the
    margin.
    natural: with the natural pass and its columns.
    ask_cloud: with the cloud's verdicts; without, none is bought and none is known.

    A batch is dealt over the hosts; the first asks the cloud, and all return the same records.

    Raises UserError where more verdicts stay unknown than `config.eval.max_unknown` allows.
    """
    rows: list[Row] = []
    for number, batch in _batches(run, examples, name):
        told = _by_device(run, sampler, params, batch, number, natural, seed)
        told = hosts.joined("what it evaluated", told, hosts.FOREVER)
        columns, attempts = zip(*told, strict=True)
        of_cloud = [cloud_columns.unknown_answer(run.task)] * len(batch)
        if ask_cloud:
            shared = attempts if natural and seed is None else None
            said = _by_cloud(run, batch, shared) if hosts.is_first() else None
            of_cloud = hosts.gathered("what the cloud said", said, hosts.FOREVER)[0]
        rows += [c | a for c, a in zip(columns, of_cloud, strict=True)]
    if natural:
        # A greedy response that never crosses is that of the first pass.
        again = [i for i, row in enumerate(rows) if seed is not None or row["natural_called"]]
        chosen = [examples[i] for i in again]
        natural_rows = _natural(run, sampler, params, chosen, f"{name}, natural", seed)
        for i, columns in zip(again, natural_rows, strict=True):
            rows[i] = rows[i] | columns
    table = records.check({column: [row[column] for row in rows] for column in rows[0]}, name)
    return cloud_columns.ask_again(run, table, examples, name) if ask_cloud else table


def _batches(
    run: Run, examples: Sequence[Example], name: str
) -> Iterator[tuple[int, Sequence[Example]]]:
    """Yields the batches with their numbers, and shows how far it is."""
    size = run.config.eval.batch_size
    with tqdm(
        total=len(examples),
        desc=f"evaluate {name}",
        unit="prompt",
        mininterval=1,
        disable=not (examples and hosts.is_first()),
    ) as bar:
        for number, start in enumerate(range(0, len(examples), size)):
            batch = examples[start : start + size]
            yield number, batch
            bar.update(len(batch))


def _by_device(
    run: Run,
    sampler: Callable[..., Samples],
    params: Params | None,
    batch: Sequence[Example],
    number: int,
    natural: bool,
    seed: int | None,
) -> list[tuple[Row, str | None]]:
    """Returns the device's columns of this host's prompts, and what it had written when it called.

    The latter is None where it did not call, or attempts are not shared. number: the batch's.
    """
    own, local = _pass(run, sampler, params, batch, number, -np.inf, seed)
    columns = [_row(run, example, i, local, natural) for i, example in enumerate(own)]
    lenient = _lenient(run.task, own, local)
    attempts: list[str | None] = [None] * len(own)
    if natural and run.config.cloud.share_attempt:
        attempts = _attempts(run.text, len(own), local.samples)
    return [(c | found, a) for c, found, a in zip(columns, lenient, attempts, strict=True)]


def _natural(
    run: Run,
    sampler: Callable[..., Samples],
    params: Params | None,
    examples: Sequence[Example],
    name: str,
    seed: int | None,
) -> list[Row]:
    """Returns the columns of the natural pass over the examples."""
    rows: list[Row] = []
    for number, batch in _batches(run, examples, name):
        own, passed = _pass(run, sampler, params, batch, number, 0.0, seed)
        told = [_natural_row(run, i, passed, seed is not None) for i, _ in enumerate(own)]
        rows += hosts.joined("what it called", told, hosts.FOREVER)
    return rows


def _by_cloud(
    run: Run, batch: Sequence[Example], attempts: Sequence[str | None] | None
) -> list[Row]:
    """Returns each prompt's columns of the cloud; attempts: those of calls, if any are shared."""
    rows = cloud_columns.cloud_answers(run.task, run.cloud, batch)
    more: list[list[Row]] = []
    if run.config.cloud.share_attempt and attempts is not None:
        more.append(cloud_columns.shared_answers(run.task, run.cloud, batch, attempts))
    if run.config.cloud.redact:
        more.append(cloud_columns.plain_answers(run.task, run.cloud, batch))
    for columns in more:
        rows = [row | column for row, column in zip(rows, columns, strict=True)]
    return rows


def _pass(
    run: Run,
    sampler: Callable[..., Samples],
    params: Params | None,
    batch: Sequence[Example],
    number: int,
    bias: float,
    seed: int | None,
) -> tuple[Sequence[Example], Pass]:
    """Returns this host's prompts of a batch, and the pass over them and what pads them."""
    size = run.config.eval.batch_size
    part, fill = hosts.part(size), list(batch[:1]) * (size - len(batch))
    own, padded = batch[part], [*batch, *fill][part]  # one shape, one compilation
    prompts, prompt_mask = run.text.prompt_batch(
        [run.task.prompt(example) for example in padded], run.config.prompt_length
    )
    drawn = rollout.draw(
        sampler, params, prompts, prompt_mask, seed=seed or 0, step=number, bias=bias
    )
    samples = jax.tree.map(lambda x: x[:, 0], parallel.gather(drawn))  # the padding included
    verdicts = rollout.judge(
        run.task, run.text, padded, samples.tokens, samples.mask, samples.ended
    )
    return own, Pass(samples, verdicts)


def _row(run: Run, example: Example, i: int, passed: Pass, natural: bool) -> Row:
    """Returns the device's columns of the prompt in row `i` of the pass without the marker.

    natural: with those of the natural pass, as they are where it does not call.
    """
    task, (local, verdicts) = run.task, passed
    states = np.flatnonzero(local.margins[i] > -np.inf)  # of decision
    before = [0, *run.text.answer_open.states(local.tokens[i].tolist())[:-1]]
    in_answer = local.mask[i] & (np.array(before) == Opening.OPEN)
    row = {
        "id": example.id,
        "task": example.task,
        "split": example.split,
        "stratum": example.stratum,
        **({} if example.budget is None else {"shown_budget": example.budget}),
        "prompt": task.prompt(example)[-1]["content"],
        "text": verdicts.texts[i],
        "local_correct": bool(verdicts.correct[i]),
        **({"local_grade": float(verdicts.grade[i])} if task.graded else {}),
        "formatted": bool(verdicts.formatted[i]),
        "unjudged": bool(verdicts.timed_out[i] | verdicts.unjudged[i]),
        "ended": bool(local.ended[i]),
        "tokens": int(local.mask[i].sum()),
        "logp": float(local.logp[i].sum()),
        "answer_logp": float(local.logp[i][in_answer].sum()),
        "margin": float(local.margins[i].max()),
        "first_margin": float(local.margins[i, states[0]]) if states.size else -np.inf,
        "last_margin": float(local.margins[i, states[-1]]) if states.size else -np.inf,
        "margins": local.margins[i][local.mask[i]].tolist(),
    }
    if not natural:
        return row
    crossing = local.margins[i] > 0
    called = bool(crossing.any())
    return row | {
        "natural_text": row["text"],
        "natural_called": called,
        "natural_completed": bool(verdicts.called[i]),
        "natural_correct": row["local_correct"],
        **({"natural_grade": row["local_grade"]} if task.graded else {}),
        "natural_ended": row["ended"],
        "natural_tokens": int(crossing.argmax()) + 1 if called else row["tokens"],
    }


def _natural_row(run: Run, i: int, passed: Pass, drawn: bool) -> Row:
    """Returns what row `i` of the natural pass says; of a greedy one, the crossing is known."""
    natural, verdicts = passed
    row = {
        "natural_text": verdicts.texts[i],
        "natural_completed": bool(verdicts.called[i]),
        "natural_correct": bool(verdicts.correct[i]),
        **({"natural_grade": float(verdicts.grade[i])} if run.task.graded else {}),
        "natural_ended": bool(natural.ended[i]),
    }
    if not drawn:
        return row
    token, length = run.text.decision_id, int(natural.mask[i].sum())
    if token is None:
        return row | {"natural_called": row["natural_completed"], "natural_tokens": length}
    calls = (natural.tokens[i] == token) & (natural.margins[i] > -np.inf)
    called = bool(calls.any())
    return row | {
        "natural_called": called,
        "natural_tokens": int(calls.argmax()) + 1 if called else length,
    }


def _lenient(task: Task, batch: Sequence[Example], local: Pass) -> list[Row]:
    """Returns the columns that say how right each response of the first pass is, tags or not."""
    rows = slice(len(batch))  # without the padding
    correct, grade = local.verdicts.correct[rows].tolist(), local.verdicts.grade[rows].tolist()
    verdicts = lenient_verdicts(
        task, batch, local.verdicts.texts[rows], correct, local.samples.ended[rows].tolist()
    )
    columns: list[Row] = []
    for right, own, verdict in zip(correct, grade, verdicts, strict=True):
        columns.append({"lenient_correct": right or (verdict is not None and verdict.correct)})
        if task.graded:
            columns[-1]["lenient_grade"] = max(own, verdict.value) if verdict else own
    return columns


def _attempts(text: Text, n: int, greedy: Samples) -> list[str | None]:
    """Returns what the device had written when it called, for the first n of a greedy pass.

    That is what comes before the decision token. None where it did not call.
    """
    tokens, mask = np.asarray(greedy.tokens), np.asarray(greedy.mask)
    crossings = np.asarray(greedy.margins[:n]) > 0
    firsts = [int(crossing.argmax()) if crossing.any() else None for crossing in crossings]
    return [
        None if t is None else text.decode(tokens[i : i + 1, :t], mask[i : i + 1, :t])[0]
        for i, t in enumerate(firsts)
    ]
