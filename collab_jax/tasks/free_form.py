"""Free-form answers compared, as far as text and exact numbers tell.

`settled` says whether a written prediction is the gold answer, or what is left for algebra
(`verifier.py`) to tell.
"""

import re
from collections import Counter
from fractions import Fraction

from collab_jax.tasks import prose, spelling


def settled(gold: str, prediction: str) -> bool | tuple[str, str]:
    """Whether a prediction is the gold answer; the pair to compare where algebra must tell.

    A prediction is compared as it stands, and taken out of the sentence around it.
    """
    gold = spelling.normal(prose.boxed(gold) or gold)
    whole = spelling.normal(prediction)
    stated = spelling.normal(prose.answer_in(prediction))
    if same(gold, whole) or same(gold, stated):
        return True
    if choice := re.fullmatch(r"\(?([A-J])\)?", gold):
        return prose.letter(prediction) == choice[1]
    pair = gold, stated
    if not spelling.is_equation(gold) and not spelling.is_equation(stated):
        pair = spelling.without_names(gold), spelling.without_names(stated)
    return False if differ(gold, stated) or differ(*pair) else pair


# ---- what is the same

_RELATION = re.compile(r"(<|>|\\le(?![a-zA-Z]) ?|\\ge(?![a-zA-Z]) ?)")
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-z]+|[a-zA-Z]\([a-z]\)")
_CONSTANTS = re.compile(r"\\(?:infty|pi|frac|sqrt)(?![a-zA-Z])")


def _interval(text: str) -> str:
    """A normal inequality with the smaller side first; an interval where it bounds a variable."""
    parts = _RELATION.split(text)
    sides, relations = parts[::2], [relation.strip() for relation in parts[1::2]]
    if not relations:
        return text
    if set(relations) <= {">", "\\ge"}:
        sides.reverse()
        relations = [{">": "<", "\\ge": "\\le"}[relation] for relation in reversed(relations)]
    elif not set(relations) <= {"<", "\\le"}:
        return text
    ends = sides if len(sides) == 3 else ["-\\infty", *sides, "\\infty"]
    for low, variable, high in zip(ends, ends[1:], ends[2:], strict=False):
        if _VARIABLE.fullmatch(variable) and not _has_letters(low + high):
            opening = "[" if low == sides[0] and relations[0] == "\\le" else "("
            closing = "]" if high == sides[-1] and relations[-1] == "\\le" else ")"
            return f"{opening}{low},{high}{closing}"
    return "".join(a + b for a, b in zip(sides, [*relations, ""], strict=True))


def _has_letters(text: str) -> bool:
    return re.search("[a-zA-Z]", _CONSTANTS.sub("", text)) is not None


# A word, as Sunday, YES or yes; m and M, kT and Kt are other symbols, and commands have their case.
_CASED = re.compile(
    r"(?<![\\a-zA-Z])(?:[A-Z]?[a-z]{2,}|[A-Z]{3,}|[Nn]o|NO|[AaPp]m|[AP]M)(?![a-zA-Z])"
)


def _key(element: str) -> Fraction | str | tuple:
    """What is equal for two elements that say the same."""
    element = element.strip()
    if (value := spelling.number(element)) is not None:
        return value
    element = _interval(element)
    kind, parts = spelling.list_of(element)
    if kind:
        return (kind, *(_key(part) for part in parts))
    if letter := re.fullmatch(r"\(?([A-Z])[).]?", element):
        element = letter[1]
    element = element.replace("\\infty", "infinity").replace("+infinity", "infinity")
    return _CASED.sub(lambda word: word[0].lower(), element)


def same(gold: str, prediction: str) -> bool:
    """True where two normal answers are the same text, number, interval, or list of these.

    False means that it is not known.
    """
    (kind, a), (other, b) = spelling.list_of(gold), spelling.list_of(prediction)
    if kind == other == "set":
        return _same_set(
            [spelling.named(element) for element in a], [spelling.named(element) for element in b]
        )
    values = [spelling.named(element) for element in b]
    if kind == "()" and other == "set" and "" not in (names := dict(values)):  # x=3,y=4
        ordered = [names[name] for name in sorted(names, key=lambda name: name.strip("\\"))]
        return len(names) == len(a) and [_key(e) for e in a] == [_key(v) for v in ordered]
    one, another = spelling.without_names(gold), spelling.without_names(prediction)
    return _key(one) == _key(another) or _rounded(one, another)


def _same_set(a: list[tuple[str, str]], b: list[tuple[str, str]]) -> bool:
    """True where two sets of (name, value) say the same.

    Names count where both sets have the same ones: x=1,y=2 is not x=2,y=1, but x_1 and x_2 are two
    values of x.
    """
    a, b = ([(name.partition("_")[0].rstrip("="), value) for name, value in s] for s in (a, b))
    names = {name for name, _ in a}
    if "" in names or len(names) < 2 or names != {name for name, _ in b}:
        a, b = ([("", value) for _, value in side] for side in (a, b))
    one, another = (Counter((name, _key(value)) for name, value in side) for side in (a, b))
    return one == another


_DECIMAL = re.compile(r"-?\d+[.,](\d+)")


def _rounded(gold: str, prediction: str) -> bool:
    """True for 0.0833333 and 1/12, a decimal of six significant digits; and for 1,22 and 1.22."""
    if "," in gold + prediction:  # a decimal comma
        if not (_DECIMAL.fullmatch(gold) and _DECIMAL.fullmatch(prediction)):
            return False
        points = gold.replace(",", "."), prediction.replace(",", ".")
        return "." in gold + prediction and spelling.number(points[0]) == spelling.number(points[1])
    value, decimal = spelling.number(gold), _DECIMAL.fullmatch(prediction)
    if value is None or not decimal or len(prediction.strip("-0.").replace(".", "")) < 6:
        return False
    return round(value, len(decimal[1])) == spelling.number(prediction)


# ---- what cannot be the same

_COMMAND = re.compile(r"\\[a-zA-Z]+")
_FORMULA_WORDS = re.compile(r"sqrt|frac|sinh|cosh|tanh|arc[a-z]+|infinity|pmatrix|matrix")


def _has_words(text: str) -> bool:
    """True where a normal answer holds a word, and so is no formula."""
    plain = _FORMULA_WORDS.sub("", _COMMAND.sub(" ", text))
    return re.search(r"[a-zA-Z]{4,}|\d(?:st|nd|rd|th)\b", plain) is not None


# A sum or a product of numbers, such as 25-12, (2)(5) or 4!; no power of ten, as in 6 \times 10^3.
_OPERATION = re.compile(
    r"[\d)}](?:[-+*/]|\\(?:times|cdot|div)(?![a-zA-Z])(?! *10 *\^)) *[-+]?[\d(.\\{]"
    r"|[\d)](?:\([-\d]|!)"
)


_BASE = re.compile(r"[\dA-F.]+_\{?(\d+)\}?")  # 52_8: the base of a number


def _numbers(text: str) -> list[Fraction | None]:
    return [spelling.number(element) for element in spelling.list_of(text)[1]]


def differ(gold: str, prediction: str) -> bool:
    """True where no algebra may make two normal answers that are not the same equal.

    math-verify would take an equation for its right-hand side, `1 2` for 3, and the way to a
    number, as 25-12, for the number.
    """
    if None not in _numbers(gold) and (
        None not in _numbers(prediction) or _OPERATION.search(prediction)
    ):
        return True
    if _has_words(gold) or _has_words(prediction):
        return True
    bases = [_BASE.fullmatch(text) for text in (gold, prediction)]
    if bases[1] and (bases[0] is None or bases[0][1] != bases[1][1]):
        return True
    if ("=" in gold) != ("=" in prediction) and (
        spelling.is_equation(gold) or spelling.is_equation(prediction)
    ):
        return True
    return any(re.search(r"[\d.] [\d.]", text) for text in (gold, prediction))
