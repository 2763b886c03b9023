"""The description of the API, OpenAPI 3.1: requests by the schemas that check them, and responses.

Tests hold every response against it.
"""

from typing import Any

import collab_jax
from collab_jax.serve import body
from collab_jax.serve.schema import BOOL, NULL, TEXT, Schema, described

NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FINISH: Schema = {"enum": ["stop", "length"]}


def _all_of(properties: dict[str, Schema], *optional: str) -> Schema:
    """An object that has all of these fields, but for the optional ones, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


SUMMARY: dict[str, Schema] = {
    "answered_by": {"enum": ["device", "cloud"]},
    "reason": TEXT,
    "margin": _or_null(NUMBER),
    "bias": _or_null(NUMBER),
    "device_tokens": COUNT,
    "cloud_tokens": COUNT,
    "device_ms": NUMBER,
    "cloud_ms": NUMBER,
    "usd": NUMBER,
    "request_id": TEXT,
}
LOGPROBS = _all_of(
    {
        "content": _list_of(
            _all_of(
                {
                    "token": TEXT,
                    "logprob": {"type": "number", "maximum": 0},
                    "bytes": _or_null(_list_of(COUNT)),
                    "top_logprobs": {"type": "array", "maxItems": 0},
                }
            )
        ),
        "refusal": NULL,
    }
)
PLAIN_LOGPROBS = _all_of(
    {
        "tokens": _list_of(TEXT),
        "token_logprobs": _list_of({"type": "number", "maximum": 0}),
        "top_logprobs": NULL,
        "text_offset": _list_of(COUNT),
    }
)
MESSAGE = _all_of(
    {"role": {"const": "assistant"}, "content": TEXT, "reasoning_content": TEXT},
    "reasoning_content",
)
DELTA = _all_of(MESSAGE["properties"], "role", "content", "reasoning_content")


def _choice(text: dict[str, Schema], logprobs: Schema, finish: Schema) -> Schema:
    """A choice; of several, each says by itself who answered."""
    fields = {"index": COUNT, "finish_reason": finish, "logprobs": _or_null(logprobs)}
    several = {"model": TEXT, "collab": _named("Collab")}
    return _all_of(fields | text | several, *several)


def _completion(kind: str, choice: Schema, *optional: str) -> Schema:
    return _all_of(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": COUNT,
            "model": TEXT,
            "choices": _list_of(choice),
            "usage": _named("Usage"),
            "collab": _named("Collab"),
        },
        *optional,
    )


BUDGET = _all_of(
    {
        "target_call_rate": NUMBER,
        "achieved_call_rate": _or_null(NUMBER),
        "queries": {"type": "integer"},
        "calls": {"type": "integer"},
        "bias": NUMBER,
        "calls_left_in_bucket": NUMBER,
    }
)
TRACE = _all_of(
    {
        "tokens": _list_of(TEXT),
        "margins": _list_of(_or_null(NUMBER)),
        "decided_at": _or_null(COUNT),
    }
)
IN_CHUNK = _or_null(FINISH)
SCHEMAS: dict[str, Schema] = {
    "ChatRequest": described(body.CHAT),
    "CompletionRequest": described(body.COMPLETION),
    "Target": described(body.TARGET),
    "Chat": _completion(
        "chat.completion", _choice({"message": MESSAGE}, LOGPROBS, FINISH), "collab"
    ),
    "ChatChunk": _completion(
        "chat.completion.chunk",
        _choice({"delta": DELTA}, LOGPROBS, IN_CHUNK),
        "collab",
        "usage",
    ),
    "Completion": _completion(
        "text_completion", _choice({"text": TEXT}, PLAIN_LOGPROBS, IN_CHUNK), "collab", "usage"
    ),
    "Usage": _all_of(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "cost": NUMBER,
            "cost_details": _all_of(
                {"currency": {"const": "USD"}, "device_tokens": COUNT, "cloud_tokens": COUNT}
            ),
        }
    ),
    "Collab": _all_of(SUMMARY | {"budget": _named("Budget"), "trace": TRACE}, "trace"),
    "Budget": BUDGET,
    "Error": _all_of(
        {
            "error": _all_of(
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": _or_null(TEXT),
                    "code": _or_null(TEXT),
                }
            )
        }
    ),
    "Models": _all_of(
        {
            "object": {"const": "list"},
            "data": _list_of(
                _all_of(
                    {
                        "id": {"enum": list(body.MODELS)},
                        "object": {"const": "model"},
                        "created": COUNT,
                        "owned_by": TEXT,
                    }
                )
            ),
        }
    ),
    "Status": _all_of({"status": TEXT}),
    "Record": _all_of(
        {
            **SUMMARY,
            "answered_by": TEXT,
            "status": COUNT,
            "error": TEXT,
            "began": NUMBER,
            "mode": {"enum": list(body.MODES)},
            "stream": BOOL,
            "model": TEXT,
            "finish_reason": TEXT,
            "margins": _list_of(_or_null(NUMBER)),
            "decided_at": _or_null(COUNT),
            "attempts": COUNT,
            "cloud_prompt": _or_null(_list_of({"type": "object"})),
        }
    ),
}
ERRORS = {
    400: "What is asked is not served; `param` names it.",
    401: "The operator's key is needed.",
    403: "This server has no operator's key.",
    404: "It is not among the last requests.",
    413: "The body is too large.",
    429: "The queue is full; retry-after says for how long.",
    500: "An error in the server.",
    503: "Neither the cloud nor the device can answer, or the server is not ready.",
}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _named(name)}}


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    errors: tuple[int, ...] = (),
    request: str = "",
    operator: bool = False,
) -> dict[str, Any]:
    """An operation. answers: the content of its response; request: the schema of its body."""
    errors += (401, 403) if operator else ()
    responses: dict[str, Any] = {"200": {"description": "As asked.", "content": answers}}
    for status in sorted(errors):
        responses[str(status)] = {"description": ERRORS[status], "content": _json("Error")}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if request:
        operation["requestBody"] = {"required": True, "content": _json(request)}
    if operator:
        operation["security"] = [{"operator": []}]
    return operation


def _completions(name: str, summary: str, request: str, whole: str, chunk: str) -> dict[str, Any]:
    """The operation of a kind of completions; an event is a chunk, an error, or [DONE]."""
    told = {"anyOf": [_named(chunk), _named("Error")]}
    json_data = {"contentMediaType": "application/json", "contentSchema": told}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, json_data]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    answers = _json(whole) | {"text/event-stream": {"schema": event}}
    return _operation(name, summary, answers, (400, 413, 429, 500, 503), request)


def _document() -> dict[str, Any]:
    record_id = {"name": "request_id", "in": "path", "required": True, "schema": TEXT}
    status = _operation("health", "Whether the engine works.", _json("Status"))
    status["responses"]["503"] = {"description": ERRORS[503], "content": _json("Status")}
    ready = status | {"operationId": "ready", "summary": "Whether all programs are compiled."}
    record = _operation("record", "A request.", _json("Record"), (404,), operator=True)
    return {
        "openapi": "3.1.0",
        "info": {"title": "collab_jax", "version": collab_jax.__version__},
        "paths": {
            "/v1/chat/completions": {
                "post": _completions("chat", "A chat.", "ChatRequest", "Chat", "ChatChunk")
            },
            "/v1/completions": {
                "post": _completions(
                    "complete", "A prompt.", "CompletionRequest", "Completion", "Completion"
                )
            },
            "/v1/models": {"get": _operation("models", "Who may be asked.", _json("Models"))},
            "/health": {"get": status},
            "/ready": {"get": ready},
            "/metrics": {
                "get": _operation("metrics", "For Prometheus.", {"text/plain": {"schema": TEXT}})
            },
            "/budget": {
                "get": _operation("budget", "The budget.", _json("Budget"), operator=True),
                "put": _operation(
                    "set_budget",
                    "A new share of queries that may go to the cloud.",
                    _json("Budget"),
                    (400, 413),
                    request="Target",
                    operator=True,
                ),
            },
            "/requests/{request_id}": {"get": record | {"parameters": [record_id]}},
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"operator": {"type": "http", "scheme": "bearer"}},
        },
    }


DOCUMENT = _document()
