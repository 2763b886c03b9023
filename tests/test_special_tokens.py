"""Special tokens left to be found: by family, from the model's own files, or one error with all."""

import json

import pytest
from ml_collections import ConfigDict
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from vocabularies import TEMPLATE, byte_level

from collab_jax.models import special_tokens, text
from collab_jax.models.special_tokens import SpecialTokens, TextError

MARKER = "<unknown> I need external assistance </unknown>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] + ('<|python_tag|>' if m.tool else '<|eot_id|>') }}"
    "{% endfor %}"
)
ROLES = (  # puts its tokens together, and takes no system prompt
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
)
QWEN25 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
QWEN25 += ["<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"]
QWEN25 += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"]
QWEN_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>"]
SMOLLM2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"]
SMOLLM2 += ["<filename>", "<gh_stars>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
LLAMA3 += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"]
LLAMA3 += ["<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
QWEN_FOUND = SpecialTokens(("<|im_end|>", "<|endoftext|>"), "<|vision_pad|>", "<|quad_start|>")
FAMILIES = {  # template, special tokens, other added tokens, roles, eos of generation_config.json
    "llama3": (
        HEADERS,
        LLAMA3,
        [],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        SpecialTokens(
            ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_0|>",
        ),
    ),
    "qwen2.5": (
        CHATML,
        QWEN25,
        QWEN_PLAIN,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_end|>", "<|endoftext|>"],
        QWEN_FOUND,
    ),
    "qwen3": (
        CHATML,
        QWEN25,
        [*QWEN_PLAIN, "<think>", "</think>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_end|>", "<|endoftext|>"],
        QWEN_FOUND,
    ),
    "smollm2": (
        CHATML,
        SMOLLM2,
        [],
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        },
        None,
        SpecialTokens(("<|im_end|>",), "<empty_output>", "<jupyter_script>"),
    ),
    "another": (
        ROLES,
        ["<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>", "<extra>"],
        ["<plain>"],
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "</s>",
        SpecialTokens(("</s>",), "<pad>", "<extra>"),
    ),
}


def write(folder, template, special, plain=(), roles=None, ends=None):
    """A tokenizer with these added tokens, and generation_config.json."""
    inner = byte_level("smollm2", ["so"], 300, special)
    inner.add_tokens([AddedToken(name, normalized=False, special=False) for name in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **roles or {})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if ends is not None:
        ids = tokenizer.convert_tokens_to_ids(ends)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def config(**changes) -> ConfigDict:
    auto = dict(marker=MARKER, decision_token="auto", pad="auto", eos=("auto",))
    auto |= dict(decide_after_answer=False)
    return ConfigDict(auto | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_found_by_family(family, tmp_path, capsys):
    *files, expected = FAMILIES[family]
    found = text.load(write(tmp_path, *files), config())
    assert found.special == expected
    ids = found.tokenizer.convert_tokens_to_ids
    assert found.eos_ids == tuple(ids(list(expected.eos))) and found.pad_id == ids(expected.pad)
    assert found.marker_ids == (found.decision_id,) == (ids(expected.decision_token),)
    [line] = capsys.readouterr().out.splitlines()
    for value in (*expected.eos, expected.pad, expected.decision_token):
        assert repr(value) in line
    # By name they are the same, and nothing is told.
    assert text.load(tmp_path, config(**expected._asdict())).special == expected
    assert capsys.readouterr().out == ""


def test_what_is_named_is_not_found_for_something_else(tmp_path):
    *files, _ = FAMILIES["smollm2"]
    folder = write(tmp_path, *files)
    found = text.load(folder, config(pad="<jupyter_script>")).special
    assert found == (("<|im_end|>",), "<jupyter_script>", "<empty_output>")
    found = text.load(folder, config(decision_token="<repo_name>")).special
    assert found == (("<|im_end|>",), "<jupyter_script>", "<repo_name>")
    found = text.load(folder, config(decision_token="", eos=("<|endoftext|>",))).special
    # Now the tokenizer's own padding ends nothing.
    assert found == (("<|endoftext|>",), "<|im_end|>", "")


def test_a_vocabulary_of_words_has_the_word_of_the_call(tmp_path):
    words = ["<answer>", "<unknown>", " I need external assistance ", "</unknown>"]
    text.word_tokenizer(words, "<pad>", "<eos>", "<unk>").save_pretrained(tmp_path)
    assert text.load(tmp_path, config()).special == (("<eos>",), "<pad>", "<unknown>")
    with pytest.raises(TextError, match="pad and eos by name"):
        text.word_tokenizer(words, "auto", "<eos>", "<unk>")


def test_one_error_names_all_that_cannot_be_found(tmp_path):
    folder = write(tmp_path, TEMPLATE, [], ["<think>", "<b>"])
    with pytest.raises(TextError) as raised:
        text.load(folder, config())
    message = str(raised.value)
    for key in ("eos", "pad", "decision_token"):
        assert f"config.text.{key}=auto: " in message
    assert message.count("<think>, <b>") == 3 and "\n" not in message
    found = text.load(folder, config(eos=("!",), pad="<b>", decision_token=""))
    assert found.special == (("!",), "<b>", "")


def test_one_error_names_all_that_is_no_token_and_what_is_used_twice(tmp_path):
    *files, _ = FAMILIES["llama3"]
    folder = write(tmp_path, *files)
    with pytest.raises(TextError) as raised:
        text.load(folder, config(eos=("<a>", "<|eot_id|>", "<b>"), pad="<c>", decision_token="<d>"))
    for token in ("eos='<a>'", "eos='<b>'", "pad='<c>'", "decision_token='<d>'"):
        assert f"config.text.{token} is not one token" in str(raised.value)
    assert str(raised.value).count("one of <|reserved_special_token_0|>, ") == 2  # pad and call
    with pytest.raises(TextError, match="pad='' is not one token"):
        text.load(folder, config(pad=""))
    for eos in ((), ("auto", "<|eot_id|>")):  # auto is no name
        with pytest.raises(TextError, match="config.text.eos='(auto)?' is not one token"):
            text.load(folder, config(eos=eos))
    for key in ("pad", "eos"):
        taken = {"pad": "<|eom_id|>", "eos": ("<|eom_id|>",)}[key]
        with pytest.raises(TextError, match="also ends .* one of <.reserved_special_token_0.>"):
            text.load(folder, config(decision_token="<|eom_id|>", **{key: taken}))


@pytest.mark.parametrize(
    ("content", "fault"), [("{", "not readable"), ('{"eos_token_id": [2, 99999]}', "99999")]
)
def test_a_generation_config_that_cannot_be_used(tmp_path, content, fault):
    *files, expected = FAMILIES["smollm2"]
    (write(tmp_path, *files) / "generation_config.json").write_text(content)
    with pytest.raises(TextError, match=fault):
        text.load(tmp_path, config())
    assert text.load(tmp_path, config(eos=expected.eos)).special == expected


def test_no_end_of_a_response(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("llama3", ["so"], 300, []))
    assert special_tokens.end_ids(tokenizer, tmp_path) == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert special_tokens.end_ids(tokenizer, tmp_path) == (7,)
