"""The bench of a server: its clients, what it makes of what they saw, its models and processes."""

import asyncio
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from serving import starter

from collab_jax.bench import load, outside, promises, served, throughput
from collab_jax.bench.load import Plan, Report, Seen
from collab_jax.bench.serve import run_serve_bench
from collab_jax.bench.throughput import Question
from collab_jax.models import decoder, hf
from collab_jax.runtime.errors import UserError

PROMPTS = ["1 2=3", "3 4=7", "5 6=11"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose device recites."""
    with starter(tmp_path_factory.mktemp("server")) as start:
        yield start()


def plan(server, clients, **changes):
    """A plan of device answers to PROMPTS."""
    asked = throughput.bodies(PROMPTS, model="collab-device")
    return Plan(("127.0.0.1", server.port), asked, clients, 60.0)._replace(**changes)


# ------------------------------------------------------------------------------------- clients


def test_clients_send_as_many_as_they_should_and_see_all_of_it(server):
    report = load.run(plan(server, 2, count=7))
    assert sorted(one.body for one in report.seen) == list(range(7))
    said = len(server.service.engine.tokens) + 1  # and the end token
    for one in report.seen:
        assert (one.status, one.tokens, one.problem) == (200, said, "")
        assert one.about["answered_by"] == "device"
        assert 0 < one.arrivals[0] <= one.arrivals[-1] <= one.took
    assert max(one.began + one.took for one in report.seen) <= report.seconds
    assert report.busy > 0


def test_requests_at_a_rate_do_not_wait_for_each_other(server):
    report = asyncio.run(load.load(plan(server, 0, rate=200.0, count=10)))
    began = [one.began for one in sorted(report.seen, key=lambda one: one.body)]
    assert len(began) == 10 and began == sorted(began)
    assert began[-1] >= 8 / 200  # the tenth, a little early at most


def test_refusals_and_nobody_there_are_seen(server):
    server.service.engine.full = True
    try:
        [refused] = asyncio.run(load.load(plan(server, 1, count=1))).seen
    finally:
        server.service.engine.full = False
    assert refused.status == 429 and "full" in refused.problem and not refused.arrivals
    nobody = plan(server, 1, count=1, address=("127.0.0.1", served.free_port()))
    [unheard] = asyncio.run(load.load(nobody)).seen
    assert unheard.status == 0 and unheard.problem


def read(*parts):
    """(the status, whether another may follow, the events) of a response in these parts."""

    async def feed():
        reader = asyncio.StreamReader()
        for part in parts:
            reader.feed_data(part)
        reader.feed_eof()
        response = load.Response(reader)
        await response.read_head()
        events = [event async for event in response.events()]
        return response.status, response.kept, events

    return asyncio.run(feed())


def test_events_are_put_together_however_they_are_cut():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"8\r\ndata: {}\r\n" + b"b\r\n\n\ndata: [DO\r\n" + b"5\r\nNE]\n\n\r\n" + b"0\r\n\r\n"
    assert read(head, chunks) == (200, True, [b"{}", b"[DONE]"])
    assert read(b"HTTP/1.1 503 No\r\n\r\n", b'{"error": 1}') == (503, False, [b'{"error": 1}'])
    head = b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\n"
    assert read(head, b"{}HTTP/1.1 200") == (429, True, [b"{}"])  # what follows is another's
    closed = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert read(closed, b"{}") == (429, False, [b"{}"])


def test_clients_keep_connections_and_open_another_where_one_was_closed():
    opened, asked = 0, 0

    async def answer(reader, writer):
        """Answers two requests, and closes the connection without a word."""
        nonlocal opened, asked
        opened += 1
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            asked += 1
            writer.write(b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            address = listening.sockets[0].getsockname()
            slow = Plan(address, throughput.bodies(PROMPTS), 0, 60.0, rate=10.0, count=5)
            return await load.load(slow)

    report = asyncio.run(ask())
    assert [one.status for one in report.seen] == [429] * 5
    assert (opened, asked) == (3, 5)


def test_a_request_that_a_server_drops_is_not_made_again():
    asked = 0

    async def answer(reader, writer):
        """Answers one request, and drops the next."""
        nonlocal asked
        for answers in (True, False):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            asked += 1
            if answers:
                writer.write(b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            address = listening.sockets[0].getsockname()
            return await load.load(Plan(address, throughput.bodies(PROMPTS), 1, 60.0, count=4))

    report = asyncio.run(ask())
    assert [one.status for one in report.seen] == [429, 0, 429, 0] and asked == 4


def test_text_is_content_or_thinking_and_neither_a_role_nor_the_prompt():
    event = lambda **delta: {"choices": [{"index": 0, "delta": delta}]}  # noqa: E731
    for true in ({"content": "4"}, {"reasoning_content": "4"}):
        assert load.has_text(event(**true), "1 2=3")
    for no in (event(role="assistant", content=""), event(content="1 2=3"), {}):
        assert not load.has_text(no, "1 2=3")


# ------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    whole = Seen(0, 200, 0.0, [0.1, 0.2, 0.4], 0.5, tokens=30)
    other = Seen(1, 200, 0.0, [0.3], 0.5, tokens=10)
    cut = Seen(2, 200, 0.0, [0.9], 0.9, problem="a stream without an end")
    found = throughput.figures(Report([whole, other, cut], 2.0, 0.25))
    assert found.tokens_per_s == 20 and found.first == [0.1, 0.3] and found.failed == 1
    np.testing.assert_allclose(found.gaps, [0.1, 0.2])
    assert throughput.quantile([1.0, 2.0, 3.0], 0.5) == 2 and np.isnan(throughput.quantile([], 0.5))

    rates = {"ours": (40.0, 60.0), "peer": (10.0, 20.0)}
    rounds = {name: [found._replace(tokens_per_s=x) for x in xs] for name, xs in rates.items()}
    one = throughput.summary(rounds, "peer")
    assert one["tokens_per_s"] == 15 and one["ratio"] == 3.5 and one["failed"] == 2
    cells = throughput.row({"model": "25m", "clients": 8, "server": "peer"} | one)
    assert cells[3:7] == ("15", "3.50 (3.25 to 3.75)", "200.0", "300.0")


def test_servers_take_turns_and_the_first_round_does_not_count(server):
    there = []
    for name in ("ours", "peer"):
        process = subprocess.Popen(["sleep", "60"])
        address = ("127.0.0.1", server.port)
        there.append(served.Server(name, address, {"model": "collab-device"}, process))
        there[-1].pause()
    try:
        rounds = throughput.measured(there, PROMPTS, clients=2, seconds=0.2, rounds=1)
        assert {name: len(found) for name, found in rounds.items()} == {"ours": 1, "peer": 1}
        assert all(found[0].tokens_per_s > 0 for found in rounds.values())
        assert there[0].memory() > 0
    finally:
        for one in there:
            one.process.kill()
            one.process.wait()


def test_a_mix_changes_in_the_middle():
    questions = [Question(str(i), f"{3 + i % 2} numbers") for i in range(400)]
    mix = promises.changing(questions, 200)
    three = [q.stratum == "3 numbers" for q in mix]
    assert len(set(mix)) == len(mix) == 200
    assert (sum(three[:100]), sum(three[100:])) == (50, 10)
    assert three[:100] != sorted(three[:100])


def test_who_may_be_answered_by_the_device_must_be():
    fallback = Seen(0, 200, 0.0, [], 0.1, about={"reason": "device_fallback"})
    refused = Seen(1, 503, 0.0, [], 0.1)
    assert promises.as_asked(fallback) and promises.as_asked(refused)
    assert not promises.as_asked(fallback._replace(body=1))
    assert not promises.as_asked(refused._replace(body=0))
    assert not promises.as_asked(fallback._replace(about={"reason": "margin"}))


# ------------------------------------------------------------------------ models and processes


def test_a_model_without_training_recites_to_every_server(tmp_path):
    served.write_model("tiny", tmp_path)
    cfg = hf.config_from_hf(hf.read_config(tmp_path))
    params = hf.load(tmp_path, cfg, "float32")
    tokens = jnp.array([[5, 9, 30]])
    position, mask = jnp.arange(3)[None], jnp.tril(jnp.ones((3, 3), bool))[None]
    hidden, _ = decoder.forward(params, cfg, tokens, position, mask)
    best = set(np.asarray(decoder.logits(params, cfg, hidden)).argmax(-1).ravel().tolist())
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert best == {vocabulary[served.RECITED]}
    assert not hf.read_config(tmp_path)["eos_token_id"] and not (tmp_path / hf.GENERATION).exists()
    assert (tmp_path / served.GGUF).stat().st_size > 3_000_000


def test_who_is_not_there_is_said_with_the_reason(tmp_path):
    assert "No such file" in served.why_no_transformers("/nowhere/python")
    assert "--llama_server=/nowhere" in served.why_no_llama("/nowhere")
    assert not served.why_no_llama(sys.executable)
    dies = [sys.executable, "-c", "print('no memory'); raise SystemExit(1)"]
    with pytest.raises(UserError, match="peer did not start: no memory"):
        with served.started("peer", dies, served.free_port(), "/", {}, tmp_path / "log"):
            pass


GUIDELLM = """#!{python}
import json, sys
values = dict(arg.split("=", 1) for arg in ",".join(sys.argv[1:]).split(",") if "=" in arg)
if values["streams"] == "3":
    sys.exit("no such data")
if not sys.argv[-1].endswith(".json"):
    sys.exit("unsupported file type")
first = {{"successful": {{"percentiles": {{"p50": 20.0, "p95": 40.0}}}}}}
tokens = {{"total": {{"total_sum": 300.0}}}}
totals = {{"successful": int(values["streams"]), "errored": 1, "incomplete": 2}}
metrics = {{"request_totals": totals, "output_token_count": tokens}}
metrics["time_to_first_token_ms"] = first
report = {{"benchmarks": [{{"metrics": metrics, "duration": float(values["seconds"])}}]}}
json.dump(report | {{"target": values["target"]}}, open(sys.argv[-1].split("path=")[1], "w"))
"""


def test_guidellm_is_asked_and_read(tmp_path):
    (program := tmp_path / "guidellm").write_text(GUIDELLM.format(python=sys.executable))
    program.chmod(0o755)
    server = served.Server("ours", ("127.0.0.1", 8123), {"model": "collab-device"}, None)
    report = outside.run(str(program), server, tmp_path / "data.jsonl", clients=4, seconds=1.5)
    assert report["target"] == "http://127.0.0.1:8123"
    found = outside.of_guidellm(report)
    assert found == {"answered": 4, "failed": 1, "tokens_per_s": 200.0,
                     "first_token_p50": 0.02, "first_token_p95": 0.04}  # fmt: skip
    cells = outside.row({"clients": 4, "program": "guidellm", "rounds": [found, found]})
    assert cells == ("4", "guidellm", "8", "200", "20.0", "40.0")
    with pytest.raises(UserError, match="guidellm failed: no such data"):
        outside.run(str(program), server, tmp_path / "data.jsonl", clients=3, seconds=1.5)


def test_without_guidellm_it_is_said_and_nothing_is_measured(tmp_path, capsys):
    assert run_serve_bench(["--only", "guidellm", "--guidellm", "/nowhere"]) == 0
    assert "without guidellm: --guidellm=/nowhere is not there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_every_promise_as_a_command(tmp_path):
    parts = ["fairness", "overload", "dead_cloud", "rate"]
    sizes = ["--seconds", "3", "--overload_seconds", "6", "--queries", "100"]
    report = tmp_path / "figures.json"
    assert run_serve_bench(["--only", *parts, *sizes, "--json", str(report)]) == 0
    figures = json.loads(report.read_text())["figures"]
    assert list(figures) == parts and len(figures["rate"]) == 8
