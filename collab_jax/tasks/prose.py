r"""The answer out of what a model writes around it: boxes, sentences, math in a text.

`boxed` is what stands in the last \boxed, or in several that are listed. `answer_in` takes the
answer out of a sentence, and `last_answer` out of a whole response without tags.
"""

import re

# ---- boxes

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITERS = re.compile(r"\$+|\\[()\[\]]|\\q?quad|\\(?:text|mbox|textrm)\s*\{|[{}~]|\\[,;: ]")
# What may stand between the parts of one answer: "\boxed{3} boys and \boxed{4} girls", "x = ".
_BETWEEN = re.compile(r"(?:[a-zA-Z()\s]*(?:[,;&]|\b(?:and|or)\b))?\s*(?:[a-zA-Z]\w*\s*=)?\s*")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each closed \boxed or \fbox, in order, none within another."""
    found, at = [], 0
    while match := _BOX.search(text, at):
        depth, at = 1, match.end()
        for i in range(at, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
            if depth == 0:
                found.append((match.start(), i + 1, text[at:i]))
                at = i + 1
                break
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
_REASON = re.compile(r"[,;(]?\s*\b(?:because|since)\b", re.IGNORECASE)
_REST = re.compile(  # what follows a stated number: "9 apples in 3 boxes"
    r"\s*(?:(?<!\\)\b(?:in|for|after|from|at|when|if|with|which|so|left|by)\b"
    r"|(?<!\\)[.;!]\s|(?<!\\),\s+(?![-\d\\]))"
)
# A number that stands alone, no part of a formula, a time or a larger number.
_NUMBER = re.compile(
    r"(?<![^\s$€£])-?(?:\\?[$€£]\s*)?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:[.,]?\d+)(?:/\d+)?"
    r"(?=[.,;:!?)]*(?:\s|$)|\\?[%$€£])(?!\s*(?:[-+*/^=<>\\]|hundred|thousand|[mbtr]+illion|dozen))"
)
_NOT_JUST = re.compile(  # before a number: "not 9", "at least 9", "4 + 9"
    r"(?:\b(?:not|minus|than|least|most|about|around|approximately|roughly|nearly|almost|between)\s+"
    r"|between\s+\S+\s+and\s+|n't\s+|[-+*/^<>]\s*)(?:\w+\s+)?$"
)


def _has_words(text: str) -> bool:
    """True where a text, its commands aside, holds a word."""
    return _WORD.search(_COMMAND.sub(" ", text)) is not None


def answer_in(text: str) -> str:
    """The answer out of the sentence around it; the text itself where none is found."""
    if (box := boxed(text)) is not None:
        return box
    text = _EMPHASIS.sub(lambda match: next(filter(None, match.groups())), text.strip())
    text = re.sub(r"\bnegative (?=\d)", "-", text)
    if not _has_words(text):
        return text
    if (rest := after_cue(text)) is not None:
        text = _SENTENCE_END.split(rest)[0].strip()
        if not _has_words(text):
            return text
    maths = [
        (match.start(), match.end(), next(filter(None, match.groups())))
        for match in _MATH.finditer(text)
    ]
    if maths and not _NUMBER.search(text[maths[-1][1] :]):
        listed = _last_listed(text, maths)
        if listed and not re.fullmatch(r"\s*[a-zA-Z]\s*", maths[-1][2]):
            return listed
    return _stated(_DELIMITERS.sub(" ", text) if maths else text, rest is not None)


def after_cue(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:" of a text; None: nothing does."""
    cues = list(_CUE.finditer(text))
    return (text[cues[-1].end() :].lstrip("}*: \n").rstrip("* \n") or None) if cues else None


def _stated(sentence: str, after_cue: bool) -> str:
    """What a sentence without math delimiters states: the part after its verb, or its number.

    after_cue: it is the end of a sentence, what follows "the answer is".
    """
    if (conclusion := _REASON.split(sentence, maxsplit=1)[0]).strip():  # "9, because 4 + 5 = 9"
        sentence = conclusion
    numbers = _numbers(sentence)
    verbs = list(_VERB.finditer(sentence))
    stating = [verb for verb in verbs if not _in_equation(sentence, verb)]
    starts = [0] * after_cue + [verb.end() for verb in stating]
    for start in reversed(starts):
        after = _REST.split(sentence[start:], maxsplit=1)[0].strip().rstrip(".")
        if after and (not _has_words(after) or not numbers):
            return after
        stated = _numbers(after)
        if len(stated) == 1 and not _FORMULA.search(after):
            return stated[0]
        if stated:
            return sentence
    return numbers[0] if len(numbers) == 1 and stating == verbs else sentence


def _in_equation(sentence: str, verb: re.Match) -> bool:
    """True for the "=" of "x + y = 1", which does not state what an answer is."""
    return verb[0].startswith("=") and _FORMULA.search(sentence[: verb.start()]) is not None


def _numbers(sentence: str) -> list[str]:
    """The different numbers that a sentence gives as such."""
    found = [
        match[0].strip()
        for match in _NUMBER.finditer(sentence)
        if not _NOT_JUST.search(sentence[: match.start()])
    ]
    return list(dict.fromkeys(found))


_LETTER = re.compile(
    r"[(\s]*(?i:option|choice)?[(\s]*([A-J])(?:[).:,]+(?:\s.*)?|\s+-\s.*)?", re.DOTALL
)


def letter(text: str) -> str | None:
    """The letter of a choice that an answer begins with: "B", "(B)", "B. 42", "B) four"."""
    for part in (text, after_cue(text) or "", answer_in(text)):
        plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[*$]", r"\1", part)
        if match := _LETTER.fullmatch(plain.strip(" .\n")):
            return match[1]
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


def last_letter(response: str) -> str | None:
    """The letter of the choice that a response without tags states, or begins or ends with."""
    text = _end(response)
    stated = _last_statement(text)
    lines = text.splitlines() or [""]
    found = (letter(part) for part in (stated or "", lines[0], lines[-1]))
    return next(filter(None, found), None)


def last_line(response: str) -> str | None:
    """The answer that a response without tags states, else its last line; None: it is empty."""
    text = _end(response)
    return _last_statement(text) or (text.splitlines() or [""])[-1].strip() or None
