"""Text <-> tokens: a fast tokenizer, its chat template and the special tokens, none guessed."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from ml_collections import ConfigDict

from collab_jax.models import special_tokens
from collab_jax.models.decision import ANSWER, NEVER, Marker, Opening, PlainMarker, opening
from collab_jax.models.special_tokens import TAGS, SpecialTokens, TextError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

Messages = list[dict[str, str]]
UNKNOWN_TOKEN = re.compile(r"<\|id \d+\|>")  # how `Text.decode` writes what is no token
DATE = "26 Jul 2024"  # for templates that write today's (Llama 3.2): prompts must not change daily


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A tokenizer with the tokens that the method needs.

    special: the special tokens by name, none of them "auto"; the ids below are theirs.
    eos_ids: every token that ends a response; the first is the one written after a demonstration.
    decision_id: the first token of the marker, the only one whose logit decides a call; None where
    no single token decides, and `plain` then has those that do.
    marker: the call as text. marker_ids: the same as a response has it, decision_id first; a
    reserved token stands for the whole marker. answer_open: sees the answer open, from where on no
    call is possible, unless decide_after_answer.
    """

    tokenizer: PreTrainedTokenizerFast
    special: SpecialTokens
    pad_id: int
    eos_ids: tuple[int, ...]
    decision_id: int | None
    marker: str
    marker_ids: tuple[int, ...]
    answer_open: Opening
    plain: PlainMarker | None
    decide_after_answer: bool

    @property
    def decision(self) -> Marker:
        """How a call begins, and until when."""
        until = NEVER if self.decide_after_answer else self.answer_open
        return Marker(self.decision_id, until, self.plain)

    @property
    def _marker_written(self) -> str:
        """The marker as a response has it: itself, or the reserved token that stands for it."""
        return _marker_written(self.marker, self.special.decision_token)

    @functools.cached_property
    def longest_piece(self) -> int:
        """The characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    @functools.cached_property
    def _vocabulary(self) -> frozenset[int]:
        """Every id that is a token: a model may have more rows than its tokenizer has tokens."""
        return frozenset(self.tokenizer.get_vocab().values())

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens of a chat prompt, ending where the response begins.

        The marker in it stays the text that it is: the model knows its words, not the reserved
        token, which it learns to write in their place.
        """
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
        )
        return cast(list[int], ids)

    def prompt_batch(
        self, prompts: Sequence[Messages], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens i32[Q, L], real bool[Q, L]) of Q prompts, padded on the left to L = `length`.

        Raises TextError where a prompt is longer.
        """
        tokens = np.full((len(prompts), length), self.pad_id, np.int32)
        real = np.zeros((len(prompts), length), bool)
        for i, messages in enumerate(prompts):
            ids = self.prompt_ids(messages)
            if len(ids) > length:
                raise TextError(
                    f"prompt {messages[-1]['content'][:60]!r} has {len(ids)} tokens, more than "
                    f"prompt_length={length}: raise config.prompt_length"
                )
            tokens[i, length - len(ids) :] = ids
            real[i, length - len(ids) :] = True
        return tokens, real

    def response_ids(self, response: str) -> list[int]:
        """Tokens of a whole response as the model should write it, EOS included."""
        written = response.replace(self.marker, self._marker_written)
        return [*self.tokenizer.encode(written, add_special_tokens=False), self.eos_ids[0]]

    def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The text of responses i32[R, T], without EOS. mask: bool[R, T], what was written.

        An id that is no token is written `<|id 151999|>`, which no well-formed response contains.
        """
        return [self.spelt(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]

    def spelt(self, ids: Iterable[int]) -> str:
        """The text of one response's tokens, as `decode` has it."""
        known = self._vocabulary.__contains__
        runs = itertools.groupby((t for t in ids if t not in self.eos_ids), known)
        pieces = [
            self._decode(list(run)) if real else "".join(map(_no_token, run)) for real, run in runs
        ]
        return "".join(pieces).replace(self._marker_written, self.marker)

    def _decode(self, ids: list[int]) -> str:
        # What the tokenizer's own method would call, but for checks that take longer than this.
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _marker_written(marker: str, decision_token: str) -> str:
    """The marker as a response has it, for a decision token, or "" where plain text decides."""
    return marker if marker.startswith(decision_token) else decision_token


def _no_token(index: int) -> str:
    """What is written for an id that is no token."""
    return f"<|id {index}|>"


def _pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text that each id adds to a text, by `Text.decode`; but for a reserved decision token."""
    vocabulary = tokenizer.get_vocab().values()
    before = min(vocabulary)  # any token: some tokenizers drop the space that begins a text
    decode = functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    start = decode([before])
    known = frozenset(vocabulary)
    return [
        decode([before, index]).removeprefix(start) if index in known else _no_token(index)
        for index in range(max(known) + 1)
    ]


def _plain_marker(pieces: Sequence[str], marker: str) -> PlainMarker:
    """The tokens that decide a call where the marker is plain text, "<unknown> ...".

    BPE cuts it differently after each text ("<" "unknown", "><" "unknown", "<un" "known", ...), and
    a model may cut as it likes. So the text counts: a call is decided by the first token after
    which the marker can be told from the other tags, here once its "<u" is written.
    anywhere: tokens that end with "<u", "<un", ...; after: "u", "un", "unknown", ..., which decide
    after one of stems: tokens that end with "<", which may also begin "<answer>" and "</think>".
    """
    shared = max(len(os.path.commonprefix([marker, tag])) for tag in TAGS)
    if shared > 1 or len(marker) <= shared:
        raise TextError(
            f"config.text.marker={marker!r} begins like a tag: let its second character differ"
        )
    stem, rest = marker[:shared], marker[shared:]

    def opens(piece: str, tail: str) -> bool:
        return bool(piece) and (tail.startswith(piece) or piece.startswith(tail))

    anywhere = [
        i for i, p in enumerate(pieces) if any(opens(p[j:], marker) for j in range(len(p) - shared))
    ]
    stems = [i for i, p in enumerate(pieces) if stem and p.endswith(stem)]
    after = [i for i, p in enumerate(pieces) if stem and opens(p, rest)]
    return PlainMarker(anywhere=tuple(anywhere), stems=tuple(stems), after=tuple(after))


def load(folder: pathlib.Path, config: ConfigDict) -> Text:
    """The Text of a model folder and `config.text`; prints the special tokens that it found.

    config: pad, eos, decision_token, marker and decide_after_answer. Raises TextError, which names
    the settings.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # transformers raises many kinds for a damaged or missing tokenizer
        raise TextError(
            f"no usable tokenizer in {folder}: {(str(error) or repr(error)).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template:
        raise TextError(f"the tokenizer in {folder} has no chat template: add chat_template.jinja")
    special = special_tokens.resolve(tokenizer, folder, config)
    if found := [key for key in SpecialTokens._fields if special_tokens.is_auto(config[key])]:
        print("config.text: " + ", ".join(f"{key}={getattr(special, key)!r}" for key in found))
    marker, decision = config.marker, special.decision_token
    decision_id = tokenizer.convert_tokens_to_ids(decision) if decision else None
    marker_ids = tokenizer.encode(_marker_written(marker, decision), add_special_tokens=False)
    if decision_id is not None and marker_ids[:1] != [decision_id]:
        raise TextError(f"config.text.marker={marker!r} does not begin with the token {decision!r}")
    pieces = _pieces(tokenizer)
    answer_open = opening(pieces)
    if not answer_open.possible:
        raise TextError(
            f"the tokenizer in {folder} cannot write {ANSWER!r}: add it to the vocabulary"
        )
    return Text(
        tokenizer=tokenizer,
        special=special,
        pad_id=tokenizer.convert_tokens_to_ids(special.pad),
        eos_ids=tuple(tokenizer.convert_tokens_to_ids(list(special.eos))),
        decision_id=decision_id,
        marker=marker,
        marker_ids=tuple(marker_ids),
        answer_open=answer_open,
        plain=None if decision else _plain_marker(pieces, marker),
        decide_after_answer=config.decide_after_answer,
    )


def word_tokenizer(words: Sequence[str], pad: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is `words`, for models trained from nothing.

    The longest word that fits is taken first. The chat template joins the contents of the messages
    and ends the prompt with a line break. Raises TextError where pad or eos is left to be found.
    """
    if special_tokens.is_auto(pad) or special_tokens.is_auto(eos):
        raise TextError("a vocabulary of config.sft.words needs config.text.pad and eos by name")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([pad, eos, unk, *words])}
    longest_first = sorted(words, key=len, reverse=True)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    pattern = Regex("|".join(map(re.escape, longest_first)))
    inner.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token=eos, unk_token=unk
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    return tokenizer
