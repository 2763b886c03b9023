"""The store from version 1 on: migration, damage that SQLite does not see, export and import,
modes, unknown verdicts.
"""

import json
import sqlite3

import pytest
from test_cloud import FakeCloud, prompt, texts

from collab_jax.cloud import (
    CachedCloud,
    CloudError,
    Ledger,
    Policy,
    Reply,
    Store,
    StoreError,
    ledger,
    transfer,
)
from collab_jax.cloud.budget import Budget, Spent
from collab_jax.cloud.store import APPLICATION_ID, key
from collab_jax.runtime.errors import UserError

REPLY = Reply("a ✓ '", 10, 3, 0.5, 0.25, reasoning="because\n", finish_reason="length")
VERSION_1 = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL, created TEXT NOT NULL, input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, seconds REAL NOT NULL, usd REAL NOT NULL, finish_reason TEXT NOT NULL,
    parameters TEXT NOT NULL, prompt TEXT NOT NULL, text TEXT NOT NULL, reasoning TEXT NOT NULL
)"""


@pytest.fixture
def filled(tmp_path):
    """An open store with the answers of FakeCloud to 0 .. 4; each cost 0.25 USD."""
    store = Store(tmp_path / "s.db")
    CachedCloud(FakeCloud(), store).answer([prompt(i) for i in range(5)])
    return store


def damage(path, statement):
    db = sqlite3.connect(path)
    assert db.execute(statement).rowcount == 1
    db.commit()
    db.close()


# ---------------------------------------------------------------- migration


def test_a_store_of_version_1_is_taken_over_whole(tmp_path):
    db = sqlite3.connect(tmp_path / "s.db")
    db.execute(VERSION_1)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute("PRAGMA user_version = 1")
    name = key("m", prompt("x"), {})
    values = (
        name,
        "m",
        "2026-11-23T10:00:00+00:00",
        10,
        3,
        0.5,
        0.25,
        "length",
        "{}",
        json.dumps(prompt("x")),
    )
    db.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, "a ✓ '", "because\n"),
    )
    db.commit()
    db.close()
    for _ in range(2):  # migrated, then opened again
        store = Store(tmp_path / "s.db")
        assert store.get_many([name]) == {name: REPLY} and transfer.verify(store) == []
        assert ledger(store) == Ledger(1, 10, 3, 0.5, 0.25) and Budget(store).spent() == Spent(
            1, 0.25
        )
        assert store.query("PRAGMA user_version") == [(2,)]
        store.close()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "column", ["text = 'b'", "reasoning = 'x'", "usd = 0", "input_tokens = 11"]
)
def test_an_answer_that_is_not_what_was_stored_is_refused(filled, column):
    damage(filled.path, f"UPDATE answers SET {column} WHERE text = 'A:3'")
    name = key("fake", prompt(3), {})
    with pytest.raises(StoreError, match=f"{name[:12]} is not what was stored"):
        filled.get_many([name])
    assert len(filled.get_many([key("fake", prompt(2), {})])) == 1
    assert transfer.verify(filled) == [f"answer {name[:12]}: not what was stored"]


def test_verify_finds_an_answer_under_another_prompt(filled):
    assert transfer.verify(filled) == []
    damage(
        filled.path,
        """UPDATE answers SET prompt = '[{"content":"9","role":"user"}]' WHERE text = 'A:3'""",
    )
    assert transfer.verify(filled) == [
        f"answer {key('fake', prompt(3), {})[:12]}: not of this prompt"
    ]


def test_compacting_keeps_every_answer(filled):
    assert 0 < transfer.compact(filled) < 10**6
    assert ledger(filled).calls == 5 and transfer.verify(filled) == []


# ---------------------------------------------------------------- export, import


def test_export_and_import_keep_everything_and_book_nothing(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 2)
    filled.put_many("m", {"temperature": 0.5}, [(prompt("ü"), REPLY)])
    assert transfer.export(filled, tmp_path / "a.jsonl") == 6
    other = Store(tmp_path / "other.db")
    assert (
        transfer.import_(other, tmp_path / "a.jsonl")
        == (6, 0)
        == transfer.import_(other, tmp_path / "a.jsonl")[::-1]
    )
    assert transfer.export(other, tmp_path / "b.jsonl") == 6
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert transfer.verify(other) == [] and ledger(other) == ledger(filled)
    assert Budget(other).spent() == Spent(0, 0.0) and Budget(filled).spent() == Spent(5, 1.25)


def test_a_stored_answer_stays_when_another_is_imported(filled, tmp_path):
    other = Store(tmp_path / "other.db")
    other.put_many("fake", {}, [(prompt(0), Reply("mine", 1, 1, 0.0, 0.0))])
    transfer.export(filled, tmp_path / "a.jsonl")
    assert transfer.import_(other, tmp_path / "a.jsonl") == (4, 1)
    assert texts(CachedCloud(FakeCloud(), other).answer([prompt(0), prompt(1)])) == ["mine", "A:1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line[:-9], "line 2 is not JSON"),
        (lambda line: "[1]", "line 2: model is missing"),
        (
            lambda line: line.replace('"usd": 0.25', '"usd": "free"'),
            "line 2: usd is missing or of another type",
        ),
        (
            lambda line: line.replace('"usd": 0.25', '"usd": NaN'),
            "line 2 holds a number that is not finite",
        ),
        (
            lambda line: line.replace('"input_tokens": 10', '"input_tokens": true'),
            "line 2: input_tokens",
        ),
    ],
)
def test_a_bad_line_is_named(filled, tmp_path, change, says):
    transfer.export(filled, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[1] = change(lines[1])
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=says):
        transfer.import_(Store(tmp_path / "other.db"), tmp_path / "a.jsonl")


def test_files_that_are_not_there(filled, tmp_path):
    with pytest.raises(UserError, match="cannot read .*a.jsonl"):
        transfer.import_(filled, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="cannot write .*choose another --file"):
        transfer.export(filled, tmp_path / "no" / "a.jsonl")


# ---------------------------------------------------------------- modes


def test_replay_buys_nothing_and_names_what_is_missing(filled):
    cloud = FakeCloud()
    replay = CachedCloud(cloud, filled, Policy(mode="replay"))
    assert texts(replay.answer([prompt(1), prompt(0)])) == ["A:1", "A:0"]
    with pytest.raises(
        CloudError,
        match=r"'replay': 2 prompts have no answer of fake in .*s.db \(as countdown-8, countdown-9\)",
    ):
        replay.answer(
            [prompt(1), prompt("eight"), prompt("nine")],
            ["countdown-1", "countdown-8", "countdown-9"],
        )
    assert cloud.asked == []


def test_record_wants_every_answer(tmp_path):
    cloud = FakeCloud(failing={"b"})
    record = CachedCloud(cloud, Store(tmp_path / "s.db"), Policy(mode="record"))
    with pytest.raises(CloudError, match=r"'record' .* 1 prompts have none \(failing\)"):
        record.submit([prompt(c) for c in "abc"]).answers(wait=0.0)
    cloud.failing.clear()
    assert texts(record.answer([prompt(c) for c in "abc"])) == [
        "A:a",
        "A:b",
        "A:c",
    ] and cloud.asked == list("abcb")


def test_a_budget_bounds_a_cloud_that_answers_in_batches(tmp_path):
    cloud = CachedCloud(FakeCloud(), Store(tmp_path / "s.db"), Policy(max_usd=0.8))  # 0.25 USD each
    answers = cloud.answer([prompt(c) for c in "abcde"])
    assert (answers.bought, answers.failed) == (3, 0) and texts(answers) == [
        "A:a",
        "A:b",
        "A:c",
        None,
        None,
    ]
    assert cloud.budget.spent() == Spent(3, 0.75) and cloud.take_tally() == (3, 0, 39, 0.75)
    assert cloud.take_tally() == (0, 0, 0, 0.0)
