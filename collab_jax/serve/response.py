"""What the device has written of a response, and what of it the client is told."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from collab_jax.models.text import Text
from collab_jax.serve.engine import Broken, Emission
from collab_jax.serve.reader import Kind, Piece, Reader, Stops


class Token(NamedTuple):
    """A token that content is made of. start: the character of the content that it begins with."""

    text: str
    logprob: float
    start: int


class Said(NamedTuple):
    """Text for the client, and the model that produced it.

    tokens: those that begin in it; None where they were not asked for, or are not known.
    """

    kind: Kind
    text: str
    model: str
    tokens: Sequence[Token] | None = None


class Response:
    """A device response to the tokens of a prompt, while it is written.

    end: how the last pass over it ended, "" while it goes on; see `Emission`, or "stop" by one of
    the strings `stops`. held: content that may yet be withdrawn.
    """

    def __init__(
        self, model: str, text: Text, prompt: tuple[int, ...], stops: Sequence[str], logprobs: bool
    ):
        self.prompt, self.end = prompt, ""
        self.written: list[int] = []
        self.held: list[Said] = []
        self.reader, self.stops = Reader(text), Stops(stops)
        self._model, self._text, self._logprobs = model, text, logprobs
        self._logps: list[float] = []  # of what is written
        self._origin: list[range] = []  # the tokens of each character that `stops` may hold back
        self._sent = self._told = 0  # characters of content; tokens up to the last one told

    def read(self, emission: Emission) -> Iterator[Said]:
        """Yields what an emission says; it may end the response. Raises Broken."""
        if emission.end == "error":
            raise Broken
        self.end = emission.end or ""
        self.written += emission.tokens
        self._logps += emission.logps[: len(emission.tokens)]
        # One by one, it is known which token each character is of; that takes longer.
        parts = [[token] for token in emission.tokens] if self._logprobs else [emission.tokens]
        for part in parts:
            for piece in self.reader.feed(part):
                yield from self._say(piece)
        if emission.end in ("stop", "length"):
            for piece in self.reader.finish():
                yield from self._say(piece)
        if emission.end and emission.end != "call" and (rest := self.stops.finish()):
            yield self._content(rest)

    def _say(self, piece: Piece) -> Iterator[Said]:
        if piece.kind == "reasoning":
            yield Said("reasoning", piece.text, self._model)
            return
        self._origin += piece.tokens
        text = self.stops.feed(piece.text)
        self.end = "stop" if self.stops.hit else self.end
        if text:
            yield self._content(text)

    def _content(self, text: str) -> Said:
        """Content that goes out, with the tokens that begin in it."""
        origin, self._origin = self._origin[: len(text)], self._origin[len(text) :]
        start, self._sent = self._sent, self._sent + len(text)
        if not self._logprobs:
            return Said("content", text, self._model)
        tokens = []
        for at, places in enumerate(origin, start):
            for place in places[max(0, self._told - places.start) :]:
                logprob = min(0.0, self._logps[place])  # rounding may lift it above
                tokens.append(Token(self._spelt(self.written[place]), logprob, at))
                self._told = place + 1
        return Said("content", text, self._model, tokens)

    def _spelt(self, token: int) -> str:
        return self._text.spelt([token])
