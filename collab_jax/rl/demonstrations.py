r"""Demonstrations that no task makes: those of a file, and the device model's own.

The warm start (`sft.py`) learns from them. A file holds JSON lines, plain or gzip-compressed, one
demonstration on each line; other fields are free:

    {"prompt": "What is 6 times 7?", "response": "<think> 6 * 7 = 42 </think>\n<answer> ..."}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}], "response": "..."}
    {"id": "train-17", "response": "..."}

`prompt` is all that the user says; `id` takes the prompt of that training example.

The model's own demonstrations come from rejection sampling, so that nobody needs data written by
people: the model answers training prompts, the marker disallowed, and some different right
responses to each prompt are kept. A model that has not seen the format is right without it, so each
response is first brought into the format: its answer is what it put between answer tags, or else
into its last box; its thinking is what stands before. A prompt that no response solves can show the
call: a failed response up to where its answer begins, then the marker. Both kinds are the model's
own words up to the one token that decides, so that learning them changes little else.
"""

import functools
import gzip
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from collab_jax.models.decoder import Params
from collab_jax.models.sampler import Sampler, Samples
from collab_jax.models.text import TAGS, Messages, Text
from collab_jax.rl import rollout
from collab_jax.runtime import files, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, base, prose

Demonstration = tuple[Messages, str]  # a chat prompt and the response to it
Item = TypeVar("Item")

# -------------------------------------------------------------------------------------- from a file


def read(
    path: pathlib.Path, train_prompts: Callable[[], Mapping[str, Messages]]
) -> list[Demonstration]:
    """The demonstrations of a file.

    train_prompts() -> the training examples' prompts by id; called only if a row needs it. Raises
    UserError, naming file and line, for what is missing, empty, not of its type, or no JSON.
    """
    train_prompts = functools.cache(train_prompts)
    demonstrations = []
    for number, line in _numbered_lines(path):
        try:
            demonstrations.append(_demonstration(line, train_prompts))
        except UserError:  # about the training data
            raise
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not demonstrations:
        raise UserError(
            f"{path} has no demonstrations: it needs one on each line, as "
            "collab_jax/rl/demonstrations.py says"
        )
    return demonstrations


def _numbered_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number, line) of the lines of a file, plain or gzip-compressed, that are not blank."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the demonstrations {path} ({error}): is it there, and complete?"
        ) from None


def _demonstration(line: str, train_prompts: Callable[[], Mapping[str, Messages]]) -> Demonstration:
    """The demonstration of one line. Raises ValueError for a line that is none."""
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
                "messages must be a list of objects with role and content, a prompt a text, and "
                "none of it empty"
            )
        return chat, response
    if "id" not in row:
        raise ValueError("no messages, prompt or id: one must say what the response answers")
    if not isinstance(row["id"], str) or row["id"] not in train_prompts():
        raise ValueError(
            f"no training example has the id {row['id']!r}: give its prompt or messages instead"
        )
    return train_prompts()[row["id"]], response


def _is_chat(messages: Any) -> bool:
    """Whether `messages`, read from JSON, is a list of messages with a role and a content."""

    def has_text(message: Any, key: str) -> bool:
        text = message.get(key) if isinstance(message, dict) else None
        return isinstance(text, str) and bool(text)

    if not isinstance(messages, list) or not messages:
        return False
    return all(has_text(message, "role") and has_text(message, "content") for message in messages)


def drop_too_long(
    demonstrations: Sequence[Demonstration], text: Text, config: ConfigDict
) -> list[Demonstration]:
    """Those within `prompt_length` and `max_new_tokens`; prints what is kept and what is left out.

    Raises UserError where none is left.
    """
    L, T = config.prompt_length, config.max_new_tokens
    short_prompt = [(m, r) for m, r in demonstrations if len(text.prompt_ids(m)) <= L]
    kept = [(m, r) for m, r in short_prompt if len(text.response_ids(r)) <= T]
    total = len(demonstrations)
    if not kept:
        raise UserError(
            f"none of {total} demonstrations fits config.prompt_length={L} and max_new_tokens={T}"
        )
    answers = sum(base.formatted(response) for _, response in kept)
    calls = sum(base.called(response, text.marker) for _, response in kept)
    print(
        f"{len(kept)} demonstrations: {answers} answer, {calls} call, "
        f"{len(kept) - answers - calls} do neither in the format"
    )
    if len(kept) < total:
        print(
            f"left out: {total - len(short_prompt)} of {total} demonstrations for prompts of more "
            f"than config.prompt_length={L} tokens, {len(short_prompt) - len(kept)} for responses "
            f"of more than max_new_tokens={T}"
        )
    return kept


def endless(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """All of the items over and over, each time in another order."""
    epoch = 0
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(len(items)):
            yield items[i]
        epoch += 1


# ---------------------------------------------------------------------------------- the model's own

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


class JudgedPrompt(NamedTuple):
    """What the responses to one prompt are good for; a line of samples.jsonl."""

    id: str
    right: list[str]  # different right responses, in the format
    failed: str | None  # where none is right: a response up to where its answer begins, or None


def sampled_batches(
    sampler: Sampler,
    params: Params,
    text: Text,
    task: Task,
    examples: Sequence[Example],
    config: ConfigDict,
    *,
    first_step: int,
    bias: float,
) -> Iterator[tuple[Sequence[Example], Samples]]:
    """(examples, their Samples on the host [P, G, ...]) in batches of `prompts_per_step`.

    Batch number i has the keys of (seed, first_step + i). `sampler` is a `rollout.make_sampler`,
    params have the axis D; a bias of -inf disallows the marker.
    """
    size = config.prompts_per_step
    for i, start in enumerate(range(0, len(examples), size)):
        batch = examples[start : start + size]
        padded = [*batch, *[batch[0]] * (size - len(batch))]  # one shape, one compilation
        chats = [task.prompt(example) for example in padded]
        prompts, prompt_mask = text.prompt_batch(chats, config.prompt_length)
        samples = rollout.draw(
            sampler,
            params,
            prompts,
            prompt_mask,
            seed=config.seed,
            step=first_step + i,
            bias=bias,
        )
        count = len(batch)
        yield batch, jax.tree.map(lambda x: x[:count], parallel.gather(samples))  # noqa: B023


def judge_batch(
    text: Text, task: Task, batch: Sequence[Example], samples: Samples, keep: int
) -> list[JudgedPrompt]:
    """The JudgedPrompt of each example, with up to `keep` right responses.

    Where none is right, `failed` is made from the first response that answers, else that ended,
    else from the first. Of one that was cut off the first half counts, to its last full line: what
    follows may be babble.
    """
    P, G, T = samples.tokens.shape
    tokens = np.asarray(samples.tokens).reshape(P * G, T)
    mask = np.asarray(samples.mask).reshape(P * G, T)
    ended = np.asarray(samples.ended).reshape(P * G)

    def read(tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        # A marker that was spelt out in other tokens, past the one that is disallowed, would be
        # read as a call.
        return [response.replace(text.marker, "") for response in text.decode(tokens, mask)]

    texts = read(tokens, mask)
    shaped = [well_formed(t) if e else None for t, e in zip(texts, ended, strict=True)]
    verdicts = task.verify([e for e in batch for _ in range(G)], [t or "" for t in shaped])
    judged = []
    for p, example in enumerate(batch):
        group = range(p * G, (p + 1) * G)
        good = [i for i in group if verdicts[i].correct and verdicts[i].formatted]
        right = list(dict.fromkeys(response for i in good if (response := shaped[i])))
        failed = None
        if not right:
            i = min(group, key=lambda i: (shaped[i] is None, not ended[i]))
            half = read(tokens[i : i + 1, : T // 2], mask[i : i + 1, : T // 2])[0]
            failed = until_answer(texts[i] if ended[i] else half[: half.rfind("\n") + 1] or half)
        judged.append(JudgedPrompt(example.id, right[:keep], failed))
    return judged


def write_own_demonstrations(
    sampler: Sampler,
    params: Params,
    text: Text,
    task: Task,
    examples: Sequence[Example],
    config: ConfigDict,
    workdir: pathlib.Path,
) -> pathlib.Path:
    """Writes `workdir`/demonstrations.jsonl, the model's own, and returns its path.

    The file is there to be looked at and to be used again (config.sft.source=file). `examples` are
    the training examples to answer, `config.group` responses each. Batches are kept in
    samples.jsonl as they come, so that the same command goes on where it was. Raises UserError
    where no response is right.
    """
    file = workdir / "samples.jsonl"
    judged = _kept_samples(file, len(examples), config)
    batches = sampled_batches(
        sampler,
        params,
        text,
        task,
        examples[len(judged) :],
        config,
        first_step=len(judged) // config.prompts_per_step,
        bias=-np.inf,
    )
    with (
        file.open("a") as out,
        tqdm(total=len(examples), initial=len(judged), desc="sample", unit="prompt") as bar,
    ):
        for batch, samples in batches:
            new = judge_batch(text, task, batch, samples, config.sft.keep)
            out.write("".join(json.dumps(row._asdict()) + "\n" for row in new))
            out.flush()
            judged += new
            bar.update(len(batch))
    rows = choose_demonstrations(judged, config.sft.marker_share, text.marker, config.seed)
    solved = sum(bool(row.right) for row in judged)
    print(f"{solved} of {len(judged)} training prompts solved, each in {config.group} responses")
    path = workdir / "demonstrations.jsonl"
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _kept_samples(file: pathlib.Path, examples: int, config: ConfigDict) -> list[JudgedPrompt]:
    """The whole batches that `file` keeps of these settings; the file then has just these.

    Its first line holds the settings. At most so many examples are wanted now.
    """
    head = json.dumps({"settings": _settings(config)}, sort_keys=True)
    contents = file.read_text() if file.exists() else ""
    # A kill may have cut the last line short.
    lines = contents[: contents.rfind("\n") + 1].splitlines()
    lines = lines[1:] if lines[:1] == [head] else []
    size = config.prompts_per_step
    lines = lines[: min(len(lines), examples) // size * size]
    files.write_text(file, "".join(f"{line}\n" for line in [head, *lines]))
    return [JudgedPrompt(**json.loads(line)) for line in lines]


def choose_demonstrations(
    judged: Sequence[JudgedPrompt], share: float, marker: str, seed: int
) -> list[dict[str, str]]:
    """The rows of demonstrations.jsonl: all right responses, and calls, at most `share` of all.

    Which of the failed prompts call is drawn by `seed`. Raises UserError where nothing is right.
    """
    right = sum(len(row.right) for row in judged)
    if not right:
        raise UserError(
            f"no response to any of {len(judged)} training prompts was right: take a stronger "
            "model, easier prompts, or demonstrations from elsewhere (config.sft.source=file)"
        )
    failed = [row.id for row in judged if row.failed is not None]
    calls = min(int(share / (1 - share) * right + 1e-9), len(failed))
    calling = set(random.Random(f"calls {seed}").sample(failed, calls))
    rows = []
    for row in judged:
        rows += [{"id": row.id, "kind": "answer", "response": response} for response in row.right]
        if row.failed is not None and row.id in calling:
            rows.append({"id": row.id, "kind": "call", "response": row.failed + marker})
    return rows


def _settings(config: ConfigDict) -> dict[str, Any]:
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
