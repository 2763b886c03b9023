"""Personal data leave a query as placeholders, as [EMAIL_1], and come back in its answer.

Queries are redacted where they leave the device (`cached.py`, and `serve/upstream.py` for streams).
One value has one placeholder in all messages, numbered in the order of the conversation, so that
its next turn has the same. What was redacted is the key of a stored answer, and the answer is
stored with its placeholders: users whose queries differ in personal data alone share it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from collab_jax.cloud import personal
from collab_jax.cloud.personal import Find, Span
from collab_jax.models.text import Messages
from collab_jax.runtime.errors import UserError

PLACEHOLDER = re.compile(r"\[[A-Z]+_[0-9]+\]")


class Redacted(NamedTuple):
    """A query as it leaves the device, and what its placeholders stand for."""

    messages: Messages
    originals: Mapping[str, str]  # by placeholder

    def restore(self, text: str) -> str:
        """Returns `text` with the originals in the place of their placeholders."""
        return PLACEHOLDER.sub(lambda found: self.originals.get(found[0], found[0]), text)


Redact = Callable[[Messages], Redacted]


def as_it_is(messages: Messages) -> Redacted:
    """Returns a query in which nothing is replaced."""
    return Redacted(messages, {})


def redact(messages: Messages, find: Find) -> Redacted:
    """Returns a query with placeholders for what `find` finds in the contents of its messages.

    What is found in one message is replaced in all. A placeholder that is in the query already is
    left alone, and is none of ours.
    """
    texts = [message["content"] for message in messages]
    found = [list(find(text)) for text in texts]
    kinds: dict[str, str] = {}
    for text, spans in zip(texts, found, strict=True):
        for start, end, kind in spans:
            kinds.setdefault(text[start:end], kind)
    placeholders: dict[str, str] = {}  # by value
    taken, numbers = set(PLACEHOLDER.findall("\n".join(texts))), Counter()
    contents = []
    for text, spans in zip(texts, found, strict=True):
        pieces, past = [], 0
        for start, end, kind in merged([*spans, *_again(text, kinds)]):
            value = text[start:end]
            if value not in placeholders:
                placeholders[value] = _next(kind, numbers, taken)
            pieces += [text[past:start], placeholders[value]]
            past = end
        contents.append("".join([*pieces, text[past:]]))
    redacted = [{**m, "content": content} for m, content in zip(messages, contents, strict=True)]
    return Redacted(redacted, {name: value for value, name in placeholders.items()})


def merged(spans: Iterable[Span]) -> list[Span]:
    """Returns spans in order that do not overlap: those that do are one, of the first's kind.

    Of two that begin at one place the longer one is the first, and of equal ones the earlier.
    """
    whole: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        if whole and span.start < whole[-1].end:
            last = whole.pop()
            span = last._replace(end=max(last.end, span.end))
        whole.append(span)
    return whole


def _again(text: str, kinds: Mapping[str, str]) -> list[Span]:
    """Returns where values that are known by now stand in `text`, in whatever surroundings."""
    return [
        Span(start, end, kinds[text[start:end]]) for start, end in personal.occurrences(text, kinds)
    ]


def _next(kind: str, numbers: Counter[str], taken: set[str]) -> str:
    """Returns the kind's next placeholder that is not taken; `numbers` counts them."""
    while True:
        numbers[kind] += 1
        if (name := f"[{kind}_{numbers[kind]}]") not in taken:
            return name


class Restorer:
    """`Redacted.restore` for a text that comes in pieces."""

    def __init__(self, query: Redacted):
        self._query, self._held = query, ""

    def feed(self, text: str) -> str:
        """Returns what may go out: all but an end that may become a placeholder of the query."""
        text, self._held = self._held + text, ""
        at = text.rfind("[")
        if at >= 0 and any(
            name.startswith(text[at:]) and name != text[at:] for name in self._query.originals
        ):
            text, self._held = text[:at], text[at:]
        return self._query.restore(text)

    def finish(self) -> str:
        """Returns what was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def from_config(config: ConfigDict) -> Redact:
    """Returns what `config`, which is the part `cloud`, does to a query before it leaves.

    Raises UserError where names cannot be had, or are given and nothing is redacted.
    """
    if not config.redact:
        if config.redact_names:
            raise UserError(f"{personal.SETTING} needs config.cloud.redact=True: add it")
        return as_it_is
    find = personal.finder(config.redact_names)
    return lambda messages: redact(messages, find)
