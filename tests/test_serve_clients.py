"""The server and the clients that people have: OpenAI's, LiteLLM, and schemathesis' odd ones."""

import asyncio
import subprocess
import sys

import openai
import pytest
from serving import KEY, Provider

CALLS = {6: 2.0}  # a margin after "<think>49+9="
ANSWER = "49+9+37"
MESSAGES = [{"role": "user", "content": "49 9 37=95"}]


@pytest.fixture
def provider():
    with Provider() as provider:
        yield provider


@pytest.fixture
def server(start, provider):
    return start(provider, CALLS)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_openai(client):
    reply = client.chat.completions.create(model="collab", messages=MESSAGES)
    assert reply.choices[0].message.content == "42" and reply.model == "big"
    assert reply.collab["answered_by"] == "cloud" and reply.usage.cost > 0
    chunks = client.chat.completions.create(
        model="collab", messages=MESSAGES, stream=True, extra_body={"collab": {"threshold": 9}}
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    plain = client.completions.create(model="collab-device", prompt="49 9 37=95", logprobs=0)
    assert plain.choices[0].text == "".join(plain.choices[0].logprobs.tokens) == ANSWER
    assert [model.id for model in client.models.list()][0] == "collab"
    with pytest.raises(openai.BadRequestError, match="top_logprobs is not served"):
        client.chat.completions.create(
            model="collab", messages=MESSAGES, logprobs=True, top_logprobs=3
        )


def test_openai_with_choices_and_logprobs(client):
    reply = client.chat.completions.create(
        model="collab-device", messages=MESSAGES, n=3, logprobs=True
    )
    assert [choice.message.content for choice in reply.choices] == [ANSWER] * 3
    for choice in reply.choices:
        assert "".join(token.token for token in choice.logprobs.content) == ANSWER
    stream = client.chat.completions.create(
        model="collab-device",
        messages=MESSAGES,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    for index in range(2):
        parts = [c.choices[0].delta.content for c in chunks if c.choices[0].index == index]
        assert "".join(filter(None, parts)) == ANSWER
    assert last.usage.completion_tokens == reply.usage.completion_tokens * 2 // 3


def test_openai_async(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            create = client.chat.completions.create
            whole = await create(model="collab-device", messages=MESSAGES)
            stream = await create(model="collab-cloud", messages=MESSAGES, stream=True)
            parts = [c.choices[0].delta.content or "" async for c in stream]
            both = await asyncio.gather(
                *(create(model="collab", messages=MESSAGES) for _ in range(4))
            )
            return whole.choices[0].message.content, "".join(parts), {r.model for r in both}

    assert asyncio.run(ask()) == (ANSWER, "42", {"big"})


def test_litellm(server):
    litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install litellm")
    common = dict(api_base=server.url, api_key="none", messages=MESSAGES)
    reply = litellm.completion(model="openai/collab", **common)
    assert reply.choices[0].message.content == "42" and reply.model.endswith("big")
    reply = litellm.completion(model="openai/collab-device", n=2, logprobs=True, **common)
    assert [choice.message.content for choice in reply.choices] == [ANSWER] * 2
    chunks = litellm.completion(
        model="openai/collab", stream=True, extra_body={"collab": {"threshold": 9}}, **common
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    reply = asyncio.run(litellm.acompletion(model="openai/collab-cloud", **common))
    assert reply.choices[0].message.content == "42"
    with pytest.raises(litellm.BadRequestError, match="colour"):
        litellm.completion(model="openai/collab", extra_body={"colour": 1}, **common)


@pytest.mark.slow
def test_schemathesis(server, tmp_path):
    """Requests drawn from the document that the server gives of itself: no error of the server, and
    every response as described.
    """
    pytest.importorskip("schemathesis", reason="it is not installed: pip install schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url[:-3]}/openapi.json"]
    checks = [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
        "ignored_auth",
    ]
    command += ["--checks", ",".join(checks), "--max-examples", "15", "--seed", "1"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--generation-database", "none"]
    # In a folder of its own: it keeps what it has found in a cache there.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
