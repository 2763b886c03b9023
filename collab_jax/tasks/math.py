"""Mathematics with a final answer: MATH, GSM8K and the benchmarks that are only for evaluation.

How an answer is found in a response (`extract`), when two answers are the same (`equal`), and the
tasks. Most answers are compared as text, in one spelling, or as exact rational numbers. What that
does not settle goes to math-verify (`verifier.py`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from ml_collections import ConfigDict

from collab_jax.tasks import base, rows, verifier
from collab_jax.tasks.base import Example, Task, TaskError

MAX_ANSWER = 500  # characters; a longer prediction is wrong, unread

# ---- finding the answer


def extract(response: str) -> str | None:
    """The answer that a response gives: the last box in its `<answer>` block, or the block itself.

    None where there is none, or where it is longer than MAX_ANSWER: that is no final answer, and
    nothing to spend time on.
    """
    block = base.answer_of(response)
    if block is None:
        return None
    boxed = last_boxed(block[-4 * MAX_ANSWER :])
    answer = (block if boxed is None else boxed).strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...} that is closed, or None."""
    for start in [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)][::-1]:
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
            if depth == 0:
                return text[start:i]
    return None


# ---- one spelling

_DROP = re.compile(
    r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|(?<!\\)\\!|\\displaystyle"
    r"|\^\{?\\circ\}?|\\degree(?![a-zA-Z])|\\\$|\$|\\%|%"
)
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s)+")  # not in "\\ ", a row's end
_OUTSIDE_NUMBERS = re.compile(r"(?<![\d.]) | (?![\d.])")  # the spaces that say nothing
_SPACED_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:(?:\\[,;: ]|~|\{,\})\d{3})+(?!\d)")  # 12\,000
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]*)\}"
)
_UNIT = re.compile(r"(?<=[\d})])\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
# What stands before "=" and is dropped: a variable, perhaps with an index, primes and arguments, or
# a tuple of variables: x, x_1, \theta, f(x), f^{-1}(x), P(X>2), (x,y).
_SUFFIX = r"(?:_(?:\w+|\{\w+\}))?'*(?:\^\{-1\})?(?:\([^()=]*\))?"
_TUPLE = r"\([a-zA-Z](?:,[a-zA-Z])+\)"
_IN = r"(?:[a-zA-Z]|f\([a-z]\))\\in(?![a-z])"
_VARIABLE = re.compile(rf"(?:(?:(?:[a-zA-Z]|\\[a-zA-Z]+){_SUFFIX}|{_TUPLE})=|{_IN})+(?=.)")
# A name may also be a word or several letters: AB = 5, m\angle ABC = 5, Area = 5.
_NAME = re.compile(rf"(?:[a-zA-Z\\]+{_SUFFIX}|{_TUPLE})=")
_EQUALS = re.compile(r"(?<![<>!:])=")


def normal(answer: str) -> str:
    """An answer in one spelling, by which most answers can be compared as text.

    Without white space, dollars, units, sizes of brackets and the variable in `x = 5`; fractions
    and roots with braces. White space between two numbers is kept, as a space: `1 2` is not 12.
    """
    text = answer.strip()
    while (box := last_boxed(text)) is not None and text.startswith("\\"):
        text = box
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.replace("−", "-").replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _SPACE.sub(" ", _DROP.sub("", text))
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = _UNIT.sub("", re.sub(r" +(?=\\(?:text|mbox|mathrm|textrm) *\{)", "", text.strip()))
    text = _SPACE.sub(" ", _WRAPPED.sub(r"\1", text))
    text = _OUTSIDE_NUMBERS.sub("", text).rstrip(".,; ")
    text = re.sub(r"\\frac([0-9a-zA-Z]) ?([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{([^{}]*)\}([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9a-zA-Z])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    if variable := _VARIABLE.match(text):
        text = text[variable.end() :]
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return text


_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_FRACTION = re.compile(
    rf"(-?)\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|({_NUMBER})/({_NUMBER})|({_NUMBER})"
)


def number(text: str) -> Fraction | None:
    """The exact value of a normal integer, decimal or fraction of these; None for anything else."""
    match = _FRACTION.fullmatch(text)
    if not match or len(text) > 60:
        return None
    sign, a, b, c, d, e = match.groups()
    try:
        if e is not None:
            return Fraction(e)
        value = Fraction(a) / Fraction(b) if a is not None else Fraction(c) / Fraction(d)
    except ZeroDivisionError:
        return None
    return -value if sign else value


def list_of(text: str) -> tuple[str, list[str]]:
    """(kind, elements) of a normal answer that is a list, as `1,2` or `(1,2]`.

    kind: "set" for elements without order, else the brackets around them, as "(]"; "" for a single
    answer, which is then the one element.
    """
    inner, kind = text, "set"
    if text.startswith("\\lbrace") and text.endswith("\\rbrace"):
        inner = text[7:-7]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inner, kind = text[1:-1], text[0] + text[-1]
    elements, depth, start = [], 0, 0
    for i, c in enumerate(inner):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return "", [text]  # (a)+(b)
        if c == "," and depth == 0:
            elements.append(inner[start:i])
            start = i + 1
    elements.append(inner[start:])
    return (kind, elements) if len(elements) > 1 else ("", [text])


# ---- comparing


def same_text(gold: str, prediction: str) -> bool:
    """True where two normal answers are the same text, exact number, or list of these.

    False means that it is not known.
    """
    (kind, a), (other, b) = list_of(gold), list_of(prediction)
    if kind != other or len(a) != len(b):
        return False
    keys = [
        [value if (value := number(element)) is not None else element.lower() for element in side]
        for side in (a, b)
    ]
    return Counter(keys[0]) == Counter(keys[1]) if kind == "set" else keys[0] == keys[1]


def _is_equation(text: str) -> bool:
    """True where a normal answer says that something equals something, and not what a name is."""
    return any(_EQUALS.search(e) and not _NAME.match(e) for e in list_of(text)[1])


def _differ(gold: str, prediction: str) -> bool:
    """True where no algebra can make two normal answers that are not the same text equal.

    math-verify would take an equation for its right-hand side, and `1 2` for 3.
    """
    if number(gold) is not None and number(prediction) is not None:
        return True
    if _is_equation(gold) != _is_equation(prediction):
        return True
    return " " in gold or " " in prediction  # only between two numbers


def equal_all(pairs: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Whether gold and prediction are the same answer, for each pair.

    None where the verifier ran out of time.
    """
    results: list[bool | None] = [False] * len(pairs)
    unsettled: dict[int, tuple[str, str]] = {}
    for i, (gold, prediction) in enumerate(pairs):
        if prediction is None or len(prediction) > MAX_ANSWER:
            continue
        pair = normal(gold), normal(prediction)
        if same_text(*pair):
            results[i] = True
        elif not _differ(*pair):
            unsettled[i] = pair
    if unsettled:
        distinct = list(dict.fromkeys(unsettled.values()))  # the responses of a group often agree
        verified = dict(zip(distinct, verifier.shared().equal(distinct), strict=True))
        for i, pair in unsettled.items():
            results[i] = verified[pair]
    return results


def equal(gold: str, prediction: str) -> bool:
    """Whether a prediction is the gold answer; False where the verifier ran out of time."""
    return equal_all([(gold, prediction)])[0] is True


# ---- the tasks

FILES = {  # task -> (training split, test split): names of files in config.task.data_dir
    "math": ("math_train", "math_test"),
    "gsm8k": ("gsm8k_train", "gsm8k_test"),
    "math500": (None, "math500"),
    "amc23": (None, "amc23"),
    "aime24": (None, "aime24"),
    "minerva_math": (None, "minerva_math"),
    "agieval_math": (None, "agieval_math"),
}
_CLOUD_PROMPT = (
    "Solve this problem. End with the final answer alone between <answer> and </answer>.\n\n"
    "{problem}"
)


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of a split of `config.task.name`; `example.problem` is (problem, answer).

    Training rows whose gold answer has several boxed values are left out.
    """
    name = FILES[task.name][split == "test"]
    if name is None:
        raise TaskError(f"task {task.name!r} has no {split} split: it is for evaluation alone")
    return [
        Example(row["id"], rows.stratum(row), (row["problem"], row["answer"]))
        for row in rows.read(task.data_dir, name)
        if split == "test" or not row.get("boxed_all")
    ]


def make_task(config: ConfigDict) -> Task:
    """The task of FILES that `config.task.name` names.

    `config.task.prompt` has {problem} where the problem goes.
    """
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=lambda example: example.problem[0],
        gold=lambda example: example.problem[1],
        compare=lambda golds, responses: equal_all(
            [(gold, extract(r)) for gold, r in zip(golds, responses, strict=True)]
        ),
        cloud_prompt=_CLOUD_PROMPT,
    )
