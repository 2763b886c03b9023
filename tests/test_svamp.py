"""SVAMP: rows made of the authors' files, splits, demonstrations, verdicts."""

import itertools
import json
import re
import runpy
import zipfile
from collections import Counter

import pytest
from conftest import ROOT
from fakes import svamp_row, write_rows

from collab_jax.cloud import make_cloud
from collab_jax.rl import rollout
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import make_task, splits, svamp_source

DATA = ROOT.parent / "shared" / "data"
MARKER = "<unknown> I need external assistance </unknown>"


def config(folder, **changes):
    config = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    config.task.update(name="svamp", data_dir=str(folder), prompt="{problem}", **changes)
    return config


@pytest.fixture
def folder(tmp_path):
    """60 training rows of one to three steps, and three test rows."""
    write_rows(tmp_path / "svamp_train.jsonl", [svamp_row(i, 1 + i % 3) for i in range(60)])
    equations = {
        "8.0": "( 16.0 / 2.0 )",
        "146": "( 100.0 + ( 23.0 * 2.0 ) )",
        "-3": "( 2.0 - 5.0 )",
    }
    write_rows(
        tmp_path / "svamp_test.jsonl",
        [
            {"id": f"c{i}", "problem": f"Test {i}?", "answer": answer, "equation": equation}
            for i, (answer, equation) in enumerate(equations.items())
        ],
    )
    return tmp_path


# ---- the authors' files

TABLE = """Question,Numbers,Equation,Answer,group_nums
"Bryan 's number0 shelves hold number1 books each , he says . How many books ?",9.0 56.0,* number0 number1,504.0,[]
He has number0 dollars and spends number1 in each of number2 months . What is left ?,900.0 100.0 8.0,- number0 * number1 number2,100.0,[]
"Jane ’ s jar has number0 cups ; she adds number1 cups . How many ?",0.6666666666666666 0.08333333333333333,+ number0 number1,0.75,[]
A pack of number1 costs number0 dollars . How much is one ?,2.99 12.0,/ number0 number1,0.25,[]
Ann has number0 and number1 pens . How many ?,4.0 5.0,+ number0 number1,20.0,[]
Ann has number0 and number1 pens . How many ?,4.0 5.0,+ number0 number1,9.0,[]
ann has number0 and number1 pens . how many ?,4 5,+ number0 number1,9.0,[]
Bo 's number0 cats weigh number1 pounds each .,3.0 -8.9,* number0 number1,-26.7,[]
"""  # noqa: E501
ROWS = [
    (
        "mawps-asdiv/0",
        "Bryan's 9 shelves hold 56 books each, he says. How many books?",
        "504",
        "9*56=504",
    ),
    (
        "mawps-asdiv/1",
        "He has 900 dollars and spends 100 in each of 8 months. What is left?",
        "100",
        "100*8=800, 900-800=100",
    ),
    (
        "mawps-asdiv/2",
        "Jane's jar has 0.6666666666666666 cups; she adds 0.08333333333333333 cups. How many?",
        "0.75",
        "0.6666666666666666+0.08333333333333333=0.7500",
    ),
    (
        "mawps-asdiv/3",
        "A pack of 12 costs 2.99 dollars. How much is one?",
        "0.25",
        "2.99/12=0.2492",
    ),
    # 4 misses its answer, and so does not count as a row with the same text as 5; 6 does
    ("mawps-asdiv/5", "Ann has 4 and 5 pens. How many?", "9", "4+5=9"),
    ("mawps-asdiv/7", "Bo's 3 cats weigh -8.9 pounds each.", "-26.7", "3*-8.9=-26.7"),
]
CHALLENGES = [
    {
        "ID": "chal-1",
        "Body": "Each pack costs 76 dollars. If it is 25 dollars off ",
        "Question": "What is to pay?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction",
    },
    {
        "ID": "chal-2",
        "Body": "He ate 3 of 5 cakes.",
        "Question": "How many are left?",
        "Equation": "( 5.0 - 3.0 )",
        "Answer": 2.0,
        "Type": "Subtraction",
    },
]


def test_the_authors_files_become_rows(tmp_path):
    with zipfile.ZipFile(tmp_path / "repository.zip", "w") as archive:
        top = "SVAMP-689d"
        archive.writestr(f"{top}/data/mawps-asdiv-a_svamp/train.csv", TABLE)
        archive.writestr(f"{top}/data/mawps-asdiv-a_svamp_without_questions/train.csv", "no")
        archive.writestr(f"{top}/SVAMP.json", json.dumps(CHALLENGES))
    train = list(svamp_source.read(tmp_path / "repository.zip", "train"))
    fields = ("id", "problem", "answer", "solution")
    assert [tuple(row[field] for field in fields) for row in train] == ROWS
    assert [row["level"] for row in train] == [1, 2, 1, 1, 1, 1]
    first, second = svamp_source.read(tmp_path / "repository.zip", "test")
    assert first == {
        "id": "chal-1",
        "problem": "Each pack costs 76 dollars. If it is 25 dollars off. What is to pay?",
        "answer": "51",
        "equation": "( 76.0 - 25.0 )",
        "type": "Subtraction",
        "source": "SVAMP",
    }
    assert second["problem"] == "He ate 3 of 5 cakes. How many are left?"


# ---- splits and difficulty


def test_three_splits_share_no_problem_and_have_a_fixed_order(folder):
    task = make_task(config(folder))
    loaded = {split: task.load(split) for split in ("train", "validation", "test")}
    ids = {split: [e.id for e in examples] for split, examples in loaded.items()}
    assert sorted(ids["train"] + ids["validation"]) == sorted(f"t{i}" for i in range(60))
    assert len(ids["validation"]) == 2 and set(ids["test"]) == {"c0", "c1", "c2"}
    for split in ("train", "validation"):
        assert {splits.split_of(e.problem["problem"]) for e in loaded[split]} == {split}
    write_rows(folder / "svamp_train.jsonl", [svamp_row(i, 1 + i % 3) for i in reversed(range(60))])
    again = make_task(config(folder))
    assert {split: [e.id for e in again.load(split)] for split in ids} == ids
    assert ids["train"] != sorted(ids["train"], key=lambda key: int(key[1:]))


def test_more_steps_are_harder(folder):
    task = make_task(config(folder))
    examples = task.load("train") + task.load("validation")
    # 20 rows of each number of steps, and all else equal: (0 + 20) / 2 / 60 ...
    expected = {"1-step": 10 / 60, "2-step": 30 / 60, "3-step": 50 / 60}
    assert {e.stratum: e.difficulty for e in examples} == expected
    assert Counter(e.stratum for e in examples) == dict.fromkeys(expected, 20)
    found = {e.id: e.stratum for e in task.load("test")}
    assert found == {"c0": "1-step", "c1": "2-step", "c2": "1-step"}


def test_a_training_row_whose_last_step_is_not_the_answer_is_left_out(folder):
    train = [svamp_row(i, 1 + i % 3) for i in range(60)]
    long = dict(answer="9.555555555555557", solution="2+1=3, 172/18=9.5556")
    rounded = dict(answer="0.25", solution="2.99/12=0.2492")
    same = dict(answer="0.75", solution="0.5+0.25=0.7500")
    changes = {0: long, 1: rounded, 2: same}
    write_rows(
        folder / "svamp_train.jsonl", [row | changes.get(i, {}) for i, row in enumerate(train)]
    )
    task = make_task(config(folder))
    examples = task.load("train") + task.load("validation")
    assert {e.id for e in examples} == {f"t{i}" for i in range(2, 60)}
    # 58 are ranked: 20 of one step (t0 is out, t2 has one in the place of three), then 19 of two
    assert {e.stratum: e.difficulty for e in examples}["2-step"] == (20 + 19 / 2) / 58


def test_a_split_that_is_not_there_is_told(folder):
    write_rows(folder / "svamp_train.jsonl", [svamp_row(0)])
    with pytest.raises(
        UserError, match="none of the 1 usable rows of svamp_train is for validation"
    ):
        make_task(config(folder)).load("validation")
    write_rows(folder / "svamp_train.jsonl", [{"id": "x", "problem": "p", "answer": "1"}])
    with pytest.raises(UserError, match="svamp_train.jsonl, line 1 has no solution"):
        make_task(config(folder)).load("train")


# ---- demonstrations


def demonstrated(folder, n, seed=0, **changes):
    task = make_task(config(folder, **changes))
    return list(itertools.islice(task.demonstrations(seed), n))


def problems(found):
    """Without the drills."""
    return [(example, response) for example, response in found if example.stratum != "drill"]


def test_after_every_third_problem_comes_a_drill(folder):
    found = demonstrated(folder, 40, demo_give_up=0.0)
    drills = found[3::4]
    assert all(e.stratum == "drill" for e, _ in drills) and len(problems(found)) == 30
    task = make_task(config(folder))
    assert all(v.correct and v.formatted for v in task.verify(*zip(*drills, strict=True)))
    prompts = [task.prompt(e)[-1]["content"] for e, _ in drills]
    assert len({task.template(prompt) for prompt in prompts}) == 10  # in either half


def test_a_demonstration_shows_each_step(folder):
    train = make_task(config(folder)).load("train")
    found = problems(demonstrated(folder, 2 * len(train), demo_give_up=0.0))[: len(train)]
    assert sorted(e.id for e, _ in found) == sorted(e.id for e in train)  # an epoch; no validation
    assert {e.stratum: response for e, response in found} == {
        "1-step": "<think>2+1=3</think>\n<answer>3</answer>",
        "2-step": "<think>2+1=3\n3*2=6</think>\n<answer>6</answer>",
        "3-step": "<think>2+1=3\n3*2=6\n6-5=1</think>\n<answer>1</answer>",
    }
    verdicts = make_task(config(folder)).verify(*zip(*found, strict=True))
    assert all(v.correct and v.formatted and not v.called for v in verdicts)


def test_a_share_stops_anywhere_and_calls(folder):
    found = demonstrated(folder, 2_000, demo_give_up=0.3)
    calls = [(e, r) for e, r in found if MARKER in r]
    # 600 expected, standard deviation sqrt(2,000 x 0.3 x 0.7) = 20.5; four of them = 82
    assert 518 <= len(calls) <= 682
    assert all(v.called for v in make_task(config(folder)).verify(*zip(*calls, strict=True)))
    two = [(e, r) for e, r in calls if e.problem["solution"] == "2+1=3, 3*2=6"]
    of_two = Counter(r.removesuffix(MARKER) for e, r in two)
    stops = ["", "2+1=3\n", "2+1=3\n3*2=6\n", "2+1=3\n3*2=6</think>\n"]
    assert set(of_two) == {f"<think>{stop}" for stop in stops}
    assert min(of_two.values()) > 0.5 * sum(of_two.values()) / 4


def test_a_seed_fixes_demonstrations(folder):
    first = demonstrated(folder, 200, demo_give_up=0.5)
    assert demonstrated(folder, 200, demo_give_up=0.5) == first
    assert demonstrated(folder, 200, seed=1, demo_give_up=0.5) != first
    train = {e.id: e for e in make_task(config(folder)).load("train")}
    n = len(train)
    shown = problems(demonstrated(folder, 4 * n, demo_give_up=0.5))[: 3 * n]
    epochs = [[e.id for e, _ in shown[i : i + n]] for i in (0, n, 2 * n)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) == set(train)
    assert epochs[0] != epochs[1] != epochs[2]
    words = [(e.problem["problem"], train[e.id].problem["problem"]) for e, _ in shown]
    same_words = [sorted(re.findall(r"\w+", a)) == sorted(re.findall(r"\w+", b)) for a, b in words]
    assert all(same_words[:n]) and all(same_words[2 * n :])
    assert sum(same_words[n : 2 * n]) < 0.7 * n  # the others have other numbers
    turned = sum(a != b for a, b in [*words[:n], *words[2 * n :]])
    assert turned == 2 * len([i for i in range(n) if i % 3])  # all of them have two things
    verdicts = make_task(config(folder)).verify(*zip(*first, strict=True))
    assert all(v.correct or v.called for v in verdicts)


# ---- verdicts, the cloud


def test_numbers_are_compared_as_numbers(folder):
    task = make_task(config(folder))
    by_id = {e.id: e for e in task.load("test")}

    def right(key, said):
        return task.verify([by_id[key]], [f"<think>x</think><answer>{said}</answer>"])[0].correct

    assert right("c0", "8") and right("c0", "8.0") and right("c0", "$8.00") and right("c1", "146.0")
    assert right("c2", "-3") and not right("c2", "3") and not right("c0", "80")
    assert not right("c1", "14.6") and not right("c0", "")


def test_the_simulated_cloud_knows_every_split_and_how_hard_it_is(folder, tmp_path):
    settings = config(folder)
    settings.cloud.update(error_rate=0.0, error_skew=2.0)
    task = make_task(settings)
    examples = [e for split in ("train", "validation", "test") for e in task.load(split)]
    cloud = make_cloud(settings, task, tmp_path / "c.sqlite")
    correct, known, _ = rollout.ask_cloud(task, cloud, examples).verdicts
    assert correct.all() and known.all()
    assert [task.difficulty(task.cloud_prompt(e)) for e in examples] == [
        e.difficulty for e in examples
    ]


# ---- the real rows


def real():
    if not (DATA / "svamp_train.jsonl.gz").exists():
        pytest.skip(
            "svamp_train.jsonl.gz is not there: benchmark data is not part of the repository"
        )
    return config(DATA)


def test_real_rows_are_split_and_right():
    task = make_task(real())
    sizes = {split: len(task.load(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 2509, "validation": 257, "test": 1000}
    found = list(itertools.islice(task.demonstrations(0), 2 * 2509))
    verdicts = task.verify(*zip(*found, strict=True))
    assert all(v.correct or v.called for v in verdicts)
    shown = task.load("train") + task.load("validation")
    last = [(e, f"<answer>{e.problem['solution'].split('=')[-1]}</answer>") for e in shown]
    assert all(v.correct for v in task.verify(*zip(*last, strict=True)))
    words = {
        split: {tuple(re.findall("[a-z]+", e.problem["problem"].lower())) for e in task.load(split)}
        for split in sizes
    }
    assert not words["validation"] & (words["train"] | words["test"])
    assert len(words["train"] & words["test"]) == 1  # as the authors published them
    for split in sizes:
        mean = sum(e.difficulty for e in task.load(split)) / sizes[split]
        assert abs(mean - 0.5) < 0.04
