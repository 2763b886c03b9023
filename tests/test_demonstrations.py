"""Demonstrations: files are read, or refused by line; the model's own are right and repeatable."""

import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from conftest import ROOT

from collab_jax import sft
from collab_jax.models import text as text_lib
from collab_jax.models.sampler import Samples
from collab_jax.rl import demonstrations, warm_start
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, make_task

MARKER = "<unknown> I need external assistance </unknown>"
RIGHT = "<think>3+4=7,7+5=12 ok</think><answer>3+4+5</answer>"
OTHER = "<think>4+5=9,9+3=12 ok</think><answer>4+5+3</answer>"
WRONG = "<think>3*4=12,12+5=17 no\n</think><answer>3*4+5</answer>"
LONG = "<think>3*4=12,12+5=17 no\n3*5=15,15-4=11 no\n</think><answer>3*5-4</answer>"
EXAMPLE = Example("x", "3 numbers", ((3, 4, 5), 12))
USER = [{"role": "user", "content": "3 4 5=12"}]


@pytest.fixture(scope="module")
def parts(small):
    """(config, task, text) of the embedded model."""
    config = small(prompts_per_step=2, group=3)
    return (
        config,
        make_task(config),
        text_lib.load(ROOT / "collab_jax" / "assets" / "countdown-tiny", config.text),
    )


def write(path, *rows):
    """A file of rows, which are objects or lines as they are."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def nobody():
    raise AssertionError("no row needs the training examples")


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["shown.jsonl", "shown.jsonl.gz"])
def test_rows_of_each_kind(tmp_path, name):
    chat = [{"role": "system", "content": "Be brief."}, *USER]
    file = write(
        tmp_path / name,
        {"prompt": "3 4 5=12", "response": RIGHT, "note": 1},
        "",
        {"messages": chat, "response": OTHER},
    )
    assert demonstrations.read(file, nobody) == [(USER, RIGHT), (chat, OTHER)]
    file = write(
        tmp_path / name, {"id": "train-7", "response": RIGHT}, {"id": "train-7", "response": OTHER}
    )
    asked = []
    prompts = lambda: asked.append(1) or {"train-7": USER}  # noqa: E731
    assert demonstrations.read(file, prompts) == [(USER, RIGHT), (USER, OTHER)] and len(asked) == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"prompt": "x", ', "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ({"prompt": "x"}, "line 2: no response"),
        ({"prompt": "x", "response": " "}, "line 2: no response"),
        ({"prompt": "x", "response": 5}, "line 2: no response"),
        ({"response": "y"}, "line 2: no messages, prompt or id"),
        ({"prompt": "", "response": "y"}, "line 2: messages must be .* a prompt a text"),
        ({"messages": "x", "response": "y"}, "line 2: messages must be a list"),
        ({"messages": [{"role": "user"}], "response": "y"}, "line 2: messages must be a list"),
        ({"id": "train-9", "response": "y"}, "line 2: no training example has the id 'train-9'"),
        ({"id": ["a"], "response": "y"}, r"line 2: no training example has the id \['a'\]"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, says):
    file = write(tmp_path / "shown.jsonl", {"id": "train-7", "response": RIGHT}, row)
    with pytest.raises(UserError, match=f"shown.jsonl, {says}") as caught:
        demonstrations.read(file, lambda: {"train-7": USER})
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_cut_short(tmp_path):
    cut = write(tmp_path / "cut.jsonl.gz", {"prompt": "x", "response": "y" * 999})
    cut.write_bytes(cut.read_bytes()[:-9])
    for path in (tmp_path / "none.jsonl", cut):
        with pytest.raises(UserError, match=f"cannot read the demonstrations .*{path.name}"):
            demonstrations.read(path, nobody)


def test_what_is_too_long_is_counted_and_left_out(parts, capsys):
    config, _, text = parts
    call = f"<think>3*4=12,12+5=17 no\n{MARKER}"
    long_prompt = [{"role": "user", "content": "1 2 3 4 5 6 7 8 9=12"}]
    found = [(USER, RIGHT), (USER, call), (USER, "12"), (long_prompt, RIGHT), (USER, LONG * 2)]
    assert demonstrations.drop_too_long(found, text, config) == found[:3]
    told, left_out = capsys.readouterr().out.splitlines()
    assert told == "3 demonstrations: 1 answer, 1 call, 1 do neither in the format"
    assert (
        "left out: 1 of 5" in left_out
        and "prompt_length=16" in left_out
        and "1 for responses" in left_out
    )
    with pytest.raises(UserError, match="none of 1 demonstrations fits"):
        demonstrations.drop_too_long(found[3:4], text, config)


def test_each_epoch_has_all_of_them_in_an_order_of_its_own():
    drawn = list(itertools.islice(demonstrations.endless(range(7), seed=3), 21))
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert (
        all(sorted(epoch) == list(range(7)) for epoch in epochs)
        and len(set(map(tuple, epochs))) == 3
    )
    assert drawn == list(itertools.islice(demonstrations.endless(range(7), seed=3), 21))
    assert drawn != list(itertools.islice(demonstrations.endless(range(7), seed=4), 21))


# --------------------------------------------------------------------------------------- the format

BOXED = "We add.\nSo the answer is $\\boxed{12}$."


@pytest.mark.parametrize(
    ("response", "opening", "whole"),
    [
        (RIGHT, "<think>3+4=7,7+5=12 ok</think>", RIGHT),
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
    assert demonstrations.well_formed(response) == whole
    assert demonstrations.until_answer(response) == opening
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
        [["3+4=7\n"], "1 ok", LONG, WRONG],
        [["4+5=9\n"]] * 4,
        [RIGHT.replace("answer>", "think>")] * 4,
    ]
    samples = samples_of(text, groups)
    judged = demonstrations.judge_batch(text, task, [EXAMPLE] * 4, samples, keep=5)
    assert [row.right for row in judged] == [[RIGHT, OTHER], [], [], []]
    assert judged[0].failed is None
    assert judged[1].failed == LONG[: LONG.index("<answer>")]  # the first that answers
    # None answers: the first that ended.
    assert judged[3].failed == f"<think>{RIGHT[7:22]}3+4+5</think>\n"
    # Half of what was cut off, in full lines.
    assert judged[2].failed is not None
    lines = judged[2].failed.removeprefix("<think>").removesuffix("</think>\n").split("\n")
    assert lines == ["4+5=9"] * len(lines) and 2 <= len(lines) <= 5
    few = demonstrations.judge_batch(text, task, [EXAMPLE], samples_of(text, groups[:1]), keep=1)
    assert few[0].right == [RIGHT]


def test_calls_have_at_most_their_share(parts):
    def judged(i, *right):
        failed = None if right else f"<think>{i}</think>\n"
        return demonstrations.JudgedPrompt(f"train-{i}", list(right), failed)

    def choose(share, seed=0):
        return demonstrations.choose_demonstrations(prompts, share, MARKER, seed)

    def calls(rows):
        return [row["id"] for row in rows if row["kind"] == "call"]

    prompts = [judged(i, RIGHT, OTHER) if i % 2 else judged(i) for i in range(8)]
    rows = choose(0.2)
    assert len(calls(rows)) == 2 and len(rows) == 10
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    for row in rows:
        if row["kind"] == "call":
            assert row["response"] == f"<think>{row['id'][6:]}</think>\n{MARKER}"
    assert rows == choose(0.2)
    assert len({tuple(calls(choose(0.2, seed))) for seed in range(9)}) > 1
    assert len(choose(0.0)) == 8 and len(choose(0.9)) == 12
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


def test_sampling_goes_on_where_it_was_and_starts_anew_for_other_settings(parts, small, tmp_path):
    config, task, text = parts
    examples = [Example(f"train-{i}", "3 numbers", ((3, 4, 5), 12)) for i in range(7)]

    def own(name, scripted, config=config):
        (tmp_path / name).mkdir(exist_ok=True)
        return demonstrations.write_own_demonstrations(
            scripted, None, text, task, examples, config, tmp_path / name
        ).read_text()

    straight = own("straight", Scripted(text))
    rows = [json.loads(line) for line in straight.splitlines()]
    assert (
        sum(r["kind"] == "answer" for r in rows) == 8
        and sum(r["kind"] == "call" for r in rows) == 2
    )
    with pytest.raises(KeyboardInterrupt):
        own("killed", Scripted(text, dies=2))
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write('{"id": "train-4", "ri')  # a kill in the middle of a line
    again = Scripted(text)
    assert own("killed", again) == straight and again.steps == [2, 3]
    samples = tmp_path / "killed" / "samples.jsonl"
    cut = samples.read_text().splitlines()[:5]
    samples.write_text(
        "\n".join(cut)[:-3]
    )  # the head and two batches of two, cut short in the last line
    again = Scripted(text)
    assert own("killed", again) == straight and again.steps == [1, 2, 3]
    del examples[4:]  # fewer prompts than were sampled
    own("killed", Scripted(text))
    rows = [json.loads(line) for line in samples.read_text().splitlines()[1:]]
    assert [row["id"] for row in rows] == [e.id for e in examples]
    other = Scripted(text)
    assert own(
        "killed", other, small(prompts_per_step=2, group=3, temperature=0.9)
    ) and other.steps == [0, 1]


# -------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_own_samples_warm_the_model_up_and_their_file_does_the_same(small, tmp_path, capsys):
    own = small(sft__source="self", sft__prompts=24, sft__check_prompts=12, sft__marker_share=0.3)
    assert sft.run(own, tmp_path / "own") == 0
    out = capsys.readouterr().out
    assert (
        "of 24 training prompts solved, each in 4 responses" in out
        and "48 responses to 12 training prompts" in out
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "own" / "demonstrations.jsonl").read_text().splitlines()
    ]
    task = make_task(own)
    examples = {e.id: e for e in task.load("train")[:24]}
    verdicts = task.verify([examples[r["id"]] for r in rows], [r["response"] for r in rows])
    assert [v.called for v in verdicts] == [r["kind"] == "call" for r in rows]
    assert all(
        v.correct and v.formatted
        for v, r in zip(verdicts, rows, strict=True)
        if r["kind"] == "answer"
    )
    calls = sum(r["kind"] == "call" for r in rows)
    assert 0 < calls <= 0.3 * len(rows) and not {r["id"] for r in rows if r["kind"] == "call"} & {
        r["id"] for r in rows if r["kind"] == "answer"
    }
    figures = json.loads((tmp_path / "own" / "sft.json").read_text())
    assert figures["prompts"] == 12 and figures["responses"] == 48 and figures["steps"] == 2
    assert (
        0 < figures["local_accuracy"] < 1
        and figures["formatted"] > 0.5
        and figures["margin"] <= figures["best_margin"]
    )

    file = small(
        sft__source="file", sft__demonstrations=str(tmp_path / "own" / "demonstrations.jsonl")
    )
    assert sft.run(file, tmp_path / "file") == 0
    assert "left out" not in out + capsys.readouterr().out
    assert json.loads((tmp_path / "file" / "sft.json").read_text()) == {"steps": 2}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("own", "file")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"sft__source": "web"}, "config.sft.source='web': use one of"),
        ({"sft__source": "file"}, "source=file names a file"),
        ({"sft__demonstrations": "x.jsonl"}, "source=file names a file"),
        ({"sft__steps": 0}, "config.sft.steps must be at least 1"),
        (
            {"prompts_per_step": 3},
            "prompts_per_step=3 must be a positive multiple of the 2 devices",
        ),
        ({"sft__keep": 0}, "config.sft.keep must be at least 1"),
        ({"sft__marker_share": 1.0}, "config.sft.marker_share=1.0"),
        ({"sft__prompts": -1}, "config.sft.prompts must be at least 0"),
        (
            {"task__name": "gsm8k", "task__prompt": "{problem}"},
            "makes no demonstrations: set config.sft.source to self",
        ),
    ],
)
def test_bad_settings(small, tmp_path, overrides, says):
    with pytest.raises(UserError, match=says):
        sft.run(small(**overrides), tmp_path)


def test_workdir_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*: choose another --workdir"):
        sft.run(small(), tmp_path / "file" / "start")


def test_what_would_keep_training_from_learning_is_told():
    fine = {"called": 0.1, "formatted": 0.8, "local_accuracy": 0.3}
    assert warm_start.warnings(fine) == []
    assert "no response calls" in warm_start.warnings(fine | {"called": 0})[0]
    assert "most responses neither" in warm_start.warnings(fine | {"formatted": 0.2})[0]
    assert "no response is right" in warm_start.warnings(fine | {"local_accuracy": 0})[0]
