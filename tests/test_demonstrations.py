"""Demonstrations: files are read, or refused by line."""

import gzip
import itertools
import json

import pytest
from conftest import ROOT

from collab_jax.models import text as text_lib
from collab_jax.rl import demonstrations
from collab_jax.rl.demonstrations import Demonstration
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, make_task, splits

MARKER = "<unknown> I need external assistance </unknown>"
RIGHT = "<think>3+4=7,7+5=12</think><answer>3+4+5</answer>"
OTHER = "<think>4+5=9,9+3=12</think><answer>4+5+3</answer>"
WRONG = "<think>3*4=12,12+5=17\n</think><answer>3*4+5</answer>"
LONG = "<think>3*4=12,12+5=17\n3*5=15,15-4=11\n</think><answer>3*5-4</answer>"
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
    assert demonstrations.read(file, MARKER, nobody) == [
        Demonstration(USER, RIGHT),
        Demonstration(chat, OTHER),
    ]
    file = write(
        tmp_path / name, {"id": "train-7", "response": RIGHT}, {"id": "train-7", "response": OTHER}
    )
    asked = []
    prompts = lambda: asked.append(1) or {"train-7": USER}  # noqa: E731
    assert demonstrations.read(file, MARKER, prompts) == [
        Demonstration(USER, RIGHT),
        Demonstration(USER, OTHER),
    ]
    assert len(asked) == 1


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
        demonstrations.read(file, MARKER, lambda: {"train-7": USER})
    assert "\n" not in str(caught.value)


def test_a_row_of_the_kind_call_teaches_the_call_alone(tmp_path):
    rows = [{"prompt": "x", "response": f"a {MARKER}", "kind": kind} for kind in ("call", "answer")]
    read = demonstrations.read(write(tmp_path / "shown.jsonl", *rows), MARKER, nobody)
    assert [one.call_only for one in read] == [True, False]


def test_a_call_without_the_marker_is_refused(tmp_path):
    file = write(tmp_path / "shown.jsonl", {"prompt": "x", "response": RIGHT, "kind": "call"})
    with pytest.raises(UserError, match="line 1: kind is call, but the response does not end with"):
        demonstrations.read(file, MARKER, nobody)


def test_space_after_the_marker_is_no_part_of_a_call(parts):
    _, _, text = parts
    plain, spaced = (
        demonstrations.encode(
            Demonstration(USER, f"<think>3+4=7\n</think>{MARKER}{end}", True), text
        )
        for end in ("", "\n")
    )
    assert plain == spaced and plain.response.count(text.marker_ids[0]) == 1


def test_a_filter_that_nothing_passes_is_an_error_not_an_endless_search():
    given = demonstrations.Given(
        lambda: itertools.cycle([Demonstration(USER, RIGHT)]), [Demonstration(USER, RIGHT)], {}
    )
    kept = given.only(lambda one: "3+" in one.response, "is right")
    assert next(kept()) == Demonstration(USER, RIGHT)
    with pytest.raises(UserError, match="no demonstration of half 1: give more of them"):
        given.only(lambda one: False, "of half 1")


def test_what_stands_before_the_question_changes_no_half():
    with_system = [{"role": "system", "content": "Be brief."}, *USER]
    assert demonstrations.half_of(with_system, str) == demonstrations.half_of(USER, str)


def test_halves_are_about_equal_and_stay():
    prompts = [[{"role": "user", "content": str(i)}] for i in range(400)]
    halves = [demonstrations.half_of(prompt, str) for prompt in prompts]
    assert 160 < sum(halves) < 240 and set(halves) == {0, 1}
    assert halves == [demonstrations.half_of(json.loads(json.dumps(p)), str) for p in prompts]


def test_problems_of_one_template_are_in_one_half():
    prompts = [[{"role": "user", "content": f"Ann has {i} pens."}] for i in range(40)]
    assert len({demonstrations.half_of(prompt, splits.template) for prompt in prompts}) == 1


def test_files_that_are_not_there_or_cut_short(tmp_path):
    cut = write(tmp_path / "cut.jsonl.gz", {"prompt": "x", "response": "y" * 999})
    cut.write_bytes(cut.read_bytes()[:-9])
    for path in (tmp_path / "none.jsonl", cut):
        with pytest.raises(UserError, match=f"cannot read the demonstrations .*{path.name}"):
            demonstrations.read(path, MARKER, nobody)


def test_what_is_too_long_is_counted_and_left_out(parts, capsys):
    config, _, text = parts
    call = f"<think>3*4=12,12+5=17\n{MARKER}"
    long_prompt = [{"role": "user", "content": "1 2 3 4 5 6 7 8 9=12"}]
    found = [
        Demonstration(prompt, response)
        for prompt, response in (
            (USER, RIGHT),
            (USER, call),
            (USER, "12"),
            (long_prompt, RIGHT),
            (USER, LONG * 3),
        )
    ]
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
