"""A cloud in this process, and the device's attempt handed over to a cloud."""

import shutil
import types

import numpy as np
import pytest
from fakes import cloud_config, prompt, texts

from collab_jax import records
from collab_jax.cloud import CachedCloud, CloudError, Reply, Store, local, make_cloud
from collab_jax.cloud.share import with_attempt
from collab_jax.models import hf
from collab_jax.models import text as text_lib
from collab_jax.reports import summary
from collab_jax.rl import cloud_columns, evaluation
from collab_jax.tasks import Example, make_task

QUESTIONS = [prompt("25 7 3=21"), prompt("9 2=11"), prompt("4 5 6=15")]


def configure(model="countdown-tiny", **changes):
    config = cloud_config(kind="local", model=model, batch_size=2, prompt_length=16, **changes)
    config.cloud.parameters = {"temperature": 0.0, "max_tokens": 24}
    return config


def test_a_local_decoder_answers_each_prompt_by_itself(tmp_path):
    cloud = make_cloud(configure(), None, tmp_path / "s.db")
    replies = cloud.answer(QUESTIONS).replies
    assert all(reply.text.startswith("<think>") or reply.reasoning for reply in replies)
    assert all(
        0 < reply.output_tokens <= 24 and reply.input_tokens > 5 and reply.usd == 0
        for reply in replies
    )
    assert {reply.finish_reason for reply in replies} <= {"stop", "length"}
    other = make_cloud(configure(), None, tmp_path / "other.db")
    other.cloud.__dict__["_loaded"] = cloud.cloud._loaded  # compiled once
    assert texts(other.answer(QUESTIONS[::-1])) == texts(cloud.answer(QUESTIONS))[::-1]
    assert cloud.answer(QUESTIONS).bought == 0
    long = cloud.answer([prompt("1 2 3 4 5 6 7 8 9 10 11 12=50")])
    assert texts(long) == [None] and "longer than config.cloud.prompt_length=16" in cloud.reasons


def test_other_weights_are_another_cloud(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hf.ASSETS / "countdown-tiny", folder)
    before = local.fingerprint(folder)
    assert before == local.fingerprint(hf.ASSETS / "countdown-tiny")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[len(weights) // 2 :: 1000] = bytes(
        len(weights[len(weights) // 2 :: 1000])
    )  # as training would, everywhere
    (folder / "model.safetensors").write_bytes(weights)
    assert local.fingerprint(folder) != before


def test_what_a_local_cloud_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="no model at 'nowhere'"):
        make_cloud(configure("nowhere"), None, tmp_path / "s.db")
    config = configure()
    config.cloud.parameters.temperature = -1.0
    with pytest.raises(CloudError, match="temperature must be at least 0"):
        make_cloud(config, None, tmp_path / "s.db")


def test_reasoning_is_told_from_the_answer():
    assert local.split_reasoning("<think>2+3=5</think><answer>2+3</answer>") == (
        "2+3=5",
        "<answer>2+3</answer>",
    )
    assert local.split_reasoning("2+3=5</think>\n\nFive") == (
        "2+3=5",
        "Five",
    )  # the template opened it
    assert local.split_reasoning(" Five ") == ("", "Five")


# ---------------------------------------------------------------- share_attempt


class Listening:
    """Right where it is given an attempt; a token a character."""

    model, provider, parameters, batch, workers = "listening", "", {}, 10, 1

    def highest_usd(self, messages):
        return 0.0

    def answer(self, prompts):
        contents = [messages[-1]["content"] for messages in prompts]
        right = ["gave up" in content for content in contents]
        return [
            Reply(f"<answer>{'3+4+5' if r else '0'}</answer>", len(c), 1, 0.0, 0.0)
            for c, r in zip(contents, right, strict=True)
        ]


def test_the_attempt_up_to_the_call_goes_along_and_both_ways_are_reported(small, tmp_path):
    config = small()
    task, text = make_task(config), text_lib.load(hf.locate(config.model.path), config.text)
    examples = [Example(name, "3 numbers", ((3, 4, 5), 12)) for name in ("calls", "answers")]
    thought = "<think>4*3=12,12+5=17\n"
    written = [
        text.response_ids(thought + config.text.marker),
        text.response_ids("<think>1</think><answer>3</answer>"),
    ]
    T = max(map(len, written))
    tokens, mask, margins = (
        np.zeros((2, T), np.int32),
        np.zeros((2, T), bool),
        np.full((2, T), -1.0),
    )
    for i, ids in enumerate(written):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    margins[0, written[0].index(text.decision_id)] = 0.5
    natural = types.SimpleNamespace(tokens=tokens, mask=mask, margins=margins)
    cloud = CachedCloud(Listening(), Store(tmp_path / "s.db"))
    attempts = evaluation._attempts(text, 2, natural)
    assert attempts == [thought, None]
    rows = cloud_columns.shared_answers(task, cloud, examples, attempts)
    alone = task.cloud_prompt(examples[0])
    extra = len(with_attempt(alone, thought)[-1]["content"]) - len(alone[-1]["content"])
    assert rows[0] == {
        "shared_known": True,
        "shared_correct": True,
        "shared_extra_tokens": extra,
    } and extra > len(thought)
    assert rows[1] == {"shared_known": False, "shared_correct": False, "shared_extra_tokens": 0}
    stored = [content for (content,) in cloud.store.query("SELECT prompt FROM answers")]
    assert len(stored) == 2 and sum("12+5=17" in content for content in stored) == 1
    assert not any("unknown" in content for content in stored)  # the call itself is not handed over

    columns = {
        "id": ["calls", "answers"],
        "local_correct": [False, True],
        "cloud_correct": [False, False],
    }
    columns |= {name: [row[name] for row in rows] for name in rows[0]}
    told = summary.shared(records.check(columns, "x"))
    assert (told["n"], told["accuracy"]["value"], told["accuracy_shared"]["value"]) == (1, 0.0, 1.0)
    assert told["extra_input_tokens"] == extra and summary.shared({"id": np.array(["x"])}) is None


def test_without_an_attempt_the_prompt_is_the_same():
    assert with_attempt(prompt("x"), " \n") == prompt("x")
    system = [{"role": "system", "content": "s"}, *prompt("x")]
    assert with_attempt(system, "y")[0] == system[0] and with_attempt(system, "y")[1][
        "content"
    ].startswith("x\n\n")
