"""An OpenAI-compatible server on the loopback interface that fails on purpose, to measure the
cloud's client with.

It counts, for each prompt (the last message's content), how often it was asked and how often a
reply was sent whole.
"""

import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "reset", "truncated", "empty", "stall")
USAGE = {"prompt_tokens": 10, "completion_tokens": 3}


class FaultServer:
    """answer(content) -> text, or a whole reply as a dict. `share` of the requests meet one of
    `faults`; `delay` seconds each.

    A context manager; `url` is the API's base address. Its threads end with the process.
    """

    def __init__(
        self,
        answer: Callable,
        share: float = 0.0,
        faults=FAULTS,
        seed: int = 0,
        delay=0.0,
        stall=20.0,
        after="0",
    ):
        self.answer, self.share, self.faults, self.delay, self.stall, self.after = (
            answer,
            share,
            faults,
            delay,
            stall,
            after,
        )
        self.asked: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.met: Counter[str] = Counter()  # faults
        self.keys: set[str] = set()  # Authorization headers
        self._random, self._lock, self._closing = (
            random.Random(seed),
            threading.Lock(),
            threading.Event(),
        )
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> int:
        return self.asked.total()

    def draw(self, content: str, key: str) -> str | None:
        """The fault that this request meets, or None."""
        with self._lock:
            self.asked[content] += 1
            self.keys.add(key)
            fault = self._random.choice(self.faults) if self._random.random() < self.share else None
            self.met[fault or "none"] += 1
            return fault

    def pause(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def handle_error(self, request, client_address):
        """A client that went away is part of the exercise."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        s = self.faulty
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        fault = s.draw(content, self.headers.get("Authorization", ""))
        s.pause(s.delay)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "stall":
            s.pause(s.stall)
            self.close_connection = True
        elif fault in ("empty", None):
            answer = s.answer(content)
            message = (
                answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
            )
            choices = (
                [{"index": 0, "message": message, "finish_reason": "stop"}] if fault is None else []
            )
            self._send(
                200, {"id": "x", "object": "chat.completion", "choices": choices, "usage": USAGE}
            )
            s.whole[content] += fault is None
        elif fault == "truncated":
            self._send(200, {"id": "x", "choices": [{"message": {"content": "lost"}}]}, cut=30)
        else:
            self._send(int(fault), {"error": {"message": f"no, not {content}", "code": None}})

    def _send(self, status: int, data: dict, cut: int | None = None) -> None:
        body = json.dumps(data).encode()[:cut]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", self.faulty.after)
        self.end_headers()
        self.wfile.write(body)
