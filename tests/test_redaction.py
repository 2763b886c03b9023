"""Personal data leave as placeholders: what is found, what is left alone, and the way back."""

import gzip
import json
import random
import types

import numpy as np
import planted
import pytest
from conftest import ROOT
from fakes import FakeCloud, cloud_config, prompt, texts

from collab_jax import records
from collab_jax.cloud import CachedCloud, Failure, Reply, Store, make_cloud, personal
from collab_jax.cloud.redaction import PLACEHOLDER, Restorer, as_it_is, redact
from collab_jax.cloud.share import with_attempt
from collab_jax.evaluate import in_words
from collab_jax.reports import summary
from collab_jax.rl import cloud_columns
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import make_task
from collab_jax.tasks.base import Example, Verdict

DATA = ROOT.parent / "shared" / "data"
NAMES = ("Anna Schmidt", "O'Brien", "José", "Jean-Luc", "张伟", "김철수")
LISTED = personal.listed(NAMES)


def find(text):
    """What all finders find, with NAMES."""
    return [*personal.finder("")(text), *LISTED(text)]


def sent(text):
    """The text as it leaves."""
    return redact(prompt(text), find).messages[0]["content"]


# ------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("text", "leaves"),
    [
        ("mail anna@x.org, or ANNA@X.ORG.", "mail [EMAIL_1], or [EMAIL_2]."),
        ("<o'neil+a.b@mail.example.co.uk>", "<[EMAIL_1]>"),
        ("пётр@почта.рф and 'jörg@müller.de'", "[EMAIL_1] and '[EMAIL_2]'"),
        ('"a b"@x.org, jose\u0301@x.org', "[EMAIL_1], [EMAIL_2]"),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "IBAN [IBAN_1] please"),
        ("gb82west12345698765432", "[IBAN_1]"),
        ("4111 1111 1111 1111 123, 378282246310005", "[CARD_1] 123, [CARD_2]"),
        ("5555-5555-5555-4444,4111111111111111", "[CARD_1],[CARD_2]"),
        ("from 192.168.001.9:80 to 10.0.0.0/8.", "from [IP_1]:80 to [IP_2]/8."),
        ("ip:2001:db8::1, [fe80::a%eth0]", "ip:[IP_1], [[IP_2]%eth0]"),
        ("::ffff:10.1.2.3 and 2001:DB8:0:0:0:0:0:1: so", "[IP_1] and [IP_2]: so"),
        ("+49 171 1234567, +4917112345678", "[PHONE_1], [PHONE_2]"),
        ("+44 (0)20 7946 0958 or 0044 20 7946 0958", "[PHONE_1] or [PHONE_2]"),
        ("(415) 555-2671/415.555.2672", "[PHONE_1]/[PHONE_2]"),
        ("(030) 1234567, 0171/1234567, 01 42 68 53 00", "[PHONE_1], [PHONE_2], [PHONE_3]"),
        ("Call me at 5551234 3 times", "Call me at [PHONE_1] 3 times"),
        ("Tel.: 98765 43210", "Tel.: [PHONE_1]"),
        ("手机13800138000", "手机[PHONE_1]"),
        ("415 555 2671, 415 555 2672", "[PHONE_1], [PHONE_2]"),
        ("anna  SCHMIDT's and o’brien", "[NAME_1]'s and [NAME_2]"),
        ("Jose\u0301 saw jean-luc; 张伟说", "[NAME_1] saw [NAME_2]; [NAME_3]说"),
        ("김철수는", "[NAME_1]는"),
        ("Anna Schmidt@x.org", "[NAME_1]"),  # what overlaps is one
    ],
)  # fmt: skip
def test_what_is_found(text, leaves):
    assert sent(text) == leaves


@pytest.mark.parametrize(
    "text",
    [
        "49 9 37=95",
        "1,234,567 of 12,345,678,901 at $12.50, 1.234.567,89 and 0.1234567890123456",
        "on 01.02.2024, 2024-01-02 03:04:05, 01/02/2024 10:30, 12/01/2024 10:30, 01-02-24 11:22",
        "1234567890, 9876543210, 4111111111111112, 1234567812345670, 12345678901234567890123",
        "3.1415926535897932, 2.718281828459045, 0.4111111111111111, 1e-05",
        "5+12345678, x+12345678, (a)+12345678, 2^0123456789, 0110101010 in binary",
        "41 11 11 11 11 11 11 11, 4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        "415 555 2671 300, 300 415 555 2671, 415 555 2671=3641, 100 200 3000",
        "1:2::3:6, A:B::C:D, 12:30:45, std::vector, ::, 256.1.1.1, 1.2.3, 1.2.3.4.5",
        "3@.50, 5 apples @ $2, a@b, $a@b$, \\text{123456}, 1900-2000-2100, 900-100=800",
        "The phone company has 1000000 customers; a cell phone costs 1200 dollars.",
        "AB12 and then the next word of a sentence; DE00370400440532013000",
        "The Obrien twins, Annas, Joseph, [EMAIL_1], [NAME_0], [PHONE_1",
    ],
)
def test_what_is_left_alone(text):
    query = redact(prompt(text), find)
    assert query == (prompt(text), {})


def test_planted_data_are_found_in_every_format():
    rows = planted.sentences(150, seed=1)
    find_all = [personal.finder(""), personal.listed(v for _, v, kind in rows if kind == "NAME")]
    for text, value, kind in rows:
        query = redact(prompt(text), lambda text: [s for find in find_all for s in find(text)])
        leaves = query.messages[0]["content"]
        assert not planted.leaked([value], leaves), (kind, text, leaves)
        assert f"[{kind}_1]" in leaves and len(query.originals) == 1
        assert query.restore(leaves) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "share"),
    [("svamp_train", 0), ("gsm8k_test", 0), ("math_test", 0), ("math_train", 3 / 7491)],
)
def test_problems_are_left_alone(file, share):
    path = DATA / f"{file}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no real problems: {path.name} is absent")
    with gzip.open(path, "rt", encoding="utf-8") as rows:
        problems = [json.loads(row)["problem"] for row in rows]
    search = personal.finder("")
    changed = [text for text in problems if next(iter(search(text)), None)]
    assert len(changed) <= share * len(problems), changed


# ------------------------------------------------------------------------------- and the way back

PIECES = (
    "[EMAIL_1]", "[NAME_2]", "[EMAIL_", "1]", "[", "]", "_", "[[", "[PHONE_01]", "[EMAIL_٣]",
    "a@b.co", "A@b.co", "+49 171 1234567", "4111111111111111", "José", "jose\u0301", "anna schmidt",
    "张伟", "10.0.0.1", "DE89370400440532013000", " ", "\n", "7", "x", "\u200d", "𝔸", "\ud7ff", "ß",
    "İ", "é", "=", ".", "@",
)  # fmt: skip


def arbitrary(draw):
    """A text of pieces that are, look like, or come near to personal data and placeholders."""
    return "".join(
        draw.choice(PIECES) if draw.random() < 0.8 else chr(draw.randrange(1, 0xD800))
        for _ in range(draw.randrange(12))
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_was_redacted_is_restored_whole_and_in_pieces(seed):
    draw = random.Random(seed)
    for _ in range(100):
        messages = [
            {"role": "user", "content": arbitrary(draw)} for _ in range(draw.randrange(1, 4))
        ]
        query = redact(messages, find)
        for message, leaving in zip(messages, query.messages, strict=True):
            assert query.restore(leaving["content"]) == message["content"]
            restorer, out, rest = Restorer(query), "", leaving["content"]
            while rest:
                n = draw.randrange(1, 6)
                out, rest = out + restorer.feed(rest[:n]), rest[n:]
            assert out + restorer.finish() == message["content"]
        written = {look for m in messages for look in PLACEHOLDER.findall(m["content"])}
        assert not written & query.originals.keys()


def test_only_what_may_become_a_placeholder_of_the_query_is_held_back():
    restorer = Restorer(redact(prompt("anna@x.org, bob@x.org"), find))
    fed = [
        restorer.feed(c) for c in ("a[", "x", "[EM", "AIL_2", "] [NA", "[", "EMAIL_1", "1]", "[E")
    ]
    assert fed == ["a", "[x", "", "", "bob@x.org [NA", "", "", "[EMAIL_11]", ""]
    assert restorer.finish() == "[E" and restorer.finish() == ""


def test_a_value_has_one_placeholder_in_a_conversation_and_its_next_turns():
    turns = [
        {"role": "system", "content": "You help Anna Schmidt."},
        {"role": "user", "content": "Call 5551234. I wrote [NAME_2] and 15551234."},
        {"role": "assistant", "content": "Whom, José or Anna Schmidt?"},
        {"role": "user", "content": "José, 5551234!"},
    ]
    query = redact(turns, find)
    assert [m["content"] for m in query.messages] == [
        "You help [NAME_1].",
        "Call [PHONE_1]. I wrote [NAME_2] and 15551234.",
        "Whom, [NAME_3] or [NAME_1]?",
        "[NAME_3], [PHONE_1]!",
    ]
    assert [m["role"] for m in query.messages] == [m["role"] for m in turns]
    for n in range(1, 5):
        assert redact(turns[:n], find).messages == query.messages[:n]
    shared = redact(with_attempt(turns, "So José has 5551234"), find)
    assert shared.messages[-1]["content"].endswith("So [NAME_3] has [PHONE_1]")


# ------------------------------------------------------------------------------- names of one's own


@pytest.mark.parametrize(
    ("text", "parts", "at"),
    [
        ("Ann, Anna, Ann", {"Ann"}, [(0, 3), (11, 14)]),
        ("Ann Lee", {"Ann", "Ann Lee", "Lee", "n Lee"}, [(0, 3), (0, 7), (4, 7)]),
        ("+++", {"+", "++"}, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]),
        ("12 123 é1 1", {"12", "1"}, [(0, 2), (10, 11)]),
        ("Ask Anna", {"Anna", "Anna Lee"}, [(4, 8)]),
        ("Ann", {""}, []),
        ("Ann", set(), []),
    ],
)
def test_parts_are_found_wherever_they_are_no_part_of_a_word(text, parts, at):
    assert sorted(personal.occurrences(text, parts)) == at


def test_names_come_from_a_file_or_a_function(tmp_path):
    (tmp_path / "names.txt").write_text("Anna Schmidt\n\n  Bob  \n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "def names(text):\n    return ['Eve', '', 'nobody'] if 'Eve' in text else []\n"
        "def fails(text):\n    return {}[text]\n"
        "def numbers(text):\n    return [3]\n"
    )
    of = lambda names: personal.finder(str(tmp_path / names))  # noqa: E731
    query = redact(prompt("BOB, Bobby and anna schmidt"), of("names.txt"))
    assert query.messages == prompt("[NAME_1], Bobby and [NAME_2]")
    query = redact([*prompt("Eve, Evening"), *prompt("and Eve")], of("mine.py:names"))
    assert query.messages == [*prompt("[NAME_1], Evening"), *prompt("and [NAME_1]")]
    with pytest.raises(UserError, match="mine.py:fails raised KeyError: mend") as caught:
        redact(prompt("a secret"), of("mine.py:fails"))
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="must return strings"):
        redact(prompt("x"), of("mine.py:numbers"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"redact_names": "names.txt"}, "redact_names needs config.cloud.redact=True"),
        ({"redact": True, "redact_names": "nowhere.txt"}, "must be a text file"),
        ({"redact": True, "redact_names": "/dev/null"}, "holds no name"),
        ({"redact": True, "redact_names": "nowhere.py:f"}, "must be path/to/file.py:function"),
        ({"redact": True, "redact_names": f"{__file__}:nothing"}, "has no function 'nothing'"),
    ],
)
def test_names_that_cannot_be_had_are_one_clear_line(tmp_path, settings, says):
    config = cloud_config(**settings)
    with pytest.raises(UserError, match=says) as caught:
        make_cloud(config, make_task(config), tmp_path / "s.db")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- what uses it


def test_the_cloud_and_the_store_see_placeholders_and_the_answers_are_each_askers_own(tmp_path):
    fake, store = FakeCloud(failing={"fail [EMAIL_1]"}), Store(tmp_path / "s.db")
    cloud = CachedCloud(fake, store, redact=lambda messages: redact(messages, find))
    asked = [prompt(t) for t in ("hi anna@x.org", "hi bob@x.org", "hi", "fail a@x.org")]
    answers = cloud.answer(asked)
    assert texts(answers) == ["A:hi anna@x.org", "A:hi bob@x.org", "A:hi", None]
    assert (answers.bought, answers.failed) == (2, 1)
    assert sorted(fake.asked) == ["fail [EMAIL_1]", "hi", "hi [EMAIL_1]"]
    [rows] = [str(store.query("SELECT * FROM answers"))]
    assert "hi [EMAIL_1]" in rows and "x.org" not in rows
    assert cloud.stored([cloud.redact(asked[1]), as_it_is(asked[1])]) == [
        Reply("A:hi bob@x.org", 10, 3, 0.5, 0.25),
        None,
    ]


class Careful:
    """Knows one question, and is lost where a name is missing."""

    model, provider, parameters, batch, workers = "careful", "", {}, 10, 1

    def highest_usd(self, messages):
        return 0.0

    def answer(self, prompts):
        replies = []
        for [message] in prompts:
            content = message["content"]
            if "[" in content and "PHONE" in content:
                replies.append(Failure("down"))
            else:
                replies.append(Reply("right" if "[" not in content else "wrong", 1, 1, 0.0, 0.0))
        return replies


def test_evaluation_says_what_redaction_costs_and_sends_nothing_for_it(tmp_path):
    """Four prompts: one is as it was; of three that change, one answer fails."""
    questions = ["2+2", "of Anna Schmidt", "of José", "call 5551234"]
    examples = [Example(f"q{i}", "", question) for i, question in enumerate(questions)]
    task = types.SimpleNamespace(
        graded=False,
        cloud_prompt=lambda example: prompt(example.problem),
        verify=lambda examples, texts: [
            Verdict(correct=t == "right", called=False, formatted=True) for t in texts
        ],
    )
    store = Store(tmp_path / "s.db")
    plain = CachedCloud(Careful(), store)
    redacting = CachedCloud(Careful(), store, redact=lambda messages: redact(messages, find))
    before = cloud_columns.plain_answers(task, redacting, examples)
    assert [row["plain_known"] for row in before] == [False] * 4
    assert not store.query("SELECT * FROM answers")
    cloud_columns.cloud_answers(task, plain, examples)
    answers = cloud_columns.cloud_answers(task, redacting, examples)
    rows = cloud_columns.plain_answers(task, redacting, examples)
    assert [row["redacted"] for row in rows] == [False, True, True, True]

    def figures(rows):
        columns = {"id": [e.id for e in examples], "local_correct": [False] * 4}
        both = [a | r for a, r in zip(answers, rows, strict=True)]
        columns |= {name: [row[name] for row in both] for name in both[0]}
        return summary.redaction(records.check(columns, "x"))

    told = figures(rows)
    assert (told["changed"]["value"], told["n"]) == (0.75, 2)
    assert (told["accuracy"]["value"], told["accuracy_plain"]["value"]) == (0.0, 1.0)
    assert figures(before)["n"] == 0 and summary.redaction({"id": np.array(["x"])}) is None
    rest = {"step": 1, "n": 4, "split": "test", "right": None, "unjudged": None}
    rest |= {"lenient_accuracy": None, "share_attempt": None}
    rest |= {name: {"value": 0.0} for name in ("local_accuracy", "cloud_unknown")}
    rest["natural"] = {name: {"value": 0.0} for name in ("call_rate", "overall_accuracy")}
    assert in_words(rest | {"redaction": told}).endswith(
        "redaction changed 75.0% of the prompts: on 2 of them the cloud is right on 0.0%, and on "
        "100.0% without it"
    )
    assert "shows what that costs" in in_words(rest | {"redaction": figures(before)})
