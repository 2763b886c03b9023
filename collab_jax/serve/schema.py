"""JSON Schemas of what a client may send: one table that checks a request and describes it.

This is the part of JSON Schema 2020-12 that `body.py` uses. An object refuses what it does not
name, and null is the same as left out.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
BOOL: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


class Refused(Exception):
    """A request that is not answered, as OpenAI's errors say it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


# ------------------------------------------------------------------------- to write a table


def whole(low: int, high: int | None = None) -> Schema:
    """A whole number within these limits; 1.0 is one."""
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def number(low: float, high: float | None = None) -> Schema:
    """A finite number within these limits."""
    return {"type": "number", "minimum": low} | ({} if high is None else {"maximum": high})


def one_of(names: Collection[str]) -> Schema:
    """One of these strings."""
    return {"type": "string", "enum": list(names)}


def only(value: Any) -> Schema:
    """One value, that which means nothing: the field itself is not served."""
    return {"const": value}


def fields(properties: dict[str, Schema], required: Sequence[str] = ()) -> Schema:
    """An object of these fields and no others."""
    needed = {"required": list(required)} if required else {}
    return {"type": "object", "properties": properties, "additionalProperties": False} | needed


# ------------------------------------------------------------------------- to use it


def checked(schema: Schema, value: Any, at: str = "") -> Any:
    """`value` without the nulls of its objects. Raises Refused, with the name of what is wrong.

    at: the name of `value`; "": it is the body.
    """
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return checked(option, value, at)
            except Refused:
                continue
        raise Refused(f"{at} must be {_wanted(schema)}", at)
    if "const" in schema:
        if not _same(schema["const"], value):
            served = json.dumps(schema["const"])
            raise Refused(f"{at} is not served, but for {served}", at, "unsupported")
        return value
    if not _holds(schema, value):
        raise Refused(f"{at or 'the body'} must be {_wanted(schema)}", at or None)
    match schema["type"]:
        case "object":
            return _checked_object(schema, value, at)
        case "array":
            return [checked(schema["items"], item, f"{at}[{i}]") for i, item in enumerate(value)]
        case "integer":
            return int(value)
    return value


def _checked_object(schema: Schema, value: dict[str, Any], at: str) -> dict[str, Any]:
    given = {name: item for name, item in value.items() if item is not None}
    required = schema.get("required", [])
    if missing := [name for name in required if name not in given]:
        raise Refused(f"{at or 'the body'} needs {' and '.join(required)}", at or missing[0])
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in given.items():
        path = f"{at}.{name}" if at else name
        if name in known:
            given[name] = checked(known[name], item, path)
        elif others is False:
            raise Refused(f"{path} is unknown", path, "unknown")
        elif others is not True:
            given[name] = checked(others, item, path)
    return given


def _holds(schema: Schema, value: Any) -> bool:
    """Whether a value is of its schema's type and within its limits; what is in it is not seen."""
    low, high = schema.get("minimum", -float("inf")), schema.get("maximum", float("inf"))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "number":
            return is_number and low <= value <= high and abs(value) != float("inf")
        case "integer":
            return is_number and low <= value <= high and value % 1 == 0
        case "string":
            long_enough = isinstance(value, str) and len(value) >= schema.get("minLength", 0)
            return long_enough and value in schema.get("enum", [value])
        case "array":
            most = schema.get("maxItems", float("inf"))
            return isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= most
        case "object":
            if not isinstance(value, dict) or len(value) > schema.get("maxProperties", 1 << 20):
                return False
            pattern = schema.get("propertyNames", {}).get("pattern", ".*")
            return all(re.fullmatch(pattern, name, re.DOTALL) for name in value)
    raise AssertionError(f"no schema of a request: {schema}")


def _same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are equal; unlike Python's, 1 is not true."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _wanted(schema: Schema) -> str:
    """What a value must be, in words."""
    if "description" in schema:
        return schema["description"]
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    low, high = schema.get("minimum", 0), schema.get("maximum")
    limits = f"of at least {low}" if high is None else f"from {low:g} to {high:g}"
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "string":
            return "a string"
        case "number":
            return f"a number {limits}"
        case "integer":
            return f"a whole number {limits}"
        case "array":
            return f"a list of at least {schema.get('minItems', 0)}"
    return "an object"


def described(schema: Schema) -> Schema:
    """The schema for a document: what is not required may be null."""
    whole_schema = dict(schema)
    if "anyOf" in schema:
        whole_schema["anyOf"] = [described(option) for option in schema["anyOf"]]
    if "items" in schema:
        whole_schema["items"] = described(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        whole_schema["additionalProperties"] = _or_null(described(schema["additionalProperties"]))
    if "properties" in schema:
        required = schema.get("required", [])
        whole_schema["properties"] = {
            name: described(field) if name in required else _or_null(described(field))
            for name, field in schema["properties"].items()
        }
    return whole_schema


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}
