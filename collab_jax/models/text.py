"""Text <-> tokens: a fast tokenizer, its chat template and the special tokens, none guessed."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import cast

import numpy as np
from ml_collections import ConfigDict

from collab_jax.models.decision import PlainMarker
from collab_jax.runtime.errors import UserError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

Messages = list[dict[str, str]]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a response, beside the marker
UNKNOWN_TOKEN = re.compile(r"<\|id \d+\|>")  # how `Text.decode` writes what is no token
DATE = "26 Jul 2024"  # for templates that write today's (Llama 3.2): prompts must not change daily


class TextError(UserError):
    """A tokenizer, token or prompt that cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A tokenizer with the tokens that the method needs.

    eos_ids: every token that ends a response; the first is the one written after a demonstration.
    decision_id: the first token of the marker, the only one whose logit decides a call; None where
    no single token decides, and `plain` then has those that do.
    marker: the call as text. marker_ids: the same as tokens, decision_id first; a reserved token
    stands for the whole marker. answer_open: the token sequences that open the answer, from where
    on no call is possible.
    """

    tokenizer: PreTrainedTokenizerFast
    pad_id: int
    eos_ids: tuple[int, ...]
    decision_id: int | None
    marker: str
    marker_ids: tuple[int, ...]
    answer_open: tuple[tuple[int, ...], ...]
    plain: PlainMarker | None

    @property
    def _marker_written(self) -> str:
        """The marker as the tokenizer sees it: itself, or the reserved token that stands for it."""
        if self.decision_id is None:
            return self.marker
        decision = cast(str, self.tokenizer.convert_ids_to_tokens(self.decision_id))
        return self.marker if self.marker.startswith(decision) else decision

    @functools.cached_property
    def _vocabulary(self) -> frozenset[int]:
        """Every id that is a token: a model may have more rows than its tokenizer has tokens."""
        return frozenset(self.tokenizer.get_vocab().values())

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens of a chat prompt, ending where the response begins."""
        written = [
            {**m, "content": m["content"].replace(self.marker, self._marker_written)}
            for m in messages
        ]
        ids = self.tokenizer.apply_chat_template(
            written, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
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
        written, texts = self._marker_written, []
        for row, kept in zip(tokens, mask, strict=True):
            ids = [t for t in row[kept].tolist() if t not in self.eos_ids]
            pieces = [
                self._decode(list(run)) if known else "".join(f"<|id {t}|>" for t in run)
                for known, run in itertools.groupby(ids, self._vocabulary.__contains__)
            ]
            texts.append("".join(pieces).replace(written, self.marker))
        return texts

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return cast(str, text)


def _answer_open(tokenizer: PreTrainedTokenizerFast, opening: str) -> tuple[tuple[int, ...], ...]:
    """The token sequences that write `opening`, "<answer>".

    One token where the vocabulary has it, else one sequence for each way that BPE may split it.
    """
    whole = cast(int | None, tokenizer.convert_tokens_to_ids(opening))
    if whole is not None and whole != tokenizer.unk_token_id:
        return ((whole,),)
    stem, sequences = opening[:-1], set()  # without ">", which BPE joins with whatever follows
    for before in ("", " ", "\n", "\n\n", "</think>", "</think>\n", "</think>\n\n", "."):
        ids = tokenizer.encode(before + stem, add_special_tokens=False)
        for n in range(1, len(ids) + 1):
            if stem in tokenizer.decode(ids[-n:]):
                sequences.add(tuple(ids[-n:]))
                break
    return tuple(sorted(sequences))


def _plain_marker(tokenizer: PreTrainedTokenizerFast, marker: str) -> PlainMarker:
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
    rows = [[i] for i in range(len(tokenizer))]
    pieces = tokenizer.batch_decode(
        rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

    def opens(piece: str, tail: str) -> bool:
        return bool(piece) and (tail.startswith(piece) or piece.startswith(tail))

    anywhere = [
        i for i, p in enumerate(pieces) if any(opens(p[j:], marker) for j in range(len(p) - shared))
    ]
    stems = [i for i, p in enumerate(pieces) if stem and p.endswith(stem)]
    after = [i for i, p in enumerate(pieces) if stem and opens(p, rest)]
    return PlainMarker(anywhere=tuple(anywhere), stems=tuple(stems), after=tuple(after))


def load(folder: pathlib.Path, config: ConfigDict) -> Text:
    """The Text of a model folder and `config.text`.

    config: pad, eos, decision_token and marker. Raises TextError, which names the setting.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # transformers raises many kinds for a damaged or missing tokenizer
        raise TextError(
            f"no usable tokenizer in {folder}: {(str(error) or repr(error)).splitlines()[0]}"
        ) from None
    if not tokenizer.chat_template:
        raise TextError(f"the tokenizer in {folder} has no chat template: add chat_template.jinja")

    def token_id(token: str, key: str) -> int:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is None or (index == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise TextError(
                f"config.text.{key}={token!r} is not one token of the tokenizer in {folder}"
            )
        return index

    marker, decision = config.marker, config.decision_token
    decision_id = token_id(decision, "decision_token") if decision else None
    written = marker if marker.startswith(decision) else decision
    marker_ids = tuple(tokenizer.encode(written, add_special_tokens=False))
    if decision_id is not None and marker_ids[:1] != (decision_id,):
        raise TextError(f"config.text.marker={marker!r} does not begin with the token {decision!r}")
    answer_open = _answer_open(tokenizer, "<answer>")
    if not answer_open:
        raise TextError(
            f"the tokenizer in {folder} cannot write '<answer>': add it to the vocabulary"
        )
    return Text(
        tokenizer=tokenizer,
        pad_id=token_id(config.pad, "pad"),
        eos_ids=tuple(token_id(t, "eos") for t in config.eos),
        decision_id=decision_id,
        marker=marker,
        marker_ids=marker_ids,
        answer_open=answer_open,
        plain=None if decision else _plain_marker(tokenizer, marker),
    )


def word_tokenizer(words: Sequence[str], pad: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is `words`, for models trained from nothing.

    The longest word that fits is taken first. The chat template joins the contents of the messages
    and ends the prompt with a line break.
    """
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
