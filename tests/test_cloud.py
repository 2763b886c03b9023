"""The cloud: wrong on a fixed share, each prompt bought once, nothing lost, exact sums."""

import dataclasses
import itertools
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fakes import FakeCloud, cloud_config, prompt, texts

from collab_jax.cloud import (
    CachedCloud,
    Ledger,
    Reply,
    SimulatedCloud,
    Store,
    StoreError,
    ledger,
    make_cloud,
)
from collab_jax.cloud.simulated import MAX_SKEW, skewed_rate, unit_hash
from collab_jax.cloud.store import APPLICATION_ID, SCHEMA_VERSION, key
from collab_jax.models.hf import FolderError
from collab_jax.rl import claims
from collab_jax.runtime.errors import UserError


def simulated(error_rate=0.06, solve=lambda messages: "right", model="sim") -> SimulatedCloud:
    return SimulatedCloud(model, solve, error_rate, 2.0, 0.5, 2.0)


# ---------------------------------------------------------------- simulated cloud


def test_simulated_reply_by_hand():
    # 11 characters -> 11 // 4 + 1 = 3 input tokens; "right" -> 5 // 4 + 1 = 2 output tokens
    # 3 x 0.5 + 2 x 2.0 = 5.5 USD per million calls
    start = time.monotonic()
    [reply] = simulated(error_rate=0.0).answer([prompt("3 5 7 to 22")])
    assert reply == Reply("right", 3, 2, 2.0, 5.5e-6)
    assert time.monotonic() - start < 1  # two seconds are reported, not slept


def test_error_share_within_binomial_bound():
    wrong = sum(
        reply.text != "right" for reply in simulated().answer([prompt(i) for i in range(10_000)])
    )
    # 600 expected, standard deviation sqrt(10,000 x 0.06 x 0.94) = 23.7; four of them = 95
    assert 505 <= wrong <= 695


def test_which_prompts_are_wrong_never_changes():
    wrong = [
        i for i in range(100) if simulated().answer([prompt(i)])[0].text == "<answer>0</answer>"
    ]
    assert wrong == [28, 29, 37, 72, 80, 82, 87]
    assert unit_hash("sim", prompt(0)) == 0.8771705965961791
    assert unit_hash("another", prompt(0)) != 0.8771705965961791


def test_higher_error_rate_only_adds_prompts():
    wrong = [
        {i for i in range(500) if simulated(r).answer([prompt(i)])[0].text != "right"}
        for r in (0, 0.1, 0.3, 1)
    ]
    assert wrong[0] == set() and wrong[1] < wrong[2] < wrong[3] and len(wrong[3]) == 500


def test_simulated_is_wrong_where_the_solver_cannot():
    def solve(messages):
        raise ValueError("no solution")

    assert simulated(0.0, solve).answer([prompt(1)])[0].text == "<answer>0</answer>"


def test_simulated_parameters_hold_what_changes_answers():
    assert simulated(0.06).parameters != simulated(0.07).parameters
    with pytest.raises(UserError, match="between 0 and 1"):
        simulated(6)


# ---------------------------------------------------------------- errors by difficulty


@pytest.mark.parametrize("rate", [0.06, 0.3, 0.9])
@pytest.mark.parametrize("skew", [1e-6, 1.0, 3.0, 30.0, MAX_SKEW])
def test_the_mean_over_all_difficulties_is_the_error_rate(rate, skew):
    n = 20_000
    chances = [skewed_rate(rate, skew, (i + 0.5) / n) for i in range(n)]
    assert sum(chances) / n == pytest.approx(rate, rel=1e-4)
    assert all(0 <= a <= b + 1e-12 <= 1 + 2e-12 for a, b in itertools.pairwise(chances))


def test_skewed_rate_by_hand():
    # exp(skew) = 4 and exp(skew / 2) = 2: c = (2 - 1) / (4 - 2) = 1/2, so the odds are 1/2, 1 and 2
    chances = [skewed_rate(0.5, math.log(4), d) for d in (0.0, 0.5, 1.0)]
    assert chances == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    for difficulty in (0.0, 0.4, 1.0):
        assert skewed_rate(0.0, 3.0, difficulty) == 0 and skewed_rate(1.0, 3.0, difficulty) == 1
        for skew in (1e-9, 1e-15, 1e-17, 1e-300):
            assert skewed_rate(0.06, skew, difficulty) == pytest.approx(0.06)


def skewed(skew, rate=0.1, n=10_000):
    """Whether the cloud is wrong on each of n prompts, ordered from easy to hard."""
    cloud = dataclasses.replace(
        simulated(rate),
        error_skew=skew,
        difficulty=lambda messages: (int(messages[0]["content"]) + 0.5) / n,
    )
    return [reply.text != "right" for reply in cloud.answer([prompt(i) for i in range(n)])]


def test_a_skew_moves_errors_to_hard_prompts_and_keeps_their_number():
    wrong = skewed(3.0)
    # 1,000 expected, standard deviation below sqrt(10,000 x 0.1 x 0.9) = 30; four of them = 120
    assert 880 <= sum(wrong) <= 1_120
    fifths = [sum(wrong[start : start + 2_000]) for start in range(0, 10_000, 2_000)]
    assert fifths == sorted(fifths) and fifths[4] > 6 * fifths[0]
    assert wrong == skewed(3.0)
    # The draw is the same hash: an easy prompt that is wrong with a skew is wrong without one.
    plain = skewed(0.0)
    assert all(p or not s for p, s in list(zip(plain, wrong, strict=True))[:5_000])
    assert plain == [
        reply.text != "right" for reply in simulated(0.1).answer([prompt(i) for i in range(10_000)])
    ]


def test_a_prompt_of_unknown_difficulty_has_the_plain_rate():
    unknown = dataclasses.replace(simulated(0.1), error_skew=3.0, difficulty=lambda messages: None)
    prompts = [prompt(i) for i in range(500)]
    assert texts_of(unknown, prompts) == texts_of(simulated(0.1), prompts)

    def of_another_task(messages):
        raise UserError("not a prompt of this task")

    lost = dataclasses.replace(unknown, difficulty=of_another_task)
    assert texts_of(lost, prompts) == [lost.wrong] * 500


def texts_of(cloud, prompts):
    return [reply.text for reply in cloud.answer(prompts)]


def test_stored_answers_have_the_key_they_had_unless_there_is_a_skew():
    cloud = simulated(0.06)
    assert cloud.parameters == {"error_rate": 0.06, "wrong": "<answer>0</answer>"}
    assert dataclasses.replace(cloud, error_skew=2.0).parameters == cloud.parameters | {
        "error_skew": 2.0
    }


def test_a_run_begun_before_there_was_a_skew_goes_on_without_one(tmp_path):
    config = cloud_config()
    older = json.loads(config.to_json_best_effort())
    del older["cloud"]["error_skew"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert claims.differences(tmp_path / "config.json", config) == ""
    config.cloud.error_skew = 1.0
    differing = claims.differences(tmp_path / "config.json", config)
    assert differing == "cloud.error_skew=0.0 then, 1.0 now"


@pytest.mark.parametrize("skew", [-1.0, MAX_SKEW + 1, float("nan")])
def test_an_impossible_skew_is_refused(skew):
    with pytest.raises(UserError, match="config.cloud.error_skew=.* must lie between 0 and"):
        dataclasses.replace(simulated(), error_skew=skew)


# ---------------------------------------------------------------- asked at most once


def test_asked_once_within_a_batch_and_across_reopening(tmp_path):
    first = FakeCloud()
    answers = CachedCloud(first, Store(tmp_path / "s.db")).answer([prompt(c) for c in "abab"])
    assert texts(answers) == ["A:a", "A:b", "A:a", "A:b"]
    assert (answers.bought, answers.failed, first.asked) == (2, 0, ["a", "b"])

    second = FakeCloud()
    again = CachedCloud(second, Store(tmp_path / "s.db")).answer([prompt(c) for c in "bca"])
    assert texts(again) == ["A:b", "A:c", "A:a"]
    assert (again.bought, again.failed, second.asked) == (1, 0, ["c"])


def test_empty_batch(tmp_path):
    assert CachedCloud(FakeCloud(), Store(tmp_path / "s.db")).answer([]) == ([], 0, 0)


def test_reply_comes_back_whole(tmp_path):
    reply = Reply("x ✓ \x00 '", 1, 2, 0.1, 1e-7, reasoning="because\n", finish_reason="length")
    Store(tmp_path / "s.db").put_many("m", {}, [(prompt("ü"), reply)])
    assert Store(tmp_path / "s.db").get_many([key("m", prompt("ü"), {})]) == {
        key("m", prompt("ü"), {}): reply
    }


def test_reply_that_has_no_utf8_form_is_kept(tmp_path):
    stored = Store(tmp_path / "s.db").put_many(
        "m", {}, [(prompt("\ud800"), Reply("a\ud800b", 1, 1, 0.0, 0.0))]
    )
    assert [reply.text for reply in stored.values()] == ["a?b"]


def test_model_prompt_and_parameters_are_the_key(tmp_path):
    store = Store(tmp_path / "s.db")
    clouds = [FakeCloud(), FakeCloud(model="other"), FakeCloud(parameters={"temperature": 1.0})]
    assert [CachedCloud(cloud, store).answer([prompt("a")]).bought for cloud in clouds] == [1, 1, 1]
    assert key("m", [{"role": "user", "content": "a"}], {"x": 1, "y": 2}) == key(
        "m", [{"content": "a", "role": "user"}], {"y": 2, "x": 1}
    )
    with pytest.raises(ValueError):
        key("m", prompt("a"), {"temperature": float("nan")})


def test_key_never_changes():
    # printf '["m",[{"content":"a","role":"user"}],{}]' | sha256sum
    assert (
        key("m", prompt("a"), {})
        == "0757cde60ab3f82c71caf375d383a91c97e33e96bd24fe760c15e04afb164092"
    )


def test_first_answer_wins(tmp_path):
    store = Store(tmp_path / "s.db")
    store.put_many("m", {}, [(prompt("a"), Reply("first", 1, 1, 0.0, 0.0))])
    stored = store.put_many("m", {}, [(prompt("a"), Reply("second", 1, 1, 0.0, 0.0))])
    assert [reply.text for reply in stored.values()] == ["first"]
    assert ledger(store).calls == 1


def test_threads_ask_once(tmp_path):
    @dataclass
    class SlowCloud(FakeCloud):
        def answer(self, prompts):
            time.sleep(0.05)  # all other threads miss the store meanwhile
            return super().answer(prompts)

    cached = CachedCloud(SlowCloud(), Store(tmp_path / "s.db"))
    prompts = [prompt(i) for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        results = [texts(answers) for answers in pool.map(cached.answer, [prompts] * 8)]
    assert results == [[f"A:{i}" for i in range(50)]] * 8
    assert len(cached.cloud.asked) == 50


CHILD = """
import os, sys
sys.path.insert(0, {root!r})
from collab_jax.cloud import CachedCloud, Reply, Store
class Cloud:
    model, provider, parameters, batch, workers = "fake", "", {{}}, 1, 1
    def highest_usd(self, messages):
        return 0.0
    def answer(self, prompts):
        return [Reply(f"{{os.getpid()}}:{{m[0]['content']}}", 1, 1, 0.0, 0.0) for m in prompts]
cached = CachedCloud(Cloud(), Store({path!r}))
for i in range({count}):
    print(cached.answer([[{{"role": "user", "content": str(i)}}]]).replies[0].text, flush=True)
"""


def start_child(path, count) -> subprocess.Popen:
    code = CHILD.format(root=str(ROOT), path=str(path), count=count)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_processes_share_one_store_from_its_creation(tmp_path):
    children = [start_child(tmp_path / "s.db", 100) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outputs[0] == outputs[1]  # who came second was given the first one's answer
    assert ledger(Store(tmp_path / "s.db")).calls == len(outputs[0]) == 100


def test_kill_loses_no_answer_that_was_returned(tmp_path):
    child = start_child(tmp_path / "s.db", 1_000_000)
    lines = [child.stdout.readline() for _ in range(5)]
    os.kill(child.pid, signal.SIGKILL)
    lines += child.stdout.readlines()
    assert child.wait(timeout=60) == -signal.SIGKILL
    returned = [line.strip() for line in lines if line.endswith("\n")]

    cloud = FakeCloud()
    answers = CachedCloud(cloud, Store(tmp_path / "s.db")).answer(
        [prompt(i) for i in range(len(returned))]
    )
    assert texts(answers) == returned
    assert cloud.asked == []


# ---------------------------------------------------------------- failures of the cloud


def test_failed_call_is_none_and_asked_again(tmp_path):
    cloud = FakeCloud(failing={"b"})
    cached = CachedCloud(cloud, Store(tmp_path / "s.db"))
    answers = cached.answer([prompt(c) for c in "abcb"])
    assert texts(answers) == ["A:a", None, "A:c", None]
    assert (answers.bought, answers.failed) == (2, 1)  # distinct prompts

    cloud.failing.clear()
    answers = cached.answer([prompt(c) for c in "abc"])
    assert texts(answers) == ["A:a", "A:b", "A:c"]
    assert (answers.bought, answers.failed) == (1, 0)
    assert cloud.asked == ["a", "b", "c", "b"]


def broken(prompts):
    raise RuntimeError("SECRET " + prompts[0][0]["content"])


@pytest.mark.parametrize("answer", [broken, lambda prompts: []], ids=["raises", "too few replies"])
def test_cloud_that_breaks_its_promise_fails_the_batch(tmp_path, caplog, answer):
    store = Store(tmp_path / "s.db")
    CachedCloud(FakeCloud(), store).answer([prompt("known")])
    cloud = FakeCloud()
    cloud.answer = answer
    with caplog.at_level(logging.WARNING):
        answers = CachedCloud(cloud, store).answer([prompt("private"), prompt("known")])
    assert texts(answers) == [None, "A:known"]
    assert (answers.bought, answers.failed) == (0, 1)
    [record] = caplog.records
    assert "fake" in record.getMessage() and record.exc_info is None
    assert "SECRET" not in caplog.text and "private" not in caplog.text


def test_a_cloud_that_the_user_must_mend_stops_the_run(tmp_path):
    """As a local cloud whose folder lacks a weight."""
    cloud = CachedCloud(FakeCloud(), Store(tmp_path / "s.db"))
    with pytest.raises(FolderError, match="lacks a weight"):
        cloud.cloud.answer = broken_folder
        cloud.answer([prompt("a")])
    assert cloud.budget.spent() == (0, 0.0)


def broken_folder(prompts):
    raise FolderError("model.safetensors lacks a weight: fetch it again")


# ---------------------------------------------------------------- ledger


def test_ledger_by_hand(tmp_path):
    store = Store(tmp_path / "s.db")
    assert ledger(store) == Ledger(0, 0, 0, 0.0, 0.0)
    cached = CachedCloud(FakeCloud(failing={"z"}), store)
    cached.answer([prompt(c) for c in "abcaz"])
    cached.answer([prompt(c) for c in "abc"])
    # three calls of 10 + 3 tokens, 0.5 s and 0.25 USD; stored hits and the failure cost nothing
    assert ledger(store) == ledger(Store(tmp_path / "s.db")) == Ledger(3, 30, 9, 1.5, 0.75)


def test_ledger_is_free_of_order(tmp_path):
    replies = [
        (prompt(i), Reply("x", 1, 1, 0.0, usd)) for i, usd in enumerate([0.1] * 10 + [1e16, -1e16])
    ]
    stores = [Store(tmp_path / "a.db"), Store(tmp_path / "b.db")]
    stores[0].put_many("m", {}, replies)
    stores[1].put_many("m", {}, replies[::-1])
    assert ledger(stores[0]).usd == ledger(stores[1]).usd == 1.0


# ---------------------------------------------------------------- the store file


def filled(path: Path) -> Path:
    """A closed store file of 300 answers, some 30 pages."""
    store = Store(path)
    store.put_many("m", {}, [(prompt(i), Reply("x" * 200, 1, 1, 0.0, 0.0)) for i in range(300)])
    store.close()
    return path


def check_refused(path: Path, match: str) -> None:
    """One line that names the file and says what to do, and the file is untouched."""
    before = path.read_bytes()
    with pytest.raises(StoreError, match=match) as error:
        store = Store(path)
        store.get_many(key("m", prompt(i), {}) for i in range(300))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_schema_is_version_3(tmp_path):
    db = sqlite3.connect(filled(tmp_path / "s.db"))
    assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,) == (3,)
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [row[1] for row in db.execute("PRAGMA table_info(answers)")] == [
        "key",
        "model",
        "created",
        "input_tokens",
        "output_tokens",
        "seconds",
        "usd",
        "finish_reason",
        "parameters",
        "prompt",
        "text",
        "reasoning",
        "checksum",
        "provider",
    ]


def test_file_that_is_no_database(tmp_path):
    path = tmp_path / "s.db"
    path.write_bytes(b"answers,go,here\n" * 500)
    check_refused(path, "not a database.*name another file")


def test_another_programs_database(tmp_path):
    path = tmp_path / "s.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE answers (key TEXT)")
    db.close()
    check_refused(path, "another program's")


def test_damaged_pages(tmp_path):
    path = filled(tmp_path / "s.db")
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    check_refused(path, "malformed.*damaged")


@pytest.mark.parametrize("cut", [4096, 100, 20_000], ids=["a page", "part of a page", "many pages"])
def test_truncated_file(tmp_path, cut):
    path = filled(tmp_path / "s.db")
    os.truncate(path, path.stat().st_size - cut)
    check_refused(path, "damaged")


def test_emptied_file_beside_a_log_that_holds_answers(tmp_path):
    store = Store(tmp_path / "s.db")
    store.put_many("m", {}, [(prompt("a"), Reply("x", 1, 1, 0.0, 0.0))])
    copy = tmp_path / "copy.db"  # as after a crash: the answer is in the log only
    log = tmp_path / "copy.db-wal"
    log.write_bytes((tmp_path / "s.db-wal").read_bytes())
    copy.touch()
    check_refused(copy, "damaged")
    assert log.read_bytes() == (tmp_path / "s.db-wal").read_bytes()


def test_newer_version(tmp_path):
    path = filled(tmp_path / "s.db")
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 4")
    db.close()
    check_refused(path, "schema version 4.*newer collab_jax")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="s.db.*permissions"):
        Store(tmp_path / "file" / "s.db")
    with pytest.raises(StoreError, match="permissions"):
        Store(tmp_path)  # a folder where the file should be


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_file_or_folder_without_permission(tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="permissions"):
        Store(tmp_path / "sealed" / "s.db")
    path = filled(tmp_path / "s.db")
    path.chmod(0o400)
    check_refused(path, "readonly.*writable")


def test_store_that_fails_later_stops_the_run(tmp_path):
    cached = CachedCloud(FakeCloud(), Store(tmp_path / "s.db"))
    cached.store.close()
    with pytest.raises(StoreError):
        cached.answer([prompt("a")])


# ---------------------------------------------------------------- config


def test_make_cloud(tmp_path):
    task = SimpleNamespace(
        name="echo",
        solve_prompt=lambda messages: messages[-1]["content"].upper(),
        gold=None,
        difficulty=None,
    )
    cached = make_cloud(cloud_config(), task, tmp_path / "new" / "s.db")
    assert texts(cached.answer([prompt("abc")])) == ["ABC"]
    # 0 and 0.0 in a config are the same cloud
    again = make_cloud(cloud_config(error_rate=0.0), task, tmp_path / "new" / "s.db")
    assert again.answer([prompt("abc")]).bought == 0
    # (1 x 0.5 + 1 x 2.0) / 1e6
    assert ledger(cached.store) == Ledger(1, 1, 1, 2.0, 2.5e-6)
    with pytest.raises(UserError, match="'echo' does not say how hard .*error_skew=3.0 needs"):
        make_cloud(cloud_config(error_skew=3.0), task, tmp_path / "new" / "s.db")


def test_make_cloud_refuses(tmp_path):
    task = SimpleNamespace(name="essay", solve_prompt=None)
    with pytest.raises(
        UserError, match="'oracle' is unknown: choose one of simulated, openai, local"
    ):
        make_cloud(cloud_config(kind="oracle"), task, tmp_path / "s.db")
    with pytest.raises(UserError, match="'essay' has no exact solver"):
        make_cloud(cloud_config(), task, tmp_path / "s.db")
    assert not (tmp_path / "s.db").exists()
