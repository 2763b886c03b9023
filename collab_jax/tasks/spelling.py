"""One spelling for answers that are written in many: `normal`, and what stands in such an answer.

That is the names of its values (`named`), its elements (`list_of`) and its exact number.
"""

import re
from fractions import Fraction

from collab_jax.tasks import denials
from collab_jax.tasks.denials import NUMERALS
from collab_jax.tasks.expressions import value as value_of

# ---- one spelling

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "±": r"\pm ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        **dict.fromkeys("€£¥", "$"),
    }
)
_COMMANDS = [  # (what may be written, its one spelling)
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle", ""),
        (r"\^ *\{?\\circ\}?|\\degree(?![a-zA-Z])", ""),
        (r"\\[cdt]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"[(\[]\s*\\begin\s*\{array\}\s*\{[lcr|\s]*\}", r"\\begin{pmatrix}"),
        (r"\\end\s*\{array\}\s*[)\]]", r"\\end{pmatrix}"),
        (r"\{(?:[bB]|small)matrix\}", "{pmatrix}"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"\\?sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\\{", r"\\lbrace "),
        (r"\\\}", r"\\rbrace "),
    )
]
_NUMERALS = {word: str(i) for i, word in enumerate(NUMERALS)}
_NUMERAL = re.compile(rf"({'|'.join(_NUMERALS)})(?=\W*$| [a-z]+\W*$)", re.IGNORECASE)
_SPACED_THOUSANDS = re.compile(  # 12\,000 and 12 000
    r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?:(?:\\[,;: ]|~|\{,\}|,?\\!\s*)\d{3})+(?!\d)"
    r"|^\W*[1-9]\d{0,2}(?: \d{3})+(?![\d ])"
)
_SPACE = re.compile(r"(?:(?<!\\)\\[,;:! ]|\\q?quad|~|\s)+")  # not in "\\ ", a row's end
_SIGNS = re.compile(r"\\?[$%]|(?<!\\)\\[()\[\]]")
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|mathit|rm|bf)"
_WRAPPED = re.compile(rf"{_TEXT} *\{{([^{{}}]*)\}}")
# Words after a number that are no unit, besides those of `denials.py`.
_NO_UNIT = r"(?:and|or|to|out|was|were|are|ha[sd]|have|will|would|could|should)\b"
_UNIT_AS_TEXT = re.compile(
    rf"(?<=[\d}})]) *{_TEXT} *\{{ *(?! *{_NO_UNIT})[^{{}}\d]*\}}(?:\^ *\{{?\d\}}?)?(?= *(?:[,;]|$))"
)
_SHORT_UNIT = (
    r"(?:[mckd]m|m(?=\^|/s)|k?g|m[lg]|ft|in|yd|mi|lbs?|oz|mph|kmh?|hrs?|mins?|secs?"
    r"|USD|pct|percent)"
)
_UNIT_AS_WORDS = re.compile(  # 9 apples, 5 km per hour, 5cm^2
    r"(?:(?<=[\d})])|(?<=\\pi))"
    rf"(?: *(?!{_NO_UNIT}){_SHORT_UNIT}| +(?!{_NO_UNIT}|x\b)[a-zA-Z]{{3,}})"
    r"(?:(?: +| *[/-] *)(?!and\b|or\b)[a-zA-Z]{1,})*(?:\^ *\{?\d\}?)?(?= *(?:[,;]|$|and\b|or\b))"
)
_AND = re.compile(r"(?:,| )*(?<=[ \d})])(?:and|or)(?=[ \\\d({A-Z-]) *|; *")
_OUTSIDE_NUMBERS = re.compile(r"(\\[a-zA-Z]+ )(?=[a-zA-Z])|(?<![\d.]) | (?![\d.])")
_THOUSANDS = re.compile(r"-?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")


def normal(answer: str) -> str:
    """An answer in one spelling, by which most answers can be compared as text.

    Without white space, dollars, units and sizes of brackets; fractions and roots with braces;
    elements of a list after commas. White space between two numbers is kept, as a space: `1 2` is
    not 12. So is a space between a command and a letter.
    """
    text = answer.strip().lstrip("= ").translate(_UNICODE)
    plain = not denials.denied(text) and not denials.altered(text)  # else each word counts
    if plain and (numeral := _NUMERAL.match(text)):  # nine, nine apples
        text = _NUMERALS[numeral[1].lower()] + text[numeral.end() :]
    if "\\begin" not in text:  # there "\\\\" ends a row; elsewhere a command was escaped twice
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, spelling in _COMMANDS:
        text = pattern.sub(spelling, text)
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"[^\d$-]", "", match[0]), text)
    text = _SPACE.sub(" ", _SIGNS.sub("", text)).strip()
    text = text.rstrip(".,; ")
    text = _UNIT_AS_TEXT.sub("", text) if plain else text
    text = _WRAPPED.sub(r"\1", text).strip().rstrip(".,; ")
    text = _UNIT_AS_WORDS.sub("", text) if plain else text
    if _THOUSANDS.fullmatch(text):  # 32,349, but not 32, 349, which is a list
        text = text.replace(",", "")
    text = re.sub(" +", " ", _AND.sub(",", _solutions(text)))
    text = _OUTSIDE_NUMBERS.sub(lambda match: match[1] or "", text)
    text = re.sub(r"\\frac([0-9a-zA-Z]) ?([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac ([a-zA-Z])([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{([^{}]*)\}([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac ?([0-9a-zA-Z])\{", r"\\frac{\1}{", text)
    return re.sub(r"\\sqrt ?([0-9a-zA-Z])", r"\\sqrt{\1}", text)


def _solutions(text: str) -> str:
    """Several solutions as tuples: `x=1,y=2;x=3,y=4` as `(1,2),(3,4)`."""
    solutions = [part.split(",") for part in re.split(r";| or ", text)]
    values = [[v.partition("=") for v in solution] for solution in solutions]
    names = [[name.strip() for name, _, _ in solution] for solution in values]
    plain = not any(bracket in text for bracket in "([{")
    if len(values) < 2 or len(names[0]) < 2 or any(n != names[0] for n in names) or not plain:
        return text
    return ",".join(f"({','.join(value.strip() for _, _, value in v)})" for v in values)


# ---- names before "=": what a value is of

# A variable, perhaps with an index, primes and arguments, several letters, a word, or a tuple of
# variables: x, x_1, \theta, f(x), f^{-1}(x), P(X>2), AB, m\angle ABC, Area, (x,y).
_SUFFIX = r"(?:_(?:\w+|\{\w+\}))?'*(?:\^\{-1\})?(?:\([^()=]*\))?"
_TUPLE = r"\([a-zA-Z](?:,[a-zA-Z])+\)"
# Of points and what they enclose: |AB|, A:B, V_{1}:V_{2}, \frac{NO}{BO}.
_POINTS = r"(?:[A-Z|:/{}]|\\frac|_\{\w+\}|_[0-9a-z])+(?<=[A-Z}|])"
_IN = r"(?:[a-zA-Z]|f\([a-z]\))\\in(?![a-z]) ?"
_NAME = re.compile(rf"[a-zA-Z\\ ]+{_SUFFIX}|{_TUPLE}|{_POINTS}")
_NAMED = re.compile(rf"(?:(?:{_NAME.pattern})=|{_IN})+(?=.)")
_EQUALS = re.compile(r"(?<![<>!:])=")
_LETTERS = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]")


def named(element: str) -> tuple[str, str]:
    """(name, value) of a normal answer as `x=5`; the name is "" for a plain value.

    Of `x=2+3=5` and of `2+3=5` the value is 5; of `x=1/3\\approx0.33` it is the exact one.
    """
    exact, approximately, rounded = element.partition(r"\approx")
    if approximately:
        element = f"{exact}={rounded.strip()}" if _NAME.fullmatch(exact) else exact
    match = _NAMED.match(element)
    variables = re.findall("[a-zA-Z]", match[0]) if match and match[0][0] == "(" else []
    if variables != sorted(variables):  # (y,x)=(1,2) is not (1,2)
        match = None
    name, value = (match[0], element[match.end() :]) if match else ("", element)
    *steps, last = _EQUALS.split(value)
    if name and steps and not any(_LETTERS.search(step) for step in steps):
        value = last
    elif steps and all(_arithmetic(step) == number(last) is not None for step in steps):
        value = last
    return name, value


def _arithmetic(text: str) -> Fraction | None:
    """The value of a normal sum, difference, product or quotient of whole numbers, or None."""
    return value_of(re.sub(r"\\(?:times|cdot)(?![a-zA-Z])", "*", text))


def is_equation(text: str) -> bool:
    """True where a normal answer says that something equals something, and not what a name is."""
    return any(_EQUALS.search(named(element)[1]) for element in list_of(text)[1])


def without_names(text: str) -> str:
    """A normal answer without the names of its values: `x=1,x=2` as `1,2`."""
    kind, elements = list_of(text)
    if kind not in ("", "set"):
        return text
    values = ",".join(named(element)[1] for element in elements)
    return f"\\lbrace{values}\\rbrace" if text.startswith("\\lbrace") else values


# ---- values

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_EXACT = re.compile(
    rf"(-?)\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|({_NUMBER})/({_NUMBER})"
    rf"|(-?)(\d+)(?: (\d+)/|\\frac\{{(\d+)\}}\{{)(\d+)\}}?|\+?({_NUMBER})"
)


def number(text: str) -> Fraction | None:
    """The exact value of a normal integer, decimal, fraction of these or mixed number, or None."""
    match = _EXACT.fullmatch(text)
    if not match or len(text) > 60:
        return None
    sign, a, b, c, d, minus, whole, over, above, below, plain = match.groups()
    try:
        if plain is not None:
            return Fraction(plain)
        if whole is not None:
            value = int(whole) + Fraction(int(over or above), int(below))
            return -value if minus else value
        value = Fraction(a) / Fraction(b) if a is not None else Fraction(c) / Fraction(d)
    except ZeroDivisionError:
        return None
    return -value if sign else value


def list_of(text: str) -> tuple[str, list[str]]:
    """(kind, elements) of a normal answer that is a list, as `1,2` or `(1,2]`.

    kind: "set" for elements without order, else the brackets around them, as "(]"; "" for a single
    answer, which is then the one element. A union of intervals is a set of them.
    """
    inner, kind = text, "set"
    if text.startswith("\\lbrace") and text.endswith("\\rbrace"):
        inner = text[7:-7].strip()
    elif text.startswith("{") and text.endswith("}"):
        inner = text[1:-1]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inner, kind = text[1:-1], text[0] + text[-1]
    elements = _split(inner)
    if elements is None and kind != "set":  # (1,2),(3,4)
        elements, kind = _split(text), "set"
    if elements is None:
        return "", [text]  # (a)+(b)
    return (kind, elements) if len(elements) > 1 else ("", [text])


def _split(text: str) -> list[str] | None:
    r"""The parts between commas and \cup outside brackets; None where brackets do not match."""
    elements, depth, start, i = [], 0, 0, 0
    while i < len(text):
        c = text[i]
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None
        width = 1 if c == "," else 4 if text.startswith("\\cup", i) else 0
        if width and depth == 0:
            elements.append(text[start:i])
            start = i + width
        i += width or 1
    return [*elements, text[start:]]
