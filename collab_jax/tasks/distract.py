"""Word problems with a number that is of no use, so that a model learns to read the question.

SVAMP adds such numbers to problems of the kind that it is trained on (Patel et al., NAACL 2021,
section 4), and a small model that saw few of them uses every number that it finds.

A row has its `problem`, as "Ann had 5 apples. She ate 2. How many apples are left?". A sentence
that counts what is asked for comes a second time, with another number of other things: "Ann had 9
pencils." The answer stays, since the question says of which of them it asks.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

_ASKED = re.compile(r"how many ([a-z]+s)\b", re.I)  # a plural, for which another can stand
_SENTENCE = re.compile(r".+?(?<!\bmr)(?<!\bdr)(?<!\bmrs)[.?!]+(?:\s+|$)|.+", re.I | re.S)
_POINTS_BACK = re.compile(r"\b(?:them|they|these|those|it|each|rest)\b|\d", re.I)


def _asked(question: str) -> str | None:
    """What a question asks for the number of."""
    found = _ASKED.search(question)
    return found and found[1].lower()


def _count_of(thing: str) -> re.Pattern[str]:
    """Finds a number of a thing, with a word between them at most: "9 apples", "9 red apples"."""
    return re.compile(rf"(?<![\w.,/$])(\d{{1,4}}) ((?:[a-z]+ )?){thing}\b(?![/-])", re.I)


def sentences(problem: str) -> list[str]:
    """The sentences of a problem, each with the white space that follows it."""
    return _SENTENCE.findall(problem)


def questions(problem: str) -> list[str]:
    """The sentences of a problem that end in a question mark."""
    return [sentence for sentence in sentences(problem) if sentence.rstrip().endswith("?")]


def things(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows count and ask for, sorted: ["apples", "pencils"]."""
    problems = [row["problem"] for row in rows]
    return sorted({t for p in problems if (t := _asked(p)) and _count_of(t).search(p)})


def distracted(row: dict[str, Any], others: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """The row with such a sentence; the row itself where there is none to repeat.

    The sentence stands before the one that it repeats or, where nothing in the question points
    back, before the question.

    others: words for what it counts, as `things` has them; the problem's own are left out.
    """
    problem = row["problem"]
    *told, question = sentences(problem) or [""]
    thing = _asked(question)
    single = [i for i, sentence in enumerate(told) if len(re.findall(r"\d+", sentence)) == 1]
    counts = [(i, m) for i in single if thing and (m := _count_of(thing).search(told[i]))]
    words = set(re.findall("[a-z]+", problem.lower()))
    new = [word for word in others if word not in words]
    if not counts or not new:
        return row
    i, count = rng.choice(counts)
    fewest = 10 ** (len(count[1]) - 1)  # as many digits
    taken = {int(number) for number in re.findall(r"\d+", problem)}
    free = [n for n in range(max(2, fewest), 10 * fewest) if n not in taken]
    if not free:
        return row
    other = f"{rng.choice(free)} {count[2]}{rng.choice(new)}"
    sentence = told[i][: count.start()] + other + told[i][count.end() :]
    places = [i] if _POINTS_BACK.search(question) else [i, len(told)]
    told.insert(rng.choice(places), sentence)
    return row | {"problem": "".join([*told, question])}
