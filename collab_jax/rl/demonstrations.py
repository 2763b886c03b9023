r"""Demonstrations that no task makes: a file's, and the device model's own. The warm start
(`sft.py`) learns from them.

A file holds JSON lines, plain or gzip-compressed, one demonstration a line; other fields are free:

    {"prompt": "What is 6 times 7?", "response": "<think> 6 * 7 = 42 </think>\n<answer> 42 </answer>"}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], "response": "..."}
    {"id": "train-17", "response": "..."}

`prompt` is all that the user says; `id` takes the prompt of that training example.

The model's own come from rejection sampling, so that nobody needs data written by people: it
answers training prompts, the marker disallowed. Of each prompt's right responses some different
ones are kept. A model that has not seen the format is right without it, so a response is first
brought into the format: what it put between answer tags or else into its last box is the answer,
what stands before is the thinking. A prompt that no response solves can show the call: a failed
response to where its answer begins, then the marker. Both kinds are the model's own words up to the
one token that decides, so that little else is changed by learning them.
"""

import functools
import gzip
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import TAGS, Messages, Text
from collab_jax.runtime import parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, base, math

Demonstration = tuple[Messages, str]  # a chat prompt and the response to it

# ------------------------------------------------------------------------------------------------- from a file


def read(path: pathlib.Path, examples: Callable[[], Mapping[str, Messages]]) -> list[Demonstration]:
    """The demonstrations of a file. examples() -> the training examples' prompts by id, asked for
    only if a row needs it.

    Raises UserError, naming file and line, for what is missing, empty, not of its type, or no JSON.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the demonstrations {path} ({error}): is it there, and complete?"
        ) from None
    found, examples = [], functools.cache(examples)
    for number, line in lines:
        try:
            found.append(_demonstration(line, examples))
        except UserError:  # of the training data
            raise
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not found:
        raise UserError(
            f"{path} has no demonstrations: it needs one a line, as collab_jax/rl/demonstrations.py says"
        )
    return found


def _demonstration(line: str, examples: Callable[[], Mapping[str, Messages]]) -> Demonstration:
    """One line's. Raises ValueError."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not an object with a response, and with messages, a prompt or an id")
    response = row.get("response")
    if not isinstance(response, str) or not response.strip():
        raise ValueError("no response: it must be a text that is not empty")
    if "messages" in row or "prompt" in row:
        chat = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        if not _is_chat(chat):
            raise ValueError(
                "messages must be a list of objects with role and content, a prompt a text, none of it empty"
            )
        return chat, response
    if "id" not in row:
        raise ValueError("no messages, prompt or id: one must say what the response answers")
    if not isinstance(row["id"], str) or row["id"] not in examples():
        raise ValueError(
            f"no training example has the id {row['id']!r}: give its prompt or messages instead"
        )
    return examples()[row["id"]], response


def _is_chat(messages) -> bool:
    def text(message, key):
        return isinstance(message, dict) and isinstance(message.get(key), str) and message[key]

    whole = isinstance(messages, list) and bool(messages)
    return whole and all(text(message, key) for message in messages for key in ("role", "content"))


def fitting(found: Sequence[Demonstration], text: Text, config: ConfigDict) -> list[Demonstration]:
    """Those within `prompt_length` and `max_new_tokens`; told what is there, and what is left out.

    Raises UserError where none is left.
    """
    L, T = config.prompt_length, config.max_new_tokens
    short = [(m, r) for m, r in found if len(text.prompt_ids(m)) <= L]
    fit = [(m, r) for m, r in short if len(text.response_ids(r)) <= T]
    if not fit:
        raise UserError(
            f"none of {len(found)} demonstrations fits config.prompt_length={L} and max_new_tokens={T}"
        )
    answers, calls = (
        sum(base.formatted(r) for _, r in fit),
        sum(base.called(r, text.marker) for _, r in fit),
    )
    print(
        f"{len(fit)} demonstrations: {answers} answer, {calls} call, {len(fit) - answers - calls} do neither in form"
    )
    if len(fit) < len(found):
        print(
            f"left out: {len(found) - len(short)} of {len(found)} demonstrations for prompts of more than "
            f"config.prompt_length={L} tokens, {len(short) - len(fit)} for responses of more than max_new_tokens={T}"
        )
    return fit


def endless(found: Sequence[Demonstration], seed: int) -> Iterator[Demonstration]:
    """All of them over and over, each time in another order."""
    epoch = 0
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(len(found)):
            yield found[i]
        epoch += 1


# --------------------------------------------------------------------------------------------- the model's own

_HANGING = re.compile(r"(?:\$|\\\[|\\\(|\s)+$")  # what opened for a box


def until_answer(response: str) -> str:
    """A response to where its answer begins, in the format: `<think> ... </think>` and the white
    space before `<answer>`.
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
    """A response in the format: itself, or rewritten where its answer can be found (in answer tags,
    in a box), or None.
    """
    if base.formatted(response):
        return response
    answer = base.answer_of(response)
    answer = math.last_boxed(response) if answer is None else answer
    rewritten = f"{until_answer(response)}<answer>{(answer or '').strip()}</answer>"
    return rewritten if answer and base.formatted(rewritten) else None


def draw(
    sample: Sampler,
    params,
    text: Text,
    task: Task,
    examples: Sequence[Example],
    config: ConfigDict,
    first: int,
    bias: float,
) -> Iterator[tuple[Sequence[Example], Samples]]:
    """(examples, their Samples on the host [P, G, ...]) in batches of `prompts_per_step`, keyed by
    (seed, first + i).

    `sample` is a `rollout.make_sampler`, `params` has axis D; bias -inf disallows the marker.
    """
    D, size = jax.local_device_count(), config.prompts_per_step
    for i, start in enumerate(range(0, len(examples), size)):
        batch = examples[start : start + size]
        padded = [*batch, *[batch[0]] * (size - len(batch))]  # one shape, one compilation
        prompts = parallel.shard(
            text.prompt_batch([task.prompt(e) for e in padded], config.prompt_length), D
        )
        key = np.full(D, config.seed, np.int32), np.full(D, first + i, np.int32)
        samples = sample(params, *prompts, *key, bias=np.full(D, bias, np.float32))
        yield batch, jax.tree.map(lambda x: x[: len(batch)], parallel.gather(samples))  # noqa: B023


def judged(
    text: Text, task: Task, batch: Sequence[Example], samples: Samples, keep: int
) -> list[dict]:
    """What each prompt's responses are good for: {"id", "right": up to `keep` different right ones,
    in the format, "failed"}.

    failed: where none is right, the first response that answers (else that ended, else at all) to
    where its answer begins; or None. Of one that was cut off the first half counts, to its last
    full line: what follows may be babble.
    """
    P, G, T = samples.tokens.shape
    flat = [x.reshape(-1, *x.shape[2:]) for x in (samples.tokens, samples.mask, samples.ended)]
    # A marker that was spelt out in other tokens, past the one that is barred, would be read as a
    # call.
    texts, ended = [t.replace(text.marker, "") for t in text.decode(*flat[:2])], flat[2]
    shaped = [well_formed(t) if e else None for t, e in zip(texts, ended, strict=True)]
    verdicts = task.verify([e for e in batch for _ in range(G)], [t or "" for t in shaped])
    right = np.array([v.correct and v.formatted for v in verdicts])
    rows = []
    for p, example in enumerate(batch):
        group = range(p * G, (p + 1) * G)
        good = list(dict.fromkeys(shaped[i] for i in group if right[i]))
        failed = None
        if not good:
            i = min(group, key=lambda i: (shaped[i] is None, not ended[i]))
            half = text.decode(flat[0][i : i + 1, : T // 2], flat[1][i : i + 1, : T // 2])[
                0
            ].replace(text.marker, "")
            failed = until_answer(texts[i] if ended[i] else half[: half.rfind("\n") + 1] or half)
        rows.append({"id": example.id, "right": good[:keep], "failed": failed})
    return rows


def own(
    sample: Sampler,
    params,
    text: Text,
    task: Task,
    examples: Sequence[Example],
    config: ConfigDict,
    workdir: pathlib.Path,
) -> pathlib.Path:
    """Writes `workdir`/demonstrations.jsonl, to be looked at and used again (as a file), and
    returns its path.

    `examples` are the training examples to answer, `config.group` responses each. Batches are kept
    in samples.jsonl as they come, so the same command goes on where it was. Raises UserError where
    no response is right.
    """
    file, size = workdir / "samples.jsonl", config.prompts_per_step
    head = json.dumps({"settings": _settings(config)}, sort_keys=True)
    whole = file.read_text() if file.exists() else ""
    lines = whole[: whole.rfind("\n") + 1].splitlines()  # a kill may have cut the last one short
    lines = lines[1:] if lines[:1] == [head] else []
    lines = lines[
        : min(len(lines), len(examples)) // size * size
    ]  # whole batches, of what is wanted now
    file.write_text("".join(f"{line}\n" for line in [head, *lines]))
    rows = [json.loads(line) for line in lines]
    more = draw(
        sample, params, text, task, examples[len(rows) :], config, len(rows) // size, -np.inf
    )
    with (
        file.open("a") as out,
        tqdm(total=len(examples), initial=len(rows), desc="sample", unit="prompt") as bar,
    ):
        for batch, samples in more:
            new = judged(text, task, batch, samples, config.sft.keep)
            out.write("".join(json.dumps(row) + "\n" for row in new))
            out.flush()
            rows += new
            bar.update(len(batch))
    found = chosen(rows, config.sft.marker_share, text.marker, config.seed)
    solved = sum(bool(row["right"]) for row in rows)
    print(f"{solved} of {len(rows)} training prompts solved, each in {config.group} responses")
    path = workdir / "demonstrations.jsonl"
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in found))
    beside.replace(path)
    return path


def chosen(rows: Sequence[dict], share: float, marker: str, seed: int) -> list[dict]:
    """The demonstrations of `judged` rows: all right responses, and calls, at most `share` of all,
    drawn by `seed`.
    """
    right = sum(len(row["right"]) for row in rows)
    if not right:
        raise UserError(
            f"no response to any of {len(rows)} training prompts was right: take a stronger model, easier prompts, or "
            "demonstrations from elsewhere (config.sft.source=file)"
        )
    failed = [row["id"] for row in rows if row["failed"] is not None]
    calls = min(int(share / (1 - share) * right + 1e-9), len(failed))
    calling = set(random.Random(f"calls {seed}").sample(failed, calls))
    found = []
    for row in rows:
        found += [
            {"id": row["id"], "kind": "answer", "response": response} for response in row["right"]
        ]
        if row["id"] in calling:
            found.append({"id": row["id"], "kind": "call", "response": row["failed"] + marker})
    return found


def _settings(config: ConfigDict) -> dict:
    """All that samples depend on."""
    names = (
        "seed",
        "group",
        "prompts_per_step",
        "prompt_length",
        "max_new_tokens",
        "temperature",
        "model",
        "text",
        "task",
    )
    settings = json.loads(config.to_json_best_effort())
    return {name: settings[name] for name in names} | {"keep": config.sft.keep}
