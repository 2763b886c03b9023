"""Sums worked out in columns, for a model too small to know them by heart.

Of 82-37=45 that is, line by line, what is asked, each column from the ones on, and the value:

    82-37:            47+38:           24*7:            96/4:
    12-7=5            7+8=15           4*7=28           9=4*2+1
    8-3-1=4           4+3+1=8          2*7+2=16         16=4*4+0
    =45               =85              =168             =24

What is borrowed stands in its column (12 for 2) and is paid in the next one; a quotient goes from
the left. A column needs single digits alone, which are few enough to learn.
"""

import re

_SUM = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
KNOWN = 20  # sums of numbers below it stay as they are
TABLE = 10  # and so do products and quotients of numbers up to it


def worked(step: str) -> list[str]:
    """The lines of a step such as "82-37=45"; [step] where it is short, or not of whole numbers.

    It is left alone too where its value is not exact, or both factors, or the divisor, have more
    than one digit.
    """
    found = _SUM.fullmatch(step)
    if not found:
        return [step]
    left, right, value = int(found[1]), int(found[3]), int(found[4])
    lines = _lines(left, found[2], right, value)
    return [f"{left}{found[2]}{right}:", *lines, f"={value}"] if lines else [step]


def _lines(left: int, operator: str, right: int, value: int) -> list[str]:
    """The columns of a sum; none where it has none."""
    if operator == "+" and left + right == value and max(left, right) >= KNOWN:
        return _added(left, right)
    if operator == "-" and left - right == value >= 0 and left >= KNOWN:
        return _subtracted(left, right)
    if operator == "*" and left * right == value and min(left, right) < 10 < max(left, right):
        return _multiplied(left, right)
    if operator == "/" and right * value == left and 1 < right < 10 and value > TABLE:
        return _divided(left, right)
    return []


def _digits(number: int, columns: int = 0) -> list[int]:
    """The digits of a number, ones first, with zeros up to so many columns."""
    return [int(digit) for digit in reversed(str(number).rjust(columns, "0"))]


def _added(left: int, right: int) -> list[str]:
    lines, carry, columns = [], 0, len(str(max(left, right)))
    for a, b in zip(_digits(left, columns), _digits(right, columns), strict=True):
        value = a + b + carry
        lines.append(f"{a}+{b}{'+1' if carry else ''}={value}")
        carry = value // 10
    return lines


def _subtracted(left: int, right: int) -> list[str]:
    lines, owed = [], 0
    digits = _digits(left)
    for a, b in zip(digits, _digits(right, len(digits)), strict=True):
        borrowed = 10 if a < b + owed else 0
        lines.append(f"{a + borrowed}-{b}{'-1' if owed else ''}={a + borrowed - b - owed}")
        owed = borrowed // 10
    return lines


def _multiplied(left: int, right: int) -> list[str]:
    """By the factor of one digit, whichever it is."""
    digit, other = sorted((left, right))
    lines, carry = [], 0
    for a in _digits(other):
        value = a * digit + carry
        lines.append(f"{a}*{digit}{f'+{carry}' if carry else ''}={value}")
        carry = value // 10
    return lines


def _divided(left: int, right: int) -> list[str]:
    lines, rest = [], 0
    for a in reversed(_digits(left)):
        taken = 10 * rest + a
        quotient, rest = divmod(taken, right)
        if quotient or lines:  # the quotient's own digits, without zeros before them
            lines.append(f"{taken}={right}*{quotient}+{rest}")
    return lines
