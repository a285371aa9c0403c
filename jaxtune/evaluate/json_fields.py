"""Strict JSON answers: how many parse, and how many have every field right."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import UserError

NULL = object()  # the JSON value null, told apart from "no JSON"


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


def score(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Return the shares of answers that are one JSON object, and that equal the expected object in every field."""
    pairs = [(parse_object(a), parse_object(e)) for a, e in zip(answers, expected, strict=True)]
    valid = [a is not None for a, _ in pairs]
    exact = [a is not None and same_json(a, e) for a, e in pairs]
    return {"eval/json_valid": float(np.mean(valid)), "eval/json_exact": float(np.mean(exact))}


@dataclass
class Example:
    prompt: list[int]
    text: str
    expected: str


def examples(rows: Any, tokenizer: Any, limit: int) -> list[Example]:
    """Split rows at their first trained token: what is asked, and what is expected.

    Raises:
        UserError: a row has no prompt, or its expected answer is not a JSON object.
    """
    found = []
    for i in range(min(limit, len(rows))):
        tokens, mask = rows[i]
        cut = int(np.argmax(mask))
        expected = tokenizer.decode(tokens[cut:][mask[cut:] > 0], skip_special_tokens=True).strip()
        if cut == 0 or parse_object(expected) is None:
            raise UserError(
                f"evaluate.json: {rows.where(i)}: expected a prompt and a completion that is one JSON object; "
                f"found the completion {expected[:80]!r}."
            )
        found.append(Example(tokens[:cut].tolist(), tokenizer.decode(tokens[:cut]), expected))
    return found


class JsonEvaluation:
    """Generates greedily for held-out rows and scores the answers; remembers them for the report."""

    def __init__(self, module: Any, rows: Any, tokenizer: Any, limit: int, max_new_tokens: int, eos_ids: Any = None):
        self.module, self.tokenizer, self.max_new_tokens = module, tokenizer, max_new_tokens
        self.eos_ids = eos_ids or (tokenizer.eos_token_id,)
        self.examples = examples(rows, tokenizer, limit)
        self.answers: list[list[str]] = []

    def __call__(self, params: Any) -> dict[str, float]:
        from jaxtune.infer.generation import generate

        out = generate(
            self.module,
            params,
            [e.prompt for e in self.examples],
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids,
        )
        self.answers.append([self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in out])
        return score(self.answers[-1], [e.expected for e in self.examples])
