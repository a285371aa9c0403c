"""Messages of a conversation: from the field names of other tools to those that chat templates read.

Known fields of a message or tool call are used. Of unknown fields, those that would change the meaning are refused, and
the rest is kept for the template; `chat.ChatRenderer` counts what the template leaves out.
"""

import json
from collections.abc import Mapping, Sequence

from jaxtune.data.files import Decoder
from jaxtune.data.sources import kind
from jaxtune.errors import UserError, nearest

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_text", "thought", "thoughts", "cot")
FLAGS = ("weight", "train", "training", "trainable", "loss")  # OpenAI, axolotl, ms-swift: whether a turn is trained
ARGUMENTS = ("arguments", "parameters", "args", "input")
# Fields with content other than text, or that select which part of a message is trained.
REFUSED_FIELDS = {
    *("image", "images", "image_url", "audio", "audios", "video", "videos", "file", "files", "attachments"),
    *("train_detail", "training_detail", "mask", "masked", "loss_mask", "loss_weight", "loss_scale", "refusal"),
    *("chosen", "rejected", "rejected_response"),
}
CALL_FIELDS = ("id", "type", "index", "name", "function", *ARGUMENTS)


class Notes:
    """Counts what was not used or was left out by the chat template, with the place where it occurred first.

    `found` maps (what, detail) to [count, place]: `what` is a phrase, `detail` the name of a field or column or "".
    """

    def __init__(self, found: Sequence[Sequence] = ()):
        self.found: dict[tuple[str, str], list] = {(w, d): [n, place] for w, d, n, place in found}

    def add(self, what: str, detail: str, where: str, count: int = 1) -> None:
        self.found.setdefault((what, detail), [0, where])[0] += count

    def merge(self, other: "Notes") -> None:
        for (what, detail), (count, where) in other.found.items():
            self.add(what, detail, where, count)

    def as_json(self) -> list[list]:
        return [[what, detail, count, where] for (what, detail), (count, where) in self.found.items()]

    def lines(self) -> list[str]:
        """One sentence for each kind: `columns that are not used: id (12), time (12), first at a.jsonl:1`."""
        kinds: dict[str, list[tuple[str, int, str]]] = {}
        for (what, detail), (count, where) in self.found.items():
            kinds.setdefault(what, []).append((detail, count, where))
        return [
            f"{what}: {', '.join(f'{detail} ({n:,})' if detail else f'{n:,}' for detail, n, _ in entries)}, "
            f"first at {entries[0][2]}"
            for what, entries in kinds.items()
        ]


def known_roles(roles: Mapping[str, str] | None) -> dict[str, str]:
    """Return {name of a role in lower case: jaxtune's name}, with those of data.roles added.

    Raises:
        UserError: jaxtune has no role of that name.
    """
    ours = tuple(dict.fromkeys(ROLES.values()))
    for theirs, role in (roles or {}).items():
        if role not in ours:
            raise UserError(
                f"data.roles: {theirs}={role}: {role!r} is no role that jaxtune knows.{nearest(role, ours)} "
                f"Known: {', '.join(ours)}."
            )
    return ROLES | {theirs.lower(): role for theirs, role in (roles or {}).items()}


def normalise_messages(
    where: str,
    column: str,
    messages: object,
    roles: Mapping[str, str] = ROLES,
    ignore: Sequence[str] = (),
    notes: Notes | None = None,
) -> tuple[list[dict], list[int]]:
    """Return messages with `role`, `content`, `reasoning_content`, `tool_calls`, and the indices of untrained ones.

    A `function_call`, as a role or as a field, becomes `tool_calls`; arguments given as a JSON string are parsed, as
    chat templates expect; thoughts are read from any of THOUGHTS; FLAGS tell which of the assistant's turns are
    trained. A list of messages may be a dict of lists, as some libraries store it.

    Args:
        where: file and row, for error messages.
        column: the column the messages stand in, for error messages.
        messages: a list of dicts, a dict of lists, or either as a JSON string.
        roles: as from `known_roles`.
        ignore: fields to leave out without an error.
        notes: where fields of tool calls that change nothing are counted.

    Raises:
        UserError: not messages, an unknown role, a field that would change the meaning and is not known.
    """
    if isinstance(messages, str):
        messages = parse_json(where, f"column {column!r}", messages)
    if isinstance(messages, dict) and messages and all(isinstance(v, list) for v in messages.values()):
        if len({len(v) for v in messages.values()}) > 1:
            raise UserError(f"{where}: column {column!r} is an object of lists of different lengths.")
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        raise UserError(f"{where}: column {column!r} is {found}, expected a list of messages.")
    notes = Notes() if notes is None else notes
    made = [_message(f"{where}, message {i}", where, m, roles, ignore, notes) for i, m in enumerate(messages, 1)]
    return [message for message, _ in made], [i for i, (_, trained) in enumerate(made) if not trained]


def _message(
    where: str, row: str, message: object, roles: Mapping[str, str], ignore: Sequence[str], notes: Notes
) -> tuple[dict, bool]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected an object with role and content, found {kind(message)}.")
    message = {k: v for k, v in message.items() if v is not None and k not in ignore}
    found = ", ".join(message) or "none"
    role = _either(where, message, ("role", "from"))
    content = _either(where, message, ("content", "value"))
    if not isinstance(role, str):
        raise UserError(f"{where}: no role. Fields found: {found}; expected role and content (or from and value).")
    if (named := roles.get(role) or roles.get(role.lower())) is None:
        raise UserError(
            f"{where}: unknown role {role!r}.{nearest(role, roles)} Known: {', '.join(roles)}. "
            f"Map it to one of these with data.roles={role}=user."
        )
    if refused := [name for name in message if name in REFUSED_FIELDS and message[name] not in ([], "", {}, False)]:
        raise UserError(
            f"{where} ({role}): the field {refused[0]!r} would change what is trained, and cannot be read: take it "
            f"out, or ignore it with data.ignore={','.join(refused)}."
        )
    if isinstance(content, list):
        content = "".join(_text_part(where, part) for part in content)
    called = named == "function_call"
    if called:
        calls = parse_json(where, f"a {role}", content) if isinstance(content, str) else content
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        named, content = "assistant", ""
    if call := message.pop("function_call", None):
        if message.get("tool_calls"):
            raise UserError(f"{where} ({role}): has both tool_calls and function_call; leave one.")
        message["tool_calls"] = [call]
    if not isinstance(message.setdefault("tool_calls", []), list):
        raise UserError(f"{where} ({role}): tool_calls is {kind(message['tool_calls'])}, expected a list of calls.")
    message["tool_calls"] = [_tool_call(where, row, call, notes) for call in message["tool_calls"]]
    if not message["tool_calls"]:
        del message["tool_calls"]
    elif named != "assistant":
        raise UserError(f"{where} ({role}): has tool_calls, which only the assistant makes.")
    if (thought := _either(where, message, THOUGHTS)) not in (None, ""):
        if not isinstance(thought, str):
            raise UserError(f"{where} ({role}): its thoughts are {kind(thought)}, expected text.")
        message["reasoning_content"] = thought
    if content is None and ("tool_calls" in message or "reasoning_content" in message):
        content = ""
    if isinstance(content, dict) and named in ("tool", "assistant"):  # an answer as an object
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise UserError(f"{where} ({role}): content is {kind(content)}, expected text.")
    trained = _trained(where, role, named, message)
    return {"role": named, "content": content, **{k: v for k, v in message.items() if k not in FLAGS}}, trained


def _either(where: str, fields: dict, names: Sequence[str]) -> object:
    """Take the one value that is given under any of the names."""
    given = {name: fields.pop(name) for name in names if fields.get(name) is not None}
    values = list(given.values())
    if any(value != values[0] for value in values):
        raise UserError(f"{where}: {' and '.join(given)} say different things; leave one.")
    return values[0] if values else None


def _trained(where: str, role: str, named: str, message: Mapping[str, object]) -> bool:
    """Whether a turn is trained, by its flags."""
    flags = {name: message[name] for name in FLAGS if name in message}
    for name, value in flags.items():
        if value not in (0, 1):
            raise UserError(
                f"{where} ({role}): {name!r} is {json.dumps(value, default=str)[:40]}; a turn is trained (1, true) or "
                "not (0, false). Weights in between are not supported."
            )
        if value and named != "assistant":
            raise UserError(
                f"{where} ({role}): {name!r} asks to train on it, but only the assistant's messages are trained: set "
                f"it to false, or leave it out with data.ignore={name}."
            )
    if len(set(map(bool, flags.values()))) > 1:
        raise UserError(f"{where} ({role}): {' and '.join(flags)} say different things; leave one.")
    return all(flags.values())


def _text_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
    raise UserError(f"{where}: content holds {found}; only text is supported.")


def _tool_call(where: str, row: str, call: object, notes: Notes) -> dict:
    if isinstance(call, str):
        call = parse_json(where, "a tool call", call)
    call = {k: v for k, v in call.items() if v is not None} if isinstance(call, dict) else {}
    function = call.get("function", call)
    if isinstance(function, str):  # {"function": "name", "arguments": ...}
        function = {**call, "name": function}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call needs a name and arguments, found {json.dumps(call, default=str)[:80]}.")
    name = function["name"]
    arguments = _either(where, dict(function), ARGUMENTS)
    if arguments is None and function is not call:
        arguments = _either(where, dict(call), ARGUMENTS)
    if arguments is None:
        raise UserError(
            f"{where}: the tool call {name!r} has no arguments (looked for {', '.join(ARGUMENTS)}); found "
            f"{', '.join(function)}. Write an empty object {{}} for a tool that takes none."
        )
    if isinstance(arguments, str):
        arguments = parse_json(where, f"the arguments of {name!r}", arguments or "{}")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments of {name!r} are {kind(arguments)}, expected an object.")
    for field in {**call, **function}:
        if field not in CALL_FIELDS:
            notes.add("fields of tool calls that are not used", field, row)
    outer = {k: v for k, v in call.items() if k == "id"}
    return {**outer, "type": "function", "function": {"name": name, "arguments": arguments}}


def normalise_tools(where: str, tools: object, column: str = "tools") -> list[dict] | None:
    """Return tool schemas as `[{"type": "function", "function": {...}}]`, or None for null, "" and []."""
    if isinstance(tools, str):
        tools = parse_json(where, f"column {column!r}", tools) if tools.strip() else None
    if not tools:
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, list):
        tools = [parse_json(where, f"column {column!r}", t) if isinstance(t, str) else t for t in tools]
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise UserError(f"{where}: {column} is {kind(tools)}, expected a list of objects.")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def parse_json(where: str, what: str, text: str) -> object:
    """Parse the JSON string `text`; `where` and `what` name it in the error message."""
    try:
        return Decoder().decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {what} is not JSON ({error.msg} at column {error.colno}): {text[:60]}") from None
