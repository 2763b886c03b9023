"""The model's own responses: brought into the format, judged, chosen from, sampled only once."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import ROOT

from collab_jax.models import text as text_lib
from collab_jax.models.sampler import Samples
from collab_jax.rl import own_samples
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Verdict, make_task

MARKER = "<unknown> I need external assistance </unknown>"
RIGHT = "<think>3+4=7,7+5=12</think><answer>3+4+5</answer>"
OTHER = "<think>4+5=9,9+3=12</think><answer>4+5+3</answer>"
WRONG = "<think>3*4=12,12+5=17\n</think><answer>3*4+5</answer>"
LONG = "<think>3*4=12,12+5=17\n3*5=15,15-4=11\n</think><answer>3*5-4</answer>"
EXAMPLE = Example("x", "3 numbers", ((3, 4, 5), 12))


@pytest.fixture(scope="module")
def parts(small):
    """(config, task, text) of the embedded model."""
    config = small(prompts_per_step=2, group=3)
    return (
        config,
        make_task(config),
        text_lib.load(ROOT / "collab_jax" / "assets" / "countdown-tiny", config.text),
    )


# --------------------------------------------------------------------------------------- the format

BOXED = "We add.\nSo the answer is $\\boxed{12}$."


@pytest.mark.parametrize(
    ("response", "opening", "whole"),
    [
        (RIGHT, "<think>3+4=7,7+5=12</think>", RIGHT),
        (
            "<think> a </think>\n\n<answer> 5 </answer>\n",
            "<think> a </think>\n\n",
            "<think> a </think>\n\n<answer> 5 </answer>\n",
        ),
        (
            BOXED,
            "<think>We add.\nSo the answer is</think>\n",
            "<think>We add.\nSo the answer is</think>\n<answer>12</answer>",
        ),
        (
            "It is \\[ \\boxed{\\frac{1}{2}} \\]",
            "<think>It is</think>\n",
            "<think>It is</think>\n<answer>\\frac{1}{2}</answer>",
        ),
        (
            "We add.\n<answer>12</answer> Done.",
            "<think>We add.</think>\n",
            "<think>We add.</think>\n<answer>12</answer>",
        ),
        (
            "<think>a <think>b</think> <answer>1</answer><answer>2</answer>",
            "<think>a b 1</think>\n",
            "<think>a b 1</think>\n<answer>2</answer>",
        ),
        ("\\boxed{3}", "<think></think>\n", "<think></think>\n<answer>3</answer>"),
        ("it is 12", "<think>it is 12</think>\n", None),
        ("<think>a</think><answer>5", "<think>a</think>\n", None),
        ("<think>a</think><answer></answer> \\boxed{}", "<think>a</think>\n", None),
        ("", "<think></think>\n", None),
    ],
)
def test_a_response_is_brought_into_the_format(response, opening, whole):
    assert own_samples.well_formed(response) == whole
    assert own_samples.until_answer(response) == opening
    assert whole is None or whole.startswith(
        opening
    )  # so a call and an answer part at the token that decides


def samples_of(text, groups, T=56):
    """Samples [P, G, T] of texts; one in a list of its own was cut off."""
    P, G = len(groups), len(groups[0])
    tokens, mask, ended = (
        np.zeros((P, G, T), np.int32),
        np.zeros((P, G, T), bool),
        np.ones((P, G), bool),
    )
    for p, g in np.ndindex(P, G):
        response = groups[p][g]
        ended[p, g] = isinstance(response, str)
        ids = (
            text.response_ids(response)[:T]
            if ended[p, g]
            else (text.response_ids(response[0])[:-1] * T)[:T]
        )
        tokens[p, g, : len(ids)], mask[p, g, : len(ids)] = ids, True
    zeros = np.zeros((P, G, T), np.float32)
    return Samples(tokens=tokens, logp=zeros, mask=mask, ended=ended, margins=zeros)


def test_right_responses_are_kept_once_each_and_a_failure_to_where_it_would_answer(parts):
    _, task, text = parts
    groups = [
        [RIGHT, WRONG, RIGHT, OTHER],
        [["3+4=7\n"], "1", LONG, WRONG],
        [["4+5=9\n"]] * 4,
        [RIGHT.replace("answer>", "think>")] * 4,
    ]
    samples = samples_of(text, groups)
    judged = own_samples.judge_batch(text, task, [EXAMPLE] * 4, samples, keep=5)
    assert [row.right for row in judged] == [[RIGHT, OTHER], [], [], []]
    assert judged[0].failed == [WRONG[: WRONG.index("<answer>")]]
    # Each once, in order; of what was cut off half, in full lines.
    cut, short, long, wrong = judged[1].failed
    lines = cut.removeprefix("<think>").removesuffix("</think>\n").split("\n")
    assert lines == ["3+4=7"] * len(lines) and 2 <= len(lines) <= 5
    assert short == "<think>1</think>\n"
    assert long == LONG[: LONG.index("<answer>")] and wrong == WRONG[: WRONG.index("<answer>")]
    assert len(judged[2].failed) == 1
    # None has an answer.
    assert judged[3].failed == [f"<think>{RIGHT[7:19]}3+4+5</think>\n"]
    few = own_samples.judge_batch(text, task, [EXAMPLE], samples_of(text, groups[:1]), keep=1)
    assert few[0].right == [RIGHT]


def test_what_nobody_could_judge_is_left_out(parts):
    _, task, text = parts
    unknown = dataclasses.replace(
        task, verify=lambda examples, _: [Verdict(False, False, True, True)] * len(examples)
    )
    samples = samples_of(text, [[RIGHT, WRONG]])
    judged = own_samples.judge_batch(text, unknown, [EXAMPLE], samples, keep=5)
    assert judged == [own_samples.JudgedPrompt("x", [], [])]


def test_calls_have_at_most_their_share_and_come_anywhere(parts):
    text = parts[2]

    def judged(i, *right):
        failed = [f"<think>{i} {n}</think>\n" for n in range(2)]
        return own_samples.JudgedPrompt(f"train-{i}", list(right), failed)

    def choose(share, seed=0):
        return own_samples.choose(prompts, share, text, seed)

    def calls(rows):
        return [row for row in rows if row["kind"] == "call"]

    prompts = [judged(i, RIGHT, OTHER) if i % 2 else judged(i) for i in range(8)]
    rows = choose(0.2)
    assert len(calls(rows)) == 2 and len(rows) == 10
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    lengths = []
    for place, row in enumerate(calls(choose(0.9))):
        i, n = divmod(place, 2)
        tokens = ["<think>", str(i), " ", str(n), "</think>", "\n"]
        begun = row["response"].removesuffix(MARKER)
        lengths.append(next(t for t in range(7) if "".join(tokens[:t]) == begun))
    assert len(set(lengths)) > 4
    assert rows == choose(0.2)
    assert len({str(calls(choose(0.2, seed))) for seed in range(9)}) > 1
    assert len(choose(0.0)) == 8 and len(choose(0.9)) == 8 + 16
    prompts = [judged(0)]
    with pytest.raises(UserError, match="no response to any of 1 training prompts was right"):
        choose(0.2)


# ---------------------------------------------------------- sampling, with a stand-in for the model


class Scripted:
    """Answers the batches by their step, G = 3: even examples right. Dies in batch `dies`."""

    def __init__(self, text, dies=None):
        self.text, self.dies, self.steps = text, dies, []

    def __call__(self, params, prompts, prompt_mask, seed, step, bias, finished=None):
        assert np.isneginf(bias).all() and (seed == 0).all() and prompts.shape[:2] == (2, 1)
        self.steps.append(int(step[0]))
        if self.dies == self.steps[-1]:
            raise KeyboardInterrupt
        samples = samples_of(self.text, [[RIGHT, WRONG, OTHER], [WRONG, LONG, WRONG]])
        return jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), samples)


def test_sampling_goes_on_where_it_was(parts, tmp_path):
    config, task, text = parts
    examples = [Example(f"train-{i}", "3 numbers", ((3, 4, 5), 12)) for i in range(7)]

    def own(name, scripted):
        file = tmp_path / f"{name}.jsonl"
        respondent = own_samples.Respondent(scripted, text, task, config)
        return own_samples.sample_and_judge(respondent, None, examples, file)

    straight = own("straight", Scripted(text))
    assert [row.id for row in straight] == [example.id for example in examples]
    assert [len(row.right) for row in straight] == [2, 0, 2, 0, 2, 0, 2]
    assert [len(row.failed) for row in straight] == [1, 2, 1, 2, 1, 2, 1]
    with pytest.raises(KeyboardInterrupt):
        own("killed", Scripted(text, dies=2))
    done = Scripted(text)
    assert own("straight", done) == straight and done.steps == []  # the last, short batch as well
    samples = tmp_path / "killed.jsonl"
    with samples.open("a") as file:
        file.write('{"id": "train-4", "ri')  # a kill in the middle of a line
    again = Scripted(text)
    assert own("killed", again) == straight and again.steps == [2, 3]
    cut = samples.read_text().splitlines()[:4]
    samples.write_text("\n".join(cut)[:-3])  # two batches of two, cut short in the last line
    again = Scripted(text)
    assert own("killed", again) == straight and again.steps == [1, 2, 3]
