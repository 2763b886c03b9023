"""A response read while it is written: what is thinking, what is content, and where to stop.

Thinking is all before `<answer>`; content is what stands in `<answer> ... </answer>`, without the
white space around it. Tags and the marker are in neither. Text that may yet become one of them is
held back until it is decided.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from collab_jax.models.special_tokens import TAGS
from collab_jax.models.text import Text

Kind = Literal["reasoning", "content"]
CUT = "\ufffd"  # how a decoder shows a character whose bytes are not all there
MOST_HELD = 8  # tokens that may end inside a character; with more, they are no character
MOST_KEPT = 24  # tokens whose text is kept before all but the last few are dropped
ANSWER, CLOSING = "<answer>", "</answer>"


class Piece(NamedTuple):
    """A part of a response, in the order it was written.

    tokens: for each character, the places in the response of those tokens that it may be of: of the
    one alone, where tokens are fed one by one.
    """

    kind: Kind
    text: str
    tokens: list[range]


class Decoder:
    """Tokens to text, a few at a time; a character that spans two tokens comes with the second.

    held: the tokens at the end that may end inside a character.
    """

    def __init__(self, text: Text):
        self.held: list[int] = []
        self._text = text
        self._context: list[int] = []  # tokens that are out, of which the last few matter
        self._before = ""  # their text

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add."""
        self.held += tokens
        fed = len(self.held)
        for count in range(fed, max(0, fed - MOST_HELD), -1):
            whole = self._text.spelt(self._context + self.held[:count])
            if not whole.endswith(CUT):
                return self._out(count, whole)
        return "" if fed < MOST_HELD else self.finish()

    def finish(self) -> str:
        """The text of what is held, though it may end inside a character."""
        return self._out(len(self.held), self._text.spelt(self._context + self.held))

    def _out(self, count: int, whole: str) -> str:
        """The new text in `whole`, which ends with so many of the held tokens."""
        new = whole[len(self._before) :]
        self._context, self._before = self._context + self.held[:count], whole
        self.held = self.held[count:]
        if len(self._context) > MOST_KEPT:
            self._context = self._context[-4:]
            self._before = self._text.spelt(self._context)
        return new


class _Span(NamedTuple):
    """Text, and for each of its characters the tokens that it is of."""

    text: str
    tokens: list[range]

    def then(self, other: "_Span") -> "_Span":
        return _Span(self.text + other.text, self.tokens + other.tokens)

    def cut(self, start: int, end: int | None = None) -> "_Span":
        return _Span(self.text[start:end], self.tokens[start:end])


_NOTHING = _Span("", [])


def spell(text: Text, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; a character that spans two comes with the second."""
    decoder = Decoder(text)
    return [decoder.feed([token]) for token in tokens]


class Reader:
    """A device response as pieces. `opened`, `closed`: whether the answer has been."""

    def __init__(self, text: Text):
        self.opened = self.closed = False
        self._decoder = Decoder(text)
        self._hidden = (*TAGS, text.marker)
        self._buffer = self._blank = _NOTHING
        self._fed = self._decoded = 0  # tokens
        self._begun: set[Kind] = set()

    def feed(self, tokens: Sequence[int]) -> Iterator[Piece]:
        """Yields the pieces that these tokens complete."""
        self._fed += len(tokens)
        self._add(self._decoder.feed(tokens))
        while found := first_of(self._buffer.text, self._hidden):
            at, tag = found
            yield from self._out(self._buffer.cut(0, at))
            self._buffer = self._buffer.cut(at + len(tag))
            self._turn(tag)
        safe = len(self._buffer.text) - held_back(self._buffer.text, self._hidden)
        yield from self._out(self._buffer.cut(0, safe))
        self._buffer = self._buffer.cut(safe)

    def finish(self) -> Iterator[Piece]:
        """Yields what was held back, once no token follows."""
        self._add(self._decoder.finish())
        yield from self._out(self._buffer)
        self._buffer = _NOTHING

    def _add(self, text: str) -> None:
        """Adds the text of tokens that are decoded now."""
        decoded = self._fed - len(self._decoder.held)
        origin = [range(self._decoded, decoded)] * len(text)
        self._buffer = self._buffer.then(_Span(text, origin))
        self._decoded = decoded

    def _turn(self, tag: str) -> None:
        if tag == ANSWER and not self.opened:
            self.opened, self._blank = True, _NOTHING
        elif tag == CLOSING and self.opened:
            self.closed = True

    def _out(self, span: _Span) -> Iterator[Piece]:
        """Yields text without white space at the ends of its kind; after the answer, nothing."""
        kind: Kind = "content" if self.opened else "reasoning"
        span = self._blank.then(span)
        if kind not in self._begun:
            span = span.cut(len(span.text) - len(span.text.lstrip()))
        end = len(span.text.rstrip())
        shown, self._blank = span.cut(0, end), span.cut(end)
        if shown.text and not self.closed:
            self._begun.add(kind)
            yield Piece(kind, shown.text, shown.tokens)


class Stops:
    """Cuts content before the first of the strings that a client stops at. `hit`: it was there."""

    def __init__(self, strings: Sequence[str]):
        self.hit = False
        self._strings, self._buffer = tuple(strings), ""

    def feed(self, text: str) -> str:
        """The content that may go out; after a stop, nothing."""
        if self.hit:
            return ""
        self._buffer += text
        if found := first_of(self._buffer, self._strings):
            self.hit = True
            return self._buffer[: found[0]]
        safe = len(self._buffer) - held_back(self._buffer, self._strings)
        out, self._buffer = self._buffer[:safe], self._buffer[safe:]
        return out

    def finish(self) -> str:
        """What was held back."""
        return "" if self.hit else self._buffer


def first_of(text: str, strings: Sequence[str]) -> tuple[int, str] | None:
    """(where, which) of the first of `strings` in `text`; the longer one of two at one place."""
    found = [(text.find(s), -len(s), s) for s in strings if s in text]
    return (min(found)[0], min(found)[2]) if found else None


def held_back(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin one of `strings`."""
    longest = max(map(len, strings), default=1)
    return next(
        (
            n
            for n in range(min(longest - 1, len(text)), 0, -1)
            if any(s.startswith(text[-n:]) for s in strings)
        ),
        0,
    )
