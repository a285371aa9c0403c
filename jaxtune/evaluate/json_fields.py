"""Strict JSON: parse a text, and compare two values."""

import json
from typing import Any

NULL = object()  # the JSON value null, as distinct from "no JSON"


def parse_json(text: str) -> Any:
    """Return the JSON value (RFC 8259) that the whole text is; `NULL` for null, None if it is anything else."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return NULL if value is None else value


def parse_object(text: str) -> dict | None:
    """Return the one JSON object that the whole text is; None if it is anything else."""
    value = parse_json(text)
    return value if isinstance(value, dict) else None


def same_json(a: Any, b: Any) -> bool:
    """Whether two parsed values are equal; Python's own equality takes true for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
