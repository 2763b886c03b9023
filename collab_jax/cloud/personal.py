"""Personal data in a text: mail and IP addresses, IBANs, payment cards, phone numbers, names.

Each function finds data of one kind, by its form and, where it has some, by its check digits; names
are those of a list, or what a function of the user returns. Numbers of a problem are to be left
alone, so a phone number needs a sign that it is one: a country code (+49), a leading zero, the
grouping of North America (415-555-2671), or a word before it (call 5551234).
"""

import ipaddress
import itertools
import pathlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from collab_jax.runtime import functions
from collab_jax.runtime.errors import UserError

SETTING = "config.cloud.redact_names"


class Span(NamedTuple):
    """Personal data at text[start:end]. kind: what its placeholder is called."""

    start: int
    end: int
    kind: str


Find = Callable[[str], Iterable[Span]]

BLANKS = r" \u00a0\u2009\u202f"
GAP = rf"[{BLANKS}.\-\u2010-\u2013/]"  # between two groups of a number
ACCENTS = r"\u0300-\u036f"  # that are characters of their own
# Of scripts without a blank between words: each is taken for a word.
SYLLABLE = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
LETTER = rf"(?:[^\W_{SYLLABLE}]|[{ACCENTS}])"

# ------------------------------------------------------------------------- addresses

# Repeats are possessive or bounded: a long text takes time in proportion to its length.
EMAIL = re.compile(
    rf"(?:\"[^\"\n]{{1,64}}\"|\w[\w{ACCENTS}.!#$%&'*+/=?^`{{|}}~-]{{0,127}}+)"
    rf"@(?:[\w{ACCENTS}-]{{1,63}}+\.){{1,20}}(?:[xX][nN]--[\w-]{{1,59}}|[^\W\d_]{{2,63}})"
)
IPV4 = re.compile(r"(?<!\d)(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)")
# In a look-ahead, as are all candidates that are checked: one that fails hides none inside it.
IPV6 = re.compile(
    r"(?<![0-9A-Fa-f])(?=((?:[0-9A-Fa-f]{0,4}:){2,7}"
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4})))"
)
LONG_GROUP = re.compile(r"[0-9A-Fa-f]{3}")  # every address has one; 1:2::3:6 is a proportion


def emails(text: str) -> Iterator[Span]:
    """Yields mail addresses, in letters of any script."""
    return (Span(*match.span(), "EMAIL") for match in EMAIL.finditer(text))


def ip_addresses(text: str) -> Iterator[Span]:
    """Yields addresses of IPv4 and IPv6, without port, prefix length and zone."""
    for match in IPV4.finditer(text):
        if all(int(byte) < 256 for byte in match[0].split(".")):
            yield Span(*match.span(), "IP")
    past = 0
    for match in IPV6.finditer(text):
        start, end = match.span(1)
        ends = (end, end - 1) if text[end - 1] == ":" else (end,)  # a colon may end a clause
        whole = next((e for e in ends if _is_ipv6(text[start:e])), 0)
        if start >= past and whole:
            past = whole
            yield Span(start, whole, "IP")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return bool(LONG_GROUP.search(text))


# ------------------------------------------------------------------------- accounts and cards

IBAN = re.compile(rf"(?=([A-Za-z]{{2}}\d\d(?:[{BLANKS}-]?[A-Za-z0-9]){{11,30}}))")
NUMBER = re.compile(rf"\d+(?:{GAP}\d+)*")
CARD_GROUPS = 5  # at most
# First digits and lengths of: Visa, Mastercard (two ranges), American Express, Diners, JCB,
# Discover with UnionPay, Maestro and RuPay, Maestro, Mir, UnionPay with RuPay.
CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11,16}|35(?:2[89]|[3-8]\d)\d{12,15}"
    r"|6\d{11,18}|5[0678]\d{10,17}|220[0-4]\d{12,15}|8[12]\d{14,17}"
)


def ibans(text: str) -> Iterator[Span]:
    """Yields IBANs, in groups or not: 15 to 34 characters with a remainder by 97 of 1."""
    past = 0
    for match in IBAN.finditer(text):
        start, end = match.span(1)
        # A word that follows may have been taken for a group.
        whole = next((e for e in range(end, start, -1) if _is_iban(text, start, e)), 0)
        if start >= past and whole:
            past = whole
            yield Span(start, whole, "IBAN")


def _is_iban(text: str, start: int, end: int) -> bool:
    if not text[end - 1].isalnum() or text[end : end + 1].isalnum():
        return False
    code = [int(c, 36) for c in text[start:end] if c.isascii() and c.isalnum()]
    number = "".join(map(str, code[4:] + code[:4]))
    half_digits = sum(n < 10 for n in code) >= len(code) / 2  # no country has fewer
    return 15 <= len(code) <= 34 and half_digits and int(number) % 97 == 1


def cards(text: str) -> Iterator[Span]:
    """Yields payment cards: a known prefix, a length that goes with it, and Luhn's check digit.

    Groups have at least three digits: small numbers in a row are not a card.
    """
    for number in NUMBER.finditer(text):
        groups = list(re.finditer(r"\d+", number[0]))
        i = 0
        while i < len(groups):
            start = number.start() + groups[i].start()
            ends = (
                j
                for j in range(min(i + CARD_GROUPS, len(groups)), i, -1)
                if all(len(group[0]) >= 3 for group in groups[i:j])
                and is_card("".join(group[0] for group in groups[i:j]))
            )
            j = next(ends, None)
            # 0.4111111111111111 is a decimal
            if j is not None and not re.search(r"\d\.$", text[max(0, start - 2) : start]):
                yield Span(start, number.start() + groups[j - 1].end(), "CARD")
            i = j or i + 1


def is_card(digits: str) -> bool:
    """Returns whether these digits may be the number of a payment card."""
    if not (digits.isascii() and CARD.fullmatch(digits)):
        return False
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(doubled) + sum(int(d) for d in digits[-1::-2])) % 10 == 0


# ------------------------------------------------------------------------- phone numbers

# Between two digits of a phone number: nothing, a gap, a bracket, a hyphen between blanks.
BETWEEN = rf"(?:{GAP}|{GAP}?\(|\){GAP}?|[{BLANKS}][/\-\u2013][{BLANKS}])?"
LAST = r"\d\d(?!\d)"  # a single digit after a number is a number of its own
# Not in the middle of a date or a time, with a year at its end; nor after a decimal point.
DATE = r"(?!\d\d?([./-])\d\d?\1(?:\d{4}|\d\d)(?!\d|\1))"
NO_DATE = r"(?<!\b\d[/:-])(?<!\b\d\d[/:-])(?<!\b\d{4}[/:-])(?<!\d\.)"
PHONES = (
    # +49 171 1234567, +1 (415) 555-2671, 0049 171 1234567; but not 5+12345678
    re.compile(
        rf"(?<![\w)\]}}+])(?<!\d\.)(?:\+|00{GAP}?)(?:[1-9]|\([1-9]\d{{0,2}}\))"
        rf"(?:{BETWEEN}\d){{4,12}}{BETWEEN}{LAST}"
    ),
    # 0171 1234567, (030) 123456, 01 42 68 53 00; but not 01.02.2024, nor a binary number
    re.compile(
        rf"(?<![\w+^]){NO_DATE}{DATE}(?![01]{{6,}}\b)"
        rf"(?:\((?=0\d{{1,5}}\)))?0[1-9](?:{BETWEEN}\d){{4,8}}{BETWEEN}{LAST}"
    ),
    # 415-555-2671, (415) 555-2671, 1-415-555-2671
    re.compile(
        r"(?<![\w+^])(?<!\d\.)(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])"
        r"[2-9]\d\d[ .-]\d{4}(?!\d)"
    ),
    # 415 555 2671 where no other number stands beside it
    re.compile(r"(?<![\w.,+/^-])(?<!\d )[2-9]\d\d [2-9]\d\d \d{4}(?! ?\d| ?=)"),
)
CALLED = re.compile(
    r"(?:\b(?:tel(?:e(?:phone|fon|fono))?|t[ée]l[ée](?:phone|fono)|phone|mobile?|m[óo]vil"
    r"|cell(?:phone|ular)?|handy|fax|whatsapp|sms|call|dial|ring|text)\b|电话|手机|電話|手機)"
    r"(?:[\s:.#=-]|\b(?:numbers?|no|nr|is|are|at|on|to|me|us|him|her|them|back)\b)*+"
    rf"([+(]?\d(?:{BETWEEN}\d){{3,12}}{BETWEEN}{LAST})",
    re.IGNORECASE,
)


def phones(text: str) -> Iterator[Span]:
    """Yields phone numbers; see the module for what makes a number one."""
    for pattern in PHONES:
        yield from (Span(*match.span(), "PHONE") for match in pattern.finditer(text))
    yield from (Span(*match.span(1), "PHONE") for match in CALLED.finditer(text))


# ------------------------------------------------------------------------- names

WORD = re.compile(rf"[{SYLLABLE}]|{LETTER}+")
HEAD = 4  # characters by which it is told what may stand here


def listed(names: Iterable[str]) -> Find:
    """Returns a function that finds these names as whole words, in any case and with any blanks."""
    found = [words for name in names if (words := list(WORD.finditer(name)))]
    known = {_folded(words[0].string[words[0].start() : words[-1].end()]) for words in found}
    firsts = {_folded(words[0][0]) for words in found}
    longest = max(map(len, found), default=0)

    def find(text: str) -> Iterator[Span]:
        words, past = list(WORD.finditer(text)), 0
        for i, first in enumerate(words):
            start = first.start()
            if start < past or _folded(first[0]) not in firsts:
                continue
            ends = (last.end() for last in reversed(words[i : i + longest]))
            end = next((end for end in ends if _folded(text[start:end]) in known), None)
            if end is not None:
                past = end
                yield Span(start, end, "NAME")

    return find


def _folded(name: str) -> str:
    """Returns a name without what spellings differ in."""
    name = unicodedata.normalize("NFKC", name).replace("\u2019", "'")
    return " ".join(name.casefold().split())


def returned(spec: str) -> Find:
    """Returns a function that finds what the function that `spec` names returns for a text."""
    function = functions.load(spec, SETTING)

    def find(text: str) -> Iterator[Span]:
        try:
            names = list(function(text))
        except Exception as error:  # the user's code; its words may be the text's
            raise UserError(
                f"{SETTING}={spec} raised {type(error).__name__}: mend the function"
            ) from None
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"{SETTING}={spec} must return strings of the text, and nothing else")
        yield from (Span(start, end, "NAME") for start, end in occurrences(text, names))

    return find


def occurrences(text: str, parts: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yields where one of the parts stands in `text`, but not inside a longer word or number.

    In one pass, since a long text may have as many parts as words.
    """
    lengths: dict[str, set[int]] = {}  # of the parts that begin so
    for part in filter(None, parts):
        lengths.setdefault(part[:HEAD], set()).add(len(part))
    heads, parts = sorted({len(head) for head in lengths}), frozenset(parts)
    for start in range(len(text)):
        ends = (
            start + length
            for head in heads
            if start + head <= len(text)
            for length in lengths.get(text[start : start + head], ())
            if start + length <= len(text) and text[start : start + length] in parts
        )
        for end in ends:
            if not (_inside_word(text, start) or _inside_word(text, end)):
                yield start, end


def _inside_word(text: str, at: int) -> bool:
    return at > 0 and re.fullmatch(f"{LETTER}{{2}}", text[at - 1 : at + 1]) is not None


# ------------------------------------------------------------------------- all of it


def finder(names: str) -> Find:
    """Returns a function that finds all of it, more telling kinds first; names: the setting.

    Raises UserError where that is neither a file with names nor a function.
    """
    kinds: list[Find] = [emails, ibans, ip_addresses, cards, phones]
    if ".py:" in names:
        kinds.append(returned(names))
    elif names:
        kinds.append(listed(_read(pathlib.Path(names).expanduser())))
    return lambda text: itertools.chain.from_iterable(find(text) for find in kinds)


def _read(path: pathlib.Path) -> list[str]:
    """Returns the names of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{SETTING}={str(path)!r} must be a text file (UTF-8) with a name a line, or "
            "path/to/file.py:function"
        ) from None
    names = [line.strip() for line in lines if WORD.search(line)]
    if not names:
        raise UserError(f"{SETTING}: {path} holds no name")
    return names
