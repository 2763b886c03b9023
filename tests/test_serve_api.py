"""What the API promises of itself: choices, log-probabilities, its description, and its books."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from serving import KEY, PRICE, Provider, told

from collab_jax.bench import fuzz
from collab_jax.bench.faults import FaultServer
from collab_jax.cloud import ledger
from collab_jax.serve import body, openapi
from collab_jax.serve.schema import Refused, checked

CALLS = {6: 2.0}  # a margin after "<think>49+9="
ANSWER = "49+9+37"
SPEC = openapi.DOCUMENT


def validator(name):
    """Of a schema of the document, with what it refers to."""
    root = {"$ref": f"#/components/schemas/{name}", "components": SPEC["components"]}
    return jsonschema.Draft202012Validator(root)


# ------------------------------------------------------------------------------- choices


def test_choices_are_equal_where_they_are_greedy_and_add_up(start):
    server = start()
    one = server.chat(model="collab-device")[2]
    status, headers, reply = server.chat(model="collab-device", n=3, seed=7)
    assert status == 200 and [c["index"] for c in reply["choices"]] == [0, 1, 2]
    assert [c["message"] for c in reply["choices"]] == [one["choices"][0]["message"]] * 3
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert reply["usage"][name] == 3 * one["usage"][name]
    assert "collab" not in reply and reply["model"] == "tiny"
    ids = [choice["collab"]["request_id"] for choice in reply["choices"]]
    assert ids == [headers["x-request-id"] + end for end in ("", "-1", "-2")]
    assert server.json("GET", f"/requests/{ids[2]}", key=KEY)[2]["status"] == 200
    assert [job.seed for job in server.service.engine.jobs[1:]] == [7, 8, 9]


def test_each_choice_decides_for_itself(start):
    """The second one's margin stays low: the device answers it, and no name is wrong."""
    with Provider() as provider:
        server = start(provider, CALLS, wavering=True)
        _, headers, reply = server.chat(n=3, seed=0, collab={"threshold": 0})
        said = [(c["model"], c["message"]["content"]) for c in reply["choices"]]
        assert said == [("big", "42"), ("tiny", ANSWER), ("big", "42")]
        assert reply["model"] == "collab" and "x-collab-answered-by" not in headers
        costs = [choice["collab"]["usd"] for choice in reply["choices"]]
        assert sorted(costs) == [0, 0, pytest.approx(PRICE)] and provider.requests == 1
        assert reply["usage"]["cost"] == pytest.approx(PRICE)
        validator("Chat").validate(reply)


def test_chunks_have_the_usage_so_far_where_it_is_asked_for(start):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with Provider() as provider:
        server = start(provider, CALLS, wavering=True)
        *chunks, _, end = server.stream(
            n=2, seed=0, collab={"threshold": 0}, stream_options=options
        )[2]
        device = server.stream(model="collab-device", stream_options=options)[2]
    so_far = [chunk["usage"]["completion_tokens"] for chunk in device[:-2]]
    assert (
        so_far == sorted(so_far)
        and 0 < so_far[0] < so_far[-1] <= device[-1]["usage"]["completion_tokens"]
    )
    assert len({chunk["usage"]["prompt_tokens"] for chunk in device if "usage" in chunk}) == 1
    assert all("usage" in chunk for chunk in (*chunks, *device))
    assert end["usage"]["cost"] == pytest.approx(PRICE)


def test_streams_of_choices_interleave(start):
    with Provider() as provider:
        server = start(provider, CALLS, pause=0.01, wavering=True)
        status, _, chunks = server.stream(
            n=2, seed=0, collab={"threshold": 0}, stream_options={"include_usage": True}
        )
    *chunks, usage = chunks
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert status == 200 and set(indices) == {0, 1} and indices != sorted(indices)
    for index, answer, model in ((0, "42", "big"), (1, ANSWER, "tiny")):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert told(own, "content") == (answer, {model})
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        assert own[-1]["choices"][0]["finish_reason"] == "stop" and own[-1]["collab"]
        assert own[-1]["model"] == model
    assert usage["usage"]["cost"] == pytest.approx(PRICE) and usage["model"] == "collab"
    for chunk in (*chunks, usage):
        validator("ChatChunk").validate(chunk)


def test_where_one_choice_fails_the_request_does(start):
    with Provider(lambda _: [("status", 503)]) as provider:
        server = start(provider, CALLS, wavering=True)
        own = {"threshold": 0, "allow_fallback": False}
        status, _, error = server.chat(n=2, seed=0, collab=own)
        assert status == 503 and error["error"]["code"] == "cloud"
        _, _, chunks = server.stream(n=2, seed=0, collab=own)
        assert chunks[-1]["error"]["code"] == "cloud"


# ------------------------------------------------------------------------------- log-probabilities


def test_logprobs_are_those_of_the_tokens_that_content_is_made_of(start):
    server = start()
    reply = server.chat(model="collab-device", logprobs=True)[2]
    rows = reply["choices"][0]["logprobs"]["content"]
    assert "".join(row["token"] for row in rows) == ANSWER
    # The engine's tokens are in one row with their steps, of which step t has -t / 8.
    text, tokens = server.service.text, server.service.engine.tokens
    place = -8 * rows[0]["logprob"]
    assert [-8 * row["logprob"] for row in rows] == [place + i for i in range(len(rows))]
    spelt = text.tokenizer.decode(tokens[int(place) : int(place) + len(rows)])
    assert spelt.replace(" ", "") == ANSWER
    assert bytes(b for row in rows for b in row["bytes"]).decode() == ANSWER
    cut = server.chat(model="collab-device", logprobs=True, stop="+3")[2]["choices"][0]
    assert "".join(row["token"] for row in cut["logprobs"]["content"]) == "49+9"
    plain = server.json(
        "POST", "/v1/completions", {"prompt": "49 9 37=95", "model": "collab-device", "logprobs": 0}
    )[2]["choices"][0]["logprobs"]
    assert plain["token_logprobs"] == [row["logprob"] for row in rows]
    ends = [
        at + len(token) for at, token in zip(plain["text_offset"], plain["tokens"], strict=True)
    ]
    assert [0, *ends[:-1]] == plain["text_offset"]
    _, _, chunks = server.stream(model="collab-device", logprobs=True)
    known = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [row for logprobs in known if logprobs for row in logprobs["content"]] == rows


def test_the_clouds_text_has_no_logprobs(start):
    with Provider() as provider:
        server = start(provider, CALLS)
        assert server.chat(logprobs=True)[2]["choices"][0]["logprobs"] is None
        for asked in ({"model": "collab-cloud"}, {"collab": {"mode": "prefer_cloud"}}):
            status, _, error = server.chat(logprobs=True, **asked)
            assert status == 400 and error["error"]["param"] == "logprobs"


# ------------------------------------------------------------------------------- the document


def test_the_document_is_of_this_server(start):
    server = start()
    assert server.json("GET", "/openapi.json")[2] == SPEC
    for name, schema in SPEC["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        validator(name).is_valid({})  # what it refers to is there
    paths = {route.path for route in server.api.app().routes} - {"/", "/openapi.json"}
    assert set(SPEC["paths"]) == paths


@pytest.mark.parametrize("schema", [body.CHAT, body.COMPLETION])
def test_what_is_accepted_is_what_the_document_says(schema):
    """By two readers of the same schema, for bodies good and odd."""
    name = "ChatRequest" if schema is body.CHAT else "CompletionRequest"
    documented, counts = validator(name), {True: 0, False: 0}
    for case in fuzz.cases(900, seed=3):
        try:
            asked = json.loads(case.body)
            json.dumps(asked, allow_nan=False)
        except (ValueError, RecursionError):
            continue
        try:
            accepted = checked(schema, asked) is not None
        except Refused:
            accepted = False
        assert accepted == documented.is_valid(asked), asked
        counts[accepted] += 1
    assert min(counts.values()) > 100


def test_every_kind_of_response_is_as_described(start):
    server = start()
    request_id = server.chat()[2]["collab"]["request_id"]
    seen = {
        "Models": server.json("GET", "/v1/models"),
        "Status": server.json("GET", "/ready"),
        "Budget": server.json("PUT", "/budget", {"target_call_rate": 0.2}, key=KEY),
        "Record": server.json("GET", f"/requests/{request_id}", key=KEY),
        "Error": server.json("GET", "/requests/none", key=KEY),
    }
    for name, (_, _, data) in seen.items():
        validator(name).validate(data)


# ------------------------------------------------------------------------------- odd clients


def test_odd_clients_and_clients_that_leave(start):
    """Some hundred of them: no error of the server, every response as described, no wrong name, the
    books agree and the slots are free.
    """
    kinds = {
        ("/v1/chat/completions", False): validator("Chat"),
        ("/v1/chat/completions", True): validator("ChatChunk"),
        ("/v1/completions", False): validator("Completion"),
        ("/v1/completions", True): validator("Completion"),
    }
    answer = lambda content: f"{fuzz.CLOUD} {len(content)}"  # noqa: E731
    with FaultServer(answer, delay=0.005) as provider:
        server = start(provider, CALLS, pause=0.0005, wavering=True)
        server.api.telemetry = books = fuzz.Books()
        cases = list(fuzz.cases(300, seed=0))
        address = ("127.0.0.1", server.port)
        seen = fuzz.fuzz(address, {"tiny": False, "big": True}, cases, clients=8)
        assert fuzz.verdict(server.api, books, provider, PRICE, seen) == []
        assert not server.service.engine.places
    counts = fuzz.statuses(seen)
    assert counts["200"] > 100 and counts["400"] > 25 and counts["cut"] == 100
    assert max(provider.whole.values()) == 1 and provider.whole.total() > 10
    for case, one in zip(cases, seen, strict=True):
        for data in one.objects if one else []:
            streamed = data.get("object", "").endswith("chunk")
            kind = validator("Error") if one.status != 200 else kinds[case.path, streamed]
            kind.validate(data)


# ------------------------------------------------------------------------------- one purchase


def test_two_servers_of_one_store_buy_an_answer_once(start):
    with Provider(lambda _: [("text", "4"), ("wait", 0.3), ("text", "2")]) as provider:
        servers = [start(provider, CALLS), start(provider, CALLS)]

        def ask(i):
            server = servers[i % 2]
            return server.chat(f"{i // 4} 9 37=95", collab={"threshold": 0})[2]

        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(ask, range(16)))
        assert [reply["choices"][0]["message"]["content"] for reply in replies] == ["42"] * 16
        assert provider.requests == 4 and set(provider.whole.values()) == {1}
        store = servers[0].service.upstream.cloud.store
        cost = sum(reply["usage"]["cost"] for reply in replies)
        assert cost == pytest.approx(4 * PRICE) == ledger(store).usd
        end = time.monotonic() + 10
        while store.query("SELECT * FROM leases") and time.monotonic() < end:
            time.sleep(0.02)
        assert not store.query("SELECT * FROM leases")


@pytest.mark.parametrize(
    ("seconds", "deadline", "reason"), [(0.5, 20.0, "margin"), (60.0, 1.0, "device_fallback")]
)
def test_a_lease_of_somebody_else_is_waited_for(start, seconds, deadline, reason):
    """That of a killed process runs out; one that does not is waited for until the deadline."""
    with Provider() as provider:
        server = start(provider, CALLS, deadline=deadline)
        cloud = server.service.upstream.cloud
        key = cloud.key([{"role": "user", "content": "49 9 37=95"}])
        with cloud.store.transaction() as db:
            db.execute("INSERT INTO leases VALUES (?, ?, ?)", (key, "other", time.time() + seconds))
        assert server.chat(collab={"threshold": 0})[2]["collab"]["reason"] == reason
        assert provider.requests == (reason == "margin")


def test_an_answer_whose_client_has_just_left_is_kept(start):
    """The next one gets it for nothing; what it cost is booked as abandoned."""
    with Provider(lambda _: [("text", "4"), ("wait", 0.1), ("text", "2")]) as provider:
        server = start(provider, CALLS)
        message = {"role": "user", "content": "49 9 37=95"}
        asked = {"messages": [message], "stream": True, "collab": {"threshold": 0}}
        with server.send("POST", "/v1/chat/completions", asked) as response:
            while b'"content"' not in response.read1():
                pass
        end = time.monotonic() + 10
        upstream = server.service.upstream
        while not (provider.whole and not upstream.pending) and time.monotonic() < end:
            time.sleep(0.02)
        reply = server.chat(collab={"threshold": 0})[2]
        assert reply["choices"][0]["message"]["content"] == "42"
        assert reply["usage"]["cost"] == 0 and provider.requests == 1
        booked = upstream.cloud.budget.spent().usd
        assert booked == pytest.approx(PRICE) == pytest.approx(ledger(upstream.cloud.store).usd)
        assert upstream.abandoned_usd == pytest.approx(PRICE)
