"""An OpenAI-compatible server on the loopback interface that fails on purpose.

The cloud's client and the server of `serve` are measured against it. It counts, for each prompt
(the content of the last message), how often it was asked and how often a reply was sent whole.
"""

import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "reset", "truncated", "empty", "stall")
USAGE = {"prompt_tokens": 10, "completion_tokens": 3}


class FaultServer:
    """A server that replies with answer(content): a text, or a whole message as a dict.

    It streams a text, in two parts, where it is asked to.

    share: of the requests, which meet one of `faults`, drawn with `seed`. delay: seconds of every
    request; stall: of the fault "stall". after: the Retry-After header of a 429. It is a context
    manager; `url` is the API's base address. Its threads end with the process.
    """

    def __init__(
        self,
        answer: Callable[[str], str | dict],
        share: float = 0.0,
        faults: Sequence[str] = FAULTS,
        seed: int = 0,
        delay: float = 0.0,
        stall: float = 20.0,
        after: str = "0",
    ):
        self.answer, self.share, self.faults = answer, share, faults
        self.delay, self.stall, self.after = delay, stall, after
        self.asked: Counter[str] = Counter()  # requests, by prompt
        self.whole: Counter[str] = Counter()  # replies sent whole, by prompt
        self.met: Counter[str] = Counter()  # requests, by fault
        self.keys: set[str] = set()  # Authorization headers
        self._random = random.Random(seed)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def requests(self) -> int:
        """How many there were."""
        return self.asked.total()

    def draw(self, content: str, key: str) -> str | None:
        """Counts a request and returns the fault that it meets, or None."""
        with self._lock:
            self.asked[content] += 1
            self.keys.add(key)
            fault = self._random.choice(self.faults) if self._random.random() < self.share else None
            self.met[fault or "none"] += 1
            return fault

    def pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the server's end."""
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

    def do_POST(self) -> None:
        server = self.faulty
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        fault = server.draw(content, self.headers.get("Authorization", ""))
        server.pause(server.delay)
        match fault:
            case None:
                answer = server.answer(content)
                if body.get("stream"):
                    self._stream(str(answer))
                    server.whole[content] += 1
                    return
                if not isinstance(answer, dict):
                    answer = {"role": "assistant", "content": answer}
                self._send_choices([{"index": 0, "message": answer, "finish_reason": "stop"}])
                server.whole[content] += 1
            case "empty":
                self._send_choices([])
            case "truncated":
                self._send(200, {"id": "x", "choices": [{"message": {"content": "lost"}}]}, cut=30)
            case "stall":
                server.pause(server.stall)
                self.close_connection = True
            case "reset":
                linger = struct.pack("ii", 1, 0)  # on, for 0 s: closing resets the connection
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
            case status:
                self._send(int(status), {"error": {"message": f"no, not {content}", "code": None}})

    def _stream(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        half = len(text) // 2
        for delta, reason in (({"content": text[:half]}, None), ({"content": text[half:]}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            data = {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}
            if reason:
                data["usage"] = USAGE
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
            self.faulty.pause(self.faulty.delay)
        self.wfile.write(b"data: [DONE]\n\n")

    def _send_choices(self, choices: list[dict]) -> None:
        data = {"id": "x", "object": "chat.completion", "choices": choices, "usage": USAGE}
        self._send(200, data)

    def _send(self, status: int, data: dict, cut: int | None = None) -> None:
        body = json.dumps(data).encode()[:cut]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", self.faulty.after)
        self.end_headers()
        self.wfile.write(body)
