"""Multiple choice with letters: MMLU, for evaluation, and questions of your own, for training too.

The questions of a task NAME are in NAME_train.jsonl, NAME_test.jsonl and, if wanted,
NAME_validation.jsonl, split as those of `jsonl.py`. A line has `id`, `problem`, `choices` (a list)
and `answer` (the letter of the right one); `type`, say the subject, is the stratum.

A training file often has its right answers in a pattern, which a model would learn. So the choices
of training and validation come in the order of their hashes, but for questions whose choices speak
of each other's places ("A and B", "all of the above"). A test is shown as its authors wrote it.
"""

import re
from collections.abc import Callable

from ml_collections import ConfigDict

from collab_jax.tasks import jsonl, math, prose, rows, splits
from collab_jax.tasks.base import SPLITS, Example, Task, TaskError

LETTERS = "ABCDEFGHIJ"
_CLOUD_PROMPT = (
    "Answer this question. End with the letter of the right choice between <answer> and </answer>."
    "\n\n{problem}"
)
_PLACES = re.compile(  # "A and C", "both (a) and (b)", "B, C only", "all of the above"
    r"\b[a-j]\)?(?:\s*[,&/]\s*|\s+)(?:(?:and|or|nor)\s+)?\(?[a-j]\b|\b(?:only [a-j]|[a-j] only)\b"
    r"|\b(?:above|below|preceding|previous|former|latter|following|other (?:choices|options))\b",
    re.IGNORECASE,
)
_LETTER_ALONE = re.compile(r"\s*\(?[A-Ja-j][).]?\s*")
_LETTER_AND_TEXT = re.compile(
    r"(?i:(?:the )?(?:(?:correct|right|best) )?(?:option|choice|answer|letter)(?: is)?\b[-–:\s]*)?"
    r"\(?([A-Ja-j])[).:,;]*\s+(?:[-–—=]\s+)?(.*)",
    re.DOTALL,
)


def shuffled(question: str, choices: tuple[str, ...], answer: str) -> tuple[tuple[str, ...], str]:
    """The choices in the order of their hashes, and the letter that the answer then has.

    Both depend on the question and its choices alone. Choices that name places stay in theirs.
    """
    if any(_PLACES.search(choice) for choice in choices):
        return choices, answer
    order = splits.shuffled(range(len(choices)), lambda i: f"{question}\n{choices[i]}")
    return tuple(choices[i] for i in order), LETTERS[order.index(LETTERS.index(answer))]


def chosen(example: Example, response: str) -> str | None:
    """The letter that a response chooses: "B", "(b)", "The answer is B. 42".

    The text of one choice, word for word, is its letter too; None where nothing is chosen.
    """
    answer = math.extract(response)
    return None if answer is None else _reader(example)(answer)


def _reader(example: Example) -> Callable[[str], str | None]:
    """Reads the letter of the example's choice that a text states, by its text or as a letter."""
    _, choices, _ = example.problem
    plain = tuple(map(prose.unwrapped, choices))

    def own_text(text: str) -> str | None:
        return _by_text(choices, text) or _by_text(plain, prose.unwrapped(text))

    def read(text: str) -> str | None:
        if found := own_text(text):
            return found
        stated = prose.after_cue(text) or ""
        if found := own_text(stated):
            before = text.rpartition(stated)[0]  # "B. Wait, the answer is 43" names two
            return None if prose.letters(before) - {found} else found
        letter = prose.letter(text)
        return letter if letter in tuple(LETTERS[: len(choices)]) else None

    return read


def _by_text(choices: tuple[str, ...], text: str) -> str | None:
    """The letter of the one choice that a text is, or is with its letter before it: "B. false"."""
    texts = {x: choice for x, choice in zip(LETTERS, choices, strict=False) if choice}
    same = [letter for letter, choice in texts.items() if jsonl.same(choice, text)]
    if len(same) == 1 and not _LETTER_ALONE.fullmatch(text):  # "B" is a letter first
        return same[0]
    match = _LETTER_AND_TEXT.fullmatch(text)
    letter = match[1].upper() if match else ""
    return letter if match and letter in texts and jsonl.same(texts[letter], match[2]) else None


def load(task: ConfigDict, split: str) -> list[Example]:
    """The examples of a split; `example.problem` is (question, choices, letter).

    Some of MMLU's high-school mathematics are problems of MATH's training split: these say so
    (`Example.seen`). Raises TaskError for a row that is no question with choices.
    """
    found = jsonl.load(task.data_dir, split, ("answer", "choices"), prefix=f"{task.name}_")
    examples = []
    for row in (example.problem for example in found):
        question, choices, answer = row["problem"], _choices(row), row["answer"]
        if answer not in tuple(LETTERS[: len(choices)]):
            raise TaskError(
                f"{task.name}, row {row['id']}: "
                f"the answer {answer!r} is not the letter of one of its choices"
            )
        if split != "test":
            choices, answer = shuffled(question, choices, answer)
        problem = question, choices, answer
        seen = "math" if row.get("math_train_id") else ""
        examples.append(Example(row["id"], rows.stratum(row), problem, seen=seen))
    return splits.shuffled(examples, _question)


def _choices(row: dict) -> tuple[str, ...]:
    """The choices of a row, as text. Raises TaskError where they are not 2 to 10 texts.

    Two may be equal, as in some of MMLU's: only their letters are read, their text is neither's.
    """
    choices = row["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise TaskError(f"row {row['id']}: choices must be a list of 2 to {len(LETTERS)}")
    for choice in choices:
        if not isinstance(choice, str | int | float) or not str(choice).strip():
            raise TaskError(
                f"row {row['id']}: the choice {choice!r} is no text or number: "
                "write what it says, or take it out"
            )
    return tuple(map(str, choices))


def _question(example: Example) -> str:
    question, choices, _ = example.problem
    lines = [f"{x}. {choice}" for x, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines])


def _solution(example: Example) -> tuple[str, str]:
    """The text of the right choice, which is the thought of a demonstration, and its letter."""
    _, choices, answer = example.problem
    return choices[LETTERS.index(answer)], answer


def make_task(config: ConfigDict) -> Task:
    """The task of the files; `config.task.prompt` has {problem} where question and choices go."""
    can_train = config.task.name != "mmlu"
    return rows.make_task(
        config,
        load=lambda split: load(config.task, split),
        problem=_question,
        gold=lambda example: example.problem[2],
        compare=lambda examples, responses: [
            chosen(e, r) == e.problem[2] for e, r in zip(examples, responses, strict=True)
        ],
        cloud_prompt=_CLOUD_PROMPT,
        splits=SPLITS if can_train else ("test",),
        read_answer=lambda example, response: prose.last_letter(response, _reader(example)),
        demonstrations=(
            lambda seed: rows.demonstrations(
                seed,
                load(config.task, "train"),
                _solution,
                config.task.demo_give_up,
                config.text.marker,
            )
        )
        if can_train
        else None,
    )
