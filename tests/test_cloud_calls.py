"""Paid calls over real sockets, by the real client, against a server that fails.

Nothing is bought twice, nothing is lost, and never is too much spent.
"""

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from unittest import mock

import pytest
from conftest import ROOT
from fakes import FakeCloud, cloud_config, prompt, texts

from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import (
    BudgetSpent,
    CachedCloud,
    CloudError,
    Failure,
    Ledger,
    Policy,
    Reply,
    Store,
    attempts,
    buyer,
    leases,
    ledger,
    make_cloud,
    openai,
    streaming,
)
from collab_jax.cloud.budget import Budget
from collab_jax.cloud.store import StoreError
from collab_jax.cloud.streaming import Delta
from collab_jax.runtime.errors import UserError

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No long pauses, a key, and no proxy on the way to the loopback interface."""
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(buyer, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("TEST_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make(server_or_url, path, **changes):
    """A CachedCloud on the server; the price of one of its replies is (10 x 1 + 3 x 2) / 1e6 =
    1.6e-5 USD.
    """
    settings = dict(
        kind="openai",
        model="m",
        base_url=getattr(server_or_url, "url", server_or_url),
        key_env="TEST_KEY",
        parameters={"max_tokens": 50},
        prices=(("m", 1.0, 2.0),),
        timeouts=(30.0, 30.0, 30.0),
        retries=8,
    )
    config = cloud_config()
    config.cloud.parameters = {}
    config.cloud.update(settings | changes)
    return make_cloud(config, None, path)


def upper(content):
    return content.upper()


def test_faults_are_survived_and_no_whole_reply_is_bought_twice(tmp_path, caplog, capfd):
    prompts = [prompt(f"private {i}") for i in range(80)]
    with caplog.at_level(logging.WARNING), FaultServer(upper, share=0.3) as server:
        cloud = make(server, tmp_path / "s.db", timeouts=(2.0, 2.0, 2.0))
        cloud.answer(
            [prompt("warm")]
        )  # the client is loaded at the first call, which takes its time
        answers = cloud.answer(prompts)
        assert texts(answers) == [f"PRIVATE {i}" for i in range(80)] and (
            answers.bought,
            answers.failed,
        ) == (80, 0)
        assert len(server.met) == 7 and server.requests > 90  # every fault, and replies
        assert set(server.whole.values()) == {1} and len(server.whole) == 81
        assert cloud.budget.spent().calls == server.requests
        assert texts(make(server, tmp_path / "s.db").answer(prompts)) == texts(answers)
        assert server.whole.total() == 81
    told = caplog.text + "".join(capfd.readouterr())
    assert "private" not in told.lower() and SECRET not in told
    assert set(cloud.reasons) == {
        "429",
        "500",
        "no connection",
        "broken JSON",
        "no choices",
        "timeout",
    }


def test_a_reply_by_hand(tmp_path):
    reply = {"role": "assistant", "content": "12", "reasoning_content": "3 x 4"}
    with FaultServer(lambda content: reply) as server:
        [answer] = make(server, tmp_path / "s.db").answer([prompt("3 x 4?")]).replies
        assert server.keys == {f"Bearer {SECRET}"}
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("12", "3 x 4", "stop")
    assert (answer.input_tokens, answer.output_tokens) == (10, 3) and answer.usd == pytest.approx(
        1.6e-5
    )
    assert 0 < answer.seconds < 1


def test_a_text_may_come_in_parts(tmp_path):
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    with FaultServer(lambda content: {"content": parts}) as server:
        assert texts(make(server, tmp_path / "s.db").answer([prompt("x")])) == ["42"]


def test_what_is_no_text_is_no_answer_and_paid_once(tmp_path):
    with FaultServer(lambda content: {"content": ["x"]}) as server:
        cloud = make(server, tmp_path / "s.db")
        assert texts(cloud.answer([prompt("x")])) == [None] and server.requests == 1
        assert cloud.budget.spent().usd == pytest.approx(1.6e-5)


def test_what_the_provider_broke_off_is_no_answer(tmp_path):
    cloud = make("http://127.0.0.1:9", tmp_path / "s.db").cloud
    reply = {
        "message": {"content": "The first st"},
        "finish_reason": "insufficient_system_resource",
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    failure = cloud.reply(prompt("x"), {"choices": [reply], "usage": usage}, 0.1)
    assert (failure.reason, failure.retry) == ("insufficient_system_resource", True)
    assert failure.usd == pytest.approx(1.6e-5)
    whole = cloud.reply(
        prompt("x"), {"choices": [reply | {"finish_reason": "length"}], "usage": usage}, 0.1
    )
    assert whole.text == "The first st"


def test_a_server_that_does_not_count_is_booked_at_no_less_than_our_estimate(tmp_path):
    cloud = make("http://127.0.0.1:9", tmp_path / "s.db", parameters={}).cloud
    choice = {"message": {"content": "x" * 40_000}, "finish_reason": "stop"}
    assert cloud.reply(prompt("x"), {"choices": [choice]}, 0.1).usd >= cloud._usd(1, 10_001)
    both = {"max_tokens": 8, "max_completion_tokens": 32}
    assert make("http://127.0.0.1:9", tmp_path / "s.db", parameters=both).cloud.max_tokens == 32


@pytest.mark.parametrize("reply", [{}, {"content": None}, {"content": "мимо"}])
def test_a_reply_without_a_usable_answer_is_an_answer(tmp_path, reply):
    with FaultServer(lambda content: reply) as server:
        for _ in range(2):
            [answer] = make(server, tmp_path / "s.db").answer([prompt("x")]).replies
        assert server.requests == 1 and answer.text == (
            "мимо" if reply.get("content") == "мимо" else ""
        )


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("401", "key in the environment variable TEST_KEY was refused"),
        ("402", "the account has no credit left"),
        ("403", "may not use model 'm'"),
        ("404", "no model 'm' at"),
    ],
)
def test_what_the_user_must_mend_is_one_clear_line(tmp_path, status, says):
    with FaultServer(upper, share=1.0, faults=(status,)) as server:
        with pytest.raises(CloudError, match=says) as caught:
            make(server, tmp_path / "s.db").answer([prompt("private")])
        assert server.requests == 1
    message = str(caught.value)
    assert "\n" not in message and "private" not in message and SECRET not in message


def test_a_key_that_is_refused_later_stops_nothing(tmp_path):
    with FaultServer(upper) as server:
        cloud = make(server, tmp_path / "s.db")
        cloud.answer([prompt("a")])
        server.share, server.faults = 1.0, ("401",)
        answers = cloud.answer([prompt(c) for c in "abcdef"])
    assert texts(answers) == ["A"] + [None] * 5 and answers.failed == 5 and cloud.breaker.is_open


def test_a_prompt_that_is_refused_is_asked_once(tmp_path):
    with FaultServer(upper, share=1.0, faults=("400",)) as server:
        answers = make(server, tmp_path / "s.db").answer([prompt("a"), prompt("b")])
        assert texts(answers) == [None, None] and answers.failed == server.requests == 2


def test_retries_are_bounded_and_wait_as_long_as_they_are_told(tmp_path):
    with FaultServer(upper, share=1.0, faults=("429",), after="0.3") as server:
        start = time.monotonic()
        assert make(server, tmp_path / "s.db", retries=2).answer([prompt("a")]).failed == 1
        assert server.requests == 3 and 0.6 <= time.monotonic() - start < 3
        server.after = "3600"
        assert make(server, tmp_path / "s.db").answer([prompt("b")]).failed == 1
        assert server.asked["b"] == 1  # nobody waits an hour


def test_no_key_no_price_no_highest_price(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with FaultServer(upper) as server:
        cloud = make(server, tmp_path / "s.db")  # nothing is demanded before the first call
        with pytest.raises(CloudError, match="TEST_KEY.*is not set"):
            cloud.answer([prompt("a")])
        assert server.requests == 0 and cloud.budget.spent() == (0, 0.0)
        assert texts(make(server, tmp_path / "s.db", key_env="").answer([prompt("a")])) == ["A"]
    with pytest.raises(CloudError, match="prices has no row for config.cloud.model='other'"):
        make("http://127.0.0.1:9", tmp_path / "s.db", model="other")
    with pytest.raises(CloudError, match="max_usd needs parameters.max_tokens"):
        make("http://127.0.0.1:9", tmp_path / "s.db", max_usd=1.0, parameters={"temperature": 0.5})
    for url in (
        "127.0.0.1",
        "https://",
        f"https://me:{SECRET}@127.0.0.1/v1",
        f"https://127.0.0.1/v1?key={SECRET}",
    ):
        with pytest.raises(CloudError, match="base_url") as caught:
            make(url, tmp_path / "s.db")
        assert SECRET not in str(caught.value)
    for url in ("http://[::1/v1", "http://127.0.0.1:99999/v1", "http://127.0.0.1:port/v1"):
        with pytest.raises(CloudError, match="base_url must begin"):
            make(url, tmp_path / "s.db")
    with pytest.raises(
        CloudError, match="key_env must be the name of an environment variable"
    ) as caught:
        make("http://127.0.0.1:9", tmp_path / "s.db", key_env=SECRET)
    assert SECRET not in str(caught.value)
    for key in ("gsk_aB3", "A" * 41):  # which are names as well
        with pytest.raises(CloudError, match="never the key itself") as caught:
            make("http://127.0.0.1:9", tmp_path / "s.db", key_env=key)
        assert key not in str(caught.value)
    for prices in ((("m", 1),), (("m", 1, "x"),), (("m", 1, float("nan")),), (("m", -1, 1),)):
        with pytest.raises(CloudError, match="prices=.* must be"):
            make("http://127.0.0.1:9", tmp_path / "s.db", prices=prices)
    for timeouts in ((1.0, "x", 1.0), (1.0, 1.0), (1.0, 1.0, float("nan"))):
        with pytest.raises(CloudError, match="timeouts=.* must be three"):
            make("http://127.0.0.1:9", tmp_path / "s.db", timeouts=timeouts)
    for limits in ({"max_usd": float("nan")}, {"max_usd": -1.0}, {"max_calls": -1}):
        with pytest.raises(UserError, match="must be at least 0, or None"):
            make("http://127.0.0.1:9", tmp_path / "s.db", **limits)
    with pytest.raises(CloudError, match="parameters may not hold stream"):
        make("http://127.0.0.1:9", tmp_path / "s.db", parameters={"stream": True})
    with pytest.raises(CloudError, match="prices_date='soon' must be a date"):
        make("http://127.0.0.1:9", tmp_path / "s.db", prices_date="soon")


def test_a_host_that_is_not_there_opens_the_circuit_and_closes_it_again(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        cloud = make(url, tmp_path / "s.db", concurrency=1, retries=1)
        answers = cloud.answer([prompt(i) for i in range(100)])
        calls = cloud.reasons["no connection"]  # until it opened, then a probe now and then
        assert answers.failed == 100
        assert attempts.OUTAGE_FAILURES < calls < attempts.OUTAGE_FAILURES + 10
        assert cloud.budget.spent() == (calls, 0.0)  # nothing was sent, so nothing is charged
    with FaultServer(upper) as server:
        object.__setattr__(cloud.cloud, "base_url", server.url)
        cloud.cloud._sessions.clear()
        time.sleep(cloud.breaker.seconds_left())
        assert texts(cloud.answer([prompt("a")])) == ["A"] and not cloud.breaker.is_open


@pytest.mark.parametrize("mode", ["live", "record"])
def test_an_outage_shorter_than_the_retries_costs_no_answer(tmp_path, monkeypatch, mode):
    """16 workers, 200 prompts, five retries; every request fails for some tenths of a second."""
    with FaultServer(upper, faults=("500", "reset")) as server:
        cloud = make(server, tmp_path / "s.db", concurrency=16, retries=5, mode=mode)
        cloud.answer([prompt("warm")])
        # Probes 0.1, 0.3, 0.7, 1.5, 2.5 s after the circuit opened.
        monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.1, 1.0))
        server.share = 1.0
        pending = cloud.submit([prompt(f"p{i}") for i in range(200)])
        while not cloud.breaker.is_open:
            time.sleep(0.01)
        if mode == "live":  # a training step does not wait for the end of it
            assert pending.answers(wait=0.1) == ([None] * 200, 0, 0) and not pending.done()
        time.sleep(0.2)
        server.share = 0.0
        assert texts(pending.answers()) == [f"P{i}" for i in range(200)]
        assert set(server.whole.values()) == {1} and server.whole.total() == 201
        assert pending.answers().failed == 0 and not cloud.breaker.is_open
        assert cloud.take_tally()[:2] == (201, 0)


@pytest.mark.parametrize("retries", [0, 1, 5])
def test_a_cloud_that_stays_away_fails_every_prompt_with_its_reason(tmp_path, retries):
    with FaultServer(upper, share=1.0, faults=("500",)) as server:
        cloud = make(server, tmp_path / "s.db", concurrency=16, retries=retries, mode="record")
        start = time.monotonic()
        with pytest.raises(CloudError, match="200 prompts have none .*500"):
            cloud.answer([prompt(i) for i in range(200)])
        assert time.monotonic() - start < 5 and cloud.breaker.gave_up(retries)
        assert server.requests < 16 * 6 + 30 and set(cloud.reasons) == {"500"}


def test_the_seconds_of_outage_that_retries_survive(monkeypatch):
    """The table of attempts.py: a probe is admitted at these seconds, and no other call."""
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (1.0, 60.0))
    clock = [1000.0]
    monkeypatch.setattr(attempts.time, "monotonic", lambda: clock[0])
    breaker = attempts.Breaker(workers=1)
    for _ in range(attempts.OUTAGE_FAILURES):
        assert breaker.admit() == "call"
        breaker.note_outage(probe=False)
    probed = []
    while len(probed) < 10:
        assert not breaker.gave_up(len(probed) + 1)
        clock[0] += breaker.seconds_left()
        assert breaker.admit() == "probe" and breaker.admit() is None
        probed.append(round(clock[0] - 1000))
        breaker.note_outage(probe=True)
        breaker.note_outage(probe=False)  # one that was in flight before
        assert breaker.gave_up(len(probed)) and not breaker.gave_up(len(probed) + 1)
    assert probed == [1, 3, 7, 15, 31, 63, 123, 183, 243, 303]
    breaker.note_life()
    assert breaker.admit() == "call" and breaker.seconds_left() == 0 and not breaker.gave_up(0)


def test_a_call_has_a_total_time_out_and_may_be_charged(tmp_path):
    with FaultServer(upper, delay=5.0) as server:
        start = time.monotonic()
        cloud = make(server, tmp_path / "s.db", retries=0, timeouts=(9.0, 9.0, 0.3))
        assert cloud.answer([prompt("a")]).failed == 1 and time.monotonic() - start < 4
    # "a": 1 byte + 32 of the frame, 50 tokens at most: (33 x 1 + 50 x 2) / 1e6
    assert cloud.budget.spent() == (1, pytest.approx(1.33e-4)) and ledger(cloud.store) == Ledger(
        0, 0, 0, 0.0, 0.0
    )


def test_a_slow_answer_is_unknown_now_and_there_later(tmp_path):
    with FaultServer(upper, delay=0.2) as server:
        cloud = make(server, tmp_path / "s.db")
        pending = cloud.submit([prompt("a")])
        assert pending.answers(wait=0.01) == ([None], 0, 0) and not pending.done()
        again = cloud.submit([prompt("a")])  # joins the call in flight
        assert (
            texts(again.answers()) == ["A"]
            and pending.answers().bought == 1
            and again.answers().bought == 0
        )
        assert server.requests == 1


def test_cancelling_ends_what_waits_and_keeps_what_is_paid(tmp_path):
    with FaultServer(upper, delay=0.1) as server:
        cloud = make(server, tmp_path / "s.db", concurrency=2)
        pending = cloud.submit([prompt(i) for i in range(50)])
        time.sleep(0.05)
        cloud.cancel()
        answers = pending.answers()
        assert answers.bought == server.whole.total() == ledger(cloud.store).calls <= 4
        assert answers.bought + answers.failed == 50


# ---------------------------------------------------------------- budget


def test_64_workers_never_pass_max_calls(tmp_path):
    with FaultServer(upper, share=0.3, faults=("500", "429", "empty", "truncated")) as server:
        cloud = make(server, tmp_path / "s.db", max_calls=100, concurrency=64)
        answers = cloud.answer([prompt(i) for i in range(200)])
        assert server.requests == 100 == cloud.budget.spent().calls
        assert (
            answers.bought == server.whole.total() < 100
            and answers.replies.count(None) == 200 - answers.bought
        )
        stop = make(server, tmp_path / "s.db", max_calls=100, when_spent="stop")
        with pytest.raises(BudgetSpent, match="100 calls of config.cloud.max_calls=100"):
            stop.answer([prompt("new")])
        stored = next(i for i, reply in enumerate(answers.replies) if reply is not None)
        assert stop.answer([prompt(stored)]).failed == 0 and server.requests == 100  # free


def test_max_usd_counts_calls_in_flight_at_their_highest_price(tmp_path):
    # highest price of "1".."9": (33 + 50 x 2) / 1e6 = 1.33e-4; paid: 1.6e-5
    with FaultServer(upper, delay=0.1) as server:
        cloud = make(server, tmp_path / "s.db", max_usd=3 * 1.33e-4, concurrency=9)
        assert cloud.answer([prompt(i) for i in range(1, 10)]).bought == server.requests == 3
        assert cloud.budget.spent() == (3, pytest.approx(3 * 1.6e-5))
        # 3.99e-4 - 4.8e-5 = 3.51e-4 are left: two more at their highest price
        assert cloud.answer([prompt(i) for i in range(1, 10)]).bought == 2


# ---------------------------------------------------------------- processes

CHILD = """
import sys
sys.path.insert(0, {root!r})
from collab_jax.cloud import CachedCloud, Policy, Store, attempts, leases, openai
leases.LEASE_SECONDS, attempts.BACKOFF_SECONDS = {lease}, (0.01, 0.05)
client = openai.OpenAICloud(
    model="m", parameters={{}}, base_url={url!r}, key_env="", prices=(1.0, 2.0),
    timeouts=(30.0, 30.0, 30.0), workers=4, provider="faulty",
)
cloud = CachedCloud(client, Store({path!r}), Policy(retries=20))
answers = cloud.answer([[{{"role": "user", "content": str(i)}}] for i in range({count})])
print(sum(reply is not None for reply in answers.replies), flush=True)
"""


def start(server, path, count, lease=1.0) -> subprocess.Popen:
    code = CHILD.format(root=str(ROOT), url=server.url, path=str(path), count=count, lease=lease)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_while_buying_and_started_again(tmp_path):
    """In flight at a kill are 4 calls at most."""
    faults = ("429", "500", "reset", "truncated", "empty")
    with FaultServer(upper, share=0.3, faults=faults, delay=0.03) as server:
        for kill in range(2):
            child = start(server, tmp_path / "s.db", 100)
            while server.requests < 40 * (kill + 1):
                assert child.poll() is None
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            child.communicate()
        child = start(server, tmp_path / "s.db", 100)
        assert child.communicate(timeout=60)[0].strip() == "100" and child.returncode == 0
        assert len(server.whole) == 100 and server.whole.total() <= 100 + 2 * 4
    assert ledger(Store(tmp_path / "s.db")).calls == 100


@pytest.mark.slow
def test_two_processes_that_want_the_same_make_one_call(tmp_path):
    with FaultServer(upper, delay=0.02) as server:
        children = [start(server, tmp_path / "s.db", 60, lease=15.0) for _ in range(2)]
        assert [child.communicate(timeout=60)[0].strip() for child in children] == ["60", "60"]
        assert server.requests == len(server.asked) == 60


class Held:
    """Fails on "k" beside "x", and answers each of them alone when it is told to."""

    model, provider, parameters, batch, workers = "m", "", {}, 2, 2

    def __init__(self):
        self.asked, self.told = ({c: threading.Event() for c in "kx"} for _ in range(2))

    def highest_usd(self, messages):
        return 0.0

    def answer(self, prompts):
        if len(prompts) == 2:
            return [Failure("no"), Failure("later", retry=True)]
        name = prompts[0][0]["content"]
        self.asked[name].set()
        assert self.told[name].wait(10)
        return [Reply(name, 1, 1, 0.0, 0.0)]


def test_a_thread_gives_back_no_lease_of_another(tmp_path):
    held = Held()
    cloud = CachedCloud(held, Store(tmp_path / "s.db"), Policy(retries=1))
    first = cloud.submit([prompt("k"), prompt("x")])
    assert held.asked["x"].wait(10)  # again; "k" has failed
    second = cloud.submit([prompt("k")])
    time.sleep(0.1)
    held.told["x"].set()
    assert held.asked["k"].wait(10) and texts(first.answers()) == [None, "x"]
    time.sleep(0.1)  # the first thread is done with its leases
    assert leases.Leases(cloud.store).take([cloud.key(prompt("k"))]) == set()
    held.told["k"].set()
    assert texts(second.answers()) == ["k"]


def test_a_lease_that_waited_for_the_store_lasts_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    slow, other = leases.Leases(Store(tmp_path / "s.db")), leases.Leases(Store(tmp_path / "s.db"))
    with ThreadPoolExecutor(1) as pool:
        with other.store.transaction():
            taken = pool.submit(slow.take, ["a"])
            time.sleep(0.5)
        assert taken.result() == {"a"} and other.take(["a"]) == set()


def test_a_lease_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    dead, heir = leases.Leases(Store(tmp_path / "s.db")), leases.Leases(Store(tmp_path / "s.db"))
    assert dead.take(["a", "b"]) == {"a", "b"} and heir.take(["a", "c"]) == {"c"}
    time.sleep(0.15)
    heir.renew()
    time.sleep(0.1)
    assert heir.take(["a", "b"]) == {"a", "b"} and dead.take(["c"]) == set()
    heir.release(["a", "b", "c"])
    assert dead.take(["a", "b", "c"]) == {"a", "b", "c"}


def test_a_lease_that_could_not_be_given_back_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    held, heir = leases.Leases(Store(tmp_path / "s.db")), leases.Leases(Store(tmp_path / "s.db"))
    assert held.take(["a", "b"]) == {"a", "b"}
    with monkeypatch.context() as broken:
        broken.setattr(held.store, "transaction", mock.Mock(side_effect=StoreError("full")))
        with pytest.raises(StoreError):
            held.release(["a"])
    time.sleep(0.15)
    held.renew()
    time.sleep(0.1)
    assert heir.take(["a", "b"]) == {"a"}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("-1", 0.0), ("inf", None), ("nan", None), ("1e400", None), ("soon", None)],
)
def test_the_seconds_of_a_retry_after_header_are_finite(value, seconds):
    assert openai._retry_after(value) == seconds


def test_halves_of_characters_are_put_together():
    halves, said = Delta("", ""), []
    for content in ("a\ud83d", "\ude00b", "\ud83d", "c", "\ude00"):
        delta, halves = streaming._whole(halves, Delta("", content))
        said.append(delta.content)
    assert said == ["a", "\U0001f600b", "", "\ufffdc", "\ufffd"] and halves == ("", "")


@dataclass
class Stopped(FakeCloud):
    """A cloud whose process stops right before its first call, until `go` is set."""

    stopped: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def highest_usd(self, messages):
        self.stopped.set()
        assert self.go.wait(10)
        return 0.25


@pytest.mark.parametrize("other_ends", [True, False])
def test_a_process_that_was_stopped_for_longer_than_its_lease_buys_nothing_twice(
    tmp_path, monkeypatch, other_ends
):
    slow = Stopped()
    quick = FakeCloud() if other_ends else Stopped()
    first, second = (CachedCloud(cloud, Store(tmp_path / "s.db")) for cloud in (slow, quick))
    pending = first.submit([prompt("a"), prompt("b")])
    assert slow.stopped.wait(10)  # both are leased
    clock = time.time() + 60
    monkeypatch.setattr(leases.time, "time", lambda: clock)  # the leases have run out
    others = second.submit([prompt("a")])
    if other_ends:
        assert texts(others.answers()) == ["A:a"]
        slow.go.set()
    else:  # the other has leased it, and is about to buy it
        assert quick.stopped.wait(10)
        slow.go.set()
        time.sleep(0.2)
        quick.go.set()
    assert texts(pending.answers()) == ["A:a", "A:b"] and texts(others.answers()) == ["A:a"]
    assert (slow.asked, quick.asked) == (["b"], ["a"])
    assert pending.answers().bought == 1 and first.budget.spent() == (2, 0.5)


# ---------------------------------------------------------------- connections

CALLER = """
import sys
sys.path.insert(0, {root!r})
from collab_jax.cloud import CachedCloud, Store, openai

def client():
    return openai.OpenAICloud(
        model="m", parameters={{}}, base_url={url!r}, key_env="", prices=(1.0, 2.0),
        timeouts=(30.0, 30.0, 30.0), workers=4, provider="faulty",
    )

def ask(*contents):
    stores.append(Store({path!r}))
    cloud = CachedCloud(client(), stores[-1])
    return cloud.submit([[{{"role": "user", "content": content}}] for content in contents])

stores = []
print(ask("a", "b", "c").answers().bought)  # collected with its connections
pending = ask("d", "e")
print(pending.answers().bought)
ask("slow 1", "slow 2", "slow 3", "slow 4", "slow 5", "slow 6").answers(wait=0.5)  # cut off
for store in stores[:2]:
    store.close()
"""


@pytest.mark.slow
def test_connections_are_closed_in_the_loop_that_made_them(tmp_path):
    def answer(content):
        time.sleep(3.0 * content.startswith("slow"))
        return content

    with FaultServer(answer) as server:
        path = tmp_path / "s.db"
        code = CALLER.format(root=str(ROOT), url=server.url, path=str(path))
        command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.split() == ["3", "2"], done.stderr
        assert "Event loop" not in done.stderr and "Warning" not in done.stderr, done.stderr
        assert "ignored" not in done.stderr, done.stderr
        # Calls in flight may be charged; a thread may end between booking a call and making it.
        assert server.requests == 5 + 4 <= Budget(Store(path)).spent().calls <= 5 + 6
