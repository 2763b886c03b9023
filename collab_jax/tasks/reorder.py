"""Word problems told in another order, so that a model does not go by which number comes first.

In most problems that SVAMP is trained on, what is subtracted comes second; in many of its own it
comes first, since its authors also changed the order of what is told (Patel et al., NAACL 2021,
section 4). A model that saw few of those writes 9-12 for 12-9.

Two things in one sentence change places, as in "17 red pens and 4 green pens", or two sentences
that have a number each, as "Ann had 5 apples. Bob had 12." The answer stays.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

from collab_jax.tasks import distract

_THING = r"\d+ (?:[a-z]+ )??[a-z]+s"  # "4 green pens": a plural, after a word at most
_PAIR = re.compile(rf"(?<![\w.,/$])({_THING}) and ({_THING})\b")
_NO_THING = re.compile(r"\b(?:as|has|his|is|its|less|plus|this|times|was)$")
# What a sentence says of the one before it, or of the time between them.
_IN_ORDER = re.compile(
    r"\b(?:after|afterwards|again|also|another|before|each|finally|first|instead|it|its|last|later|"
    r"left|more|next|now|other|others|remaining|rest|same|second|still|that|them|then|these|they|"
    r"this|those|too|when)\b",
    re.I,
)
_NO_NAME = set(  # of words that a sentence may begin with
    "a an at by every for he her his if in my on she some the their there to while with".split()
)


def _pairs_swapped(problem: str) -> Iterator[str]:
    for found in _PAIR.finditer(problem):
        if not any(map(_NO_THING.search, found.groups())):
            yield f"{problem[: found.start()]}{found[2]} and {found[1]}{problem[found.end() :]}"


def _sentences_swapped(problem: str) -> Iterator[str]:
    *told, _ = sentences = distract.sentences(problem) or [""]
    for i, (first, second) in enumerate(zip(told, told[1:], strict=False)):
        one_each = all(len(re.findall(r"\d+", s)) == 1 for s in (first, second))
        if not one_each or _IN_ORDER.search(first) or _IN_ORDER.search(second):
            continue
        name, _, of_name = first.partition(" ")
        pronoun, _, of_pronoun = second.partition(" ")
        if pronoun.lower() in ("he", "she"):  # the name goes first again
            if name.lower() in _NO_NAME or not name.isalpha():
                continue
            first, second = f"{pronoun} {of_name}", f"{name} {of_pronoun}"
        # The last sentence may end without a space.
        swapped = [f"{second.rstrip()} ", first]
        yield "".join([*sentences[:i], *swapped, *sentences[i + 2 :]])


def reordered(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The row with two things told in the other order; the row itself where none can be.

    Sums and products of two numbers of the problem name the one first that it names first.
    """
    problem = row["problem"]
    orders = [*_pairs_swapped(problem), *_sentences_swapped(problem)]
    if not orders:
        return row
    problem = rng.choice(orders)
    places = {number: i for i, number in reversed([*enumerate(re.findall(r"\d+", problem))])}

    def in_order(step: re.Match[str]) -> str:
        left, sign, right = step.groups()
        if left in places and right in places and places[left] > places[right]:
            return f"{right}{sign}{left}="
        return step[0]

    solution = re.sub(r"\b(\d+)([+*])(\d+)=", in_order, row["solution"])
    return row | {"problem": problem, "solution": solution}
