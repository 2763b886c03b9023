"""The device model's own responses as demonstrations, so that nobody needs data written by people.

The model answers training prompts, the marker disallowed. A right response stays what it is; of a
wrong one the call is taught, at a place drawn by chance before its answer (`choose`): so the model
learns to call along what it writes itself where that goes wrong. Were the call always taught where
the answer begins, it could be learnt there alone, and how unsure a model is shows earlier, where it
chooses an operator or a digit. A model that has not seen the format is right without it, so each
response is first brought into the format: its answer is what it put between answer tags, or else
into its last box; its thinking is what stands before. Both kinds are the model's own words up to
the one token that decides, so that learning them changes little else.
"""

import json
import os
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import TAGS, Text
from collab_jax.rl import rollout
from collab_jax.runtime import files, hosts, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, base, prose

_HANGING = re.compile(r"(?:\$|\\\[|\\\(|\s)+$")  # what opened for a box


def until_answer(response: str) -> str:
    """A response up to where its answer begins, in the format.

    That is `<think> ... </think>` and the white space before `<answer>`.
    """
    if base.formatted(response):
        return response[: response.index("<answer>")]
    end = response.rfind("<answer>")
    end = response.rfind("\\boxed") if end < 0 else end
    thought = response if end < 0 else response[:end]
    for tag in TAGS:
        thought = thought.replace(tag, "")
    return f"<think>{_HANGING.sub('', thought).strip()}</think>\n"


def well_formed(response: str) -> str | None:
    """The response in the format, rewritten if need be; None if it has no answer.

    The answer is looked for in answer tags, then in a box.
    """
    if base.formatted(response):
        return response
    answer = base.answer_of(response)
    answer = prose.boxed(response) if answer is None else answer
    rewritten = f"{until_answer(response)}<answer>{(answer or '').strip()}</answer>"
    return rewritten if answer and base.formatted(rewritten) else None


class Respondent(NamedTuple):
    """What answers prompts, but for its params: how it samples, is asked, and is judged."""

    sampler: Sampler  # a `rollout.make_sampler`
    text: Text
    task: Task
    config: ConfigDict


class JudgedPrompt(NamedTuple):
    """What the responses to one prompt are good for; a line of samples.jsonl."""

    id: str
    right: list[str]  # different right responses, in the format
    failed: list[str]  # different others, each up to where its answer begins


def sampled_batches(
    respondent: Respondent,
    params: Params,
    examples: Sequence[Example],
    *,
    first_step: int,
    bias: float,
) -> Iterator[tuple[Sequence[Example], Samples]]:
    """(examples, their Samples on the host [P, G, ...]) in batches of `prompts_per_step`.

    Of several hosts each has its part of a batch, which may be empty where the last is not full.
    Batch number i has the keys of (seed, first_step + i). params have the axis D; a bias of -inf
    disallows the marker.
    """
    config, text = respondent.config, respondent.text
    size = config.prompts_per_step
    for i, start in enumerate(range(0, len(examples), size)):
        batch = examples[start : start + size]
        part, fill = hosts.part(size), batch[:1] * (size - len(batch))
        own, padded = batch[part], [*batch, *fill][part]  # one shape, one compilation
        chats = [respondent.task.prompt(example) for example in padded]
        prompts, prompt_mask = text.prompt_batch(chats, config.prompt_length)
        samples = rollout.draw(
            respondent.sampler,
            params,
            prompts,
            prompt_mask,
            seed=config.seed,
            step=first_step + i,
            bias=bias,
        )
        count = len(own)
        yield own, jax.tree.map(lambda x: x[:count], parallel.gather(samples))  # noqa: B023


def judge_batch(
    text: Text, task: Task, batch: Sequence[Example], samples: Samples, keep: int
) -> list[JudgedPrompt]:
    """The JudgedPrompt of each example, with up to `keep` responses of each kind.

    Of a response that was cut off the first half counts, to its last full line: what follows may be
    babble. One whose verdict is unknown is left out.
    """
    P, G, T = samples.tokens.shape
    tokens = np.asarray(samples.tokens).reshape(P * G, T)
    mask = np.asarray(samples.mask).reshape(P * G, T)
    ended = np.asarray(samples.ended).reshape(P * G)

    def read(tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        # A marker that was spelt out in other tokens, past the one that is disallowed, would be
        # read as a call.
        return [response.replace(text.marker, "") for response in text.decode(tokens, mask)]

    texts, halves = read(tokens, mask), read(tokens[:, : T // 2], mask[:, : T // 2])
    shaped = [well_formed(t) if e else None for t, e in zip(texts, ended, strict=True)]
    verdicts = task.verify([e for e in batch for _ in range(G)], [t or "" for t in shaped])
    judged = []
    for p, example in enumerate(batch):
        right, failed = [], []
        for i in range(p * G, (p + 1) * G):
            verdict, response, half = verdicts[i], shaped[i], halves[i]
            if verdict.timed_out or verdict.unjudged:
                continue
            if response is not None and verdict.correct and verdict.formatted:
                right.append(response)
            elif ended[i]:
                failed.append(until_answer(texts[i]))
            else:
                failed.append(until_answer(half[: half.rfind("\n") + 1] or half))
        different = [list(dict.fromkeys(kind))[:keep] for kind in (right, failed)]
        judged.append(JudgedPrompt(example.id, different[0], different[1]))
    return judged


def sample_and_judge(
    respondent: Respondent, params: Params, examples: Sequence[Example], file: pathlib.Path
) -> list[JudgedPrompt]:
    """What `config.group` responses to each example are good for; params have the axis D.

    Batches are kept in `file` as they come, so that the same command goes on where it was. The
    first host writes, and all return the same.
    """
    config = respondent.config
    judged = _kept_samples(file, config.prompts_per_step, len(examples))
    batches = sampled_batches(
        respondent,
        params,
        examples[len(judged) :],
        first_step=len(judged) // config.prompts_per_step,
        bias=-np.inf,
    )
    with (
        open(file if hosts.is_first() else os.devnull, "a") as out,
        tqdm(
            total=len(examples),
            initial=len(judged),
            desc="sample",
            unit="prompt",
            disable=not hosts.is_first(),
        ) as bar,
    ):
        for batch, samples in batches:
            own = judge_batch(respondent.text, respondent.task, batch, samples, config.sft.keep)
            new = hosts.joined("what it sampled", [row._asdict() for row in own], hosts.FOREVER)
            out.write("".join(json.dumps(row) + "\n" for row in new))
            out.flush()
            judged += [JudgedPrompt(**row) for row in new]
            bar.update(len(new))
    solved = sum(bool(row.right) for row in judged)
    print(f"{solved} of {len(judged)} training prompts solved, each in {config.group} responses")
    return judged


def _kept_samples(file: pathlib.Path, size: int, wanted: int) -> list[JudgedPrompt]:
    """The `wanted` prompts if `file` has them, else whole batches; it then has just these."""
    contents = file.read_text() if file.exists() else ""
    # A kill may have cut the last line short.
    lines = contents[: contents.rfind("\n") + 1].splitlines()
    if len(lines) < wanted:
        lines = lines[: len(lines) // size * size]
    if hosts.is_first():
        files.write_text(file, "".join(f"{line}\n" for line in lines))
    return [JudgedPrompt(**json.loads(line)) for line in lines]


def choose(
    judged: Sequence[JudgedPrompt], share: float, text: Text, seed: int
) -> list[dict[str, str]]:
    """Rows of a file of demonstrations: all right responses, and calls, at most `share` of all.

    Which of the failed responses call, and after which token, is drawn by `seed`. Raises UserError
    where nothing is right.
    """
    right = sum(len(row.right) for row in judged)
    if not right:
        raise UserError(
            f"no response to any of {len(judged)} training prompts was right: take a stronger "
            "model, easier prompts, or demonstrations from elsewhere (config.sft.source=file)"
        )
    failed = [(p, i) for p, row in enumerate(judged) for i in range(len(row.failed))]
    calls = min(int(share / (1 - share) * right + 1e-9), len(failed))
    calling = set(random.Random(f"calls {seed}").sample(failed, calls))
    places = random.Random(f"places {seed}")
    rows = []
    for p, row in enumerate(judged):
        rows += [{"id": row.id, "kind": "answer", "response": response} for response in row.right]
        rows += [
            {"id": row.id, "kind": "call", "response": _begun(attempt, text, places) + text.marker}
            for i, attempt in enumerate(row.failed)
            if (p, i) in calling
        ]
    return rows


def _begun(attempt: str, text: Text, places: random.Random) -> str:
    """An attempt up to one of its tokens, all of them equally likely, or none or all of it."""
    ids = text.response_ids(attempt)[:-1]
    kept = np.array([ids[: places.randrange(len(ids) + 1)]], np.int32)
    return text.decode(kept, np.ones_like(kept, bool))[0]
