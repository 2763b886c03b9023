"""The store: migration, providers, unseen damage, export and import, modes, unknown verdicts."""

import dataclasses
import hashlib
import json
import sqlite3

import pytest
from fakes import FakeCloud, cloud_config, prompt, texts

from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import (
    CachedCloud,
    CloudError,
    Ledger,
    Policy,
    Reply,
    Store,
    StoreError,
    ledger,
    make_cloud,
    transfer,
)
from collab_jax.cloud.budget import Budget, Spent
from collab_jax.cloud.store import APPLICATION_ID, checksum, insert, key, row
from collab_jax.rl import experiment
from collab_jax.runtime.errors import UserError

REPLY = Reply("a ✓ '", 10, 3, 0.5, 0.25, reasoning="because\n", finish_reason="length")
VERSION_1 = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY NOT NULL, model TEXT NOT NULL, created TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, seconds REAL NOT NULL,
    usd REAL NOT NULL, finish_reason TEXT NOT NULL, parameters TEXT NOT NULL, prompt TEXT NOT NULL,
    text TEXT NOT NULL, reasoning TEXT NOT NULL
)"""
VERSION_2 = (
    VERSION_1.removesuffix(")") + ", checksum TEXT NOT NULL DEFAULT '')",
    "CREATE TABLE leases (key TEXT PRIMARY KEY NOT NULL, owner TEXT NOT NULL,"
    " expires REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE spent (calls INTEGER NOT NULL, usd REAL NOT NULL)",
    "INSERT INTO spent VALUES (7, 1.75)",
)


def make_old_store(path, version, *rows):
    """A store file as version 1 or 2 wrote it; rows: (model, parameters, prompt's content)."""
    db = sqlite3.connect(path)
    for statement in [VERSION_1] if version == 1 else VERSION_2:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {version}")
    canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
    for model, parameters, content in rows:
        named = canonical([model, prompt(content), parameters])
        name = hashlib.sha256(named.encode()).hexdigest()
        values = [name, model, "2026-11-23T10:00:00+00:00", 10, 3, 0.5, 0.25, "length"]
        values += [canonical(parameters), canonical(prompt(content))]
        values += ["a ✓ '", "because\n"]
        values += [checksum(name, *dataclasses.astuple(REPLY))] * (version == 2)
        db.execute(f"INSERT INTO answers VALUES ({','.join('?' * len(values))})", values)
    db.commit()
    db.close()


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


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_store_is_taken_over_whole(tmp_path, version):
    make_old_store(tmp_path / "s.db", version, ("m", {}, "x"))
    name = key("m", prompt("x"), {})
    spent = Spent(1, 0.25) if version == 1 else Spent(7, 1.75)
    for _ in range(2):  # migrated, then opened again
        store = Store(tmp_path / "s.db")
        assert store.get_many([name]) == {name: REPLY} and transfer.verify_store(store) == []
        assert ledger(store) == Ledger(1, 10, 3, 0.5, 0.25) and Budget(store).spent() == spent
        assert store.query("PRAGMA user_version") == [(3,)]
        store.close()


def test_answers_of_an_old_store_are_those_of_the_first_provider_that_asks(tmp_path, caplog):
    path = tmp_path / "s.db"
    make_old_store(
        path, 2, ("m", {}, "a"), ("m", {}, "b"), ("m", {"temperature": 1}, "a"), ("fake", {}, "a")
    )
    first = FakeCloud(model="m", provider="https://one/v1")
    for _ in range(2):  # adopted, then opened again
        cloud = CachedCloud(first, Store(path))
        assert cloud.answer([prompt("a"), prompt("b")]).replies == [REPLY, REPLY]
    assert first.asked == [] and caplog.text.count("2 answers of m") == 1

    second = FakeCloud(model="m", provider="https://two/v1")
    for _ in range(2):
        assert texts(CachedCloud(second, Store(path)).answer([prompt("a")])) == ["A:a"]
    assert second.asked == ["a"]
    renamed = FakeCloud(model="m", provider="https://one/v1")  # another address, say, of this name
    assert CachedCloud(renamed, Store(path)).answer([prompt("b")]).replies == [REPLY]
    no_provider = FakeCloud()  # as simulated and local clouds
    assert CachedCloud(no_provider, Store(path)).answer([prompt("a")]).replies == [REPLY]
    other_parameters = FakeCloud(model="m", provider="two", parameters={"temperature": 1})
    assert CachedCloud(other_parameters, Store(path)).answer([prompt("a")]).replies == [REPLY]
    assert renamed.asked == no_provider.asked == other_parameters.asked == []
    assert transfer.verify_store(Store(path)) == [] and ledger(Store(path)).calls == 5


def test_an_old_answer_stays_where_its_new_key_is_taken(tmp_path):
    store = Store(tmp_path / "s.db")
    CachedCloud(FakeCloud(provider="one"), store).answer([prompt("a")])
    old = row("fake", {}, prompt("a"), REPLY, provider=None)
    with store.transaction() as db:
        insert(db, [old])
    cloud = CachedCloud(FakeCloud(provider="one"), store)
    assert texts(cloud.answer([prompt("a")])) == ["A:a"] and cloud.cloud.asked == []
    assert transfer.verify_store(store) == [] and len(store.get_many([old[0]])) == 1


def test_two_providers_of_one_model_share_no_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultServer(lambda content: "one") as one, FaultServer(lambda content: "two") as two:

        def ask(server, **changes):
            config = cloud_config(kind="openai", model="m", base_url=server.url, key_env="")
            config.cloud.prices = (("m", 1.0, 2.0),)
            config.cloud.update(changes)
            return make_cloud(config, None, tmp_path / "s.db").answer([prompt("a")])

        assert [texts(ask(server)) for server in (one, two, one, two)] == [
            ["one"], ["two"], ["one"], ["two"],
        ]  # fmt: skip
        with pytest.raises(CloudError, match=f"by elsewhere in .* it has answers of {one.url}, "):
            ask(one, mode="replay", provider="elsewhere")
        assert texts(ask(two, mode="replay", provider=one.url)) == ["one"]  # a mirror, by its name
        with pytest.raises(CloudError, match="provider must name"):
            ask(one, provider="")
        assert one.requests == two.requests == 1


def test_a_run_keeps_its_provider_and_may_change_its_address(small, tmp_path):
    def prepare(url, **changes):
        settings = (
            dict(kind="openai", model="deepseek-reasoner", key_env="", base_url=url) | changes
        )
        settings = {f"cloud__{name}": value for name, value in settings.items()}
        return experiment.prepare(small(**settings), tmp_path).cloud.cloud

    assert prepare("http://a/v1/").provider == "http://a/v1"
    with pytest.raises(UserError, match="cloud.provider='http://a/v1/' then, 'http://b/v1' now"):
        prepare("http://b/v1")
    assert prepare("http://b/v1", provider="http://a/v1/").base_url == "http://b/v1"


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
    assert transfer.verify_store(filled) == [f"answer {name[:12]}: not what was stored"]


def test_verify_finds_an_answer_under_another_prompt(filled):
    assert transfer.verify_store(filled) == []
    damage(
        filled.path,
        """UPDATE answers SET prompt = '[{"content":"9","role":"user"}]' WHERE text = 'A:3'""",
    )
    assert transfer.verify_store(filled) == [
        f"answer {key('fake', prompt(3), {})[:12]}: not of this prompt"
    ]


def test_compacting_keeps_every_answer(filled):
    assert 0 < transfer.compact_store(filled) < 10**6
    assert ledger(filled).calls == 5 and transfer.verify_store(filled) == []


# ---------------------------------------------------------------- export, import


def test_export_and_import_keep_everything_and_book_nothing(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 2)
    filled.put_many("m", {"temperature": 0.5}, [(prompt("ü"), REPLY)])
    assert transfer.export_answers(filled, tmp_path / "a.jsonl") == 6
    other = Store(tmp_path / "other.db")
    assert (
        transfer.import_answers(other, tmp_path / "a.jsonl")
        == (6, 0)
        == transfer.import_answers(other, tmp_path / "a.jsonl")[::-1]
    )
    assert transfer.export_answers(other, tmp_path / "b.jsonl") == 6
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert transfer.verify_store(other) == [] and ledger(other) == ledger(filled)
    assert Budget(other).spent() == Spent(0, 0.0) and Budget(filled).spent() == Spent(5, 1.25)


def test_providers_are_exported_and_imported(tmp_path):
    store = Store(tmp_path / "s.db")
    for provider in ("", "one", "two"):
        CachedCloud(FakeCloud(provider=provider), store).answer([prompt("a")])
    transfer.export_answers(store, tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted(line["provider"] for line in lines) == ["", "one", "two"]
    other = Store(tmp_path / "other.db")
    assert transfer.import_answers(other, tmp_path / "a.jsonl") == (3, 0)
    for provider in ("", "one", "two"):
        cloud = FakeCloud(provider=provider)
        assert texts(CachedCloud(cloud, other).answer([prompt("a")])) == ["A:a"] and not cloud.asked


def test_lines_without_a_provider_are_those_of_the_first_that_asks(filled, tmp_path):
    """As an export from before version 3."""
    transfer.export_answers(filled, tmp_path / "a.jsonl")
    text = (tmp_path / "a.jsonl").read_text()
    assert text.count(', "provider": ""') == 5
    (tmp_path / "a.jsonl").write_text(text.replace(', "provider": ""', ""))
    other = Store(tmp_path / "other.db")
    assert transfer.import_answers(other, tmp_path / "a.jsonl") == (5, 0)
    assert transfer.verify_store(other) == []
    transfer.export_answers(other, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text().count('"provider": null') == 5
    for provider, bought in (("one", 0), ("two", 5)):
        cloud = CachedCloud(FakeCloud(provider=provider), other)
        assert cloud.answer([prompt(i) for i in range(5)]).bought == bought


def test_a_stored_answer_stays_when_another_is_imported(filled, tmp_path):
    other = Store(tmp_path / "other.db")
    other.put_many("fake", {}, [(prompt(0), Reply("mine", 1, 1, 0.0, 0.0))])
    transfer.export_answers(filled, tmp_path / "a.jsonl")
    assert transfer.import_answers(other, tmp_path / "a.jsonl") == (4, 1)
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
    transfer.export_answers(filled, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[1] = change(lines[1])
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=says):
        transfer.import_answers(Store(tmp_path / "other.db"), tmp_path / "a.jsonl")


def test_files_that_are_not_there(filled, tmp_path):
    with pytest.raises(UserError, match="cannot read .*a.jsonl"):
        transfer.import_answers(filled, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="cannot write .*choose another --file"):
        transfer.export_answers(filled, tmp_path / "no" / "a.jsonl")


# ---------------------------------------------------------------- modes


def test_replay_buys_nothing_and_names_what_is_missing(filled):
    cloud = FakeCloud()
    replay = CachedCloud(cloud, filled, Policy(mode="replay"))
    assert texts(replay.answer([prompt(1), prompt(0)])) == ["A:1", "A:0"]
    with pytest.raises(
        CloudError,
        match="'replay': 2 prompts have no answer of fake in .*s.db "
        r"\(as countdown-8, countdown-9\): import it",
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
