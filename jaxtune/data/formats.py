"""From a row's columns to what is trained on: a conversation, or pieces of text.

    chat                messages = [{"role": ..., "content": ...}, ...]              (+ tools, system)
    sharegpt            conversations = [{"from": ..., "value": ...}, ...]           (+ tools, system)
    prompt_completion   prompt, completion
    instruction         instruction, output                                          (+ input, system)
    text                text

A file with other columns is mapped by `columns` (our name -> the file's name) or rendered by `template`.
"""

import hashlib
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtune.data.sources import Source, kind
from jaxtune.errors import UserError, nearest

# format -> (columns it needs, columns it may have), in the order in which they are looked for
FORMATS = {
    "chat": (("messages",), ("tools", "system")),
    "sharegpt": (("conversations",), ("tools", "system")),
    "prompt_completion": (("prompt", "completion"), ()),
    "instruction": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
# What people call the two sides of a pair: used to suggest a mapping, never to guess one.
PAIRS = [
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("input", "output"),
    ("source", "target"),
    ("problem", "solution"),
    ("document", "summary"),
]
MESSAGES = {"messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat"}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them (`role`, `content` as text, `tool_calls`), and tool schemas or None."""

    messages: list[dict]
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Document:
    """Text in order, each piece with whether it is trained. The end-of-sequence token follows the last one."""

    pieces: tuple[tuple[str, bool], ...]


Example = Conversation | Document

CANONICAL = json.JSONEncoder(sort_keys=True, default=str).encode  # made once: json.dumps makes one a call
QUOTED = json.encoder.encode_basestring_ascii


@dataclass(frozen=True)
class Reader:
    """How the rows of one source are read.

    `format` is one of FORMATS or "template"; `columns` are the file's columns that are used; `convert(where, row)`
    gives the example and raises UserError for a row that does not fit.
    """

    format: str
    columns: tuple[str, ...]
    convert: Callable[[str, dict], Example]

    def digest(self, row: dict) -> int:
        """Return 64 bits over the columns in use: equal rows are equal whatever their number, id or order."""
        values = [row.get(c) for c in self.columns]
        plain = all(type(v) is str for v in values)  # the usual row, for which the same text is made sooner
        used = f"[{', '.join(map(QUOTED, values))}]" if plain else CANONICAL(values)
        return int.from_bytes(hashlib.blake2b(used.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def make_reader(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    completion_from: str | None = None,
    system: str | None = None,
    chat: bool = False,
) -> Reader:
    """Decide from the first row how `source` is read.

    format: one of FORMATS, or "auto": the first of them whose columns the file has.
    columns: our name -> the file's name, applied before anything else.
    template: a format string over the file's columns. The text before its last placeholder is the prompt; the last
        placeholder and what follows it is the completion, which is trained.
    completion_from: for `text` and `template`: only what follows the first occurrence of this text is trained.
    system: a system prompt for every conversation that has none of its own.
    chat: read prompt/completion and instruction rows as a conversation of two turns.

    Raises UserError for missing columns (lists those found, suggests a mapping) and for settings without effect.
    """
    number, row = next(iter(source))
    found = list(row)
    columns = dict(columns or {})
    for ours, theirs in columns.items():
        known = sorted({c for needs, may in FORMATS.values() for c in needs + may})
        if ours not in known:
            raise UserError(
                f"data.columns: no column of ours is called {ours!r} (ours=theirs).{nearest(ours, known)} "
                f"Known: {', '.join(known)}."
            )
        if theirs not in row:
            raise UserError(
                f"data.columns: {source.where(number)} has no column {theirs!r} for {ours!r}."
                f"{nearest(theirs, found)} Columns found: {', '.join(found)}."
            )

    if template is not None:
        if columns:
            raise UserError("data.template names the file's own columns: leave out data.columns.")
        reader = _template_reader(source.where(number), template, row, completion_from)
    else:
        if format == "auto":
            format = _detect(source.where(number), found, columns)
        elif format not in FORMATS:
            raise UserError(
                f"data.format: unknown format {format!r}.{nearest(format, FORMATS)} Known: auto, {', '.join(FORMATS)}."
            )
        missing = [c for c in FORMATS[format][0] if columns.get(c, c) not in row]
        if missing:
            raise _no_columns(source.where(number), f"data.format={format} needs {', '.join(missing)}", found, columns)
        reader = _format_reader(format, columns, row, completion_from, system, chat)

    conversational = format in ("chat", "sharegpt") or (format in ("prompt_completion", "instruction") and chat)
    if system and (template is not None or format == "text"):
        raise UserError("data.system has no effect on plain text: leave it out, or write it into data.template.")
    if completion_from and (conversational or (template is None and format != "text")):
        raise UserError(
            f"data.completion_from has no effect on {format} rows, whose completion is known: "
            "it is for text and data.template."
        )
    return reader


def _detect(where: str, found: list[str], columns: Mapping[str, str]) -> str:
    fits = [name for name, (needs, _) in FORMATS.items() if all(columns.get(c, c) in found for c in needs)]
    mapped = [name for name in fits if any(c in columns for c in FORMATS[name][0])]
    if not fits or (columns and not mapped and any(c in needs for needs, _ in FORMATS.values() for c in columns)):
        raise _no_columns(where, "the columns fit no known format", found, columns)
    return (mapped or fits)[0]


def _no_columns(where: str, problem: str, found: list[str], columns: Mapping[str, str]) -> UserError:
    lower = {c.lower(): c for c in found}
    pair = next(((lower[a], lower[b]) for a, b in PAIRS if a in lower and b in lower), None)
    turns = next((c for c in found if c.lower() in MESSAGES), None)
    other = next((name for name, (needs, _) in FORMATS.items() if all(columns.get(c, c) in found for c in needs)), None)
    if other:
        hint = f"These are the columns of data.format={other}."
    elif columns:
        hint = f"The mapping given was {', '.join(f'{a}={b}' for a, b in columns.items())}."
    elif pair:
        hint = f"Set data.columns, for example prompt={pair[0]},completion={pair[1]}."
    elif turns:
        hint = f"Set data.columns, for example messages={turns}."
    elif len(found) == 1:
        hint = f"Set data.columns, for example text={found[0]}."
    else:
        hint = "Set data.columns (prompt=THEIRS,completion=THEIRS or text=THEIRS) or data.template ('{a}\\n{b}')."
    needs = "; ".join("+".join(needs) for needs, _ in FORMATS.values())
    return UserError(f"{where}: {problem}. Columns found: {', '.join(found)}. Known: {needs}. {hint}")


def _value(where: str, row: dict, column: str):
    if column not in row:
        raise UserError(f"{where}: no column {column!r}. Columns found: {', '.join(row)}.{nearest(column, row)}")
    return row[column]


def _text_value(where: str, row: dict, column: str) -> str:
    if type(value := row.get(column)) is str:
        return value
    value = _value(where, row, column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {kind(value)}, expected text.")
    return value


def _format_reader(
    format: str, columns: Mapping[str, str], first: dict, completion_from: str | None, system: str | None, chat: bool
) -> Reader:
    needs, may = FORMATS[format]
    theirs = {c: columns.get(c, c) for c in needs + may}
    used = tuple(theirs[c] for c in needs) + tuple(theirs[c] for c in may if theirs[c] in first)

    def optional(where: str, row: dict, column: str) -> str:
        return _text_value(where, row, theirs[column]) if row.get(theirs[column]) is not None else ""

    def turns(where: str, row: dict) -> Conversation:
        messages = normalise_messages(where, theirs[needs[0]], _value(where, row, theirs[needs[0]]))
        tools = normalise_tools(where, row.get(theirs["tools"]))
        return Conversation(with_system(messages, optional(where, row, "system") or system), tools)

    def pair(where: str, row: dict) -> Example:
        own_system = ""
        if format == "instruction":
            own_system = optional(where, row, "system")
            given = optional(where, row, "input")
            prompt = _text_value(where, row, theirs["instruction"]) + (f"\n\n{given}" if given else "")
            completion = _text_value(where, row, theirs["output"])
        else:
            prompt, completion = (_text_value(where, row, theirs[c]) for c in needs)
        if chat:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return Conversation(with_system(messages, own_system or system))
        if own_system or system:
            prompt = f"{own_system or system}\n\n{prompt}"
        seam = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else "\n"
        return Document(((prompt + seam, False), (completion, True)))

    def text(where: str, row: dict) -> Document:
        value = _text_value(where, row, theirs["text"])
        return _marked(where, value, completion_from) if completion_from else Document(((value, True),))

    convert = {"chat": turns, "sharegpt": turns, "prompt_completion": pair, "instruction": pair, "text": text}[format]
    return Reader(format, used, convert)


def _marked(where: str, text: str, marker: str) -> Document:
    at = text.find(marker)
    if at < 0:
        raise UserError(f"{where}: data.completion_from={marker!r} does not occur in this text: {text[:80]!r}.")
    at += len(marker)
    return Document(((text[:at], False), (text[at:], True)))


def _template_reader(where: str, template: str, first: dict, completion_from: str | None) -> Reader:
    try:
        parts = [(literal, name, spec) for literal, name, spec, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"data.template: {error} in {template!r}. Write {{{{ for a brace of the text.") from None
    names = [name for _, name, _ in parts if name is not None]
    if not names:
        raise UserError(f"data.template: no placeholder in {template!r}. Columns found: {', '.join(first)}.")
    for name in names:
        if name not in first:
            raise UserError(
                f"data.template: {where} has no column {name!r}.{nearest(name, first)} "
                f"Columns found: {', '.join(first)}."
            )
    last = max(i for i, (_, name, _) in enumerate(parts) if name is not None)

    def convert(where: str, row: dict) -> Document:
        prompt, completion = [], []
        for i, (literal, name, _) in enumerate(parts):
            (prompt if i <= last else completion).append(literal)
            if name is not None:
                (prompt if i < last else completion).append(_text_value(where, row, name))
        prompt, completion = "".join(prompt), "".join(completion)
        if completion_from:
            return _marked(where, prompt + completion, completion_from)
        return Document(((prompt, False), (completion, True)))

    return Reader("template", tuple(dict.fromkeys(names)), convert)


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """Put a system message first where there is none."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def normalise_messages(where: str, column: str, messages: object) -> list[dict]:
    """Return messages with `role`, `content` and, for calls, `tool_calls`, from OpenAI's or sharegpt's names.

    A `function_call` becomes an assistant's message with `tool_calls`, an `observation` a tool's message; arguments
    given as a JSON string are parsed, as chat templates expect.
    """
    if isinstance(messages, str):
        messages = _parse_json(where, f"column {column!r}", messages)
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        raise UserError(f"{where}: column {column!r} is {found}, expected a list of messages.")
    return [_message(f"{where}, message {i}", m) for i, m in enumerate(messages, 1)]


def _message(where: str, message: object) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object with role and content, found {kind(message)}.")
    message = {k: v for k, v in message.items() if v is not None}
    found = ", ".join(message) or "none"
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if not isinstance(role, str):
        raise UserError(f"{where}: no role. Fields found: {found}; expected role and content (or from and value).")
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}.{nearest(role, ROLES)} Known: {', '.join(ROLES)}.")
    if isinstance(content, list):
        content = "".join(_text_part(where, part) for part in content)
    if ROLES[role] == "function_call":
        calls = _parse_json(where, "a function_call", content) if isinstance(content, str) else content
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        role, content = "assistant", ""
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(where, call) for call in message["tool_calls"]]
        if not message["tool_calls"]:
            del message["tool_calls"]
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where} ({role}): content is {kind(content)}, expected text.")
    return {"role": ROLES[role], "content": content, **message}


def _text_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
    raise UserError(f"{where}: content holds {found}; only text is supported.")


def _tool_call(where: str, call: object) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs a name and arguments, found {json.dumps(call, default=str)[:80]}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(where, f"the arguments of {function['name']!r}", arguments or "{}")
    outer = {k: v for k, v in call.items() if k in ("id",) and v is not None}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def normalise_tools(where: str, tools: object) -> list[dict] | None:
    """Return tool schemas as `[{"type": "function", "function": {...}}]`, or None for null, "" and []."""
    if isinstance(tools, str):
        tools = _parse_json(where, "column 'tools'", tools) if tools.strip() else None
    if not tools:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise UserError(f"{where}: tools is {kind(tools)}, expected a list of objects.")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def _parse_json(where: str, what: str, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {what} is not JSON ({error.msg} at column {error.colno}): {text[:60]}") from None


class ColumnTypes:
    """Notices a column that changes its type between rows. Null is no type; whole and broken numbers are one."""

    def __init__(self, source: Source, columns: tuple[str, ...]):
        self.source = source
        self.columns = columns
        self.seen: dict[str, tuple[str, int]] = {}  # column -> (kind, row number where it was first seen)
        self._usual: dict[str, type] = {}

    def check(self, number: int, row: dict) -> None:
        """Raise UserError if `row` holds another type than the rows before it."""
        for column in self.columns:
            value = row.get(column)
            if value is None or type(value) is self._usual.get(column):
                continue
            found = kind(value)
            expected, first = self.seen.setdefault(column, (found, number))
            if found != expected:
                raise UserError(
                    f"{self.source.where(number)}: column {column!r} is {found} "
                    f"({json.dumps(value, default=str)[:40]}), but {expected} at {self.source.where(first)}. "
                    "A column has one type: mend the rows."
                )
            self._usual[column] = type(value)
