"""Mathematics with a final answer: MATH, GSM8K and the benchmarks that are only for evaluation.

How an answer is found in a response (`extract`), when two answers are the same (`equal`), and the
tasks. Most answers are compared as text, in one spelling, or as exact rational numbers. What that
does not settle goes to math-verify (`verifier.py`).
"""

import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from collab_jax.tasks import base, rows, verifier
from collab_jax.tasks.base import Example, Task, TaskError

MAX_ANSWER = 500  # characters; a longer prediction is wrong, unread

# ------------------------------------------------------------------------------------------------- finding


def extract(response: str) -> str | None:
    """The answer that a response gives: the last box in its `<answer>` block, or the block itself.

    None where there is none, or where it is longer than MAX_ANSWER: no final answer, and nothing to
    spend time on.
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


# ----------------------------------------------------------------------------------------------- one spelling

_DROP = re.compile(
    r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|\\q?quad(?![a-zA-Z])|\\displaystyle|\^\{?\\circ\}?|\\degree(?![a-zA-Z])|\\\$|\$|\\%|%|~"
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]*)\}"
)
_UNIT = re.compile(r"(?<=[\d})])\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def normal(answer: str) -> str:
    """An answer in one spelling: without white space, dollars, units, sizes of brackets; fractions
    and roots with braces.
    """
    text = answer.strip()
    while (box := last_boxed(text)) is not None and text.startswith("\\"):
        text = box
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = text.replace("−", "-").replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    text = _DROP.sub("", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = _UNIT.sub("", re.sub(r"\s+(?=\\(?:text|mbox|mathrm|textrm)\s*\{)", "", text.strip()))
    text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\s+", "", text).rstrip(".,;")
    text = re.sub(r"\\(frac)([0-9a-zA-Z])([0-9a-zA-Z])", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\(frac)\{([^{}]*)\}([0-9a-zA-Z])", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\(frac)([0-9a-zA-Z])\{", r"\\\1{\2}{", text)
    text = re.sub(r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = re.sub(r"^(?:[a-zA-Z]|f\([a-z]\))(?:=|\\in)(?=.)", "", text)  # x = 5
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


def parts(text: str) -> tuple[str, list[str]]:
    """(kind, parts) of a normal list: kind "set" for parts without order, else the brackets around
    them; "" for a single answer.
    """
    inner, kind = text, "set"
    if text.startswith("\\lbrace") and text.endswith("\\rbrace"):
        inner = text[7:-7]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inner, kind = text[1:-1], text[0] + text[-1]
    found, depth, start = [], 0, 0
    for i, c in enumerate(inner):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return "", [text]  # (a)+(b)
        if c == "," and depth == 0:
            found.append(inner[start:i])
            start = i + 1
    found.append(inner[start:])
    return (kind, found) if len(found) > 1 else ("", [text])


def same_text(gold: str, prediction: str) -> bool:
    """True where two answers are the same in one spelling, as exact numbers, or as lists of these;
    False means "not known".
    """
    (kind, a), (other, b) = parts(normal(gold)), parts(normal(prediction))
    if kind != other or len(a) != len(b):
        return False
    keys = [
        [number(part) if number(part) is not None else part.lower() for part in found]
        for found in (a, b)
    ]
    return Counter(keys[0]) == Counter(keys[1]) if kind == "set" else keys[0] == keys[1]


def equal_all(pairs: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Whether gold and prediction are the same answer, for each pair; None where the verifier ran
    out of time.
    """
    found: list[bool | None] = [False] * len(pairs)
    unsettled: list[int] = []
    for i, (gold, prediction) in enumerate(pairs):
        if prediction is None or len(prediction) > MAX_ANSWER:
            continue
        if same_text(gold, prediction):
            found[i] = True
        elif not _both_numbers(gold, prediction):  # two numbers that differ need no algebra
            unsettled.append(i)
    if unsettled:
        spelt = [(normal(pairs[i][0]), normal(pairs[i][1])) for i in unsettled]
        distinct = list(dict.fromkeys(spelt))  # the responses of a group often agree
        slow = dict(zip(distinct, verifier.shared().equal(distinct), strict=True))
        for i, pair in zip(unsettled, spelt, strict=True):
            found[i] = slow[pair]
    return found


def _both_numbers(gold: str, prediction: str) -> bool:
    return number(normal(gold)) is not None and number(normal(prediction)) is not None


def equal(gold: str, prediction: str) -> bool:
    """Whether a prediction is the gold answer; False where the verifier ran out of time."""
    return equal_all([(gold, prediction)])[0] is True


# --------------------------------------------------------------------------------------------------- tasks

FILES = {  # task -> (training split, test split): names of files in config.task.data_dir
    "math": ("math_train", "math_test"),
    "gsm8k": ("gsm8k_train", "gsm8k_test"),
    "math500": (None, "math500"),
    "amc23": (None, "amc23"),
    "aime24": (None, "aime24"),
    "minerva_math": (None, "minerva_math"),
    "agieval_math": (None, "agieval_math"),
}
_CLOUD_PROMPT = "Solve this problem. End with the final answer alone between <answer> and </answer>.\n\n{problem}"


def load(task, split: str) -> list[Example]:
    """The examples of a split of `config.task.name`. Training rows whose gold has several boxed
    values are left out.
    """
    name = FILES[task.name][split == "test"]
    if name is None:
        raise TaskError(f"task {task.name!r} has no {split} split: it is for evaluation alone")
    found = rows.read(pathlib.Path(task.data_dir).expanduser(), name)
    if split == "train":
        found = [row for row in found if not row.get("boxed_all")]
    return [Example(row["id"], rows.stratum(row), (row["problem"], row["answer"])) for row in found]


def make_task(config) -> Task:
    """The task of FILES that `config.task.name` names; `config.task.prompt` has {problem} where the
    problem goes.
    """

    def compare(examples: Sequence[Example], responses: Sequence[str]) -> list[bool | None]:
        golds = [example.problem[1] for example in examples]
        return equal_all(list(zip(golds, map(extract, responses), strict=True)))

    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=lambda example: example.problem[0],
        gold=lambda example: example.problem[1],
        compare=compare,
        cloud_prompt=_CLOUD_PROMPT,
    )
