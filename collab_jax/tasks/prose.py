r"""The answer out of what a model writes around it: boxes, sentences, math in a text.

`boxed` is what stands in the last \boxed, or in several that are listed. `answer_in` takes the
answer out of a sentence, and `last_answer` out of a whole response without tags.
"""

import re
import unicodedata
from collections.abc import Callable

from collab_jax.tasks import denials

# ---- boxes

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)[{}]")
_DELIMITERS = re.compile(r"\$+|\\[()\[\]]|\\q?quad|\\(?:text|mbox|textrm)\s*\{|[{}~]|\\[,;: ]")
# What may stand between the parts of one answer: "\boxed{3} boys and \boxed{4} girls", "x = ".
_BETWEEN = re.compile(r"(?:[a-zA-Z()\s]*(?:[,;&]|\b(?:and|or)\b))?\s*(?:[a-zA-Z]\w*\s*=)?\s*")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each closed \boxed or \fbox, in order, none within another."""
    found, opened = [], []  # opened: (start of the brace, start of its content)
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.start(), brace.end()))
        elif opened:
            start, inner = opened.pop()
            if inner - start > 1:  # a box, and no plain brace
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, brace.end(), text[inner : brace.start()]))
    return found


def boxed(text: str) -> str | None:
    """The content of the last box, or of the last boxes where they are one list; None: no box."""
    contents = _last_listed(text, boxes(text))
    if contents is None:
        return None
    inner = boxed(contents)
    return contents if inner is None else inner


def _last_listed(text: str, parts: list[tuple[int, int, str]]) -> str | None:
    """The last of the (start, end, content), with those before it that it makes a list with."""
    if not parts:
        return None
    listed = [parts[-1]]
    for part in parts[-2::-1]:
        if not _BETWEEN.fullmatch(_DELIMITERS.sub(" ", text[part[1] : listed[0][0]])):
            break
        listed.insert(0, part)
    return ", ".join(dict.fromkeys(content.strip() for _, _, content in listed))


# ---- sentences

_EMPHASIS = re.compile(r"\*\*(.+?)\*\*|__(.+?)__|`([^`]+)`", re.DOTALL)
_CUE = re.compile(
    r"\b(?:answer|result|solution|option|choice)s?\b[^.\n$\d\\=]{0,40}?(?:\bis\b|\bare\b|:|=)\s*:?"
    r"|^\s*(?:answer|option|choice)\b",
    re.IGNORECASE,
)
# A clause that goes on from what was said before it: "it is not 8, so the answer is 9".
_CLAUSE = re.compile(r"[.!?;:]\s|\n|,\s+(?:but|so|then|thus|hence|therefore)\b", re.IGNORECASE)
_MINUS = re.compile(r"(?<!\d )\b(?:negative|minus)\s+(\$+|\\[(\[])?\s*(?=[\d\\])")
_OPERATION = re.compile(r"\s*[-+*/^<>]\s*[\d$\\(]")
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])|\n\s*\n")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_COMMAND = re.compile(r"\\[a-zA-Z]+(?:\s*\{(?:matrix|[bp]matrix|array)\})?")
_WORD = re.compile(r"(?!(?:sin|cos|tan|log|and|or|mod|sqrt)\b)[a-zA-Z]{2,}")
_VERB = re.compile(
    r"(?:\b(?:is|are|was|were|equals?|be|has|have|gets?|makes?|costs?)\b|'s\b|=|(?<!\d):|:(?!\d))"
    r"(?:\s*\b(?:equal to|exactly|only|just|also|then|therefore|now|a total of)\b)*\s*"
)
_FORMULA = re.compile(  # with a variable in it
    r"[\\^_]|\d[a-zA-Z]|\b[a-zA-Z]\s*[-+*]|[-+*]\s*[a-zA-Z]\b"
)
_REST = re.compile(  # what follows a stated number: "9 apples in 3 boxes"
    r"\s*(?:(?<!\\)\b(?:in|for|after|from|at|when|if|with|which|so|left|by)\b"
    r"|(?<!\\)[.;!]\s|(?<!\\),\s+(?![-\d\\]))"
)
# A number that stands alone, no part of a formula, a time or a larger number.
_NUMBER = re.compile(
    r"(?<![-+*/^<>] )(?<![^\s$€£])-?(?:\\?[$€£]\s*)?-?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:[.,]?\d+)(?:/\d+)?"
    r"(?=[.,;:!?)]*(?:\s|$)|\\?[%$€£])(?!\s*(?:[-+*/^=<>\\]|pi\b))"
)
# "9 is half of it" or "9 was a slip", but not "9 is the answer".
_NOT_AFFIRMED = re.compile(
    r"\W*[\d.,/]+\s+(?:is|was)\s+(?!(?:correct|right|left|how|what"
    r"|(?:the|my|our|his|her|their)\s+(?:\w+\s+)?"
    r"(?:answer|result|solution|total|number|sum|difference|product|value|amount|cost|price))\b)",
    re.IGNORECASE,
)


def _has_words(text: str) -> bool:
    """True where a text, its commands aside, holds a word."""
    return _WORD.search(_COMMAND.sub(" ", text)) is not None


def answer_in(text: str) -> str:
    """The answer out of the sentence around it; the text itself where none is found."""
    if (box := boxed(text)) is not None:
        return box
    text = _EMPHASIS.sub(lambda match: next(filter(None, match.groups())), text.strip())
    text = denials.without_asides(_MINUS.sub(r"\1-", text))
    if not _has_words(text):
        return text
    rest = after_cue(text)
    sentence = text if rest is None else _SENTENCE_END.split(rest)[0].strip()
    if denials.taken_back(rest or text):
        return text
    if denials.denied(rest or text):
        return sentence if denials.denied(sentence) else text
    answer = _stated(sentence, rest is not None) if _has_words(sentence) else sentence
    one_number = _ANY_NUMBER.fullmatch(_DELIMITERS.sub(" ", answer).strip(" ."))
    return text if one_number and denials.undecided(text[_clause_start(text) :]) else answer


def _clause_start(text: str) -> int:
    """Where the clause begins that has the last "the answer is"; 0 where none has."""
    cues = list(_CUE.finditer(text))
    return max([0, *(c.end() for c in _CLAUSE.finditer(text, 0, cues[-1].start()))]) if cues else 0


def after_cue(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:" of a text; None: nothing does.

    Where the words before it deny it, as in "the wrong answer is", they are part of it.
    """
    cues = list(_CUE.finditer(text))
    rest = text[cues[-1].end() :].lstrip("}*: \n").rstrip("* \n") if cues else ""
    if not rest:
        return None
    head = text[_clause_start(text) : cues[-1].end()]
    return f"{head} {rest}" if denials.denied(head) else rest


def _stated(sentence: str, after_cue: bool) -> str:
    """What a sentence with words states: its math, the part after its verb, or its number.

    after_cue: it is the end of a sentence, what follows "the answer is".
    """
    maths = [
        (match.start(), match.end(), next(filter(None, match.groups())))
        for match in _MATH.finditer(sentence)
    ]
    words = re.sub(r"\s+", " ", _DELIMITERS.sub(" ", sentence)) if maths else sentence
    if _NOT_AFFIRMED.match(words):
        return sentence
    listed = _stated_in_math(sentence, maths) if maths else None
    return _stated_in_words(words, after_cue) if listed is None else listed


def _stated_in_math(sentence: str, maths: list[tuple[int, int, str]]) -> str | None:
    """What the last (start, end, content) of a sentence state; None where words must tell."""
    start, end, content = maths[-1]
    if _NUMBER.search(sentence[end:]) or re.fullmatch(r"\s*[a-zA-Z]\s*", content):
        return None
    for left, right, _ in maths:  # "10 - $5$"
        if sentence[:left].rstrip().endswith(tuple("-+*/^<>")):
            return None
        if _OPERATION.match(sentence, right):
            return None
    verbs = _VERB.finditer(sentence, 0, start)
    after = sentence[max([0, *(verb.end() for verb in verbs)]) :]
    return sentence if denials.altered(after) else _last_listed(sentence, maths)


def _stated_in_words(sentence: str, after_cue: bool) -> str:
    """What a sentence without math delimiters states: the part after its verb, or its number."""
    numbers = _numbers(sentence)
    verbs = list(_VERB.finditer(sentence))
    stating = [verb for verb in verbs if not _in_equation(sentence, verb)]
    starts = [0] * after_cue + [verb.end() for verb in stating]
    for start in reversed(starts):
        if denials.altered(sentence[start:]):
            return sentence
        after = _REST.split(sentence[start:], maxsplit=1)[0].strip().rstrip(".")
        if after and (not _has_words(after) or not numbers):
            return after
        stated = _numbers(after)
        if len(stated) == 1 and not _FORMULA.search(after):
            return stated[0]
        if stated:
            return sentence
    alone = len(numbers) == 1 and stating == verbs and not denials.altered(sentence)
    return numbers[0] if alone else sentence


def _in_equation(sentence: str, verb: re.Match) -> bool:
    """True for the "=" of "x + y = 1", which does not state what an answer is."""
    return verb[0].startswith("=") and _FORMULA.search(sentence[: verb.start()]) is not None


def _numbers(sentence: str) -> list[str]:
    """The different numbers that a sentence gives as such."""
    return list(dict.fromkeys(match[0].strip() for match in _NUMBER.finditer(sentence)))


# ---- letters of choices

_WRAPPED = re.compile(  # the letter or the words in a text: "\text{B}", "**B**", "'B'", "[B]"
    r"\\(?:(?:text|math)[a-z]*|mbox|emph|underline)\s*\{([^{}]*)\}"
    r"|\{\\(?:bf|it|rm|sf|tt|em)\b([^{}]*)\}|[*$`]|\\[()\[\]]|^\s*#+"
    r"|[\"'“‘<{\[]\s*([A-Ja-j])\s*[\"'”’>}\]]"
)
_SPACE = re.compile(r"\\(?:q?quad\b|[,;:! ])")
_TITLE = r"(?:(?i:option|choice|letter|answer)\b[-–:\s]*)?[(\s]*"
_LETTER = re.compile(
    r"(?:(?:[-=]?>|[→⇒∴])\s*)?(?i:(?:so|then|thus|hence|therefore|but)\b[,:]?)?[(\s]*"
    rf"{_TITLE}([A-J])((?:[).:,;!。]+(?:\s.*)?)?|\s*\n.*|\s+[-–—=]\s.*|\s+\([^()]*\))",
    re.DOTALL,
)
_SMALL_LETTER = re.compile(  # "b", "(b)", "b) four", "option b", "b:"
    rf"{_TITLE}([a-j])(\)(?:\s.*)?|:|)", re.DOTALL
)
_NAMED = re.compile(  # "B is correct", "option B is the answer", "I choose B"
    r"(?:(?:^|[,.:;]\s+|\b(?i:option|choice|answer|letter|statement)\s+)\(?([A-J])\)?\s+is\s+"
    r"(?:the\s+)?(?:(?:most\s+)?(?:correct|right|best|true)|answer|choice)\b"
    r"|\b(?i:choose|pick|select|go\s+with)\s+(?:(?i:option|choice|answer|letter)\s+)?"
    r"\(?([A-J])(?=\)|[.:,;!]|\s*$|\s+(?:because|since|as)\b))"
)
_ALONE = re.compile(  # letters that may be choices: no I, which is a number or a word more often
    r"\b(?:as|by|from|in|like|of|the|with)\s+[A-J]\.\s[a-z]"  # "such as E. coli", no choice
    r"|(?<![\w-])(?:([B-HJ])(?![\w-])"
    r"|(A)(?=[^\w\s'’-]|\s*$|\s+(?:is|are|was|and|or|but)\b)"  # no article
    r"|\(?([a-j])\))"
)
_COMBINED = re.compile(r"[).:]+\s+(?:(?i:both|neither)\s+)?[A-J]\s+(?:and|or|nor)\s+[A-J]")
_MARK = re.compile(r"(?<!\w)([A-J])[).:]")
# "A is", "A: wrong", but not the text of a choice, as "A. without a name" or "A. Wrong, wrong".
_ABOUT_LETTER = re.compile(
    r"\s*\n.*|[-().:,;!\s]*(?:(?:(?:(?i:that|this)\s+)?"
    r"(?:(?:is|was|can|seems|looks)\b|isn't|(?:cannot|can't) be\b)|(?i:that's)\b).*|[a-z]+\W*)",
    re.DOTALL,
)


def unwrapped(text: str) -> str:
    r"""A text without what sets it: "B. 42" for "**B.** 42" and "\textbf{B.}\ 42." alike."""
    plain = _SPACE.sub(" ", unicodedata.normalize("NFKC", text))
    return _WRAPPED.sub(r"\1\2\3", plain).strip(" .。\n")


def letters(text: str) -> set[str]:
    """The letters, in capitals, that stand in a text as those of choices do."""
    return {name.upper() for names in _ALONE.findall(text) for name in names if name}


def letter(text: str) -> str | None:
    """The letter of a choice that an answer states: "B", "(b)", "B. 42", "B is correct".

    None where it names another one too, or takes it back ("A and B", "A: wrong"), and for a letter
    that is part of what a sentence says ("A cat", "vitamin C").
    """
    whole = denials.without_asides(unwrapped(text))
    listed = "AB" in "".join(_MARK.findall(whole))  # a list of the choices comes first
    for part in ("" if listed else whole, after_cue(text) or "", answer_in(text)):
        plain = denials.without_asides(unwrapped(part)).strip(" .\n")
        if match := _LETTER.fullmatch(plain) or _SMALL_LETTER.fullmatch(plain):
            name, rest = match[1].upper(), match[2]
            denied = _ABOUT_LETTER.fullmatch(rest) is not None and denials.denied(rest)
            others = set() if _COMBINED.fullmatch(rest) else letters(rest) - {name}
            return None if denied or others else name
        if named := {name for names in _NAMED.findall(plain) for name in names if name}:
            alone = len(named | letters(plain)) == 1
            return named.pop() if alone and not denials.denied(plain) else None
    return None


# ---- responses without tags

LENGTH = 2000  # characters at the end of a response that are read
_TAG = re.compile(r"</?(?:answer|think)>")
_HASHES = re.compile(r"####\s*(.+)")
_ANY_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?!\w)")


def _last_statement(text: str) -> str | None:
    """What a text says is the answer: its last box, what follows "####" or "the answer is"."""
    if (box := boxed(text)) is not None:
        return box
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip()
    if rest := after_cue(text):
        return _SENTENCE_END.split(rest)[0].split("\n")[0].strip(" .*") or None
    return None


def _end(response: str) -> str:
    return _TAG.sub("\n", response[-LENGTH:]).strip()


def last_answer(response: str) -> str | None:
    """The answer that a response without tags states, else its last number; None: neither."""
    text = _end(response)
    if stated := _last_statement(text):
        return stated
    numbers = _ANY_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_letter(response: str, read: Callable[[str], str | None] = letter) -> str | None:
    """The letter of the choice that a response without tags states, or begins or ends with.

    read: reads the letter of a statement or a line. Lines with different letters are a list of
    choices, and choose none.
    """
    text = _end(response)
    if found := read(_last_statement(text) or ""):
        return found
    lines = text.splitlines() or [""]
    of_lines = [read(line) for line in lines]
    if of_lines[-1] == lines[-1].strip(" .*()"):
        return of_lines[-1]
    ends = of_lines[-1:] if len(response) > LENGTH else [of_lines[0], of_lines[-1]]
    chosen = set(ends) - {None}
    return chosen.pop() if len(chosen) == 1 and len(set(of_lines) - {None}) == 1 else None


def last_line(response: str) -> str | None:
    """The answer that a response without tags states, else its last line; None: it is empty."""
    text = _end(response)
    return _last_statement(text) or (text.splitlines() or [""])[-1].strip() or None
