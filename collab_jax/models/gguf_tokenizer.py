"""A tokenizer as the metadata of a GGUF file, by which llama.cpp builds its own.

llama.cpp has byte-level BPE with the pre-tokenizers of `bpe.PRE_TOKENIZERS`. A word tokenizer has a
form there, too: a BPE without merges each of whose words is a token that a user added, which is cut
out of a text before BPE sees it. Any other tokenizer is refused.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from collab_jax.models import bpe
from collab_jax.models.bpe import (
    CONTROL,
    NO_MERGES,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    TokenizerError,
)
from collab_jax.models.gguf import GGUFError
from collab_jax.models.gguf_layout import END_TOKENS
from collab_jax.models.text import Text

INSTEAD = "use the Hugging Face folder (export --out FOLDER)"


def metadata(text: Text, rows: int, bos: int | None) -> dict[str, Any]:
    """The metadata of a tokenizer with its special tokens and chat template.

    rows: of the embedding; those without a token are marked as unused. bos: the BOS token where the
    tokenizer names none. Raises GGUFError where llama.cpp has no form for the tokenizer.
    """
    if len(text.eos_ids) > len(END_TOKENS):
        raise GGUFError(
            f"config.text.eos names {len(text.eos_ids)} tokens, and GGUF has places for "
            f"{len(END_TOKENS)}: name those that responses end with"
        )
    own: Any = text.tokenizer.bos_token_id
    bos = bos if own is None else own
    try:
        made = _vocabulary(text.tokenizer.backend_tokenizer, rows, bos, text.decision_id)
    except TokenizerError as error:
        raise GGUFError(f"llama.cpp has no form for this tokenizer ({error}): {INSTEAD}") from None
    special: dict[str, Any] = {
        **dict(zip(END_TOKENS, text.eos_ids, strict=False)),
        "bos": bos,
        "padding": text.pad_id,
        "unknown": text.tokenizer.unk_token_id,
    }
    ids = {f"{name}_token_id": i for name, i in special.items() if i is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in (made | ids).items()} | {
        "tokenizer.chat_template": str(text.tokenizer.chat_template)
    }


def _vocabulary(
    tokenizer: Tokenizer, rows: int, bos: int | None, decision_id: int | None
) -> dict[str, Any]:
    """Tokens, merges and the pre-tokenizer's name. Raises TokenizerError.

    The decision token is of the kind that llama.cpp shows: a response that calls would be empty.
    """
    model = json.loads(tokenizer.to_str())["model"]
    added = tokenizer.get_added_tokens_decoder()
    names = [token.content for token in added.values()]
    if model["type"] == "BPE":
        pre, kind = bpe.name_of(tokenizer), NORMAL
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]] or NO_MERGES
        samples = [bpe.PROBE, " x ".join(names)]
    elif model["type"] == "WordLevel":
        words = [word for word in model["vocab"] if word not in names]
        _check_words(words)
        pre, kind, merges = "gpt-2", USER_DEFINED, NO_MERGES
        samples = ["".join(words), "".join(reversed(words)), "".join(names)]
    else:
        raise TokenizerError(f"it is of the kind {model['type']}, no byte-level BPE")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if i >= rows:
            raise TokenizerError(f"the model has {rows} rows, none for its token {token!r}")
        tokens[i], kinds[i] = token, kind
    for i, token in added.items():
        kinds[i] = CONTROL if token.special else USER_DEFINED
    if decision_id is not None:
        kinds[decision_id] = USER_DEFINED
    adds_bos = bos is not None and tokenizer.encode("").ids[:1] == [bos]
    bos_token = None if bos is None else tokens[bos]
    written = bpe.make(tokens, kinds, merges, pre, bos_token, adds_bos)
    for sample in samples:
        if tokenizer.encode(sample).ids != written.encode(sample).ids:
            raise TokenizerError("it does more than its vocabulary and merges say")
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "add_bos_token": adds_bos,
    }


def _check_words(words: Sequence[str]) -> None:
    """Raises TokenizerError unless llama.cpp cuts out the words that a cut from the left gives.

    It cuts out the longest words first. That is the same where each word that may begin within
    another one, and end after it, is shorter than that one.
    """
    texts = [word.encode() for word in words]
    begun = defaultdict(set)  # the words that begin with some bytes, and go on
    for text in texts:
        for end in range(1, len(text)):
            begun[text[:end]].add(text)
    for text in texts:
        for start in range(1, len(text)):
            for other in begun.get(text[start:], ()):
                if other != text and len(other) >= len(text):
                    raise TokenizerError(
                        f"its word {text.decode()!r} may end where {other.decode()!r} begins"
                    )
