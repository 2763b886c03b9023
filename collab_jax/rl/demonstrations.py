r"""Demonstrations: prompts with the responses that the warm start learns from (`sft.py`).

They come from the task, from the model itself (`own_samples.py`), or from a file. A file holds JSON
lines, plain or gzip-compressed, one demonstration on each line; other fields are free:

    {"prompt": "What is 6 times 7?", "response": "<think> 6 * 7 = 42 </think>\n<answer> ..."}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}], "response": "..."}
    {"id": "train-17", "response": "..."}
    {"id": "train-18", "response": "<think> 18 </think>\n<unknown> ... </unknown>", "kind": "call"}

`prompt` is all that the user says; `id` takes the prompt of that training example. Of the kind
"call" the marker alone is taught, not what stands before it: a failed attempt is shown, so that the
model calls after the like, and not that it makes it.
"""

import functools
import gzip
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from collab_jax.models.decision import Opening
from collab_jax.models.text import Messages, Text
from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Task, base

LOOKED_AT = 1000  # demonstrations of a task that are counted before they are used


class Demonstration(NamedTuple):
    """A chat prompt and a response to it. call_only: the marker alone is taught."""

    prompt: Messages
    response: str
    call_only: bool = False


class Encoded(NamedTuple):
    """A demonstration in tokens; the last `learnt` ones of its response are taught.

    states: how many of the first ones come of decision states, the marker's first token among them;
    0 where the marker alone is taught.
    """

    prompt: list[int]
    response: list[int]  # EOS in
    learnt: int
    states: int = 0

    @property
    def columns(self) -> int:
        """How many columns it takes: its last token is predicted, and never read."""
        return len(self.prompt) + len(self.response) - 1


Item = TypeVar("Item")

# -------------------------------------------------------------------------------------- from a file


def read(
    path: pathlib.Path, marker: str, train_prompts: Callable[[], Mapping[str, Messages]]
) -> list[Demonstration]:
    """The demonstrations of a file; a row of the kind "call" ends with `marker`.

    train_prompts() -> the training examples' prompts by id; called only if a row needs it. Raises
    UserError, naming file and line, for what is missing, empty, not of its type, or no JSON.
    """
    train_prompts = functools.cache(train_prompts)
    demonstrations = []
    for number, line in _numbered_lines(path):
        try:
            demonstrations.append(_demonstration(line, marker, train_prompts))
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


def _demonstration(
    line: str, marker: str, train_prompts: Callable[[], Mapping[str, Messages]]
) -> Demonstration:
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
    call_only = row.get("kind") == "call"
    if call_only and not base.called(response, marker):
        raise ValueError(f"kind is call, but the response does not end with {marker!r}")
    if "messages" in row or "prompt" in row:
        chat = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
        if not _is_chat(chat):
            raise ValueError(
                "messages must be a list of objects with role and content, a prompt a text, and "
                "none of it empty"
            )
        return Demonstration(chat, response, call_only)
    if "id" not in row:
        raise ValueError("no messages, prompt or id: one must say what the response answers")
    if not isinstance(row["id"], str) or row["id"] not in train_prompts():
        raise ValueError(
            f"no training example has the id {row['id']!r}: give its prompt or messages instead"
        )
    return Demonstration(train_prompts()[row["id"]], response, call_only)


def _is_chat(messages: Any) -> bool:
    """Whether `messages`, read from JSON, is a list of messages with a role and a content."""

    def has_text(message: Any, key: str) -> bool:
        text = message.get(key) if isinstance(message, dict) else None
        return isinstance(text, str) and bool(text)

    if not isinstance(messages, list) or not messages:
        return False
    return all(has_text(message, "role") and has_text(message, "content") for message in messages)


# -------------------------------------------------------------------------------------- any of them


def encode(demonstration: Demonstration, text: Text) -> Encoded:
    """The tokens of a demonstration.

    Of one whose call alone is taught they are those that decoding would give: the marker's own,
    after whatever the model wrote before.
    """
    prompt = text.prompt_ids(demonstration.prompt)
    if not demonstration.call_only:
        response = text.response_ids(demonstration.response)
        return Encoded(prompt, response, len(response), _decision_states(response, text))
    attempt = demonstration.response.rstrip().removesuffix(text.marker.rstrip())
    attempt = text.response_ids(attempt)[:-1]
    call = [*text.marker_ids, text.eos_ids[0]]
    return Encoded(prompt, [*attempt, *call], len(call))


def _decision_states(response: Sequence[int], text: Text) -> int:
    """How many of the first tokens of a response come of decision states."""
    ends = [state == Opening.OPEN for state in text.decision.answer_open.states(response)]
    for i, token in enumerate(response):
        if ends[i] or token == text.decision_id:
            return i + 1
    return len(response)


def fits(encoded: Encoded, config: ConfigDict) -> bool:
    """Whether prompt and response are within `prompt_length` and `max_new_tokens`."""
    return (
        len(encoded.prompt) <= config.prompt_length
        and len(encoded.response) <= config.max_new_tokens
    )


def drop_too_long(
    demonstrations: Sequence[Demonstration], text: Text, config: ConfigDict
) -> list[Demonstration]:
    """Those that fit; prints what is kept and what is left out. UserError where none is left."""
    L, T, total = config.prompt_length, config.max_new_tokens, len(demonstrations)
    encoded = [encode(d, text) for d in demonstrations]
    kept = [d for d, e in zip(demonstrations, encoded, strict=True) if fits(e, config)]
    if not kept:
        raise UserError(
            f"none of {total} demonstrations fits config.prompt_length={L} and max_new_tokens={T}: "
            "raise them"
        )
    answers = sum(base.formatted(d.response) for d in kept)
    calls = sum(base.called(d.response, text.marker) for d in kept)
    print(
        f"{len(kept)} demonstrations: {answers} answer, {calls} call, "
        f"{len(kept) - answers - calls} do neither in the format"
    )
    if len(kept) < total:
        prompts = sum(len(e.prompt) > L for e in encoded)
        print(
            f"left out: {prompts} of {total} demonstrations for prompts of more "
            f"than config.prompt_length={L} tokens, {total - len(kept) - prompts} for responses "
            f"of more than max_new_tokens={T}"
        )
    return kept


def half_of(prompt: Messages, template: Callable[[str], str]) -> int:
    """Which half, 0 or 1, a prompt is in: by a hash of its last message, whatever stands before.

    Those with the same `Task.template` are in the same half.
    """
    return hashlib.sha256(template(prompt[-1]["content"]).encode()).digest()[0] & 1


class Given(NamedTuple):
    """The demonstrations that a warm start is given, by a file or a task.

    stream() starts an endless sequence, the same each time. known: all of a file that fit, or the
    first of a task's. fingerprint: of a file, by its name.
    """

    stream: Callable[[], Iterator[Demonstration]]
    known: list[Demonstration]
    fingerprint: dict[str, dict]

    def only(
        self, keep: Callable[[Demonstration], bool], what: str
    ) -> Callable[[], Iterator[Demonstration]]:
        """Starts the sequence of those that `keep` takes. Raises UserError where there is none."""
        if not any(map(keep, self.known)):
            raise UserError(
                f"no demonstration {what}: give more of them, or set config.sft.relabel_steps=0"
            )
        return lambda: filter(keep, self.stream())


def of_file(
    text: Text, config: ConfigDict, train_prompts: Callable[[], Mapping[str, Messages]]
) -> Given:
    """Those of the file that `config.sft.demonstrations` names, over and over."""
    path = pathlib.Path(config.sft.demonstrations).expanduser()
    found = read(path, text.marker, train_prompts)
    contents = {path.name: files.fingerprint(map(json.dumps, found), "demonstrations")}
    kept = drop_too_long(found, text, config)
    return Given(lambda: endless(kept, config.seed), kept, contents)


def of_task(task: Task, text: Text, config: ConfigDict) -> Given:
    """Those that the task makes. Raises UserError where it makes none, or where none fits."""
    make = task.demonstrations
    if make is None:
        raise UserError(
            f"task {task.name!r} makes no demonstrations: set config.sft.source to self, or to file"
        )

    def stream() -> Iterator[Demonstration]:
        pairs = make(config.seed)
        return (Demonstration(task.prompt(example), response) for example, response in pairs)

    first = drop_too_long(list(itertools.islice(stream(), LOOKED_AT)), text, config)
    return Given(stream, first, {})


def endless(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """All of the items over and over, each time in another order."""
    epoch = 0
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(len(items)):
            yield items[i]
        epoch += 1
