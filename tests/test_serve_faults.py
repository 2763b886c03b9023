"""Serving over real sockets, with an engine that recites: who answers, at what cost, what fails."""

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from serving import KEY, PRICE, Provider, told

from collab_jax.cloud import attempts, ledger
from collab_jax.cloud.redaction import as_it_is

CALLS = {6: 2.0}  # a margin after "<think>49+9="
THOUGHT, ANSWER = "49+9=58,58+37=95", "49+9+37"


# ------------------------------------------------------------------------------- who answers


def test_the_device_answers_and_no_socket_is_opened(start):
    with Provider() as provider:
        server = start(provider, CALLS)
        for body in ({"model": "collab-device"}, {"collab": {"mode": "only_device"}}):
            status, headers, reply = server.chat(**body)
            message = reply["choices"][0]["message"]
            assert (status, message["content"], message["reasoning_content"]) == (
                200, ANSWER, THOUGHT,
            )  # fmt: skip
            assert reply["model"] == "tiny" and reply["choices"][0]["finish_reason"] == "stop"
            collab = reply["collab"]
            assert (collab["answered_by"], collab["reason"], collab["usd"]) == (
                "device", "only_device", 0,
            )  # fmt: skip
            assert headers["x-collab-answered-by"] == "device"
            assert headers["x-request-id"] == collab["request_id"]
        assert provider.connections == 0 and server.service.upstream._client is None


def test_a_call_passes_the_clouds_stream_on(start):
    steps = [("reasoning", "let me see"), ("text", " The"), ("text", " answer")]
    with Provider(lambda _: steps) as provider:
        server = start(provider, CALLS)
        status, headers, chunks = server.stream(stream_options={"include_usage": True})
    assert status == 200 and "x-collab-answered-by" not in headers
    thought, models = told(chunks, "reasoning_content")
    assert thought == "49+9=let me see" and models == {"tiny", "big"}
    assert told(chunks, "content") == (" The answer", {"big"})
    *_, final, usage = chunks
    assert final["choices"][0]["finish_reason"] == "stop" and final["model"] == "big"
    assert final["collab"]["reason"] == "margin" and final["collab"]["margin"] == 2.0
    assert final["collab"]["device_tokens"] == 7 and final["collab"]["cloud_tokens"] == 13
    assert usage["choices"] == [] and usage["usage"]["cost"] == pytest.approx(PRICE)
    assert usage["usage"]["prompt_tokens"] == 10 and usage["usage"]["completion_tokens"] == 3
    assert provider.bodies[0]["messages"] == [{"role": "user", "content": "49 9 37=95"}]


def test_a_stream_of_the_device_shows_neither_tags_nor_marker(start):
    _, _, chunks = start().stream(collab={"threshold": 100})
    assert told(chunks, "reasoning_content") == (THOUGHT, {"tiny"})
    assert told(chunks, "content") == (ANSWER, {"tiny"})
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "usage" not in chunks[-1] and chunks[-1]["collab"]["reason"] == "margin"
    assert "<" not in json.dumps(chunks)


def test_an_answer_is_bought_once_and_the_books_agree(start):
    with Provider(lambda _: [("wait", 0.2), ("text", "4")]) as provider:
        server = start(provider, CALLS)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda i: server.chat(f"{i % 2} 9 37=95")[2], range(8)))
        replies.append(server.chat("1 9 37=95")[2])
        assert {reply["choices"][0]["message"]["content"] for reply in replies} == {"4"}
        assert sorted(provider.whole.values()) == [1, 1] and provider.requests == 2
        cost = sum(reply["usage"]["cost"] for reply in replies)
        cloud = server.service.upstream.cloud
        assert cost == pytest.approx(2 * PRICE) == ledger(cloud.store).usd
        assert cloud.budget.spent().usd == pytest.approx(cost)
        assert server.service.upstream.down is False


def test_the_clients_thresholds_and_limits_hold(start):
    with Provider() as provider:
        server = start(provider, CALLS)
        by = lambda **collab: server.chat(collab=collab)[2]["collab"]  # noqa: E731
        assert by(threshold=2.5)["answered_by"] == "device"
        assert by(threshold=1.5)["answered_by"] == "cloud"
        assert by(target_call_rate=0)["answered_by"] == "device"
        dear = by(max_usd=1e-9)
        assert (dear["answered_by"], dear["reason"]) == ("device", "max_usd")
        status, _, error = server.chat(collab={"target_call_rate": 0.5})
        assert status == 400 and error["error"]["param"] == "collab.target_call_rate"
        server.chat("1 2=3", collab={"share_attempt": True})
        assert "49+9=" in provider.bodies[-1]["messages"][-1]["content"]


def test_a_response_without_an_answer_goes_to_the_cloud_or_stays_empty(start):
    with Provider() as provider:
        server = start(provider, response="<think>49+9=58")
        reply = server.chat()[2]
        assert reply["choices"][0]["message"]["content"] == "42"
        assert reply["collab"]["reason"] == "unanswered"
        reply = server.chat(model="collab-device", max_tokens=3)[2]
        assert reply["choices"][0]["message"]["content"] == ""
        assert reply["choices"][0]["finish_reason"] == "length"


def test_tokens_without_an_answer_count_where_the_cloud_has_none_either(start):
    server = start("http://127.0.0.1:9/v1", response="<think>49+9=58", deadline=0.5)
    reply = server.chat()[2]
    assert reply["collab"]["reason"] == "device_fallback"
    usage = reply["usage"]
    assert usage["completion_tokens"] == usage["cost_details"]["device_tokens"] > 0
    assert usage["prompt_tokens"] > 0


def test_stop_strings_cut_content_of_either_model(start):
    with Provider(lambda _: [("text", "on"), ("text", "e STOP two")]) as provider:
        server = start(provider)
        reply = server.chat(model="collab-device", stop="+9")[2]
        assert reply["choices"][0]["message"]["content"] == "49"
        assert reply["choices"][0]["message"]["reasoning_content"] == THOUGHT
        _, _, chunks = server.stream(model="collab-cloud", stop=["two", " STOP"])
        assert told(chunks, "content") == ("one", {"big"})


def test_plain_completions(start):
    server = start()
    status, _, reply = server.json("POST", "/v1/completions", {"prompt": "49 9 37=95"})
    assert status == 200 and reply["choices"][0]["text"] == ANSWER
    assert reply["object"] == "text_completion"


# ---------------------------------------------------------------------------- when the cloud fails


def test_failures_are_tried_again_within_the_deadline(start):
    faults = iter([[("status", 500)], [("status", 429)], [("garbage",)], [("text", "ok")]])
    with Provider(lambda _: next(faults)) as provider:
        server = start(provider, CALLS, retries=5)
        reply = server.chat()[2]
        assert reply["choices"][0]["message"]["content"] == "ok" and provider.requests == 4
        record = server.json("GET", f"/requests/{reply['collab']['request_id']}", key=KEY)[2]
        assert record["attempts"] == 4 and record["decided_at"] == 6
        assert record["margins"][6] == 2.0 and "messages" not in record
        assert server.service.upstream.cloud.budget.spent().usd == pytest.approx(
            reply["usage"]["cost"]
        )


def test_attempts_that_failed_are_within_what_a_client_allows(start):
    for times, answered_by in ((1.5, "device"), (2.5, "cloud")):
        faults = iter([[("garbage",)], [("text", "ok")]])
        with Provider(lambda _, faults=faults: next(faults)) as provider:
            server = start(provider, CALLS, retries=5)
            query = as_it_is([{"role": "user", "content": "49 9 37=95"}])
            most = times * server.service.upstream.highest_usd(query)
            reply = server.chat(collab={"max_usd": most})[2]
            assert reply["collab"]["answered_by"] == answered_by
            assert 0 < reply["usage"]["cost"] <= most
            assert provider.requests == (1 if answered_by == "device" else 2)


@pytest.mark.parametrize("fault", [[("status", 503)], [("wait", 3.0)], [("cut",)], "dead"])
def test_where_the_cloud_fails_the_device_goes_on_or_503(start, fault):
    with Provider(lambda _: fault) as provider:
        url = "http://127.0.0.1:9/v1" if fault == "dead" else provider
        server = start(url, CALLS, deadline=0.5)
        begin = time.monotonic()
        _, _, chunks = server.stream()
        assert time.monotonic() - begin < 1.5
        assert told(chunks, "reasoning_content") == (THOUGHT, {"tiny"})
        assert told(chunks, "content") == (ANSWER, {"tiny"})
        assert chunks[-1]["collab"]["reason"] == "device_fallback"
        assert chunks[-1]["collab"]["device_tokens"] == len(server.service.engine.tokens) + 1
        first, second = server.service.engine.jobs
        assert second.bias == -float("inf") and len(second.written) == 6 and not first.written
        budget = server.service.controller
        assert budget.state.queries == 0 and budget.bias == pytest.approx(
            0
        )  # as if it had not been
        status, _, error = server.chat(collab={"allow_fallback": False})
        assert status == 503 and error["error"]["code"] == "cloud"
        for mode, expected in [("only_cloud", 503), ("prefer_cloud", 200)]:
            status, _, reply = server.chat(collab={"mode": mode})
            assert status == expected
        assert reply["collab"]["reason"] == "device_fallback" and reply["model"] == "tiny"


def test_after_the_first_content_there_is_an_error_and_nobody_elses_text(start):
    with Provider(lambda _: [("text", "The answer "), ("cut",)]) as provider:
        server = start(provider, CALLS)
        status, _, chunks = server.stream()
        assert status == 200 and told(chunks, "content") == ("The answer ", {"big"})
        assert chunks[-1]["error"]["code"] == "cloud"
        # Nothing was sent yet where the answer is whole or not at all.
        assert server.chat()[2]["collab"]["reason"] == "device_fallback"
        _, _, chunks = server.stream(collab={"strict": True})
        assert told(chunks, "content") == (ANSWER, {"tiny"})


def test_while_the_cloud_is_down_the_budget_stands_still(start):
    with Provider(lambda _: [("status", 503)]) as provider:
        server = start(provider, CALLS)
        for _ in range(attempts.OUTAGE_FAILURES):
            server.chat()
        assert server.service.upstream.down
        before = server.service.controller.state
        for _ in range(20):
            assert server.chat()[2]["collab"]["reason"] == "device_fallback"
        after = server.service.controller.state  # probes were wanted, and taken back
        assert (after.queries, after.calls) == (before.queries, before.calls)
        assert after.bucket == pytest.approx(before.bucket)
        assert after.tracker.bias == pytest.approx(before.tracker.bias)
        provider.steps = lambda _: [("text", "back")]
        end = time.monotonic() + 20
        while server.chat()[2]["collab"]["answered_by"] != "cloud" and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.service.upstream.down


def test_a_cloud_that_is_back_is_found_by_queries_that_would_not_call(start):
    """While it is down the bias stands still; else nothing would raise it to the next call."""
    with Provider(lambda _: [("status", 503)]) as provider:
        server = start(provider, {0: -3.0})  # no query calls by the bias that there is
        for _ in range(attempts.OUTAGE_FAILURES):
            server.chat(collab={"mode": "only_cloud"})
        assert server.service.upstream.down
        provider.steps = lambda _: [("text", "back")]
        end = time.monotonic() + 30
        while server.chat()[2]["collab"]["answered_by"] != "cloud" and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.service.upstream.down


def test_a_stream_that_is_too_slow_is_no_outage(start):
    steps = [("text", "The answer"), ("wait", 2.0), ("text", " is late")]
    with Provider(lambda _: steps) as provider:
        server = start(provider, CALLS, deadline=0.3)
        for _ in range(attempts.OUTAGE_FAILURES + 1):
            server.chat(collab={"mode": "only_cloud"})
        assert not server.service.upstream.down


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(start):
    server = start(None)
    text = server.service.text
    most = server.service.prompt_length * text.longest_piece
    with mock.patch.object(type(text), "prompt_ids", side_effect=AssertionError):
        status, _, body = server.chat("7" * (most + 1))
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"


def test_64_clients_and_a_dead_cloud(start):
    server = start("http://127.0.0.1:9/v1", CALLS, deadline=1.0, retries=3)
    seconds = []

    def ask(i):
        begin = time.monotonic()
        collab = {"threshold": 0, "allow_fallback": bool(i % 2)}
        status, _, reply = server.chat(f"{i} 9 37=95", collab=collab)
        seconds.append(time.monotonic() - begin)
        return status == 200 and reply["collab"]["reason"], status

    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(ask, range(64)))
    assert replies == [("device_fallback", 200) if i % 2 else (False, 503) for i in range(64)]
    assert max(seconds) < 30  # that of this machine; each waits at most for its own deadline


def test_a_spent_purse_and_an_empty_bucket_leave_it_to_the_device(start):
    with Provider() as provider:
        server = start(provider, CALLS, max_calls=1)
        assert server.chat("1 1=2")[2]["collab"]["answered_by"] == "cloud"
        assert server.chat("1 2=3")[2]["collab"]["reason"] == "device_fallback"
        assert provider.requests == 1
        server.json("PUT", "/budget", {"target_call_rate": 0.0}, key=KEY)
        assert server.chat("1 3=4")[2]["collab"]["reason"] == "margin"  # the bias is -inf


# ------------------------------------------------------------------------------- who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_and_its_call(start, stream):
    messages = [{"role": "user", "content": "49 9 37=95"}]
    with Provider(lambda _: [("text", "a"), ("wait", 20.0)]) as provider:
        server = start(provider, CALLS, deadline=30.0)
        body = {"messages": messages, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse() if stream else None
        while not provider.requests:
            time.sleep(0.02)
        if response:
            response.close()
        connection.close()
        end = time.monotonic() + 10
        while not provider.left and time.monotonic() < end:
            time.sleep(0.02)
        assert provider.left == 1
        while not server.api.telemetry._sums["errors_total", '{status="499"}']:
            time.sleep(0.02)
        assert server.service.engine.cancelled and not server.service.upstream.pending


def test_streams_cut_anywhere_leave_the_books_in_order(start):
    """Clients that leave after some bytes: nothing stays behind, nothing is bought twice, and what
    was booked is what answers cost and what was abandoned.
    """
    steps = [("text", "a"), ("wait", 0.06), ("text", "b")]
    draw = random.Random(1)
    with Provider(lambda _: steps) as provider:
        server = start(provider, CALLS, pause=0.001)

        def cut(i):
            message = {"role": "user", "content": f"{i % 20} 9 37=95"}
            body = {"messages": [message], "stream": True, "collab": {"threshold": 0}}
            with server.send("POST", "/v1/chat/completions", body) as response:
                response.read(draw.choice([1, 200, 1500, 3000, 10**6]))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(cut, range(120)))
        counts, upstream = server.api.telemetry._sums, server.service.upstream
        deadline = time.monotonic() + 20
        while (counted(counts) < 120 or upstream.pending) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert counted(counts) == 120 and not upstream.pending
        assert not [labels for name, labels in counts if name == "errors_total" and '"5' in labels]
        assert max(provider.whole.values()) == 1
        time.sleep(0.2)  # the last booking is in a thread
        booked = counts["usd_total", ""] + upstream.abandoned_usd
        assert upstream.cloud.budget.spent().usd == pytest.approx(booked)


def counted(sums):
    """Requests that have ended, answered or not."""
    return sum(n for (name, _), n in sums.items() if name in ("requests_total", "errors_total"))


def test_a_full_queue_is_a_429_that_says_when(start):
    server = start()
    server.service.engine.full = True
    for reply in (server.chat(), server.chat(stream=True)):
        status, headers, error = reply
        assert (status, error["error"]["type"]) == (429, "rate_limit_error")
        assert headers["retry-after-ms"] == "250" and headers["retry-after"] == "1"
        assert headers["x-request-id"]
    with server.send("GET", "/metrics") as response:
        assert b'collab_errors_total{status="429"} 2.0' in response.read()


def test_a_full_queue_does_not_keep_anybody_from_the_cloud(start):
    server = start()
    server.service.engine.full = True
    for body in ({"collab": {"mode": "only_cloud"}}, {"model": "collab-cloud"}):
        status, _, answer = server.chat(**body)
        assert (status, answer["collab"]["answered_by"]) == (200, "cloud")


def test_whoever_waits_for_the_cloud_holds_no_place_in_the_devices_queue(start):
    held = []

    def answer(_):
        held.append(len(server.service.engine.places))
        return [("text", "4")]

    with Provider(answer) as provider:
        server = start(provider, CALLS)
        model = r'"model": "collab-cl\u006fud"'  # read as JSON, the same
        for field in ('"model": "collab-cloud"', model, '"collab": {"threshold": 0}'):
            question = f'{{"role": "user", "content": "4 9 37=9{len(held)}"}}'
            body = f'{{"messages": [{question}], {field}}}'.encode()
            status, _, reply = server.json("POST", "/v1/chat/completions", body)
            assert (status, reply["collab"]["answered_by"]) == (200, "cloud")
    assert held == [0, 0, 0] and not server.service.engine.places


# ------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("colour", 1, "colour"),
        ("n", 17, "n"),
        ("n", True, "n"),
        ("top_logprobs", 2, "top_logprobs"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("temperature", 3, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("stop", [""], "stop"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("stream_options", {"x": 1}, "stream_options.x"),
        ("collab", {"mode": "best"}, "collab.mode"),
        ("collab", {"speed": 1}, "collab.speed"),
        ("model", "gpt", "model"),
        ("messages", [], "messages"),
        ("messages", [{"role": "user"}], "messages[0]"),
        ("messages", [{"role": "user", "content": "1 " * 40}], "messages"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(start, field, value, name):
    body = {"messages": [{"role": "user", "content": "1=1"}], field: value}
    server = start()
    status, headers, reply = server.json("POST", "/v1/chat/completions", body)
    assert status == 400 and reply["error"]["param"] == name
    assert reply["error"]["type"] == "invalid_request_error" and headers["x-request-id"]


def test_what_means_nothing_is_taken(start):
    body = dict(n=1, user="me", frequency_penalty=0, response_format={"type": "text"}, tools=None)
    status, _, _ = start().chat(**body, seed=-5, top_p=1, temperature=0.5)
    assert status == 200


def test_no_body_is_an_error_of_the_server(start):
    """Bodies cut, mangled and made of odd values: 200 or 4xx, never a hang."""
    server = start()
    draw = random.Random(0)
    odd = [None, True, -1, 1e400, "", "\ud800", [], {}, [[]], {"a": {}}, 10**400, "x" * 5000]
    fields = ["model", "messages", "stop", "seed", "logit_bias", "collab", "temperature", "user"]
    for i in range(150):
        body = {"messages": [{"role": "user", "content": "1=1"}]}
        for _ in range(draw.randrange(1, 3)):
            body[draw.choice(fields)] = draw.choice(odd)
        raw = json.dumps(body).encode()
        if i % 3 == 0:
            raw = raw[: draw.randrange(len(raw))]
        with server.send("POST", "/v1/chat/completions", raw) as response:
            assert response.status in (200, 400), raw
            json.loads(response.read())
    with server.send("POST", "/v1/chat/completions", b"[" * 100_000) as response:
        assert response.status == 400
    with server.send("POST", "/v1/chat/completions", b"1" * ((1 << 20) + 9)) as response:
        assert response.status == 413
    assert server.json("GET", "/nowhere")[0] == 404
    assert server.json("GET", "/v1/completions")[0] == 405


# ------------------------------------------------------------------------------- the operator


def test_the_operator_sets_the_budget(start):
    server = start()
    assert server.json("GET", "/budget")[0] == 401
    assert server.json("PUT", "/budget", {"target_call_rate": 0.1}, key="guess")[0] == 401
    status, _, budget = server.json("PUT", "/budget", {"target_call_rate": 0.1}, key=KEY)
    assert status == 200 and budget["target_call_rate"] == 0.1
    assert server.json("GET", "/budget", key=KEY)[2] == budget
    assert server.chat()[2]["collab"]["budget"]["target_call_rate"] == 0.1
    for body in ({}, {"target_call_rate": 2}, {"target_call_rate": 0.1, "x": 1}):
        assert server.json("PUT", "/budget", body, key=KEY)[0] == 400
    assert server.json("GET", "/requests/none", key=KEY)[0] == 404


def test_metrics_health_and_models(start):
    server = start()
    server.chat()
    with server.send("GET", "/metrics") as response:
        lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['collab_requests_total{answered_by="device",reason="margin"}']) == 1
    assert float(values["collab_device_tokens_total"]) > 20
    assert values["collab_target_call_rate"] == "0.3"
    names = [row["id"] for row in server.json("GET", "/v1/models")[2]["data"]]
    assert names == ["collab", "collab-device", "collab-cloud"]
    assert server.json("GET", "/health")[0] == server.json("GET", "/ready")[0] == 200
    server.service.engine.ready.clear()
    assert server.json("GET", "/ready")[0] == 503
    server.service.engine.broken = "RuntimeError"
    assert server.json("GET", "/health")[0] == 503
