"""From tokens to verdicts, and when the cloud is asked."""

import numpy as np
import pytest

from collab_jax.cloud import Answers, Reply
from collab_jax.models import hf
from collab_jax.models import text as text_lib
from collab_jax.rl import rollout
from collab_jax.tasks import Example, make_task

EXAMPLE = Example("x", "3 numbers", ((3, 4, 5), 12))
RIGHT = "<think>4+3=7,7+5=12</think><answer>3+4+5</answer>"
WRONG = "<think>4*3=12,12+5=17</think><answer>3*4+5</answer>"
CALL = "<think>4*3=12,12+5=17\n<unknown> I need external assistance </unknown>"


@pytest.fixture(scope="module")
def parts(small):
    config = small()
    return make_task(config), text_lib.load(hf.locate(config.model.path), config.text)


def verdicts(parts, responses, ended=True, change=lambda ids: ids):
    """(correct, called, formatted) of each response, written out in the tiny model's tokens."""
    task, text = parts
    rows = [change(text.response_ids(r)) for r in responses]
    tokens = np.zeros((len(rows), 60), np.int32)
    mask = np.zeros((len(rows), 60), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    got = rollout.judge(task, text, [EXAMPLE] * len(rows), tokens, mask, np.full(len(rows), ended))
    return list(
        zip(got.correct.tolist(), got.called.tolist(), got.formatted.tolist(), strict=True)
    ), got.texts


def test_verdicts_of_finished_responses(parts):
    got, texts = verdicts(parts, [RIGHT, WRONG, CALL, "3+3"])
    assert got == [
        (True, False, True),
        (False, False, True),
        (False, True, False),
        (False, False, False),
    ]
    assert texts[:3] == [RIGHT, WRONG, CALL]


def test_a_marker_in_plain_text_is_sampled_and_judged_as_one_token_is(parts, small):
    """The tiny model writes the marker's opening as one word, so both ways to say so come to the
    same.
    """
    config = small(text__decision_token="")
    text = text_lib.load(hf.locate(config.model.path), config.text)
    assert verdicts((parts[0], text), [RIGHT, WRONG, CALL]) == verdicts(parts, [RIGHT, WRONG, CALL])
    cfg = hf.config_from_hf(hf.read_config(hf.locate(config.model.path)))
    marker = rollout.make_sampler(cfg, text, config, group=4, temperature=1.0).settings.marker
    assert marker.decision_id is None and marker.plain == ((parts[1].decision_id,), (), ())


def test_a_call_after_the_answer_takes_it_back_where_the_config_lets_it(parts, small):
    late = RIGHT + "<unknown> I need external assistance </unknown>"
    assert verdicts(parts, [late])[0] == [(True, False, False)]
    config = small(text__decide_after_answer=True)
    text = text_lib.load(hf.locate(config.model.path), config.text)
    got, texts = verdicts((parts[0], text), [late, RIGHT, CALL])
    assert got == [(False, True, False), (True, False, True), (False, True, False)]
    assert texts[0] == late.replace("<answer>3+4+5</answer>", "") and texts[1:] == [RIGHT, CALL]


def test_a_response_that_was_cut_off_is_nothing(parts):
    got, _ = verdicts(parts, [RIGHT, WRONG, CALL], ended=False, change=lambda ids: ids[:-1])
    assert got == [(False, False, False)] * 3


def test_the_cloud_is_asked_where_its_verdict_matters(parts):
    """Asked once for each distinct prompt; a failed call is unknown, and not wrong."""
    task, _ = parts
    asked = []

    class Sometimes:
        def answer(self, prompts, names):
            asked.extend(prompts)
            reply = Reply("<answer>3+4+5</answer>", 1, 1, 0.0, 0.0)
            return Answers([reply, None], bought=1, failed=1)

    other = Example("y", "3 numbers", ((1, 2, 3), 6))
    (correct, known, _), answers = rollout.ask_cloud(task, Sometimes(), [EXAMPLE, other])
    assert (
        correct.tolist() == [True, False]
        and known.tolist() == [True, False]
        and (answers.bought, answers.failed) == (1, 1)
    )
    assert "3 4 5" in asked[0][-1]["content"] and "12" in asked[0][-1]["content"]
