"""Serving with redaction: nothing planted leaves by the socket, and answers come back whole."""

import contextlib
import dataclasses
import json
import random
from concurrent.futures import ThreadPoolExecutor

import planted
import pytest
from serving import KEY, PRICE, RESPONSE, Provider, Reciter, Server, make_service, tiny_text

from collab_jax.cloud import attempts
from collab_jax.cloud.redaction import PLACEHOLDER

CALLS = {6: 2.0}  # a margin after "<think>49+9="
ROWS = planted.sentences(60, seed=2)
VALUES = [value for _, value, _ in ROWS]
NAMES = [value for _, value, kind in ROWS if kind == "NAME"]


@pytest.fixture(scope="module")
def text():
    return tiny_text()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def start(text, tmp_path):
    """start(provider, **changes): a running server that redacts, and knows NAMES; ends with the
    test.
    """
    (tmp_path / "names.txt").write_text("\n".join([*NAMES, "Anna Schmidt", "49"]), encoding="utf-8")
    with contextlib.ExitStack() as stack:

        def make(provider=None, margins=CALLS, names="names.txt", **changes):
            changes = {"redact": True, "redact_names": str(tmp_path / names)} | changes
            engine = Reciter(text, RESPONSE, margins)
            service = make_service(engine, text, tmp_path, provider, **changes)
            service = dataclasses.replace(service, prompt_length=10**5)
            return stack.enter_context(Server(service))

        yield make


def echo(seed):
    """What a Provider does that says what it was asked, as reasoning and as content, cut anywhere;
    in the middle of placeholders too.
    """
    draw = random.Random(seed)

    def steps(content):
        said = []
        for kind in ("reasoning", "text"):
            at = sorted({0, len(content), *draw.choices(range(len(content)), k=len(content) // 3)})
            said += [(kind, content[a:b]) for a, b in zip(at, at[1:], strict=False)]
        return said

    return steps


def told(chunks):
    """(reasoning, content) that the cloud has streamed."""
    deltas = [c["choices"][0]["delta"] for c in chunks if c.get("choices") and c["model"] == "big"]
    return tuple("".join(d.get(n) or "" for d in deltas) for n in ("reasoning_content", "content"))


def conversation(rows):
    """Messages of several roles that hold the texts of `rows`, the last one twice."""
    roles = ["system", "user", "assistant", "user"]
    size = -(-len(rows) // len(roles))
    parts = ["\n".join(text for text, _, _ in rows[i * size : (i + 1) * size]) for i in range(4)]
    parts[-1] += "\n" + parts[0]
    return [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]


@pytest.mark.parametrize("share_attempt", [False, True])
@pytest.mark.parametrize("mode", ["prefer_device", "only_cloud"])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_planted_leaves_and_every_answer_is_restored(start, stream, mode, share_attempt):
    """360 values in 12 conversations; the first attempt of every second one fails."""
    steps, failing = echo(3), set()

    def fails_once(content):
        if len(failing) % 2 == 0 and content not in failing:
            failing.add(content)
            return [("status", 500)]
        failing.add(content)
        return steps(content)

    with Provider(fails_once) as provider:
        server = start(provider, retries=2)
        for i in range(0, len(ROWS), 30):
            messages = conversation(ROWS[i : i + 30])
            body = {"messages": messages, "stream": stream}
            body["collab"] = {"mode": mode, "share_attempt": share_attempt}
            if mode == "prefer_device":
                body["collab"]["threshold"] = 0
            if stream:
                with server.send("POST", "/v1/chat/completions", body) as response:
                    events = response.read().decode().split("\n\n")
                assert events[-2:] == ["data: [DONE]", ""]
                reasoning, content = told(json.loads(e.removeprefix("data: ")) for e in events[:-2])
            else:
                reply = server.json("POST", "/v1/chat/completions", body)[2]
                message = reply["choices"][0]["message"]
                reasoning = message["reasoning_content"].removeprefix("49+9=")
                content = message["content"]
            wanted = messages[-1]["content"]
            assert content.startswith(wanted) and reasoning.startswith(wanted)
            attempt = share_attempt and mode == "prefer_device"
            assert content == wanted or (attempt and content.endswith("<think>49+9="))
        assert provider.requests > len(ROWS) // 30 and len(provider.whole) == len(ROWS) // 30
        for body in provider.bodies:
            assert not planted.leaked(VALUES, json.dumps(body, ensure_ascii=False))
            assert not planted.leaked(VALUES, json.dumps(body))
            if share_attempt and mode == "prefer_device":  # 49 is a name here
                assert body["messages"][-1]["content"].rstrip().endswith("+9=")
                assert "49" not in PLACEHOLDER.sub("", body["messages"][-1]["content"][-20:])
        store = server.service.upstream.cloud.store
        assert not planted.leaked(VALUES, str(store.query("SELECT * FROM answers")))
        assert not planted.leaked(VALUES, str(server.api.telemetry._recent))


def test_askers_that_differ_in_names_alone_share_an_answer_that_knows_neither(start):
    steps = [("wait", 0.3), ("text", "Dear [NA"), ("text", "ME_1], no [NAME_2]")]
    with Provider(lambda _: steps) as provider:
        server = start(provider)
        with ThreadPoolExecutor(2) as pool:
            asked = [f"A letter to {name}" for name in ("Anna Schmidt", NAMES[0])]
            replies = list(pool.map(lambda content: server.chat(content)[2], asked))
        replies.append(server.chat(f"A letter to {NAMES[1]}")[2])
        said = [reply["choices"][0]["message"]["content"] for reply in replies]
        names = ("Anna Schmidt", NAMES[0], NAMES[1])
        assert said == [f"Dear {name}, no [NAME_2]" for name in names]
        assert provider.requests == 1
        assert sum(reply["usage"]["cost"] for reply in replies) == pytest.approx(PRICE)
        [(stored, prompt)] = server.service.upstream.cloud.store.query(
            "SELECT text, prompt FROM answers"
        )
        assert stored == "Dear [NAME_1], no [NAME_2]" and "A letter to [NAME_1]" in prompt


def test_a_cloud_that_does_not_stream_is_asked_and_stored_the_same_way(start):
    """The simulated cloud answers what it does not know with 0: its prompts are in the store."""
    server = start(keep_prompts=True)
    for content in ("3 4=12 anna@x.org", "3 4=12 bob@x.org"):
        reply = server.chat(content, model="collab-cloud")[2]
        record = server.json("GET", f"/requests/{reply['collab']['request_id']}", key=KEY)[2]
        assert record["cloud_prompt"] == [{"role": "user", "content": "3 4=12 [EMAIL_1]"}]
    [(prompt,)] = server.service.upstream.cloud.store.query("SELECT prompt FROM answers")
    assert "3 4=12 [EMAIL_1]" in prompt and "x.org" not in prompt


def test_the_operator_sees_what_was_asked_where_that_is_kept_and_the_client_its_own(start):
    with Provider(echo(1)) as provider:
        for kept in (True, False):
            server = start(provider, keep_prompts=kept)
            reply = server.chat("Is 10.1.2.3 up? [IP_1]")[2]
            assert reply["choices"][0]["message"]["content"] == "Is 10.1.2.3 up? [IP_1]"
            path = f"/requests/{reply['collab']['request_id']}"
            record = server.json("GET", path, key=KEY)[2]
            asked = [{"role": "user", "content": "Is [IP_2] up? [IP_1]"}]
            assert record["cloud_prompt"] == (asked if kept else None)
            assert server.json("GET", path)[0] == 401
            own = server.chat("10.1.2.3", model="collab-device")[2]["collab"]["request_id"]
            assert server.json("GET", f"/requests/{own}", key=KEY)[2]["cloud_prompt"] is None


def test_where_redaction_fails_nothing_is_sent(start, tmp_path, caplog):
    (tmp_path / "mine.py").write_text("def names(text):\n    raise KeyError(text)\n")
    with Provider() as provider:
        server = start(provider, names="mine.py:names")
        reply = server.chat("a secret")[2]
        assert reply["collab"]["reason"] == "device_fallback" and reply["model"] == "tiny"
        status, _, error = server.chat("a secret", collab={"mode": "only_cloud"})
        assert (status, error["error"]["code"]) == (503, "cloud")
        assert provider.connections == 0
    assert "raised KeyError" in caplog.text and "secret" not in caplog.text


def test_prices_are_those_of_what_is_sent(start):
    """A placeholder may be longer than what it stands for."""
    with Provider() as provider:
        server = start(provider)
        upstream = server.service.upstream
        query = upstream.cloud.redact([{"role": "user", "content": "a@b.co"}])
        assert query.messages[0]["content"] == "[EMAIL_1]"
        highest = upstream.highest_usd(query)
        for usd, by in ((highest * 1.001, "cloud"), (highest * 0.999, "device")):
            collab = {"max_usd": usd}
            assert server.chat("a@b.co", collab=collab)[2]["collab"]["answered_by"] == by
