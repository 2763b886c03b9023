"""The special tokens of a model, by name: what ends a response, fills rows and decides a call.

`config.text` names them, or leaves them to be found: "auto" reads the model's own files, and takes
a token that nothing else writes for the call and for padding. All that cannot be decided is told
in one error.
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jinja2
from ml_collections import ConfigDict

from collab_jax.models.hf import GENERATION
from collab_jax.runtime.errors import UserError

if TYPE_CHECKING:  # `text.py` imports transformers, with its settings
    from transformers import PreTrainedTokenizerFast

AUTO = "auto"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a response, beside the marker
# Added tokens that no text model has been taught, by family, the first choice first.
UNTAUGHT = (
    r"reserved|unused",  # Llama 3
    r"^<\|quad_(start|end)\|>$",  # Qwen: of its models that see
    r"^<(jupyter_script|empty_output)>$",  # SmolLM2: their embeddings are those of random weights
)
SHOWN = 8  # candidates in a message


class TextError(UserError):
    """A tokenizer, token or prompt that cannot be used; the message says what to do."""


class SpecialTokens(NamedTuple):
    """The tokens by name, as in `config.text`.

    eos: every token that ends a response, first the one written after a demonstration.
    decision_token: "" where plain text decides a call.
    """

    eos: tuple[str, ...]
    pad: str
    decision_token: str


def is_auto(value: str | Sequence[str]) -> bool:
    """Whether a setting of `config.text` is left to be found."""
    return value == AUTO or list(value) == [AUTO]


def resolve(
    tokenizer: "PreTrainedTokenizerFast", folder: pathlib.Path, config: ConfigDict
) -> SpecialTokens:
    """The special tokens of the model in `folder` by `config`, which is `config.text`.

    Raises TextError that lists all faults, each with candidates.
    """
    free = free_tokens(tokenizer)
    faults = [
        f"config.text.{key}={name!r} is not one token of the tokenizer in {folder}: use auto, or "
        f"one of {_some(free if key != 'eos' else _added(tokenizer))}"
        for key, name in _named(config)
        if not _is_token(tokenizer, name)
    ]

    def found(setting: str | tuple[str, ...], find: Callable, *known: Any) -> Any:
        """The setting, or what `find` finds in its place; "" where that fails."""
        try:
            return find(tokenizer, *known) if is_auto(setting) else setting
        except TextError as error:
            faults.append(str(error))
            return ""

    eos = found(config.eos, _find_eos, folder)
    free = [t for t in free if t not in (*eos, config.pad, config.decision_token)]
    decision = found(config.decision_token, _find_decision_token, config.marker, free)
    free = [t for t in free if t != decision]
    pad = found(config.pad, _find_pad, (*eos, decision), free)
    if decision and decision in (*eos, pad):
        faults.append(
            f"config.text.decision_token={decision!r} also ends responses or fills rows: use "
            f"another, as one of {_some(free)}"
        )
    if faults:
        raise TextError("; ".join(faults))
    return SpecialTokens(eos=tuple(eos), pad=pad, decision_token=decision)


def _named(config: ConfigDict) -> list[tuple[str, str]]:
    """The settings that are not left to be found, (key, token), without a decision token of ""."""
    named = []
    for key in SpecialTokens._fields:
        value = config[key]
        if not is_auto(value):
            # An empty eos is no token either.
            named += [(key, n) for n in ([value] if isinstance(value, str) else value or [""])]
    return [setting for setting in named if setting != ("decision_token", "")]


def _find_eos(tokenizer: "PreTrainedTokenizerFast", folder: pathlib.Path) -> tuple[str, ...]:
    ids = end_ids(tokenizer, folder)
    if not ids:
        raise TextError(
            f"config.text.eos=auto: neither {GENERATION} nor the tokenizer in {folder} says what "
            f"ends a response: name it, as one of {_some(_added(tokenizer))}"
        )
    names = cast(list[str | None], tokenizer.convert_ids_to_tokens(list(ids)))
    if None in names:
        raise TextError(
            f"config.text.eos=auto: eos_token_id={ids[names.index(None)]} in {folder / GENERATION} "
            f"is no token: mend it, or name one, as one of {_some(_added(tokenizer))}"
        )
    return tuple(cast(list[str], names))


def _find_decision_token(
    tokenizer: "PreTrainedTokenizerFast", marker: str, free: Sequence[str]
) -> str:
    """The tag that the marker begins with, where the vocabulary has it, else a free token."""
    tag = re.match(r"<[^<>\s]+>", marker)
    if tag and _is_token(tokenizer, tag[0]):
        return tag[0]
    if not free:
        raise TextError(
            "config.text.decision_token=auto: no added token is free: name one that no text has, "
            f'as one of {_some(_added(tokenizer))}, or set "" for a call in plain text'
        )
    return free[0]


def _find_pad(
    tokenizer: "PreTrainedTokenizerFast", used: Sequence[str], free: Sequence[str]
) -> str:
    """The tokenizer's own, where nothing else uses it, else a free token, if can be named so."""
    own = cast(str | None, tokenizer.pad_token)
    if own and own not in used:
        return own
    if not free:
        others = [name for name in _added(tokenizer) if name not in used]
        raise TextError(
            "config.text.pad=auto: no added token is free: name one that no response has, as one "
            f"of {_some(others)}"
        )
    return next((name for name in free if "pad" in name), free[0])


def end_ids(tokenizer: "PreTrainedTokenizerFast", folder: pathlib.Path) -> tuple[int, ...]:
    """All tokens that end a response by generation_config.json, else the tokenizer's own, if any.

    The tokenizer's own comes first where it is among them: that is what a chat's turn ends with.
    Raises TextError where the file cannot be read.
    """
    own, file = cast(int | None, tokenizer.eos_token_id), folder / GENERATION
    listed: int | list[int] | None = None
    if file.is_file():
        try:
            listed = json.loads(file.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            raise TextError(f"{file} is not readable JSON: restore it, or remove it") from None
    if listed is None:
        return () if own is None else (own,)
    ids = [listed] if isinstance(listed, int) else listed
    return tuple(sorted(dict.fromkeys(ids), key=lambda i: i != own))


def free_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The added tokens that neither a chat nor a response has, the best first.

    First those that no text model is known to be taught, then all that count as special, each in
    the order of their ids.
    """
    roles = {name for name in tokenizer.special_tokens_map.values() if isinstance(name, str)}
    chat = _chat(tokenizer)
    ranked = []
    for index, added in sorted(tokenizer.added_tokens_decoder.items()):
        name = added.content
        known = [rank for rank, pattern in enumerate(UNTAUGHT) if re.search(pattern, name)]
        if (known or added.special) and name not in (*roles, *TAGS) and name not in chat:
            ranked.append((known[0] if known else len(UNTAUGHT), index, name))
    return [name for _, _, name in sorted(ranked)]


def _chat(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The chat template, and a chat by it: it may put tokens together, as "<|" + role + "|>"."""
    template = str(tokenizer.chat_template)
    messages = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    for chat in (messages, messages[1:]):  # some templates refuse a system prompt
        try:
            return template + str(tokenizer.apply_chat_template(chat, tokenize=False))
        except jinja2.TemplateError:
            continue
    return template


def _is_token(tokenizer: "PreTrainedTokenizerFast", name: str) -> bool:
    index = tokenizer.convert_tokens_to_ids(name)
    unknown = index == tokenizer.unk_token_id and name != tokenizer.unk_token
    return index is not None and not unknown


def _added(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """All added tokens by name, in the order of their ids."""
    return [added.content for _, added in sorted(tokenizer.added_tokens_decoder.items())]


def _some(names: Sequence[str]) -> str:
    """Some of the names, for a message."""
    return ", ".join(names[:SHOWN]) or "none"
