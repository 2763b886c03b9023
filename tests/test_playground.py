"""The playground's page and the trace that it draws, as the server sends them."""

import base64
import contextlib
import hashlib
import re

import pytest
from serving import RESPONSE, Provider, Reciter, Server, make_service, tiny_text

from collab_jax.cloud import attempts
from collab_jax.serve import playground

CALLS = {6: 2.0}  # a margin after "<think>49+9="


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(attempts, "BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def start(tmp_path):
    """start(provider, margins): a running server whose device recites; it ends with the test."""
    text = tiny_text()
    with contextlib.ExitStack() as stack:

        def make(provider=None, margins=None):
            service = make_service(Reciter(text, RESPONSE, margins), text, tmp_path, provider)
            return stack.enter_context(Server(service))

        yield make


# ------------------------------------------------------------------------------------ the page


def directives(header):
    """A policy as {directive: its sources}."""
    parts = [part.strip().split(" ") for part in header.split(";")]
    return {name: sources for name, *sources in parts}


def test_the_page_runs_its_own_script_and_style_alone(start):
    with start().send("GET", "/") as response:
        html, headers = response.read().decode(), response.headers
    assert response.status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    allowed = directives(headers["content-security-policy"])
    for tag in ("script", "style"):
        begin, end = html.index(f"<{tag}>") + len(tag) + 2, html.index(f"</{tag}>")
        digest = hashlib.sha256(html[begin:end].encode()).digest()
        assert allowed[f"{tag}-src"] == [f"'sha256-{base64.b64encode(digest).decode()}'"]
    assert allowed["default-src"] == ["'none'"] and allowed["connect-src"] == ["'self'"]
    assert allowed["require-trusted-types-for"] == ["'script'"]
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere_and_writes_no_html():
    html = playground.PAGE.read_text()
    assert set(re.findall(r"https?://[^\"'\s]+", html)) == {"http://www.w3.org/2000/svg"}
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                "srcdoc", "localStorage", "sessionStorage", "cookie"):  # fmt: skip
        assert way not in html
    assert re.search(r"<[^>]+\s(style|on\w+)=", html.split("<script>")[0]) is None


def test_the_page_is_packaged():
    """The pattern of pyproject.toml matches it, from the package's folder."""
    project = (playground.PAGE.parents[2] / "pyproject.toml").read_text()
    [patterns] = re.findall(r"^collab_jax = \[(.*)\]$", project, re.MULTILINE)
    package = playground.PAGE.parents[1]
    assert any(playground.PAGE in package.glob(p) for p in re.findall(r'"(.*?)"', patterns))


def test_only_one_script_and_style_can_be_allowed():
    with pytest.raises(ValueError):
        playground.policy("<style></style><script>1</script><script>2</script>")


# ----------------------------------------------------------------------------------- the trace


def test_a_trace_has_each_token_and_its_margin(start):
    """The last step, at the end token, has a margin and no token."""
    collab = start(None, {2: -1.25}).chat(model="collab-device", collab={"trace": True})[2][
        "collab"
    ]
    trace = collab["trace"]
    assert "".join(trace["tokens"]).replace(" ", "") == RESPONSE.replace(" ", "")
    assert trace["tokens"][:3] == ["<think>", "4", "9"]
    assert len(trace["margins"]) == len(trace["tokens"]) + 1 == collab["device_tokens"]
    assert trace["margins"][:4] == [-5, -5, -1.25, -5] and trace["margins"][-1] is None
    assert trace["decided_at"] is None and collab["margin"] == -1.25


def test_a_trace_ends_at_the_call(start):
    with Provider() as provider:
        server = start(provider, CALLS)
        trace = server.stream(collab={"trace": True})[2][-1]["collab"]["trace"]
        assert trace["margins"] == [-5.0] * 6 + [2.0] and len(trace["tokens"]) == 6
        assert trace["decided_at"] == 6
        trace = server.chat(model="collab-cloud", collab={"trace": True})[2]["collab"]["trace"]
    assert trace == {"tokens": [], "margins": [], "decided_at": None}


def test_a_trace_goes_on_where_the_device_stands_in(start):
    """The step of the call is there once, though it was computed twice."""
    with Provider(lambda _: [("status", 500)]) as provider:
        reply = start(provider, CALLS).chat(collab={"trace": True})[2]["collab"]
    assert reply["reason"] == "device_fallback" and reply["trace"]["decided_at"] == 6
    assert len(reply["trace"]["margins"]) == len(reply["trace"]["tokens"]) + 1
    assert [t for t, m in enumerate(reply["trace"]["margins"]) if m == 2.0] == [6]


def test_a_trace_is_sent_to_those_alone_who_ask(start):
    server = start()
    for wanted in (None, False):
        assert "trace" not in server.chat(collab={"trace": wanted})[2]["collab"]
    status, _, reply = server.chat(collab={"trace": 1})
    assert status == 400 and reply["error"]["param"] == "collab.trace"
