"""Text <-> tokens: what is explicit is found, what is absent is named, and a response survives the round trip."""

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collab_jax.models import text as text_lib

MARKER = "<unknown> I need external assistance </unknown>"
WORDS = (
    "<think>", "</think>", "<answer>", "</answer>", "<unknown>", " I need external assistance ", "</unknown>",
    " ", "\n", "<", "+", "=", "<|reserved_5|>", *"0123456789",
)  # fmt: skip
CONFIG = dict(marker=MARKER, decision_token="<unknown>", pad="<pad>", eos=("<eos>",))
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
# How GPT-2 and Qwen cut text before BPE; the second joins a sign with the letters after it.
CUTS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    text_lib.word_tokenizer(WORDS, "<pad>", "<eos>", "<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CUTS)
def bpe_folder(request, tmp_path_factory):
    """A byte-level BPE, as Llama's and Qwen's, with merges of what stands around the tags."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS[request.param]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    corpus = [
        "<think> we answer 12 </think><answer> 3 </answer>\n",
        "is it.<answer>\n\n<think>\n<answer>5</answer>",
    ] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        min_frequency=5,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|end|>", "<|eot|>", "<|reserved_5|>"],
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, **changes) -> text_lib.Text:
    return text_lib.load(folder, SimpleNamespace(**{**CONFIG, **changes}))


def load_bpe(folder, **changes) -> text_lib.Text:
    return load(
        folder, **{"pad": "<|pad|>", "eos": ("<|end|>", "<|eot|>"), "decision_token": "<|reserved_5|>", **changes}
    )


def prompt(content):
    return [{"role": "user", "content": content}]


def round_trip(text, response) -> str:
    """The response, written, padded, masked and read again beside another row."""
    ids = text.response_ids(response)
    tokens = np.full((2, len(ids) + 2), text.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    tokens[1, : len(ids)], mask[1, : len(ids)] = ids, True
    empty, found = text.decode(tokens, mask)
    assert empty == ""
    return found


# ---------------------------------------------------------------- tokens


def test_every_token_is_explicit(words_folder):
    text = load(words_folder)
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    assert (text.pad_id, text.eos_ids, text.decision_id) == (0, (1,), ids["<unknown>"])
    assert text.marker_ids == (ids["<unknown>"], ids[" I need external assistance "], ids["</unknown>"])
    assert text.answer_open == ((ids["<answer>"],),)
    assert load(words_folder, eos=("<eos>", "\n")).eos_ids == (1, ids["\n"])


@pytest.mark.parametrize(
    ("key", "value", "token"),
    [
        ("pad", "<nothing>", "<nothing>"),
        ("eos", ("<stop>", "<eos>"), "<stop>"),
        ("decision_token", "<|reserved_99|>", "<|reserved_99|>"),
        ("decision_token", "<unknown> I", "<unknown> I"),
    ],
)
def test_token_not_in_the_vocabulary_is_named(words_folder, bpe_folder, key, value, token):
    for loader, folder in ((load, words_folder), (load_bpe, bpe_folder)):  # with an unknown-token, and without
        with pytest.raises(text_lib.TextError) as raised:
            loader(folder, **{key: value})
        assert f"config.text.{key}={token!r} is not one token" in str(raised.value)


def test_marker_that_begins_with_another_token(words_folder):
    with pytest.raises(text_lib.TextError, match="does not begin with the token '<'"):
        load(words_folder, decision_token="<")


def test_no_chat_template(words_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(words_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(text_lib.TextError, match="has no chat template: add chat_template.jinja"):
        load(tmp_path)


def test_no_way_to_open_an_answer(tmp_path):
    words = [word for word in WORDS if word not in ("<answer>", "<")]
    text_lib.word_tokenizer(words, "<pad>", "<eos>", "<unk>").save_pretrained(tmp_path)
    with pytest.raises(text_lib.TextError, match="<answer>"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, "{ not json"])
def test_no_tokenizer(tmp_path, content):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(text_lib.TextError, match="no usable tokenizer in") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- prompts


def test_prompts_are_padded_on_the_left_and_end_where_the_response_begins(words_folder):
    text = load(words_folder)
    one, plus, newline = (text.tokenizer.convert_tokens_to_ids(t) for t in ("1", "+", "\n"))
    tokens, real = text.prompt_batch([prompt("1+1"), prompt("1")], 5)
    assert tokens.tolist() == [[0, one, plus, one, newline], [0, 0, 0, one, newline]]
    assert real.tolist() == [[False, True, True, True, True], [False, False, False, True, True]]
    assert tokens.dtype == np.int32


def test_prompt_longer_than_its_room(words_folder):
    text = load(words_folder)
    assert text.prompt_batch([prompt("1+2=3")], 6)[1].all()
    with pytest.raises(text_lib.TextError, match=r"prompt '1\+2=3' has 6 tokens.* prompt_length=5: raise"):
        text.prompt_batch([prompt("1"), prompt("1+2=3")], 5)


def test_chat_of_several_messages(words_folder):
    text = load(words_folder)
    messages = [{"role": "system", "content": "1+"}, {"role": "user", "content": "2"}]
    assert text.tokenizer.decode(text.prompt_ids(messages)) == "1+2\n"


# ---------------------------------------------------------------- responses


@pytest.mark.parametrize("response", ["<think>1+2=3</think><answer>1+2</answer>", f"<think>1 +\n{MARKER}", MARKER, ""])
def test_response_round_trip_by_words(words_folder, response):
    text = load(words_folder)
    assert text.response_ids(response)[-1] == text.eos_ids[0]
    assert round_trip(text, response) == response


@pytest.mark.parametrize("response", ["<think> it's 12 </think>\n<answer>3</answer>", f"<think> né 漢\n{MARKER}", ""])
def test_response_round_trip_by_bpe(bpe_folder, response):
    text = load_bpe(bpe_folder)
    assert round_trip(text, response) == response


def test_a_reserved_token_stands_for_the_marker(words_folder, bpe_folder):
    for text in (load(words_folder, decision_token="<|reserved_5|>"), load_bpe(bpe_folder)):
        assert text.marker == MARKER and text.marker_ids == (text.decision_id,)
        ids = text.response_ids(f"<think>1{MARKER}")
        assert ids[-2:] == [text.decision_id, text.eos_ids[0]] and ids.count(text.decision_id) == 1
        assert round_trip(text, f"<think>1{MARKER}") == f"<think>1{MARKER}"
        [found] = text.decode(np.array([[text.decision_id, text.eos_ids[0]]]), np.ones((1, 2), bool))
        assert found == MARKER


def test_decode_leaves_out_every_eos_and_rows_without_a_token(bpe_folder):
    text = load_bpe(bpe_folder)
    one = text.tokenizer.encode("1", add_special_tokens=False)
    beyond = len(text.tokenizer)  # a row of the embedding that the tokenizer does not know
    for end in text.eos_ids:
        row = np.array([[*one, beyond, beyond + 7, end, text.pad_id, *one]])
        assert text.decode(row, np.array([[True] * 4 + [False] * 2])) == ["1"]


def test_text_outside_the_words_is_unknown(words_folder):
    assert round_trip(load(words_folder), "1 what 2") == "1 <unk> 2"


# ---------------------------------------------------------------- where an answer opens


def opened_at(text, response) -> int | None:
    """How many tokens of the response are written when the sampler sees an answer open."""
    ids = text.response_ids(response)
    for n in range(1, len(ids) + 1):
        if any(tuple(ids[max(n - len(opening), 0) : n]) == opening for opening in text.answer_open):
            return n
    return None


@pytest.mark.parametrize(
    "before",
    ["", " ", "so ", "\n", "\n\n", "</think>", "<think> 12</think>", "</think>\n", "</think>\n\n", "it is.", "12"],
)
@pytest.mark.parametrize("after", ["5</answer>", " 5", "\n5"])
def test_answer_of_several_tokens_is_seen_to_open(bpe_folder, before, after):
    text = load_bpe(bpe_folder)
    assert text.tokenizer.convert_tokens_to_ids("<answer>") is None and max(map(len, text.answer_open)) > 1
    n = opened_at(text, f"{before}<answer>{after}")
    assert n is not None
    written = text.tokenizer.decode(text.response_ids(f"{before}<answer>{after}")[:n])
    assert written == f"{before}<answer"


@pytest.mark.parametrize("response", ["<think> the answer </think>", "answer>", "</answer>", "< answer", f"<{MARKER}"])
def test_what_opens_no_answer(bpe_folder, response):
    assert opened_at(load_bpe(bpe_folder), response) is None


def test_answer_as_one_added_token(bpe_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    tokenizer.add_tokens([AddedToken("<answer>", normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    text = load_bpe(tmp_path)
    assert text.answer_open == ((text.tokenizer.convert_tokens_to_ids("<answer>"),),)
    assert round_trip(text, "</think><answer>5</answer>") == "</think><answer>5</answer>"
