"""Validation problems and orders by hash: fixed, fair, and blind to numbers."""

import json
import random
import string

import pytest

from collab_jax import evaluate, records
from collab_jax.tasks import rows, splits


def problems(n):
    """n problems with a template each."""
    draw = random.Random(7)
    words = ["".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(n)]
    return [f"{words[i]} has {i} pens and {i / 4} cents." for i in range(n)]


def test_a_template_is_the_words_alone():
    assert splits.template("Ann has 12,000 pens,  Bo 3.5. Who has 8?") == (
        "ann has pens bo who has"
    )
    assert splits.template("A 8th and an mp3, \u00bd a_b") == "a th and an mp a b"
    assert splits.template("Jos\u00e9 hat 3 \u00c4pfel; \u5c0f\u660e\u67095\u4e2a") == (
        "jos\u00e9 hat \u00e4pfel \u5c0f\u660e\u6709 \u4e2a"
    )


def test_problems_that_differ_in_numbers_punctuation_or_case_are_on_one_side():
    for name in "abcdefghijklmnopqrstuvwxyz":
        texts = [f"{name} buys {a} pens for $ {b:,}.5. Left?" for a, b in ((1, 2), (7, 90_000))]
        texts += [f"{name.upper()} buys 1 pens, for $2.5; left"]
        assert len({splits.split_of(text) for text in texts}) == 1


def test_a_tenth_of_the_templates_is_for_validation_and_that_never_changes():
    sides = [splits.split_of(text) for text in problems(4_000)]
    assert set(sides) == {"train", "validation"}
    # 400 expected, standard deviation sqrt(4,000 x 0.1 x 0.9) = 19; four of them = 76
    assert 324 <= sides.count("validation") <= 476
    names = [a + b for a in "BCDGHLMNPT" for b in ("an", "en", "in", "on", "un")]
    held_out = [n for n in names if splits.split_of(f"{n} has 3 pens.") == "validation"]
    assert held_out == ["Ban", "Cin", "Mun", "Nan", "Nen", "Pun", "Tan"]


def test_the_order_is_that_of_no_file():
    texts = problems(1_000)
    other = random.Random(0).sample(texts, 1_000)
    order = splits.shuffled(texts, str)
    assert order == splits.shuffled(other, str) != texts and sorted(order) == sorted(texts)
    # The mean place in the file of the first 100: 499.5 expected, standard deviation 27.4.
    first = [texts.index(text) for text in order[:100]]
    assert 390 < sum(first) / 100 < 610


def test_problems_of_one_text_stay_in_order():
    pairs = [("same", 2), ("same", 1), ("same", 3)]
    assert splits.shuffled(pairs, lambda pair: pair[0]) == pairs


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([5], [1 / 2]),
        ([30, 10, 20, 40], [5 / 8, 1 / 8, 3 / 8, 7 / 8]),
        ([(1, 2), (1, 2), (0, 9), (2, 0)], [1 / 2, 1 / 2, 1 / 8, 7 / 8]),
        ([], []),
    ],
)
def test_ranks_by_hand(keys, expected):
    assert rows.ranks(keys) == expected


@pytest.mark.slow
def test_an_evaluation_on_validation_reads_no_test_prompt(small, tmp_path):
    lines = [{"id": f"v{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = small(task__name="jsonl", task__data_dir=str(tmp_path), task__prompt="{problem}=")
    assert evaluate.main(config, tmp_path / "run") == 0  # test.jsonl is not there
    table = records.read(tmp_path / "run" / "validation.parquet")
    assert sorted(table["id"]) == ["v0", "v1", "v2", "v3", "v4"]  # fewer than config.eval.prompts
    figures = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert (figures["split"], figures["n"]) == ("validation", 5)
    assert set(table["split"]) == {"validation"}
    assert not list((tmp_path / "run").glob("test.*"))
