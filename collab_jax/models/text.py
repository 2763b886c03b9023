"""Text <-> tokens: a fast tokenizer, its chat template, and the special tokens, all explicit, none
guessed.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from collab_jax.runtime.errors import UserError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would advise to install torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

Messages = list[dict[str, str]]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a response, beside the marker
DATE = "26 Jul 2024"  # for templates that write today's (Llama 3.2), which would make each day's prompts others


class TextError(UserError):
    """A tokenizer, token or prompt that cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A tokenizer with the tokens the method needs.

    eos_ids: every token that ends a response; the first is the one written after a demonstration.
    decision_id: the first token of the marker, the only one whose logit decides a call (design: the
    decision token).
    marker: the call as text. marker_ids: as tokens, decision_id first; one token where a reserved
    token stands for all.
    answer_open: token sequences that open the answer; from there on no call is possible.
    plain: where no one token decides (decision_id is None), those that do: the fields of
    `decision.PlainMarker`.
    """

    tokenizer: PreTrainedTokenizerFast
    pad_id: int
    eos_ids: tuple[int, ...]
    decision_id: int | None
    marker: str
    marker_ids: tuple[int, ...]
    answer_open: tuple[tuple[int, ...], ...]
    plain: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None

    @property
    def _marker_written(self) -> str:
        """The marker as the tokenizer sees it: itself, or the reserved token that stands for it."""
        if self.decision_id is None:
            return self.marker
        decision = self.tokenizer.convert_ids_to_tokens(self.decision_id)
        return self.marker if self.marker.startswith(decision) else decision

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens of a chat prompt, ending where the response begins."""
        written = [
            {**m, "content": m["content"].replace(self.marker, self._marker_written)}
            for m in messages
        ]
        return self.tokenizer.apply_chat_template(
            written, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
        )

    def prompt_batch(
        self, prompts: Sequence[Messages], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens i32[Q, L], real bool[Q, L]), padded on the left. Raises TextError where a prompt
        is longer than L.
        """
        tokens = np.full((len(prompts), length), self.pad_id, np.int32)
        real = np.zeros((len(prompts), length), bool)
        for i, messages in enumerate(prompts):
            ids = self.prompt_ids(messages)
            if len(ids) > length:
                start = messages[-1]["content"][:60]
                raise TextError(
                    f"prompt {start!r} has {len(ids)} tokens, more than prompt_length={length}: raise config.prompt_length"
                )
            tokens[i, length - len(ids) :] = ids
            real[i, length - len(ids) :] = True
        return tokens, real

    def response_ids(self, response: str) -> list[int]:
        """Tokens of a whole response as the model should write it, EOS included."""
        written = response.replace(self.marker, self._marker_written)
        return [*self.tokenizer.encode(written, add_special_tokens=False), self.eos_ids[0]]

    def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """Responses as text, EOS left out, from tokens and mask [R, T]."""
        known = len(self.tokenizer)  # a model may have more rows than its tokenizer has tokens
        rows = [
            [t for t in row[m].tolist() if t not in self.eos_ids and t < known]
            for row, m in zip(tokens, mask, strict=True)
        ]
        texts = self.tokenizer.batch_decode(
            rows, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        written = self._marker_written
        return texts if written == self.marker else [t.replace(written, self.marker) for t in texts]


def _answer_open(tokenizer, opening: str) -> tuple[tuple[int, ...], ...]:
    """The token sequences that open the answer: one token if the vocabulary has it, else each way
    BPE may split it.
    """
    whole = tokenizer.convert_tokens_to_ids(opening)
    if whole is not None and whole != tokenizer.unk_token_id:
        return ((whole,),)
    stem, found = opening[:-1], set()  # without '>', which BPE joins with whatever follows
    for before in ("", " ", "\n", "\n\n", "</think>", "</think>\n", "</think>\n\n", "."):
        ids = tokenizer.encode(before + stem, add_special_tokens=False)
        for n in range(1, len(ids) + 1):
            if stem in tokenizer.decode(ids[-n:]):
                found.add(tuple(ids[-n:]))
                break
    return tuple(sorted(found))


def _plain(tokenizer, marker: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(anywhere, stems, after): the tokens that decide for a marker in plain text, "<unknown> ...".

    BPE cuts it otherwise after each text ("<" "unknown", "><" "unknown", "<un" "known", ...), and a
    model may cut as it likes. So the text counts: a call is decided by the first token after which
    the marker can be told from the other tags, here once its "<u" is written. anywhere: tokens that
    end with "<u", "<un", ...; after: "u", "un", "unknown", ..., which decide after one of stems:
    tokens that end with "<", from where "<answer>" and "</think>" go on too.
    """
    shared = max(len(os.path.commonprefix([marker, tag])) for tag in TAGS)
    if shared > 1 or len(marker) <= shared:
        raise TextError(
            f"config.text.marker={marker!r} begins like a tag: let it differ by its second character"
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
    return tuple(anywhere), tuple(stems), tuple(after)


def load(folder: pathlib.Path, config) -> Text:
    """Text from a model folder and `config.text` (pad, eos, decision_token, marker). Raises
    TextError by name.
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
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise TextError(
                f"config.text.{key}={token!r} is not one token of the tokenizer in {folder}"
            )
        return found

    decision_id = (
        token_id(config.decision_token, "decision_token") if config.decision_token else None
    )
    written = (
        config.marker if config.marker.startswith(config.decision_token) else config.decision_token
    )
    marker_ids = tuple(tokenizer.encode(written, add_special_tokens=False))
    if decision_id is not None and marker_ids[:1] != (decision_id,):
        raise TextError(
            f"config.text.marker={config.marker!r} does not begin with the token {config.decision_token!r}"
        )
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
        marker=config.marker,
        marker_ids=marker_ids,
        answer_open=answer_open,
        plain=None if config.decision_token else _plain(tokenizer, config.marker),
    )


def word_tokenizer(words: Sequence[str], pad: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is `words` (longest match first), for models trained from
    nothing.

    The chat template joins the messages' contents and ends the prompt with a line break.
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
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    return tokenizer
