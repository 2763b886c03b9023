"""How a response is read: called, correct and formatted; bad task settings are refused."""

import random
import runpy
import time
from collections import Counter
from pathlib import Path

import pytest

from collab_jax.models.text import TAGS
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import TASKS, Example, Task, TaskError, Verdict, base, make_task

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "common.py"
MARKER = "<unknown> I need external assistance </unknown>"
EXAMPLE = Example("", "", ((1, 2, 3), 6))


def config(**changes):
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.task.update(changes)
    return config


def one(task):
    """The task's verify, of a single response."""
    return lambda example, response: task.verify([example], [response])[0]


VERIFY = one(make_task(config()))

SOLVED = Verdict(correct=True, called=False, formatted=True)
BROKEN = Verdict(correct=True, called=False, formatted=False)
CALLED = Verdict(correct=False, called=True, formatted=False)
FAILED = Verdict(correct=False, called=False, formatted=True)
NOTHING = Verdict(correct=False, called=False, formatted=False)

GOOD = "<think>1+2=3,3+3=6</think><answer>1+2+3</answer>"


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        "<think></think><answer>1+2+3</answer>",
        "\n<think>\nlong\n\nthought\n</think>\n\n<answer> (1 + 2) + 3 </answer>\n",
        f"<think>I could say {MARKER} here</think><answer>1*2*3</answer>",  # quoted in the middle
        f"<think>{MARKER}</think><answer>1+2+3</answer>",
        "<think>so</think>\n<answer>\n1+2+3\n</answer>\n",  # as real models write
        "<think>so</think>\r\n<answer>\r\n\t1 +\r\n\t2 + 3\r\n</answer>\r\n",
        "<think>so</think><answer>\u00a01+2+3\u2003</answer>",
        "<think> </unknown> <unknown> </think><answer>1+2+3</answer>",  # pieces of it are nothing
        "<think>1 < 2 > 0, <b>so</b></think><answer>1+2+3</answer>",
    ],
)
def test_correct_and_well_formed(response):
    assert VERIFY(EXAMPLE, response) == SOLVED


@pytest.mark.parametrize(
    "response",
    [
        "<answer>1+2+3</answer>",  # no thought
        "<think>so<answer>1+2+3</answer>",  # </think> missing
        "so</think><answer>1+2+3</answer>",  # <think> missing
        "<answer>1+2+3</answer><think>so</think>",  # the wrong way round
        "<think>so<answer>1+2+3</answer></think>",
        "</think><think><answer>1+2+3</answer>",
        "<think>a</think><think>b</think><answer>1+2+3</answer>",  # doubled
        "<think><think>so</think></think><answer>1+2+3</answer>",  # nested
        "<think>so</think></think><answer>1+2+3</answer>",
        "<think>so</think><answer><answer>1+2+3</answer>",
        "<think>so</think><answer>1+2+3</answer></answer>",
        "<think>so</think><answer>1+2+3</answer> or not </answer>",
        "<think>so</think><answer>9</answer><answer>1+2+3</answer>",  # the last answer counts
        "<think>maybe <answer>9</answer></think><answer>1+2+3</answer>",
        "<think>so</think><answer>1+2+3</answer><answer>9",  # if it is closed
        "Well: <think>so</think><answer>1+2+3</answer>",  # text outside
        "<think>so</think> hence <answer>1+2+3</answer>",
        "<think>so</think><answer>1+2+3</answer>.",
        "<think>so</think><answer>1+2+3</answer><eos>",
        f"<think>so</think><answer>1+2+3</answer>{MARKER}",  # the answer came first
        f"<think>so</think><answer>1+2+3</answer>\n{MARKER}\n",
        f"{MARKER}<think>so</think><answer>1+2+3</answer>",
        "<THINK>so</THINK><answer>1+2+3</answer>",
    ],
)
def test_correct_in_a_broken_format(response):
    assert VERIFY(EXAMPLE, response) == BROKEN


@pytest.mark.parametrize(
    "response",
    [
        MARKER,  # at once
        f"<think>{MARKER}",  # early exit
        f"<think>1+2=3,3*3=9\n{MARKER}",
        f"<think>hard</think>{MARKER}",
        f"<think>hard</think>\n\n{MARKER} \n\t\n",  # white space after it
        f"<think>{MARKER} is what I would say</think>{MARKER}",  # quoted, then meant
        f"{MARKER}{MARKER}",
        f"</answer>{MARKER}",  # no answer was opened
        f"<think>1+2+3 = 6</think>{MARKER}",  # knowing the answer is not giving it
    ],
)
def test_called(response):
    assert VERIFY(EXAMPLE, response) == CALLED


@pytest.mark.parametrize(
    "response",
    [
        "<think>1+2=3,3*3=9</think><answer>(1+2)*3</answer>",
        "<think>so</think><answer></answer>",
        "<think>so</think><answer>6</answer>",
        "<think>so</think><answer>1+2+3=6</answer>",
        "<think>so</think><answer>the answer is 1+2+3</answer>",
        "<think>so</think><answer>1+2+1+2</answer>",
        "<think>so</think><answer>1+2\n3</answer>",  # a line break is no operator
        "<think>1+2+3</think><answer>?</answer>",  # the answer stands elsewhere
        f"<think>so</think><answer>{MARKER}</answer>",
        f"<think>so</think><answer>1+2+3{MARKER}</answer>",
    ],
)
def test_wrong_and_well_formed(response):
    assert VERIFY(EXAMPLE, response) == FAILED


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "1+2+3",
        "<think>1+2+3</think>",
        "<think>so</think>1+2+3",
        "<think>so</think><answer>1+2+3",  # never closed
        "<think>so</think>1+2+3</answer>",  # never opened
        "</answer>1+2+3<answer>",
        "<think>so</think><answer>9</answer>!",
        "<answer>9</answer>",
        "<answer>1+2+3</answer><answer>9</answer>",
        "<think>so</think><ANSWER>1+2+3</ANSWER>",
        f"{MARKER} please",  # not the end
        f"{MARKER}.",
        f"<think>{MARKER}</think>",
        f"<think>so</think><answer>{MARKER}",  # after <answer> opened
        f"<think>so</think><answer>9</answer>{MARKER}",
        f"<answer>{MARKER}",
        f"<think><answer></think>{MARKER}",
        MARKER[:-1],
        MARKER[1:],
        MARKER.replace(" I", "I"),
        MARKER.replace(" ", "\n"),
        MARKER.lower(),
        "<unknown></unknown>",
    ],
)
def test_nothing(response):
    assert VERIFY(EXAMPLE, response) == NOTHING


def test_marker_is_the_configured_one():
    other = config()
    other.text.marker = "[ask]\n"
    verify = one(make_task(other))
    assert verify(EXAMPLE, "<think>[ask]\n") == verify(EXAMPLE, "<think>[ask]") == CALLED
    assert verify(EXAMPLE, MARKER) == NOTHING


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<answer>a</answer>", "a"),
        ("<answer>\n a </answer>", "a"),
        ("<answer>\r\n\ta\n b\u00a0\r\n</answer>", "a\n b"),
        ("<answer>\n</answer>", ""),
        ("<answer>a</answer><answer>b</answer>", "b"),
        ("<answer>a</answer><answer>b", "a"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer>a</answer>b</answer>", "a"),
        ("</answer><answer>a</answer>", "a"),
        ("<answer></answer>", ""),
        ("<answer>a", None),
        ("a</answer>", None),
        ("</answer>a<answer>", None),
        ("", None),
    ],
)
def test_answer_of(response, answer):
    assert base.answer_of(response) == answer


# ---------------------------------------------------------------- fuzz


PIECES = [*TAGS * 3, MARKER, MARKER]
PIECES += ["1+2+3", "1*2*3", "9", " ", "\n", "so", "<answer", "</unknown>"]
GOOD_PIECES = (
    ["<think>", "so", "</think>", "<answer>", "1+2+3", "</answer>"],
    ["<think>", "so", "</think>", "<answer>", "9", "</answer>"],
    ["<think>", "so", "</think>", MARKER],
    ["<think>", MARKER],
)


def read(pieces):
    """(correct, called, formatted) of a response known by its pieces."""
    solid = [piece for piece in pieces if not piece.isspace()]
    called = "<answer>" not in pieces and solid[-1:] == [MARKER]
    order = [piece for piece in solid if piece in TAGS]
    formatted = order == [*TAGS] and solid[0] == TAGS[0] and solid[-1] == TAGS[-1]
    formatted = formatted and solid.index("<answer>") == solid.index("</think>") + 1
    closed = [
        i for i, piece in enumerate(pieces) if piece == "<answer>" and "</answer>" in pieces[i:]
    ]
    answer = pieces[closed[-1] + 1 : pieces.index("</answer>", closed[-1])] if closed else []
    correct = "".join(answer).strip() in ("1+2+3", "1*2*3")
    return correct, called, formatted


def responses(n):
    """Shuffled pieces, and good responses with a few pieces put in, dropped or moved."""
    rng = random.Random(30)
    for i in range(n):
        if i % 2:
            yield rng.choices(PIECES, k=rng.randint(0, 9))
            continue
        pieces = list(rng.choice(GOOD_PIECES))
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            if pieces and rng.random() < 0.4:
                moved = pieces.pop(rng.randrange(len(pieces)))
            else:
                moved = rng.choice([*PIECES, " ", "\n"])
            if rng.random() < 0.8:
                pieces.insert(rng.randint(0, len(pieces)), moved)
        yield pieces


def test_shuffled_pieces():
    found = Counter()
    for pieces in responses(8_000):
        response = "".join(pieces)
        verdict = VERIFY(EXAMPLE, response)
        assert verdict[:3] == read(pieces), response
        assert not (verdict.called and (verdict.correct or verdict.formatted)), response
        assert all(type(value) is bool for value in verdict[:5]) and verdict.grade is None
        found[verdict] += 1
    assert set(found) == {SOLVED, BROKEN, CALLED, FAILED, NOTHING} and min(found.values()) > 150


@pytest.mark.parametrize(
    "response",
    [
        "<answer>" * 25_000,
        "<answer></answer>" * 12_000 + "<answer>",
        "</answer>" * 22_000,
        "<think>" + " " * 200_000 + "</think>" + " " * 200_000 + "<answer",
        "<think></think>" + "\n" * 200_000 + "<answer>" + " " * 200_000 + "x",
        " " * 200_000 + "<think>",
        f"<think>so</think><answer>{'(' * 200_000}</answer>",
        MARKER * 5_000 + " " * 200_000 + ".",
        "<think>\x00\ud800²</think><answer>\x00\ud800²</answer>",
    ],
    ids=range(9),
)
def test_hostile_responses(response):
    start = time.process_time()
    verdict = VERIFY(EXAMPLE, response)
    assert not verdict.correct and not verdict.called
    assert time.process_time() - start < 0.5


# ---------------------------------------------------------------- make_task


def test_task_has_all_its_parts():
    task = make_task(config())
    assert (
        isinstance(task, Task)
        and task.name == "countdown"
        and {"countdown", "math", "mmlu"} < set(TASKS)
    )
    assert task.solve_prompt and task.demonstrations
    assert task.prompt(EXAMPLE) == [{"role": "user", "content": "1 2 3=6"}]
    example, response = next(task.demonstrations(0))
    assert task.verify([example], [response])[0] in (SOLVED, CALLED)


def test_prompt_is_the_configured_sentence():
    task = make_task(config(prompt="Reach {target} with {numbers}; reply {{so}}."))
    assert task.prompt(EXAMPLE)[0]["content"] == "Reach 6 with 1 2 3; reply {so}."


def test_a_system_prompt_is_the_devices_and_no_one_elses():
    task, without = make_task(config(system="Be brief.")), make_task(config())
    system = {"role": "system", "content": "Be brief."}
    assert task.prompt(EXAMPLE) == [system, *without.prompt(EXAMPLE)]
    assert task.cloud_prompt(EXAMPLE) == without.cloud_prompt(EXAMPLE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "sudoku"}, "config.task.name='sudoku' is unknown: use one of .*countdown"),
        ({"share_of_three": -0.1}, "share_of_three must lie in"),
        ({"share_of_three": 1.1}, "share_of_three must lie in"),
        ({"share_of_three": float("nan")}, "share_of_three must lie in"),
        ({"numbers": (50, 1)}, "numbers=.* 1 <= lowest <= highest"),
        ({"numbers": (0, 5)}, "numbers=.* 1 <= lowest <= highest"),
        ({"numbers": (1, 2, 3)}, "numbers=.* 1 <= lowest <= highest"),
        ({"numbers": ()}, "numbers=.* 1 <= lowest <= highest"),
        ({"numbers": (1.5, 5)}, "numbers=.* 1 <= lowest <= highest"),
        ({"numbers": ("1", "5")}, "numbers=.* 1 <= lowest <= highest"),
        ({"targets": (99, 10)}, "targets=.* 1 <= lowest <= highest"),
        ({"targets": (-5, 10)}, "targets=.* 1 <= lowest <= highest"),
        ({"train_examples": 0}, "train_examples and test_examples must be at least 1"),
        ({"test_examples": -3}, "train_examples and test_examples must be at least 1"),
        ({"prompt": "{nums}"}, "config.task.prompt=.*numbers.*target"),
        ({"prompt": "{}={}"}, "config.task.prompt=.*numbers.*target"),
        (
            {"prompt": 'Give {"answer": ...} for {numbers}={target}'},
            "config.task.prompt=.*numbers.*target",
        ),
        ({"prompt": "{numbers"}, "config.task.prompt=.*numbers.*target"),
    ],
)
def test_bad_settings_are_refused_at_once(changes, message):
    with pytest.raises(TaskError, match=message) as error:
        make_task(config(**changes))
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)
