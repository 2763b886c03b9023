"""Mixes by weight, a task of one's own from JSON lines, a reward of one's own, a judge."""

import dataclasses
import itertools
import operator
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from fakes import answered, svamp_row, task_config, write_rows

from collab_jax.cloud import CachedCloud, Failure, Reply, SimulatedCloud, Store, make_cloud
from collab_jax.rl import prompt_order
from collab_jax.rl.rollout import ask_cloud
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Verdict, judge, make_task, mix, with_task

MARKER = "<unknown> I need external assistance </unknown>"
RIGHT, WRONG = Verdict(True, False, True), Verdict(False, False, True)
CALLED, UNJUDGED = Verdict(False, True, False), Verdict(False, False, True, unjudged=True)


@pytest.fixture
def folder(tmp_path):
    """Training and test rows of two maths tasks, sums and products, and rows of one's own."""
    for name, count, sign, operate in (
        ("math", 6, "+", operator.add),
        ("gsm8k", 3, "*", operator.mul),
    ):
        for split in ("train", "test"):
            rows = [
                {
                    "id": f"{split}{i}",
                    "problem": f"{i}{sign}{i}, {split}",
                    "answer": str(operate(i, i)),
                    "level": 1,
                }
                for i in range(count)
            ]
            write_rows(tmp_path / f"{name}_{split}.jsonl", rows)
    town = {"id": "a", "problem": "A capital?", "answer": "New  Delhi", "type": "towns"}
    write_rows(tmp_path / "test.jsonl", [town, {"id": "b", "problem": "A poem!"}])
    return tmp_path


# ---- mixes


def test_a_pattern_meets_the_weights_and_spreads_them_evenly():
    assert mix.pattern([3, 1])[:8].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    deal = mix.pattern([1, 1, 1])
    assert np.bincount(deal).tolist() == [334, 333, 333]
    assert np.bincount(mix.pattern([0.999, 0.001])).tolist() == [999, 1]
    for start in range(0, 996, 4):
        assert np.bincount(mix.pattern([3, 1])[start : start + 4]).tolist() == [3, 1]


def test_training_prompts_follow_the_weights_and_go_through_each_task_in_its_own_epochs():
    pools = [np.arange(12), np.arange(12, 16)]
    steps = [
        mix.indices(3, np.arange(8 * i, 8 * i + 8), pools, [3, 1], prompt_order.shuffled_epochs)
        for i in range(300)
    ]
    assert all((step < 12).sum() == 6 for step in steps)
    flat = np.concatenate(steps)
    for pool in pools:
        mine = flat[np.isin(flat, pool)]
        epochs = [mine[i : i + len(pool)].tolist() for i in range(0, len(mine), len(pool))]
        assert (
            all(sorted(epoch) == pool.tolist() for epoch in epochs)
            and len(set(map(tuple, epochs))) > 3
        )
    whole = mix.indices(3, np.arange(2400), pools, [3, 1], prompt_order.shuffled_epochs)
    assert np.array_equal(whole, flat)  # a function of seed and place alone, hence of (seed, step)
    one = mix.indices(3, np.arange(50), pools[:1], [1], prompt_order.shuffled_epochs)
    assert np.array_equal(
        one, prompt_order.prompt_indices(3, 0, 50, 12)
    )  # a mix of one task is that task


def test_a_mix_is_a_task_whose_examples_know_theirs(folder):
    settings = task_config(folder, "mix", mix=(("math", 2), ("gsm8k", 1)))
    task = make_task(settings)
    examples, held = task.load("train"), task.load("test")
    assert task.name == "mix" and task.weights == {
        "math": pytest.approx(2 / 3),
        "gsm8k": pytest.approx(1 / 3),
    }
    assert (
        Counter(e.task for e in examples) == {"math": 6, "gsm8k": 3}
        and len({e.id for e in examples}) == 9
    )
    assert {(e.id, e.stratum) for e in held if e.task == "gsm8k"} >= {
        ("gsm8k/test0", "gsm8k, level 1")
    }
    assert Counter(e.task for e in held[:3]) == {
        "math": 2,
        "gsm8k": 1,
    }  # the beginning is a mix too
    assert [pool.size for pool in mix.pools(task, examples)] == [6, 3]
    with pytest.raises(UserError, match="no training prompt of 'gsm8k' is left"):
        mix.pools(task, [e for e in examples if e.task == "math"])
    sum3 = next(e for e in held if e.id == "math/test3")
    product3 = next(e for e in held if e.id == "gsm8k/test2")
    assert task.prompt(sum3)[0]["content"] == "3+3, test" and task.gold(product3) == "4"
    settings.task.system = "Be brief."
    told = make_task(settings).prompt(product3)
    assert [message["role"] for message in told] == ["system", "user"]  # once, for all parts
    verdicts = task.verify(
        [sum3, product3, sum3, product3], [answered("6"), answered("4"), MARKER, answered("6")]
    )
    assert verdicts == [RIGHT, RIGHT, CALLED, WRONG]


def test_a_mix_verifies_one_batch_for_each_task(folder):
    calls = []

    def part(name):
        def verify(examples, responses):
            calls.append((name, list(responses)))
            return [RIGHT] * len(examples)

        task = make_task(task_config(folder, name))
        return dataclasses.replace(task, verify=verify, solve_prompt=None)

    task = mix.make_task({n: part(n) for n in ("math", "gsm8k")}, {"math": 0.5, "gsm8k": 0.5})
    examples = [Example("x", "", None, n) for n in ("math", "gsm8k", "math")]
    assert task.verify(examples, ["1", "2", "3"]) == [RIGHT] * 3
    assert calls == [("math", ["1", "3"]), ("gsm8k", ["2"])]
    assert task.solve_prompt is None  # these parts have no solver


def test_demonstrations_of_a_mix_are_dealt_out_by_weight_each_from_its_own_stream(tmp_path):
    write_rows(tmp_path / "svamp_train.jsonl", [svamp_row(i) for i in range(60)])
    parts = {"countdown": 2, "svamp": 1}
    settings = task_config(tmp_path, "mix", mix=tuple(parts.items()), prompt="Solve: {problem}")
    task = make_task(settings)
    shown = list(itertools.islice(task.demonstrations(3), 30))
    assert [e.task for e, _ in shown[:6]] == ["countdown", "svamp", "countdown"] * 2
    for name in parts:
        alone = make_task(with_task(settings, name)).demonstrations(3)
        of_part = [(e.problem, response) for e, response in shown if e.task == name]
        first = itertools.islice(alone, len(of_part))
        assert of_part == [(e.problem, response) for e, response in first]
    asked = [task.prompt(e)[0]["content"] for e, _ in shown]  # drills of SVAMP's too
    assert all(prompt.startswith("Solve: ") for prompt in asked)
    # Countdown's problem is what the embedded model is asked.
    numbers, target = shown[0][0].problem
    assert asked[0] == f"Solve: {' '.join(map(str, numbers))}={target}"
    # Problems that are alike but for numbers stay alike in a mix, in any order of its parts.
    for turned in (parts, dict(reversed(parts.items()))):
        same = make_task(task_config(tmp_path, "mix", mix=tuple(turned.items()))).template
        assert same("Ann has 3 pens.") == same("Ann has 40 pens.") != same("Ann has 3 caps.")
        assert same("1 2 3=6") != same("1 2 4=7")


def test_a_mix_with_a_task_without_demonstrations_has_none(folder):
    settings = task_config(folder, "mix", mix=(("math", 1), ("countdown", 1)))
    assert make_task(settings).demonstrations is None


def test_the_simulated_cloud_answers_a_mix_from_its_gold_answers(folder, tmp_path):
    settings = task_config(folder, "mix", mix=(("math", 1), ("gsm8k", 1)))
    task = make_task(settings)
    examples = task.load("train") + task.load("test")
    cloud = make_cloud(settings, task, tmp_path / "c.sqlite")
    correct, known, _ = ask_cloud(task, cloud, examples).verdicts
    assert correct.all() and known.all()
    settings.cloud.error_rate = 1.0  # wrong everywhere, where the answer is 0 too
    cloud = make_cloud(settings, task, tmp_path / "c.sqlite")
    correct, known, _ = ask_cloud(task, cloud, examples).verdicts
    assert not correct.any() and known.all()
    with pytest.raises(UserError, match="not a prompt of math or gsm8k"):
        task.solve_prompt([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mix": ()}, "must be .task, weight. pairs"),
        ({"mix": (("math", 0), ("gsm8k", 1))}, "must be .task, weight. pairs"),
        ({"mix": (("math", "much"),)}, "must be .task, weight. pairs"),
        ({"mix": (("math", 1), ("math", 2))}, "must be .task, weight. pairs"),
        ({"mix": ("math", "gsm8k")}, "must be .task, weight. pairs"),
        ({"mix": (("math", 2000), ("gsm8k", 1))}, "at least a 1000th"),
        ({"mix": (("math", 1), ("chess", 1))}, "config.task.mix='chess' is unknown"),
        ({"name": "math", "mix": (("math", 1),)}, "needs config.task.name=mix"),
        ({"name": "math", "judge": "m", "reward": __file__ + ":answered"}, "set one of them"),
    ],
)
def test_bad_mixes_are_refused(folder, changes, says):
    with pytest.raises(UserError, match=says):
        make_task(task_config(folder, **{"name": "mix"} | changes))


# ---- rows of one's own


def test_the_template_task(folder):
    with pytest.raises(UserError, match=r"test.jsonl, line 2 has no answer"):
        make_task(task_config(folder, "jsonl")).load("test")
    with pytest.raises(UserError, match=r"no train.jsonl or train.jsonl.gz"):
        make_task(task_config(folder, "jsonl")).load("train")
    task = make_task(task_config(folder, "jsonl", judge="a-model"))
    town, poem = task.load("test")
    assert (town.task, town.stratum, task.gold(poem)) == ("jsonl", "towns", None)
    assert task.prompt(town)[0]["content"] == "A capital?"
    responses = [
        answered("new delhi"),
        answered("\nNew\u00a0\r\n DELHI\n"),
        answered("Delhi"),
        MARKER,
    ]
    assert task.verify([town] * 4, responses) == [RIGHT, RIGHT, WRONG, CALLED]
    verdicts = task.verify([poem, poem], [answered("Roses"), MARKER])
    assert verdicts == [UNJUDGED, CALLED]  # there is no answer, so nobody knows
    lines = (ROOT / "collab_jax" / "tasks" / "jsonl.py").read_text().splitlines()
    assert len(lines) < 65


REWARD = """
def long(example, response):
    return len(response) / 100

def picky(example, response):
    if example.id == "b":
        return None
    return example.problem["answer"].split()[0] in response

def broken(example, response):
    return example.problem["points"] > 0

def odd(example, response):
    return "yes"
"""


def test_a_reward_of_ones_own(folder, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    of = lambda name: make_task(task_config(folder, "jsonl", reward=f"{tmp_path}/mine.py:{name}"))  # noqa: E731
    town, poem = of("picky").load("test")  # without answers too
    responses = [answered("New!"), answered("x"), answered("New"), MARKER]
    verdicts = of("picky").verify([town, town, poem, poem], responses)
    assert verdicts == [RIGHT, WRONG, UNJUDGED, CALLED]
    verdicts = of("long").verify([town, town], ["x" * 50, "x" * 49])
    nothing = Verdict(False, False, False)
    assert verdicts == [nothing._replace(correct=True, grade=0.5), nothing._replace(grade=0.49)]
    with pytest.raises(
        UserError,
        match=r"mine.py:broken: example 'a', line 11: KeyError: 'points': mend the function",
    ):
        of("broken").verify([town], [answered("x")])
    with pytest.raises(UserError, match=r"mine.py:odd: example 'a' got 'yes': return a bool"):
        of("odd").verify([town], [answered("x")])
    with pytest.raises(UserError, match=r"must be path/to/file.py:function"):
        make_task(task_config(folder, "jsonl", reward="nowhere.py:f"))
    with pytest.raises(UserError, match=r"mine.py has no function 'none'"):
        of("none")
    (tmp_path / "worse.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UserError, match=r"worse.py does not load, line 2: invalid syntax"):
        make_task(task_config(folder, "jsonl", reward=f"{tmp_path}/worse.py:f"))


# ---- a judge


class Fake:
    """A cloud that judges: yes to "good", no to "bad", no reply to "down", a speech to the rest."""

    model, provider, parameters, batch, workers = "fake", "", {}, 100, 1

    def __init__(self):
        self.asked = []

    def highest_usd(self, messages):
        return 0.0

    def answer(self, prompts):
        self.asked += [prompt[0]["content"] for prompt in prompts]
        said = lambda p: "Yes." if "good" in p else "no" if "bad" in p else "I think that yes"  # noqa: E731
        return [
            Failure("down")
            if "down" in p[0]["content"]
            else Reply(said(p[0]["content"]), 1, 1, 0.0, 0.0)
            for p in prompts
        ]


def test_a_model_as_judge(folder, tmp_path):
    task, fake = make_task(task_config(folder, "jsonl", judge="fake")), Fake()
    verify = judge.verify_by(task, CachedCloud(fake, Store(tmp_path / "c.sqlite")), MARKER)
    town, poem = task.load("test")
    responses = [answered(a) for a in ("good", "bad", "down", "so so", "good")]
    responses += [MARKER, "<think> good", answered(" "), answered("good" * 9999)]
    verdicts = verify([town, town, town, poem, poem, town, town, town, town], responses)
    nothing = Verdict(False, False, False)
    assert verdicts == [RIGHT, WRONG, UNJUDGED, UNJUDGED, RIGHT, CALLED, nothing, WRONG, WRONG]
    assert (
        len(fake.asked) == 5
        and "<reference>New  Delhi</reference>" in fake.asked[0]
        and "A capital?" in fake.asked[0]
    )
    assert "<reference>" not in fake.asked[3]
    verify([town, town], responses[:2])
    assert len(fake.asked) == 5  # stored like any other answer


def test_a_judge_by_config_and_a_cloud_answer_that_it_cannot_judge(folder, tmp_path):
    settings = task_config(folder, "jsonl", judge="simulated-judge")
    settings.cloud.error_rate = 0.0
    task, store = make_task(settings), Store(tmp_path / "c.sqlite")
    judged = judge.judged(settings, task, store.path)
    town, poem = task.load("test")
    responses = [answered("NEW DELHI"), answered("Delhi"), answered("x")]
    assert judged.verify([town, town, poem], responses) == [RIGHT, WRONG, UNJUDGED]
    assert {row[0] for row in store.query("SELECT DISTINCT model FROM answers")} == {
        "simulated-judge"
    }
    poet = SimulatedCloud("poet", lambda messages: answered("roses"), 0.0, 0.0, 0.0, 0.0)
    (correct, known, _), answers = ask_cloud(judged, CachedCloud(poet, store), [town, poem])
    assert not correct.any() and known.tolist() == [True, False] and answers.failed == 0
