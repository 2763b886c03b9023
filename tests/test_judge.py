"""Open questions: rubrics, and grades through the whole chain."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import F, T, answered, make_table, task_config, write_rows

from collab_jax import gapg, records, train
from collab_jax.cloud import CachedCloud, Failure, Reply, Store
from collab_jax.reports import run as run_report
from collab_jax.reports import summary
from collab_jax.rl import algorithms
from collab_jax.rl.missing_verdicts import MissingVerdicts, MissingVerdictsFile
from collab_jax.routing import curves, measures
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Verdict, judge, make_task, rubric

RUBRIC = """
scale = [1, 5]

[criteria]
correct = "It says nothing that the reference contradicts."
brief = "It is one sentence."
"""
MARKER = "<unknown> I need external assistance </unknown>"
CALLED = Verdict(False, True, False)


@pytest.fixture
def folder(tmp_path):
    """Two test rows, one without an answer, and a rubric with a scale from 1 to 5."""
    town = {"id": "a", "problem": "A capital?", "answer": "Delhi"}
    write_rows(tmp_path / "test.jsonl", [town, {"id": "b", "problem": "A poem!"}])
    (tmp_path / "rubric.toml").write_text(RUBRIC)
    return tmp_path


class Fake:
    """A cloud that judges with `say(content)`; None is a failed call."""

    model, provider, parameters, batch, workers = "fake", "", {}, 100, 1

    def __init__(self, say):
        self.say, self.asked = say, []

    def highest_usd(self, messages):
        return 0.0

    def answer(self, prompts):
        contents = [prompt[0]["content"] for prompt in prompts]
        self.asked += contents
        said = [self.say(content) for content in contents]
        return [Failure("down") if s is None else Reply(s, 1, 1, 0.0, 0.0) for s in said]


def verifier(folder, way, say, right_from=0.5):
    """(examples, verify, the fake cloud) of a judge that says `say(content)`."""
    task = make_task(task_config(folder, "jsonl", judge="fake"))
    fake = Fake(say)
    cloud = CachedCloud(fake, Store(folder / "c.sqlite"))
    return task.load("test"), judge.verify_by(task, cloud, MARKER, way, right_from), fake


# ---- rubrics


def test_a_rubric_is_read_and_asked(folder):
    found = rubric.load(str(folder / "rubric.toml"))
    assert found.scale == (1.0, 5.0) and list(found.criteria) == ["correct", "brief"]
    [[message]] = judge.scored(found).ask("A capital?", "Delhi", "It is Delhi.")
    for part in ("A capital?", "<reference>Delhi</reference>", "- brief: It is one sentence."):
        assert part in message["content"]
    assert "from 1 (lowest) to 5 (highest)" in message["content"]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("correct: 5\nbrief: 1", 0.5),  # (1 + 0) / 2
        ("correct: 4\nbrief: 2", 0.5),  # (3/4 + 1/4) / 2
        ("- **Correct**: 5/5\n- **Brief**: 5/5\n", 1.0),
        ("Correct = 2.\nbrief = 1.", 0.125),
        ("correct: 5", None),
        ("correct: 5\nbrief: 6", None),
        ("correct: 5\nbrief: -1", None),
        ("correct: 5\nbrief: 1\nbrief: 5", None),
        ("correct: 5\nbrief: one", None),
        ("It is correct: I give it 5, and it is brief: 4.", None),
        ("", None),
    ],
)
def test_scores_are_read_by_hand(folder, reply, grade):
    found = rubric.load(str(folder / "rubric.toml"))
    assert rubric.read_scores(found, reply) == grade


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scale = [1, 5]", r"needs \[criteria\]"),
        ("scale = [1, 5]\n[criteria]\nfine = 3", r"needs \[criteria\]"),
        ("scale = [1, 5]\ncriteria = 'x'", r"needs \[criteria\]"),
        ("scale = [5, 1]\n[criteria]\nfine = 'x'", r"scale=\[5, 1\] must be \[lowest, highest\]"),
        ("scale = 5\n[criteria]\nfine = 'x'", "scale=5 must be"),
        ("scale = ['a', 'b']\n[criteria]\nfine = 'x'", "must be .lowest, highest."),
        ("weights = 1\n[criteria]\nfine = 'x'", "nothing else"),
        ("scale = [1, 5]\ncompare = true\n[criteria]\nfine = 'x'", "scale or compare = true"),
        ("not a rubric", "cannot be read as TOML"),
        (None, "cannot be read as TOML"),
    ],
)
def test_what_is_no_rubric_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=says):
        rubric.load(str(tmp_path / "r.toml"))


def test_a_rubric_without_a_scale_is_told_and_grades_by_met_or_not(tmp_path, caplog):
    (tmp_path / "r.toml").write_text("[criteria]\nkind = 'It is kind.'\ntrue = 'It is true.'")
    with caplog.at_level(logging.WARNING):
        found = rubric.load(str(tmp_path / "r.toml"))
    assert "r.toml has no scale: each criterion counts as met (1) or not met (0)" in caplog.text
    assert rubric.read_scores(found, "kind: 1\ntrue: 0") == 0.5


def test_settings_that_do_not_go_together_are_refused(folder):
    with pytest.raises(UserError, match="name config.task.judge too"):
        make_task(task_config(folder, "jsonl", rubric=str(folder / "rubric.toml")))
    for bad in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="right_from=.* must lie in"):
            make_task(task_config(folder, "jsonl", right_from=bad))
    (folder / "c.toml").write_text("compare = true\n[criteria]\nbetter = 'It says more.'")
    settings = task_config(folder, "jsonl", judge="m", rubric=str(folder / "c.toml"))
    with pytest.raises(UserError, match="compares answers, which .*simulated.* cannot"):
        judge.judged(settings, make_task(settings), folder / "c.sqlite")


# ---- a judge that grades


def test_a_judge_grades_by_a_rubric_and_prose_is_no_verdict(folder, caplog):
    way = judge.scored(rubric.load(str(folder / "rubric.toml")))

    def say(content):
        for word, reply in (
            ("best", "correct: 5\nbrief: 5"),
            ("fair", "correct: 3\nbrief: 2"),  # (1/2 + 1/4) / 2
            ("talk", "I think that it is quite good, really."),
        ):
            if f"<answer>{word}" in content:
                return reply
        return None

    (town, poem), verify, fake = verifier(folder, way, say, right_from=0.4)
    responses = [answered(x) for x in ("best", "fair", "talk", "lost", "talk 2")]
    with caplog.at_level(logging.WARNING):
        verdicts = verify([town, poem, town, poem, town, town], [*responses, MARKER])
    assert [v.grade for v in verdicts] == [1.0, 0.375, None, None, None, None]
    assert [v.correct for v in verdicts] == [True, False, False, False, False, False]
    assert [v.unjudged for v in verdicts] == [False, False, True, True, True, False]
    assert [v.value for v in verdicts] == [1.0, 0.375, 0, 0, 0, 0] and verdicts[5] == CALLED
    told = [r for r in caplog.records if "no verdict" in r.getMessage()]
    assert len(told) == 1 and "I think that it is" in told[0].getMessage()  # once
    verify([town], responses[:1])
    assert len(fake.asked) == 5  # verdicts are kept in the store


def test_a_comparison_is_made_in_both_orders(folder):
    way = judge.compared(rubric.Rubric({"better": "It says more."}, None))
    better = lambda content: (  # noqa: E731
        "First." if content.index("good") < content.index("Delhi") else "second"
    )
    replies = {
        "good": better,
        "poor": lambda c: "second" if c.index("poor") < c.index("Delhi") else "first",
        "even": lambda c: "**equal**",
        "near": lambda c: "equal" if c.index("near") < c.index("Delhi") else "second",
        "bias": lambda c: "first",  # whatever stands there
        "prose": lambda c: "first" if c.index("prose") < c.index("Delhi") else "Well, the second",
    }
    say = lambda content: next(f(content) for word, f in replies.items() if word in content)  # noqa: E731
    (town, poem), verify, fake = verifier(folder, way, say)
    verdicts = verify([town] * 6 + [poem], [answered(word) for word in [*replies, "good"]])
    assert [v.grade for v in verdicts] == [1.0, 0.0, 0.5, 0.75, 0.5, None, None]
    assert [v.unjudged for v in verdicts] == [False] * 5 + [True, True]  # the poem has no reference
    assert len(fake.asked) == 12  # and so nobody was asked on it


def test_the_simulated_cloud_grades_by_the_reference(folder):
    settings = task_config(folder, "jsonl", judge="sim", rubric=str(folder / "rubric.toml"))
    task = judge.judged(settings, make_task(settings), folder / "c.sqlite")
    town, poem = task.load("test")
    verdicts = task.verify([town, town, poem], [answered(x) for x in ("delhi", "Rome", "roses")])
    assert task.graded and [v.grade for v in verdicts] == [1.0, 0.0, None]
    assert [v.unjudged for v in verdicts] == [False, False, True]


# ---- grades in the method


def test_booleans_earn_bit_for_bit_what_the_table_says():
    """Every combination of verdicts, under weights whose sums are rounded."""
    bits = jnp.array(np.indices((2, 2, 2)).reshape(3, -1).astype(bool))
    compiled = jax.jit(gapg.reward)
    for alphas in np.random.default_rng(0).uniform(0, 3, (20, 3)).astype(np.float32):
        a, c, f = alphas
        for cloud in (T, F):
            state = gapg.init_reward(a, c, f)
            correct, called, formatted = (x[None] for x in bits)
            r, counted = compiled(state, correct, called, formatted, jnp.array([cloud]))
            expected = [
                (c if cloud else 0) if y else (a + f if z else a) if x else (f if z else 0)
                for x, y, z in np.array(bits.T)
            ]
            assert np.array_equal(np.asarray(r[0]), np.array(expected, np.float32))
            ones = correct.astype(jnp.float32), jnp.array([cloud], jnp.float32)
            graded, same = gapg.reward(state, correct, called, formatted, jnp.array([cloud]), *ones)
            assert np.array_equal(r, graded) and np.array_equal(counted.counts, same.counts)


def test_grades_earn_their_part_by_hand():
    state = gapg.init_reward(2.0, 0.5, 0.2)
    correct, called = jnp.array([[T, F, F, F]]), jnp.array([[F, F, F, T]])
    formatted, grade = jnp.array([[T, T, F, F]]), jnp.array([[0.75, 0.25, 0.25, 0.0]])
    asked = (state, correct, called, formatted, jnp.array([T]), grade, jnp.array([0.6]))
    r, state = gapg.reward(*asked)
    np.testing.assert_allclose(r, [[1.7, 0.7, 0.5, 0.3]], rtol=1e-6)
    assert state.counts.tolist() == [1, 0, 1, 1, 1]  # by right or wrong
    r, _ = algorithms.task_reward(*asked)
    np.testing.assert_allclose(r, [[1.7, 0.7, 0.5, 0.0]], rtol=1e-6)


GRADES = """
def grade(example, response):
    if "unjudged" in response:
        return None
    return (len(response) % 11) / 10
"""


@pytest.mark.slow
def test_a_graded_run_ends_in_a_report_of_means(small, tmp_path):
    (tmp_path / "mine.py").write_text(GRADES)
    settings = {"train__steps": 1, "task__reward": f"{tmp_path}/mine.py:grade"}
    assert train.main(small(**settings, task__right_from=0.7), tmp_path / "run") == 0
    table = records.read(tmp_path / "run" / "after.parquet")
    for side in ("local", "cloud"):
        grade, right = table[f"{side}_grade"], table[f"{side}_correct"]
        assert np.array_equal(grade >= 0.7 - 1e-6, right) or side == "cloud"
        assert ((grade >= 0) & (grade <= 1)).all()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    after = report["after"]
    assert after["local_accuracy"]["value"] == pytest.approx(table["local_grade"].mean())
    assert after["right"]["local"]["value"] == table["local_correct"].mean()
    assert (table["lenient_grade"] >= table["local_grade"]).all()
    assert after["lenient_accuracy"]["value"] == pytest.approx(table["lenient_grade"].mean())
    steps = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= step["local_grade"] <= 1 for step in steps)
    assert any(step["local_grade"] != step["local_accuracy"] for step in steps)
    assert "counted as right" in (tmp_path / "run" / "report.md").read_text()


def test_verdicts_of_runs_before_grades_are_read(tmp_path):
    old = {"id": "p", "index": 1, "correct": False, "called": False, "formatted": True}
    line = {"step": 2, "prompts": [], "responses": [old | {"timed_out": True, "unjudged": False}]}
    (tmp_path / "missing_verdicts.jsonl").write_text(json.dumps(line) + "\n")
    late = Verdict(False, False, True, timed_out=True)
    assert MissingVerdictsFile(tmp_path).at(2) == MissingVerdicts(frozenset(), {("p", 1): late})


# ---- grades in figures


def graded(**columns):
    grades = {"local_grade": [1.0, 0.2, 0.4, 0.8, 0.0], "cloud_grade": [1.0, 0.9, 0.1, 0.3, 0.7]}
    return make_table(**(grades | {"natural_grade": [1.0, 0.2, 0.4, 0.8, 0.0]} | columns))


def test_a_mean_has_students_interval():
    got = measures.rate(np.array([0.0, 0.5, 1.0]))  # s = 0.5; t(0.975, 2) = 4.3027
    assert got["value"] == 0.5
    assert got["high"] == pytest.approx(0.5 + 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    assert got["low"] == pytest.approx(0.5 - 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    assert measures.rate(np.array([0.5])) == {"value": 0.5, "low": None, "high": None}


def test_accuracies_of_graded_answers_are_means_by_hand():
    table = graded()
    s = summary.summary(table)
    assert s["local_accuracy"]["value"] == pytest.approx(2.4 / 5)
    assert s["cloud_accuracy"]["value"] == pytest.approx(3.0 / 5)
    assert s["right"]["local"]["value"] == 0.4 and s["right"]["cloud"]["value"] == 0.6
    # Prompts 0 and 1 called: 1.0 + 0.9 of the cloud, 0.4 + 0.8 + 0.0 of the device.
    assert s["natural"]["overall_accuracy"]["value"] == pytest.approx(3.1 / 5)
    # At 20 % margin sends prompt 4, which has no answer: 0.7 in the place of 0.0.
    assert s["at_budget"]["0.2"]["margin"]["value"] == pytest.approx(3.1 / 5)
    assert s["at_budget"]["0.2"]["perfect"]["value"] == pytest.approx(3.1 / 5)
    lines = run_report.markdown_table({"before": s, "after": s})
    assert lines.count("counted as right") == 2
    assert summary.summary(make_table())["right"] is None


def test_replay_and_frontier_agree_on_grades():
    table, score = graded(), np.array([0.3, 0.9, 0.1, 0.5, 0.7])
    f = curves.frontiers({"x": [(table, score)]}, [0.4], resamples=10)
    assert f.at("x", 0.4)[0] == pytest.approx(measures.replay(table, score, 0.4).mean())
    # Prompts 1 and 4 go: 0.9 + 0.7 of the cloud, and 1.0 + 0.4 + 0.8 of the device.
    assert f.at("x", 0.4)[0] == pytest.approx(3.8 / 5)


def test_a_reward_that_grades(folder, tmp_path):
    (tmp_path / "mine.py").write_text(GRADES)
    task = make_task(
        task_config(folder, "jsonl", reward=f"{tmp_path}/mine.py:grade", right_from=0.9)
    )
    example = Example("x", "", {})
    verdicts = task.verify([example] * 4, ["x" * 10, "x" * 8, "unjudged", MARKER])
    assert [v.grade for v in verdicts] == [1.0, 0.8, None, None]
    assert [v.correct for v in verdicts] == [True, False, False, False]
    assert task.graded and verdicts[2].unjudged and verdicts[3] == CALLED
