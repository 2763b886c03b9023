"""Small byte-level BPE tokenizers that cut text as those of the model families do."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Before BPE; the last two join a sign with the letters after it. SmolLM2's is GPT-2's, with each
# digit by itself.
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "smollm2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": _MODERN % r"\p{N}{1,3}",
    "qwen2.5": _MODERN % r"\p{N}",
}
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def byte_level(cut: str, corpus: Iterable[str], size: int, special: Sequence[str]) -> Tokenizer:
    """A BPE of at most `size` tokens, learnt from the corpus; `cut` is one of CUTS."""
    inner = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm2" else []
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *digits,
            pre_tokenizers.Split(Regex(CUTS[cut]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=5,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    return inner
