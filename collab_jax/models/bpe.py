"""Byte-level BPE tokenizers from a vocabulary, its merges and the name of their pre-tokenizer.

A GGUF file holds these instead of a tokenizer.json. The pre-tokenizer cuts a text into the pieces
that BPE works on; its regular expressions are known by name (`tokenizer.ggml.pre`), which `name_of`
finds for a tokenizer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from collab_jax.runtime.errors import UserError

# The kinds of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
NO_MERGES = [""]  # of a file: llama.cpp asks for a list, and the `gguf` package writes no empty one


class PreTokenizer(NamedTuple):
    """How text is cut before BPE.

    patterns: regular expressions; each one cuts the pieces that the one before it left, into what
    matches and what lies between. nfc: Unicode is composed first. whole_words: a piece that stands
    in the vocabulary is that token, whatever the merges give. bos: a text begins with the BOS
    token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = PreTokenizer((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)
QWEN2 = ("qwen2", "deepseek-r1-qwen")  # the names of Qwen2's
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), whole_words=True, bos=True),
    **dict.fromkeys(QWEN2, _QWEN2),
    # What llama.cpp does with a file whose maker did not know the pre-tokenizer.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}

# A text that each of them cuts differently, and other pre-tokenizers too.
PROBE = (
    "I'LL we've 'S don't 1 12 1234567 x\u00b2\u00bd  a\tb \n\n  c\r\nd... e!?\n ?Que? e\u0301 "
    "\u0e01\u0e47 \u0939\u093f\u0928 \u6570\u5b66\uff1a\u5b8c \u0668\u0669 \U0001f44d\U0001f3fd "
    "_x-1 <a>b</a> $5.00 http://a.b/c?d=1 \u00a0z\u2003w ' \n\t"
)


class TokenizerError(UserError):
    """A vocabulary of which no tokenizer can be made; the message says why."""


def make(
    tokens: Sequence[str],
    kinds: Sequence[int],
    merges: Sequence[str],
    pre: str,
    bos: str | None,
    adds_bos: bool | None,
) -> Tokenizer:
    """The tokenizer of a vocabulary.

    tokens: the text of each id. kinds: their token types; UNUSED ids are rows of the model that are
    no tokens. merges: "left right", the first come first. pre: a name in PRE_TOKENIZERS.
    bos: the BOS token, if any; adds_bos: whether it begins each text, None where that is left to
    the pre-tokenizer. Raises TokenizerError.
    """
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"pre-tokenizer {pre!r} is not supported: only {', '.join(PRE_TOKENIZERS)} are"
        )
    rule = PRE_TOKENIZERS[pre]
    if len(kinds) != len(tokens):
        raise TokenizerError(
            f"there are {len(tokens)} tokens, but types of {len(kinds)}: fetch the file again"
        )
    used = [i for i, kind in enumerate(kinds) if kind != UNUSED]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) < len(used):
        raise TokenizerError("a token stands twice in the vocabulary")
    if bos is not None and bos not in vocabulary:
        raise TokenizerError(f"the BOS token {bos!r} is marked as unused: fetch the file again")
    merges = [] if list(merges) == NO_MERGES else merges
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rule.whole_words))
    except Exception as error:  # tokenizers raises a plain one for a merge outside the vocabulary
        raise TokenizerError(f"the merges do not fit the vocabulary ({error})") from None
    _cut_by(tokenizer, rule)
    tokenizer.decoder = decoders.ByteLevel()
    special = [i for i in used if kinds[i] in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in special])
    defined = [i for i in used if kinds[i] == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in defined])
    if bos is not None and (rule.bos if adds_bos is None else adds_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def _cut_by(tokenizer: Tokenizer, rule: PreTokenizer) -> None:
    """Gives a tokenizer the normalizer and the pre-tokenizer of a rule."""
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in rule.patterns]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_alone])


def name_of(tokenizer: Tokenizer) -> str:
    """The name of a BPE tokenizer's pre-tokenizer: that of PRE_TOKENIZERS which cuts PROBE alike.

    Raises TokenizerError where there is none.
    """
    for name, rule in PRE_TOKENIZERS.items():
        known = Tokenizer(models.BPE(ignore_merges=rule.whole_words))
        _cut_by(known, rule)
        whole_words = tokenizer.model.ignore_merges
        if whole_words == rule.whole_words and _pieces(tokenizer) == _pieces(known):
            return name
    raise TokenizerError(
        f"its pre-tokenizer is none of those that are known: {', '.join(PRE_TOKENIZERS)}"
    )


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """What BPE works on, of PROBE."""
    text = tokenizer.normalizer.normalize_str(PROBE) if tokenizer.normalizer else PROBE
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
