"""Where an answer opens, by tokens as by the decoded text; which token a random number draws."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vocabularies import CUTS, TEMPLATE, byte_level

from collab_jax.models import hf
from collab_jax.models import text as text_lib
from collab_jax.models.decision import ANSWER, Opening, invert, opening

SETTINGS = ConfigDict(
    dict(
        marker="<unknown> help </unknown>",
        decision_token="auto",
        pad="auto",
        eos=("auto",),
        decide_after_answer=False,
    )
)
SIGNS = list(")$}].:;,!?*=+-/\\|'\"`~^&%#@>") + ["\\)", "}$", "$$", "**", "```"]
PARTS = ["<answer>", "<answer", "answer>", "<ans", "wer>", "<", "<<", ">", "</answer>", "</think>"]
PARTS += [*SIGNS, "x", " so", "the answer", "\n", "\n\n", " ", "  ", "12", "é", "漢", "🙂"]


def test_states_by_hand():
    pieces = ["<", "<ans", "wer", ">", "answer>5", "x<answer>y", "", "<<answ", "answ<", "s"]
    opens = opening(pieces)
    of = lambda *written: opens.states([pieces.index(piece) for piece in written])  # noqa: E731
    assert Opening.OPEN == 8
    assert of("<", "<", "answer>5") == [1, 1, 8]
    assert of("<ans", "wer", ">", "<") == [4, 7, 8, 8]
    assert of("<ans", "wer", "wer", ">") == [4, 7, 0, 0]
    assert of("<ans", "", "<<answ", "wer") == [4, 4, 5, 0]
    assert of("<ans", "<ans", "s", "<") == [4, 4, 0, 1]
    assert of("<", "answ<", "answer>5") == [1, 1, 8]
    assert of("x<answer>y") == [8] and of("answer>5") == [0]
    assert opens.possible and not opening(["<", "ans", "er>"]).possible


def test_the_device_walks_as_the_table_does():
    opens = opening(["<", "answer", ">", "so"])
    tokens = jnp.array([[0, 1, 2, 3, 9], [0, 9, 1, 2, 0], [3, 0, 1, 0, 1]])  # 9: beyond the table
    step = jax.jit(opens.after)
    states = [jnp.zeros(3, jnp.int8)]
    for t in range(5):
        states.append(step(states[-1], tokens[:, t]))
    assert np.array(states[1:]).T.tolist() == [[1, 7, 8, 8, 8], [1, 0, 0, 0, 1], [0, 1, 7, 1, 7]]
    assert states[-1].dtype == jnp.int8
    assert opens == opening(["<", "answer", ">", "so"]) and hash(opens) != hash(opening(["<"]))


def split_at_random(vocabulary: dict, pieces: list[str], draw: random.Random) -> list[int]:
    """The same text in other tokens: some are cut in two, again and again."""
    pieces, again = list(pieces), []
    while pieces:
        piece = pieces.pop(0)
        cuts = [
            (piece[:i], piece[i:])
            for i in range(1, len(piece))
            if piece[:i] in vocabulary and piece[i:] in vocabulary
        ]
        if cuts and draw.random() < 0.6:
            pieces = [*draw.choice(cuts), *pieces]
        else:
            again.append(vocabulary[piece])
    return again


def check_by_text(text: text_lib.Text, seed: int, count: int = 400) -> set[int]:
    """Compares with `str.find` on random texts, each in several cuts; returns what tokens open."""
    draw, opened_by, tokenizer = random.Random(seed), set(), text.tokenizer
    vocabulary = tokenizer.get_vocab()
    cut = lambda written: split_at_random(vocabulary, tokenizer.tokenize(written), draw)  # noqa: E731
    likely = text.answer_open.table.any(axis=0).nonzero()[0].tolist()
    for _ in range(count):
        written = "".join(draw.choices(PARTS, k=draw.randint(1, 8)))
        written += draw.choice(["", "", draw.choice(SIGNS) + ANSWER]) + draw.choice(PARTS)
        greedy = tokenizer.encode(written, add_special_tokens=False)
        joined = [*cut(written[:3]), *cut(ANSWER), *greedy]
        for ids in (greedy, cut(written), joined, draw.choices([*likely, *greedy], k=10)):
            decoded = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
            states = text.answer_open.states(ids)
            assert [s == Opening.OPEN for s in states] == [d.find(ANSWER) >= 0 for d in decoded]
            for state, d in zip(states, decoded, strict=True):
                assert state == Opening.OPEN or d.endswith(ANSWER[:state])
            if Opening.OPEN in states:
                opened_by.add(ids[states.index(Opening.OPEN)])
    return opened_by


@pytest.mark.parametrize("cut", CUTS)
def test_an_opening_is_found_as_in_the_text_however_bpe_cuts_it(cut, tmp_path):
    corpus = [f"f(x{sign}<answer>{sign} 5 <answer>\n</answer>{sign}\n" for sign in SIGNS] * 6
    inner = byte_level(cut, corpus, 700, ["<|pad|>", "<|end|>", "<|reserved|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path)
    text = text_lib.load(tmp_path, SETTINGS)
    vocabulary = text.tokenizer.get_vocab()
    assert {")<", "$<", "}<"} <= vocabulary.keys()  # BPE joins a sign with the tag
    assert [t for t in ")$}" if text.tokenizer.tokenize(f"x{t}<answer>5")[-4] == f"{t}<"]
    opened_by = check_by_text(text, seed=len(cut))
    names = text.tokenizer.convert_ids_to_tokens(sorted(opened_by))
    assert ">" in names and [n for n in names if len(n) > 1 and n[0] == ">"]  # and what follows it


def test_a_space_before_a_word_and_an_id_without_a_token(tmp_path):
    """Alone, the token of " answer" would be decoded without its space, as a text's first word."""
    words = {"<unk>": 0, "<": 1, "▁answer": 2, "answer": 3, ">": 4, "<pad>": 7}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path)
    settings = dict(marker="> help", decision_token="<unk>", pad="<pad>", eos=("<unk>",))
    settings |= dict(decide_after_answer=False)
    with pytest.raises(text_lib.TextError, match="also ends"):
        text_lib.load(tmp_path, ConfigDict(settings))
    opens = text_lib.load(tmp_path, ConfigDict(settings | {"decision_token": ""})).answer_open
    assert opens.table.shape == (8, 8)
    assert opens.states([1, 3, 4]) == [1, 7, 8]
    assert opens.states([1, 2, 4, 1, 5, 3]) == [1, 0, 0, 1, 0, 0]  # 5 is no token


@pytest.mark.usefixtures("smollm2_file")
def test_an_opening_is_found_as_in_the_text_by_smollm2():
    text = text_lib.load(hf.locate("smollm2-135m"), SETTINGS)
    assert text.tokenizer.tokenize("f(x)<answer>5")[3] == ")<"
    assert len(check_by_text(text, seed=0)) > 3


# ---- a token is drawn


def test_a_number_draws_the_token_whose_share_it_falls_in():
    logits = jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))
    numbers = jnp.array([0.0, 0.49, 0.5, 0.74, 0.75, 0.999])
    tokens = invert(jnp.tile(logits, (6, 1)), numbers)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3] and tokens.dtype == jnp.int32


@pytest.mark.parametrize("vocabulary", [1, 29, 256, 700])
def test_all_numbers_together_draw_each_token_as_often_as_it_is_likely(vocabulary):
    logits = 3 * jax.random.normal(jax.random.key(vocabulary), (vocabulary,))
    logits = jnp.where(jnp.arange(vocabulary) % 5 == 3, -jnp.inf, logits)
    count = 4096
    numbers = (jnp.arange(count) + 0.5) / count
    tokens = invert(jnp.broadcast_to(logits, (count, vocabulary)), numbers)
    drawn = np.bincount(tokens, minlength=vocabulary)
    np.testing.assert_allclose(drawn, count * jax.nn.softmax(logits), atol=1.01)


def test_the_ends_draw_tokens_that_can_be():
    logits = (
        jax.random.normal(jax.random.key(0), (400, 49_152)) * jnp.linspace(0.1, 20, 400)[:, None]
    )
    logits = jnp.where(jnp.arange(49_152) % 300 < 100, -jnp.inf, logits)
    for number in (0.0, 1 - 2.0**-24):
        tokens = np.asarray(invert(logits, jnp.full(400, number)))
        assert np.isfinite(np.asarray(logits)[np.arange(400), tokens]).all()
