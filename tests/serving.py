"""What the tests of serving share: a provider that streams and fails, an engine that recites, a
server on a real socket, and its client.
"""

import contextlib
import functools
import http.client
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import uvicorn
from fakes import cloud_config

from collab_jax.cloud import make_cloud
from collab_jax.models import hf
from collab_jax.models import text as text_lib
from collab_jax.serve.answer import Service
from collab_jax.serve.api import Api
from collab_jax.serve.budget import Controller
from collab_jax.serve.engine import Busy, Emission
from collab_jax.serve.upstream import Upstream
from collab_jax.tasks import make_task

KEY = "operator's"
RESPONSE = "<think>49+9=58,58+37=95</think><answer> 49+9+37 </answer>"
PRICE = (10 * 1.0 + 3 * 2.0) / 1e6  # of an answer of Provider, by the prices below


class Provider:
    """An OpenAI-compatible server that streams `steps(content)`, a list of what to do in turn:
    ("text", s), ("reasoning", s), ("wait", seconds), ("status", number), ("garbage",) or ("cut",).
    Its usage is 10 and 3 tokens. It counts requests, whole answers, and clients that left.
    """

    def __init__(self, steps=lambda content: [("text", "4"), ("text", "2")]):
        self.steps, self.lock = steps, threading.Lock()
        self.requests, self.connections, self.whole, self.left = 0, 0, Counter(), 0
        self.bodies = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def setup(self):
                provider.connections += 1
                super().setup()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with provider.lock:
                    provider.requests += 1
                    provider.bodies.append(body)
                try:
                    provider.play(self, body["messages"][-1]["content"])
                except OSError:
                    provider.left += 1

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def play(self, handler, content):
        steps = self.steps(content)
        if steps and steps[0][0] == "status":
            body = b'{"error": {"message": "no"}}'
            handler.send_response(steps[0][1])
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()

        def send(data):
            handler.wfile.write(f"data: {data}\n\n".encode())
            handler.wfile.flush()

        def choice(delta, reason=None):
            row = {"index": 0, "delta": delta, "finish_reason": reason}
            send(json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": [row]}))

        for kind, *value in steps:
            match kind:
                case "text":
                    choice({"content": value[0]})
                case "reasoning":
                    choice({"reasoning_content": value[0]})
                case "wait":
                    for _ in range(int(value[0] / 0.02)):  # so that a client that left is noticed
                        time.sleep(0.02)
                        handler.wfile.write(b": waiting\n\n")
                        handler.wfile.flush()
                case "garbage":
                    send("{not json")
                case "cut":
                    return
        choice({}, "stop")
        usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        send(json.dumps({"id": "x", "object": "x", "choices": [], "usage": usage}))
        send("[DONE]")
        self.whole[content] += 1


class Reciter:
    """In an engine's place: says RESPONSE, with margins by step; all others are -5. Step t has the
    log-probability -t / 8. wavering: no margins for an odd seed.
    """

    def __init__(self, text, response=RESPONSE, margins=None, pause=0.0, wavering=False):
        self.tokens = text.tokenizer.encode(response, add_special_tokens=False)
        self.margins, self.pause, self.wavering = margins or {}, pause, wavering
        self.ready, self.broken, self.busy, self.full = threading.Event(), "", (0, 0), False
        self.ready.set()
        self.jobs, self.cancelled, self.places = [], [], set()

    def hold_place(self):
        if self.full:
            raise Busy(0.25)
        self.places.add(place := object())
        return place

    def leave_place(self, place):
        self.places.discard(place)

    def submit(self, job):
        if self.full:
            raise Busy(0.25)
        self.jobs.append(job)
        threading.Thread(target=self._recite, args=(job,), daemon=True).start()

    def _recite(self, job):
        for t in range(len(job.written), len(self.tokens)):
            margin = -5.0 if self.wavering and job.seed % 2 else self.margins.get(t, -5.0)
            if job.cancelled:
                return
            if margin + job.bias > 0:
                return job.emit(Emission([], [-0.5], [margin], "call"))
            logp = -t / 8
            if t + 1 == job.limit:
                return job.emit(Emission(self.tokens[t : t + 1], [logp], [margin], "length"))
            job.emit(Emission(self.tokens[t : t + 1], [logp], [margin], None))
            time.sleep(self.pause)
        job.emit(Emission([], [0.0], [-float("inf")], "stop"))

    def cancel(self, job):
        job.cancelled = True
        self.cancelled.append(job)

    def close(self):
        pass


@functools.cache
def tiny_text():
    """The embedded model's Text."""
    return text_lib.load(hf.ASSETS / "countdown-tiny", cloud_config().text)


def make_service(
    engine,
    text,
    folder,
    provider=None,
    deadline=5.0,
    calibration=None,
    keep_prompts=False,
    **changes,
):
    """A Service around `engine`; its target is 30 %, its bias 0. changes: of config.cloud."""
    settings = dict(retries=0) | changes
    if provider is not None:
        settings = (
            dict(
                kind="openai",
                model="big",
                base_url=getattr(provider, "url", provider),
                key_env="",
                prices=(("big", 1.0, 2.0),),
                timeouts=(2.0, 20.0, 20.0),
                concurrency=4,  # the breaker opens after eight failures
            )
            | settings
        )
    config = cloud_config()
    config.cloud.parameters = {"max_tokens": 50}
    config.cloud.update(settings)
    return Service(
        engine=engine,
        upstream=Upstream(make_cloud(config, make_task(config), folder / "s.db"), deadline),
        controller=Controller(folder / "budget.json", "tiny", calibration, 0.3),
        text=text,
        model="tiny",
        system="",
        prompt_length=16,
        limit=56,
        call_unanswered=True,
        keep_prompts=keep_prompts,
    )


class Server:
    """The application of a service on a real socket, in a thread; a context manager."""

    def __init__(self, service, key=KEY):
        self.service, self.api = service, Api(service, key)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        config = uvicorn.Config(self.api.app(), log_level="warning", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(60)

    @contextlib.contextmanager
    def send(self, method, path, body=None, headers=None):
        """The response of a request, unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, body, headers or {})
        try:
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def json(self, method, path, body=None, key=""):
        """(status, headers, the object) of a request."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self.send(method, path, body, headers) as response:
            return response.status, response.headers, json.loads(response.read())

    def chat(self, content="49 9 37=95", **fields):
        """(status, headers, the object) of a chat that is not streamed."""
        messages = [{"role": "user", "content": content}]
        return self.json("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def stream(self, content="49 9 37=95", **fields):
        """(status, headers, chunks) of a stream; it must end with [DONE]."""
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        with self.send("POST", "/v1/chat/completions", body) as response:
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        return response.status, response.headers, chunks


@contextlib.contextmanager
def starter(folder):
    """start(provider, margins, **changes): a running server; all end with the block."""
    with contextlib.ExitStack() as stack:

        def start(
            provider=None, margins=None, response=RESPONSE, pause=0.0, wavering=False, **changes
        ):
            engine = Reciter(tiny_text(), response, margins, pause, wavering)
            service = make_service(engine, tiny_text(), folder, provider, **changes)
            return stack.enter_context(Server(service))

        yield start


def told(chunks, name):
    """The text of a stream under the name "content" or "reasoning_content", and whose it is."""
    parts = [
        (chunk["choices"][0]["delta"].get(name), chunk["model"])
        for chunk in chunks
        if chunk.get("choices")
    ]
    return "".join(text for text, _ in parts if text), {model for text, model in parts if text}
