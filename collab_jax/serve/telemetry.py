"""What a server knows of its requests: counters for Prometheus, and the last ones by their id."""

import collections
from typing import Any

from collab_jax.serve.answer import Outcome, Service

KEPT = 1000  # requests

# name: (kind, help). Counters are since the start of the process.
METRICS = {
    "requests_total": ("counter", "Requests that were answered, by who answered and why."),
    "errors_total": ("counter", "Requests that were not, by HTTP status; 499: the client left."),
    "device_tokens_total": ("counter", "Tokens that the device wrote."),
    "cloud_tokens_total": ("counter", "Tokens of the cloud's answers, input included."),
    "usd_total": ("counter", "What answers cost."),
    "abandoned_usd_total": ("counter", "What calls may have cost whose clients left."),
    "device_seconds_total": ("counter", "Time that requests were with the device."),
    "cloud_seconds_total": ("counter", "Time that requests were with the cloud."),
    "slots_used": ("gauge", "Slots of the engine in use."),
    "queue_length": ("gauge", "Requests that wait for a slot."),
    "bias": ("gauge", "What is added to the decision token's logit."),
    "target_call_rate": ("gauge", "The share of queries that may go to the cloud."),
    "achieved_call_rate": ("gauge", "The share that went, since the target was set."),
    "cloud_down": ("gauge", "1 while the circuit breaker is open."),
}


class Telemetry:
    """To be used in one thread."""

    def __init__(self) -> None:
        self._sums: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
        self._recent: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()

    def note(self, outcome: Outcome, status: int) -> None:
        """Counts a request that has ended."""
        add = self._sums
        if status == 200:
            labels = f'{{answered_by="{outcome.answered_by}",reason="{outcome.reason}"}}'
            add["requests_total", labels] += 1
        else:
            self.count_error(status)
        add["device_tokens_total", ""] += outcome.device_tokens
        add["cloud_tokens_total", ""] += outcome.cloud_tokens
        add["usd_total", ""] += outcome.usd
        add["device_seconds_total", ""] += outcome.device_ms / 1000
        add["cloud_seconds_total", ""] += outcome.cloud_ms / 1000
        self._recent[outcome.request_id] = record(outcome, status)
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)

    def count_error(self, status: int) -> None:
        """Counts a request that was not answered."""
        self._sums["errors_total", f'{{status="{status}"}}'] += 1

    def request(self, request_id: str) -> dict[str, Any] | None:
        """The record of one of the last requests, or None."""
        return self._recent.get(request_id)

    def page(self, service: Service) -> str:
        """The metrics in Prometheus' text format."""
        used, waiting = service.engine.busy
        budget = service.controller.report()
        now = {
            "abandoned_usd_total": service.upstream.abandoned_usd,
            "slots_used": used,
            "queue_length": waiting,
            "bias": budget["bias"],
            "target_call_rate": budget["target_call_rate"],
            "achieved_call_rate": budget["achieved_call_rate"] or 0,
            "cloud_down": int(service.upstream.down),
        }
        lines = []
        for name, (kind, text) in METRICS.items():
            rows = {labels: v for (of, labels), v in self._sums.items() if of == name}
            if name in now:
                rows = {"": now[name]}
            lines += [f"# HELP collab_{name} {text}", f"# TYPE collab_{name} {kind}"]
            lines += [f"collab_{name}{labels} {float(value)!r}" for labels, value in rows.items()]
        return "\n".join(lines) + "\n"


def record(outcome: Outcome, status: int) -> dict[str, Any]:
    """A request as its operator may see it: no text, but for a `cloud_prompt` that is kept."""
    return {
        "request_id": outcome.request_id,
        "status": status,
        "error": outcome.error,
        "began": outcome.began,
        "mode": outcome.ask.mode,
        "stream": outcome.ask.stream,
        "model": outcome.model,
        "finish_reason": outcome.finish,
        "margins": margins(outcome),
        "decided_at": outcome.decided_at,
        "attempts": outcome.attempts,
        "cloud_prompt": outcome.cloud_prompt,
        **summary(outcome),
    }


def margins(outcome: Outcome) -> list[float | None]:
    """The margin of each step of the device; None where no call was possible."""
    return [None if m == -float("inf") else round(m, 4) for m in outcome.margins]


def summary(outcome: Outcome) -> dict[str, Any]:
    """The object `collab` of a response, without the budget."""
    return {
        "answered_by": outcome.answered_by,
        "reason": outcome.reason,
        "margin": outcome.margin,
        "bias": outcome.bias,
        "device_tokens": outcome.device_tokens,
        "cloud_tokens": outcome.cloud_tokens,
        "device_ms": round(outcome.device_ms, 3),
        "cloud_ms": round(outcome.cloud_ms, 3),
        "usd": outcome.usd,
    }
