"""Chains: steps by hand, disjoint splits, answers judged as digits, a cloud that errs by length."""

import itertools
from collections import Counter

import pytest
from streams import take, tiny_config, within

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import chain, make_task
from collab_jax.tasks.base import SPLITS


def config(**changes):
    sizes = {"train_examples": 300, "test_examples": 60, "prompt": "{problem}", "name": "chain"}
    return tiny_config(**sizes | {"numbers": (2, 99), "steps": (1, 4)} | changes)


def test_steps_by_hand():
    assert chain.steps("47+38*6-129") == ["47+38=85", "85*6=510", "510-129=381"]
    assert chain.steps("5-9*9+4") == ["5-9=996", "996*9=964", "964+4=968"]  # modulo 1,000
    assert chain.answer("99*99") == "801"


def test_problems_are_of_their_split_in_whatever_order_and_none_is_in_two():
    task = make_task(config())
    of = {split: [e.problem for e in task.load(split)] for split in SPLITS}
    assert {split: len(set(problems)) for split, problems in of.items()} == {
        "train": 300,
        "validation": 60,
        "test": 60,
    }
    assert all(not set(a) & set(b) for a, b in itertools.combinations(of.values(), 2))
    assert [e.problem for e in make_task(config()).load("test")] == of["test"]
    assert [e.problem for e in make_task(config(data_seed=1)).load("test")] != of["test"]
    # A larger split begins with the smaller.
    assert [e.problem for e in make_task(config(test_examples=90)).load("test")][:60] == of["test"]


def test_no_more_problems_are_drawn_than_a_split_needs(monkeypatch):
    drawn = []

    def generate(*_):
        for i in itertools.count():
            drawn.append(i)
            yield f"1+{i // 2}"  # each twice

    monkeypatch.setattr(chain, "generate", generate)
    assert len(chain.load("train", config(train_examples=10).task)) == 10
    assert len(drawn) == 19


def test_lengths_are_equally_likely_and_difficulties_spread_evenly():
    problems = take(2_000, chain.generate("train", 0, config().task))
    lengths = Counter(len(chain.steps(problem)) for problem in problems)
    assert set(lengths) == {1, 2, 3, 4}
    assert all(within(count, 2_000, 1 / 4) for count in lengths.values())
    assert all(chain.answer(problem) != "0" for problem in problems)
    examples = make_task(config()).load("train")
    found = {(e.stratum, e.difficulty) for e in examples}
    assert found == {("1-step", 1 / 8), ("2-step", 3 / 8), ("3-step", 5 / 8), ("4-step", 7 / 8)}


def test_demonstrations_are_right_and_well_formed_and_of_no_evaluated_problem():
    task = make_task(config(demo_give_up=0.0))
    shown = take(200, task.demonstrations(0))
    assert shown == take(200, task.demonstrations(0)) != take(200, task.demonstrations(1))
    for example, response in shown:
        verdict = task.verify([example], [response])[0]
        assert verdict.correct and verdict.formatted and not verdict.called, response
    problems = {example.problem for example, _ in shown}
    held_out = {e.problem for split in ("validation", "test") for e in task.load(split)}
    assert not problems & held_out


def test_calls_among_the_demonstrations_come_anywhere_and_whatever_the_problem():
    task = make_task(config(demo_give_up=0.4))
    called, early, within_a_line = [], [], 0
    for example, response in take(2_000, task.demonstrations(0)):
        verdict = task.verify([example], [response])[0]
        assert verdict.called != verdict.correct
        if verdict.called:
            thought = response.removeprefix("<think>").removesuffix(config().text.marker)
            worked = "".join(f"{line}\n" for line in chain.steps(example.problem))
            assert worked.startswith(thought)
            early.append(2 * len(thought) < len(worked))
            within_a_line += thought != "" and not thought.endswith("\n")
        called.append(verdict.called)
    assert within(sum(called), len(called), 0.4)
    assert abs(sum(early) / len(early) - 1 / 2) < 0.1 and within_a_line > len(early) / 2


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("381", True),
        (" 0381\n", True),
        ("38", False),
        ("381.0", False),
        ("-381", False),
        ("3 81", False),
        ("", False),
        ("\u0663\u0668\u0661", False),
        ("9" * 5000, False),
    ],
)
def test_an_answer_is_digits(answer, right):
    task = make_task(config())
    example = chain._example("x", "47+38*6-129", config().task)
    verdict = task.verify([example], [f"<think>x</think><answer>{answer}</answer>"])[0]
    assert verdict.correct is right


def test_the_exact_solver_answers_the_cloud_prompt():
    task = make_task(config())
    for example in task.load("validation")[:5]:
        reply = task.solve_prompt(task.cloud_prompt(example))
        assert task.verify([example], [reply])[0].correct
        assert task.difficulty(task.cloud_prompt(example)) == example.difficulty


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": (0, 3)}, "steps=.* 1 <= lowest <= highest"),
        ({"steps": (3, 2)}, "steps=.* 1 <= lowest <= highest"),
        ({"numbers": (1.5, 2)}, "numbers=.* two integers"),
        ({"test_examples": 0}, "at least 1"),
        ({"prompt": "{numbers}"}, "needs {problem}"),
    ],
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        make_task(config(**changes))


def test_more_problems_than_there_are():
    with pytest.raises(UserError, match="different train problems of 300: widen"):
        make_task(config(numbers=(2, 3), steps=(1, 2))).load("train")
