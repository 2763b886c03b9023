"""Text <-> tokens: what is named is found or refused, and a response survives the round trip."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import CUTS, TEMPLATE, byte_level

from collab_jax.models import text as text_lib
from collab_jax.models.decision import Opening
from collab_jax.tasks import base

MARKER = "<unknown> I need external assistance </unknown>"
WORDS = (*text_lib.TAGS, "<unknown>", " I need external assistance ", "</unknown>")
WORDS += (" ", "\n", "<", "+", "=", "<|reserved_5|>", *"0123456789")
CONFIG = dict(marker=MARKER, decision_token="<unknown>", pad="<pad>", eos=("<eos>",))
CONFIG |= dict(decide_after_answer=False)
BPE_CONFIG = dict(decision_token="<|reserved_5|>", pad="<|pad|>", eos=("<|end|>", "<|eot|>"))


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    text_lib.word_tokenizer(WORDS, "<pad>", "<eos>", "<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CUTS)
def bpe_folder(request, tmp_path_factory):
    """A byte-level BPE, as Llama's and Qwen's, with merges of what stands around the tags."""
    corpus = [
        "<think> we answer 12 </think><answer> 3 </answer>\n",
        "is it.<answer>\n\n<think>\n<answer>5</answer>",
        "so\n<unknown> .<unknown> know <unknown> </think><unknown> 12<unknown> .<",
    ] * 9
    special = ["<|pad|>", "<|end|>", "<|eot|>", "<|reserved_5|>"]
    inner = byte_level(request.param, corpus, 365, special)
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, **changes) -> text_lib.Text:
    return text_lib.load(folder, ConfigDict(CONFIG | changes))


def load_bpe(folder, **changes) -> text_lib.Text:
    return load(folder, **BPE_CONFIG | changes)


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
    words = ("<unknown>", " I need external assistance ", "</unknown>")
    assert text.marker_ids == tuple(ids[word] for word in words)
    assert opened_at(text, "<think>1</think><answer>1</answer>") == 4
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
    # The first tokenizer has an unknown-token, the second has none.
    for loader, folder in ((load, words_folder), (load_bpe, bpe_folder)):
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
    with pytest.raises(
        text_lib.TextError, match=r"prompt '1\+2=3' has 6 tokens.* prompt_length=5: raise"
    ):
        text.prompt_batch([prompt("1"), prompt("1+2=3")], 5)


def test_the_call_is_words_in_a_prompt_and_one_token_in_a_response(bpe_folder):
    text = load_bpe(bpe_folder)
    ids = text.prompt_ids(prompt(f"or end with {MARKER}"))
    assert text.tokenizer.decode(ids) == f"or end with {MARKER}\n"
    assert text.decision_id not in ids and text.decision_id in text.response_ids(MARKER)


def test_chat_of_several_messages(words_folder):
    text = load(words_folder)
    messages = [{"role": "system", "content": "1+"}, {"role": "user", "content": "2"}]
    assert text.tokenizer.decode(text.prompt_ids(messages)) == "1+2\n"


# ---------------------------------------------------------------- responses


@pytest.mark.parametrize(
    "response", ["<think>1+2=3</think><answer>1+2</answer>", f"<think>1 +\n{MARKER}", MARKER, ""]
)
def test_response_round_trip_by_words(words_folder, response):
    text = load(words_folder)
    assert text.response_ids(response)[-1] == text.eos_ids[0]
    assert round_trip(text, response) == response


@pytest.mark.parametrize(
    "response", ["<think> it's 12 </think>\n<answer>3</answer>", f"<think> né 漢\n{MARKER}", ""]
)
def test_response_round_trip_by_bpe(bpe_folder, response):
    text = load_bpe(bpe_folder)
    assert round_trip(text, response) == response


def test_a_reserved_token_stands_for_the_marker(words_folder, bpe_folder):
    for text in (load(words_folder, decision_token="<|reserved_5|>"), load_bpe(bpe_folder)):
        assert text.marker == MARKER and text.marker_ids == (text.decision_id,)
        ids = text.response_ids(f"<think>1{MARKER}")
        assert ids[-2:] == [text.decision_id, text.eos_ids[0]] and ids.count(text.decision_id) == 1
        assert round_trip(text, f"<think>1{MARKER}") == f"<think>1{MARKER}"
        [found] = text.decode(
            np.array([[text.decision_id, text.eos_ids[0]]]), np.ones((1, 2), bool)
        )
        assert found == MARKER


def test_decode_leaves_out_every_eos_and_shows_tokens_outside_the_tokenizer(bpe_folder):
    text = load_bpe(bpe_folder)
    one = text.tokenizer.encode("1", add_special_tokens=False)
    beyond = len(text.tokenizer)  # a row of the embedding that the tokenizer does not know
    for end in text.eos_ids:
        row = np.array([[*one, beyond, beyond + 7, *one, end, text.pad_id, *one]])
        mask = np.array([[True] * 5 + [False] * 2])
        assert text.decode(row, mask) == [f"1<|id {beyond}|><|id {beyond + 7}|>1"]


@pytest.mark.parametrize("at", range(11))
def test_a_token_outside_the_tokenizer_leaves_no_response_well_formed(words_folder, at):
    text = load(words_folder)
    ids = text.response_ids("<think>1+2=3</think><answer>3</answer>")[:-1]
    [response] = text.decode(np.array([ids]), np.ones((1, 10), bool))
    assert base.formatted(response) and base.answer_of(response) == "3"
    ids.insert(at, len(text.tokenizer) + at)
    [response] = text.decode(np.array([ids]), np.ones((1, 11), bool))
    assert not base.formatted(response)
    assert base.answer_of(response) == (None if at in (8, 9) else "3")


def test_text_outside_the_words_is_unknown(words_folder):
    assert round_trip(load(words_folder), "1 what 2") == "1 <unk> 2"


# ---------------------------------------------------------------- where an answer opens

CONTEXTS = ["", " ", "so ", "so", "\n", "\n\n", "</think>", "</think>\n", "</think>\n\n"]
CONTEXTS += ["it is.", "12"]  # what may stand before a tag


def opened_at(text, response) -> int | None:
    """How many tokens of the response are written when the sampler sees an answer open."""
    states = text.answer_open.states(text.response_ids(response))
    return states.index(Opening.OPEN) + 1 if Opening.OPEN in states else None


@pytest.mark.parametrize("before", [*CONTEXTS, "<think> 12</think>", "f(x)", "$x$", "{x}"])
@pytest.mark.parametrize("after", ["5</answer>", " 5", "\n5"])
def test_answer_of_several_tokens_is_seen_to_open(bpe_folder, before, after):
    text = load_bpe(bpe_folder)
    assert text.tokenizer.convert_tokens_to_ids("<answer>") is None
    ids = text.response_ids(f"{before}<answer>{after}")
    written = [text.tokenizer.decode(ids[:n]) for n in range(len(ids))]
    expected = next(n for n, w in enumerate(written) if "<answer>" in w)
    assert opened_at(text, f"{before}<answer>{after}") == expected


@pytest.mark.parametrize(
    "response",
    ["<think> the answer </think>", "answer>", "</answer>", "< answer>", "<answer", f"<{MARKER}"],
)
def test_what_opens_no_answer(bpe_folder, response):
    assert opened_at(load_bpe(bpe_folder), response) is None


def test_answer_as_one_added_token(bpe_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    tokenizer.add_tokens([AddedToken("<answer>", normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    text = load_bpe(tmp_path)
    one = text.tokenizer.convert_tokens_to_ids("<answer>")
    assert (text.answer_open.table[:, one] == Opening.OPEN).all()
    assert round_trip(text, "</think><answer>5</answer>") == "</think><answer>5</answer>"


# ---------------------------------------------------------------- a marker in plain text


def decides(text, ids) -> list[bool]:
    """Which of the tokens decide a call, each after the one before."""
    table = text.plain.deciding(jnp.array([-1, *ids[:-1]]), len(text.tokenizer))
    return np.asarray(table)[np.arange(len(ids)), ids].tolist()


@pytest.mark.parametrize("before", [*CONTEXTS, "x <", "<<"])
def test_plain_marker_is_decided_where_it_parts_from_the_tags(bpe_folder, before):
    """By the first token that leaves "<u" or more of the marker at the end of the text."""
    text = load_bpe(bpe_folder, decision_token="")
    assert text.decision_id is None and text.marker_ids[-1] != text.marker_ids[0]
    ids = text.response_ids(before + MARKER)[:-1]
    written = [text.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    expected = next(n for n, w in enumerate(written) if w.startswith(f"{before}<u"))
    assert decides(text, ids).index(True) == expected
    for tag in text_lib.TAGS:
        assert not any(decides(text, text.response_ids(before + tag + "5")[:-1]))
    assert round_trip(text, f"<think>1{before}{MARKER}") == f"<think>1{before}{MARKER}"


def test_plain_marker_spelt_otherwise_than_bpe_would(bpe_folder):
    text = load_bpe(bpe_folder, decision_token="")
    letter = text.tokenizer.convert_tokens_to_ids
    assert decides(text, [letter(c) for c in ".<unk"]) == [False, False, True, False, False]
    assert decides(text, [letter(c) for c in "<<u"]) == [False, False, True]
    assert decides(text, [letter(c) for c in "unu<answer"]) == [False] * 10


def test_no_one_token_begins_the_plain_marker_everywhere(bpe_folder):
    text = load_bpe(bpe_folder, decision_token="")
    after = lambda before: text.response_ids(before + MARKER)[len(text.response_ids(before)) - 1]  # noqa: E731
    assert after("\n") != after("so ")


def test_plain_marker_of_one_word_is_decided_by_that_word_alone(words_folder):
    text = load(words_folder, decision_token="")
    opening = text.tokenizer.convert_tokens_to_ids("<")
    assert text.plain == ((load(words_folder).decision_id,), (opening,), ())


@pytest.mark.parametrize("marker", ["<ask> the cloud", "<answer>?", "<"])
def test_plain_marker_that_begins_like_a_tag(bpe_folder, marker):
    with pytest.raises(text_lib.TextError, match="begins like a tag"):
        load_bpe(bpe_folder, decision_token="", marker=marker)


# ---------------------------------------------------------------- chat templates

LLAMA3 = (
    "{{- bos_token }}"
    "{%- if date_string is not defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{- m['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FAMILIES = {  # template, special tokens, those with a name
    "llama3": (
        LLAMA3,
        ["<|bos|>", "<|start_header_id|>", "<|end_header_id|>"],
        {"bos_token": "<|bos|>"},
    ),
    "qwen2.5": (QWEN25, ["<|im_start|>", "<|im_end|>"], {}),
}
HI = "<think> is it 12?"
LLAMA3_START = "<|bos|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
PROMPT_START = {  # by family and whether there is a system prompt
    ("llama3", False): f"{LLAMA3_START}<|eot|>",
    ("llama3", True): f"{LLAMA3_START}Be brief.<|eot|>",
    ("qwen2.5", False): "<|im_start|>system\nYou are helpful.<|im_end|>\n",
    ("qwen2.5", True): "<|im_start|>system\nBe brief.<|im_end|>\n",
}
PROMPT_END = {
    "llama3": (
        f"<|start_header_id|>user<|end_header_id|>\n\n{HI}<|eot|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen2.5": f"<|im_start|>user\n{HI}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize(
    ("bpe_folder", "family"), [(name, name) for name in FAMILIES], indirect=["bpe_folder"]
)
def test_chat_template_of_each_family(bpe_folder, tmp_path, family, system):
    """Special tokens and prompts are the template's; Llama's BOS stands once, its date is fixed."""
    template, special, names = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": special, **names})
    if names:  # as Llama's: a post-processor writes BOS before text encoded with special tokens
        bos = tokenizer.convert_tokens_to_ids("<|bos|>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    text = load_bpe(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}] * system + prompt(HI)
    ids = text.prompt_ids(messages)
    theirs = text.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=text_lib.DATE
    )
    assert text.tokenizer.decode(ids) == theirs == PROMPT_START[family, system] + PROMPT_END[family]
    for token in special:
        assert ids.count(text.tokenizer.convert_tokens_to_ids(token)) == theirs.count(token) > 0
    assert ids.count(text.tokenizer.convert_tokens_to_ids("<|bos|>")) == (1 if names else 0)
    plain = text.tokenizer.encode("so", add_special_tokens=False)
    assert text.response_ids("so")[:-1] == plain  # no special token in a response
