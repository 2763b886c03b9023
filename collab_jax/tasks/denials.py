"""Words by which a text takes back its number, makes another one of it, or leaves open which.

A text that holds them is compared as it stands: nothing is dropped around its number.
"""

import re

NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

_MARKUP = re.compile(r"\\(?:text|mbox|math)[a-z]*|\\q?quad|\\[()\[\],;:! ]|\*\*|[{}$€£~]|\s")
_DIGITS = r"-?\d+(?:[.,/]\d+)*"
_NUMERAL = rf"(?:{'|'.join(NUMERALS)}|thirty|forty|fifty|sixty|seventy|eighty|ninety)\b"
_NUMBER = rf"(?:-?\.?\d|{_NUMERAL})"  # its beginning
_PART = (
    r"(?:half|quarter|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    r"|[a-z]+teenth|[a-z]+tieth|hundredth|thousandth|[a-z]+illionth)"
)
_PARTS = rf"(?:halves\b|{_PART}s\b|{_PART}(?=\W*$| of\b))"  # no "9 third graders"

_DENIED = re.compile(
    r"n't\b|\b(?:not|never|cannot|neither|nor|none|wrong|incorrect|false|untrue|invalid|impossible"
    r"|mistake[ns]?|except|excluding|without|unlike|hardly|unequal|unless|reject(?:ed)?|ruled? out"
    r"|(?:anything|everything|nothing|all|numbers?) but|other than|rather than|instead of|far from"
    rf"|differ(?:s|ent) from|doubt\w*|used to be|(?:is|was) too|no (?:longer|way|{_NUMBER})"
    r"|no(?=\W*$))\b",
    re.IGNORECASE,
)
_BEFORE = (  # "at least 9", "twice 9"
    r"\b(?:than|least|most|about|around|approximately|roughly|nearly|almost|between|over|under"
    r"|above|below|beyond|beneath|past|up to|exceed(?:s|ing)?|within|twice|thrice|double|triple"
    r"|times|plus|minus|negative|power|divided by|multiplied by|near|close to|root|log|ln|sin|cos"
    rf"|tan)(?: [a-z]+)? {_NUMBER}"
)
_OF = (  # "half of 9", "the sum of 9 and"
    rf"\b(?:{_PART}|root|square|cube|sum|product|difference|quotient|ratio|remainder|factorial"
    r"|log[a-z]*|reciprocal|inverse|opposite|absolute value|multiple|factor|divisor|percent)"
    rf" (?:of|between)(?: the| a| an)? {_NUMBER}"
)
_AFTER = (  # "9 thirds", "9 or more", "9 times as many"
    rf"(?:\d|\b{_NUMERAL})\)?[ -](?:{_PARTS}|(?:squared|cubed|factorial|plus|minus|less|over|mod"
    r"|choose|divided|multiplied|to the|below|under|short of|at (?:most|least)|(?:min|max)imum"
    r"|negative|off|double|in (?:binary|hex[a-z]*|octal|base)"
    r"|(?:and|or) (?:more|less|fewer|so|higher|lower|greater|above|below|over|under|up|beyond)"
    r"|ish|tens|pairs?|scores?|gross|bn|mil|grand|lakhs?|crores?|dozens?|hundreds?|thousands?"
    rf"|(?-i:k)|[a-z]{{1,4}}illions?|point(?= )|times(?= \w))\b|from {_NUMBER}|{_NUMERAL})"
)
_AND_A_PART = rf"\band (?:a|an|{_NUMBER}\w*)[ -](?:{_PART}\b|{_PARTS})"
_ALTERED = re.compile(rf"{_BEFORE}|{_OF}|{_AFTER}|{_AND_A_PART}|\bgive or take\b", re.IGNORECASE)
_OPEN = re.compile(  # no "May"
    r"\b(?:may|(?i:or|if|could|might|maybe|perhaps|possib\w+|probab\w+|though|although"
    r"|alternative\w*|otherwise|else|depend\w*|(?:in|on) (?:an)?other|vs|versus))\b|\?"
)
_STANDALONE = re.compile(
    rf"(?<![\w.+*/^<>=-])(?<![-+*/^<>] ){_DIGITS}(?![\w^])(?! ?[-+*/^<>=] ?\S)"
    rf"|\b(?!one\b){_NUMERAL}"  # "one" is seldom a number of its own
)
_QUOTED = rf"[$(]*(?:{_DIGITS}|(?-i:[A-J])\b)[$)]*"
_ASIDES = re.compile(
    r"(?<=\S)[,;(]?\s*\b(?:because|since)\b(?:(?![.!?]\s+[A-Z]).)*"  # "9, because 4 + 5 = 9"
    rf"|\bnot {_QUOTED}[,;.]? (?=(?:but|it is|it's|which is)\b)"  # "it is not 8, it is 9"
    rf"|(?<=[\w)$])(?:[,.] (?:and |but )?not| rather than| instead of) {_QUOTED}(?=[.!]?\s*$)"
    r"|\bwho \w+(?: not|n't)\b",  # "9 children who did not go"
    re.IGNORECASE | re.DOTALL,
)


_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|correction|hmm+|oops|whoops|scratch that|re-?check(?:ing)?"
    r"|let me (?:check|see|think|correct|redo|fix))\b",
    re.IGNORECASE,
)


def taken_back(text: str) -> bool:
    """True where a text goes back on what it has said: "The answer is 9. Wait, ..."."""
    return _TAKEN_BACK.search(_plain(text)) is not None


def without_asides(text: str) -> str:
    """A text without its reasons and what it sets apart from its answer: "it is 9, not 8"."""
    return _ASIDES.sub("", text)


def _plain(text: str) -> str:
    return re.sub(" +", " ", _MARKUP.sub(" ", text))


def denied(text: str) -> bool:
    """True where a text says of something that it is not so."""
    return _DENIED.search(_plain(text)) is not None


def altered(text: str) -> bool:
    """True where words make another number of one that a text has: "at least 9", "9 thirds"."""
    return _ALTERED.search(_plain(text)) is not None


def undecided(text: str) -> bool:
    """True where a text offers different numbers, or one under a condition and another."""
    plain = _plain(text)
    numbers = list(_STANDALONE.finditer(plain))
    different = len({number[0] for number in numbers}) > 1
    return different and _OPEN.search(plain, numbers[0].end()) is not None
