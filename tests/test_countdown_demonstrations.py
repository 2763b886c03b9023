"""Countdown's demonstrations for the warm start: what they show, and what they do not."""

import functools
import hashlib
import re
from collections import Counter
from fractions import Fraction

import pytest
from streams import take, tiny_config, within

from collab_jax.models.text import word_tokenizer
from collab_jax.tasks import Example, make_task
from collab_jax.tasks.countdown import demonstrations, split_of
from collab_jax.tasks.expressions import is_solution

MARKER = tiny_config().text.marker
N = 3_000


@functools.cache
def demonstrated(seed=0, n=N, **changes):
    return take(n, demonstrations(seed, tiny_config(**changes).task, MARKER))


@functools.cache
def tokenizer():
    config = tiny_config()
    return word_tokenizer(config.sft.words, config.text.pad, config.text.eos[0], "<unk>")


def token_count(response):
    """Tokens of a response, EOS included; every piece of it is in the vocabulary."""
    ids = tokenizer().encode(response, add_special_tokens=False)
    assert tokenizer().unk_token_id not in ids and tokenizer().decode(ids) == response
    return len(ids) + 1


def thoughts(response):
    """The lines of the thinking part, without the tags, and what follows it."""
    found = re.fullmatch(f"<think>(.*?)(</think>.*|{re.escape(MARKER)})", response, re.DOTALL)
    return [line for line in found[1].split("\n") if line], found[2]


def value_of(line):
    """Where an attempt's steps end."""
    return int(line.rpartition("=")[2])


def eval_exact(after):
    """Value of the expression in `</think><answer>...</answer>`, found by `is_solution`."""
    expression = re.fullmatch(r"</think><answer>(.*)</answer>", after)[1]
    numbers = tuple(map(int, re.findall(r"\d+", expression)))
    return next(value for value in range(1, 10**6) if is_solution(numbers, value, expression))


def test_every_demonstration_is_what_its_last_result_says():
    task = make_task(tiny_config())
    verify = lambda example, response: task.verify([example], [response])[0]  # noqa: E731
    kinds = Counter()
    for example, response in demonstrated():
        called, (lines, _) = response.endswith(MARKER), thoughts(response)
        right = not called and value_of(lines[-1]) == example.problem[1]
        assert verify(example, response)[:3] == (right, called, not called), response
        kinds["call" if called else "right" if right else "wrong"] += 1
    assert kinds["right"] > kinds["call"] > 200 and kinds["wrong"] > 200


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_shares_of_give_ups_and_guesses(share):
    found = demonstrated(n=1_500, demo_give_up=share, demo_guess=0.0)
    assert within(sum(MARKER in response for _, response in found), 1_500, share)
    wrong = [value_of(thoughts(r)[0][-1]) != e.problem[1] for e, r in found if MARKER not in r]
    assert not any(wrong)
    found = demonstrated(n=1_500, demo_give_up=0.0, demo_guess=share)
    wrong = [value_of(thoughts(r)[0][-1]) != e.problem[1] for e, r in found]
    assert 0.7 * share <= sum(wrong) / 1_500 < share + 0.05  # some guesses hit


def test_give_ups_and_guesses_do_not_depend_on_the_problem():
    task = tiny_config().task
    for count in (3, 4):
        found = [(e, r) for e, r in demonstrated() if len(e.problem[0]) == count]
        assert within(sum(MARKER in r for _, r in found), len(found), task.demo_give_up)
        answers = [(e, r) for e, r in found if MARKER not in r]
        wrong = sum(value_of(thoughts(r)[0][-1]) != e.problem[1] for e, r in answers)
        assert 0.6 < wrong / len(answers) / task.demo_guess < 1.1


def test_a_call_follows_a_solution_too():
    # Of the solutions that come first, half call in this setting, in half of these before it: so
    # that of those that are written 1/2 / (1/2 + 1) are followed by the call.
    called = []
    for example, response in demonstrated(n=6_000, demo_give_up=0.5, demo_guess=0.0):
        lines, after = thoughts(response)
        if len(lines) == 1 and value_of(lines[0]) == example.problem[1]:
            called.append(after == MARKER)
    assert len(called) > 1_500 and within(sum(called), len(called), 1 / 3)


SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
}


def test_arithmetic_of_every_step():
    hits = Counter()
    for example, response in demonstrated():
        numbers, target = example.problem
        lines, after = thoughts(response)
        for line in lines:
            left = Counter(numbers)
            for step in line.split(","):
                a, sign, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
                assert SIGNS[sign](int(a), int(b)) == int(result) > 0, response
                left.subtract((int(a), int(b)))
                assert min(left.values()) >= 0, response  # only what is given or made
                left[int(result)] += 1
            assert left.total() == 1  # all of it
            hit = value_of(line) == target
            assert line is lines[-1] or not hit, response  # no attempt follows a solution
            hits[hit] += 1
        assert len(set(lines)) == len(lines) <= 3, response  # none is made twice
        assert after == MARKER or eval_exact(after) == value_of(lines[-1]), response
    assert min(hits.values()) > 500


def test_calls_and_answers_come_with_and_without_failures():
    kinds = Counter()
    for example, response in demonstrated():
        lines, after = thoughts(response)
        kinds[after == MARKER, sum(value_of(line) != example.problem[1] for line in lines)] += 1
    assert min(kinds[called, n] for called in (False, True) for n in (0, 1)) > 50
    assert min(kinds[True, 2], kinds[False, 2]) > 20
    # Room for a second attempt with four numbers, and for an answer after it.
    second = [r for e, r in demonstrated() if len(e.problem[0]) == 4 and len(thoughts(r)[0]) > 1]
    assert sum(MARKER not in response for response in second) > 300


def test_all_fit_the_token_limit():
    config = tiny_config()
    assert config.task.demo_length <= config.max_new_tokens
    lengths = [token_count(response) for _, response in demonstrated()]
    assert config.task.demo_length - 6 <= max(lengths) <= config.task.demo_length
    # With less room there are fewer failed attempts; what is still too long is only a solution.
    for _, response in demonstrated(n=500, demo_length=32):
        assert token_count(response) <= 32 or len(thoughts(response)[0]) == 1


def test_prompts_fit_the_token_limit():
    config = tiny_config()
    task = make_task(config)
    longest = Example("", "", ((50, 50, 50, 50), 99))
    for example in [longest, *(example for example, _ in demonstrated()[:300])]:
        ids = tokenizer().apply_chat_template(
            task.prompt(example), add_generation_prompt=True, return_dict=False
        )
        assert tokenizer().unk_token_id not in ids and len(ids) <= config.prompt_length


def test_demonstrations_are_of_the_train_side():
    assert {split_of(*example.problem) for example, _ in demonstrated()} == {"train"}


def test_demonstrations_are_fixed_by_the_seed():
    again = take(200, demonstrations(0, tiny_config().task, MARKER))
    assert again == demonstrated()[:200]
    others = {response for _, response in demonstrated(seed=1, n=200)}
    assert len({response for _, response in again} & others) < 20
    # the embedded model is made from this stream: a new stream needs a new model
    text = "\n".join(f"{example.problem}{response}" for example, response in again)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("e435f3967d30678582f4fb3e9605393c")
