"""From a row's columns to a training example: a conversation, or pieces of text.

    chat                messages = [{"role": ..., "content": ...}, ...]              (+ tools, functions, system)
    sharegpt            conversations = [{"from": ..., "value": ...}, ...]           (+ tools, functions, system)
    prompt_completion   prompt, completion: texts, or lists of messages              (+ context, system, history, tools)
    instruction         instruction, output                                          (+ input, context, system, history)
    text                text

A file with other columns is mapped by `columns` (jaxtune's name -> the file's) or rendered by `template`.
"""

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from jaxtune.data.files import header_hint
from jaxtune.data.messages import Notes, known_roles, normalise_messages, normalise_tools, parse_json
from jaxtune.data.sources import Source, kind
from jaxtune.errors import UserError, nearest

# format -> (columns it needs, columns it may have), in the order in which they are looked for
FORMATS = {
    "chat": (("messages",), ("tools", "system", "functions")),
    "sharegpt": (("conversations",), ("tools", "system", "functions")),
    "prompt_completion": (("prompt", "completion"), ("context", "system", "history", "tools", "functions")),
    "instruction": (("instruction", "output"), ("input", "system", "context", "history")),
    "text": (("text",), ()),
}
# Columns that change what is trained; ignoring one silently would train something else than the file means.
# jaxtune's names for them, where data.columns can map them.
MEANT = {
    **dict.fromkeys(("images", "image", "audio", "audios", "video", "videos", "documents", "chat_template_kwargs")),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "cot", "chain_of_thought")),
    **dict.fromkeys(("rationale", "weight", "weights", "sample_weight", "loss_weight", "loss_mask")),
    **{name: name for name in ("system", "context", "history", "tools", "functions", "input")},
    **dict.fromkeys(("system_prompt", "system_message", "system_instruction", "sys_prompt"), "system"),
    **dict.fromkeys(("passage", "paragraph", "background", "document", "article", "story", "evidence"), "context"),
    **dict.fromkeys(("chat_history", "conversation_history", "dialogue_history"), "history"),
    **dict.fromkeys(("available_tools", "tool_schemas", "tool_definitions"), "tools"),
}
# Common names of prompts and completions, the surest first: used to suggest a mapping, never to guess one.
ASKED = ("prompt", "instruction", "question", "query", "input", "problem", "source", "document", "article")
ANSWERED = ("completion", "response", "answer", "output", "target", "solution", "summary", "highlights")
UNLEARNT = "labels that are not trained (objective.name=sequence_classification learns them)"
LABELLED = ("label", "labels", "gold_label", "label_text", "sentiment", "intent")
MESSAGES = {"messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat"}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them (`role`, `content` as text, `tool_calls`), and tool schemas or None.

    `untrained` are the indices of the assistant's turns that are not trained.
    """

    messages: list[dict]
    tools: list[dict] | None = None
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Document:
    """Pieces of text in order, each with whether it is trained. The end-of-sequence token follows the last piece."""

    pieces: tuple[tuple[str, bool], ...]


Example = Conversation | Document

CANONICAL = json.JSONEncoder(sort_keys=True, default=str).encode  # made once: json.dumps makes an encoder in each call
QUOTED = json.encoder.encode_basestring_ascii


@dataclass(frozen=True)
class Reader:
    """How the rows of one source are read.

    `format` is one of FORMATS or "template"; `columns` are the file's columns that are used, if a row has them;
    `convert(where, row)` gives the example and raises UserError for a row that does not fit. What it does not use is
    counted in `notes`. `together(row)` is what rows that are held out together have in common; None: nothing.
    """

    format: str
    columns: tuple[str, ...]
    convert: Callable[[str, dict], Example]
    notes: Notes = field(default_factory=Notes)
    together: Callable[[dict], object] = lambda row: None

    def digest(self, row: dict) -> int:
        """Return a 64-bit hash of the columns in use; a row's number, id and order do not matter.

        Its upper half is that of what the row has in common with others, where there is that: see `data.held_out`.
        """
        values = [row.get(c) for c in self.columns]
        while len(values) > 1 and values[-1] is None:  # columns that this row lacks
            values.pop()
        plain = all(type(v) is str for v in values)  # most rows: a faster way to the same text
        used = f"[{', '.join(map(QUOTED, values))}]" if plain else CANONICAL(values)
        shared = self.together(row)
        own, common = _hash64(used), None if shared is None else _hash64(CANONICAL(shared))
        return own if common is None else common >> 32 << 32 | own & 0xFFFFFFFF


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def make_reader(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    completion_from: str | None = None,
    prompt_from: str | None = None,
    system: str | None = None,
    system_as_user: bool = False,
    roles: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    chat: bool = False,
) -> Reader:
    """Decide from the first row how `source` is read.

    Args:
        source: of rows, at least one.
        format: one of FORMATS, or "auto": the first of them whose columns the file has.
        columns: jaxtune's name of a column -> the file's name, applied before anything else; see `own_columns`.
        template: a format string over the file's columns. The text before its last placeholder is the prompt; the last
            placeholder and what follows it is the completion, which is trained.
        completion_from: for `text` and `template`: only what follows the first occurrence of this text is trained.
        prompt_from: with completion_from: training stops again at this text, up to the next completion_from.
        system: a system prompt for every conversation that has none of its own.
        system_as_user: put system messages at the start of the user's first message.
        roles: the file's name of a role -> jaxtune's, beside those that are known.
        ignore: columns, and fields of messages, to leave out without an error.
        chat: read prompt/completion and instruction rows as a conversation of two turns.

    Raises:
        UserError: missing columns (lists those found, suggests a mapping), settings without effect, rows of another
            objective.
    """
    number, row = next(iter(source))
    where, found = source.where(number), list(row)
    columns = own_columns(source, columns or {})
    for ours, theirs in columns.items():
        known = sorted({c for needs, may in FORMATS.values() for c in needs + may})
        if ours not in known:
            raise UserError(
                f"data.columns: {ours!r} is not a column that jaxtune knows (ours=theirs).{nearest(ours, known)} "
                f"Known: {', '.join(known)}."
            )
        if theirs not in row and not any(ours in may for _, may in FORMATS.values()):
            raise UserError(
                f"data.columns: {where} has no column {theirs!r} for {ours!r}."
                f"{nearest(theirs, found)} Columns found: {', '.join(found)}. "
                f"Where sources differ, name both: {ours}={theirs}|{ours}."
            )
    if prompt_from and not completion_from:
        raise UserError("data.prompt_from has no effect without data.completion_from: give both.")

    if template is not None:
        if columns:
            raise UserError("data.template names the file's own columns: leave out data.columns.")
        reader = _template_reader(where, template, row, completion_from, prompt_from)
    else:
        if format == "auto":
            format = _detect(where, found, columns)
            if format == "text" and not columns and not completion_from:
                _refuse_judged(where, [name for name in found if name not in ignore])
        elif format not in FORMATS:
            raise UserError(
                f"data.format: unknown format {format!r}.{nearest(format, FORMATS)} Known: auto, {', '.join(FORMATS)}."
            )
        needs, may = FORMATS[format]
        missing = [c for c in needs if columns.get(c, c) not in row]
        if missing:
            raise _no_columns(where, f"data.format={format} needs {', '.join(missing)}", found, columns)
        if idle := [ours for ours in columns if ours not in needs + may]:
            raise UserError(
                f"data.columns: {idle[0]}={columns[idle[0]]} has no effect on {format} rows, which have "
                f"{', '.join(needs + may)}. Leave it out, or set data.format."
            )
        for ours in may:
            if ours in columns and not any(columns[ours] in other for _, other in zip(range(SEEN), _rows(source))):
                raise UserError(
                    f"data.columns: {where} has no column {columns[ours]!r} for {ours!r}, nor has any of the first "
                    f"{SEEN:,} rows.{nearest(columns[ours], found)} Columns found: {', '.join(found)}."
                )
        reader = Columns(
            format=format,
            columns=columns,
            ignore=tuple(ignore),
            completion_from=completion_from,
            prompt_from=prompt_from,
            system=system,
            system_as_user=system_as_user,
            roles=known_roles(roles),
            chat=chat,
            first=(where, row),
        ).reader()

    conversational = format in ("chat", "sharegpt") or (format in ("prompt_completion", "instruction") and chat)
    if system and (template is not None or format == "text"):
        raise UserError("data.system has no effect on plain text: leave it out, or write it into data.template.")
    if completion_from and (conversational or (template is None and format != "text")):
        raise UserError(
            f"data.completion_from has no effect on {format} rows, whose completion is known: "
            "it is for text and data.template."
        )
    for name, given in (("data.roles", roles), ("data.system_as_user", system_as_user)):
        if given and (template is not None or format == "text"):
            raise UserError(f"{name} has no effect on plain text: leave it out.")
    return reader


SEEN = 1000  # rows searched for a column that the first row lacks


def _rows(source: Source):
    return (row for _, row in source)


def own_columns(source: Source, columns: Mapping[str, str]) -> dict[str, str]:
    """The part of a mapping (jaxtune's name -> the file's) that applies to one of several sources.

    The file's side may list several names, `a|b`: the first one in the source's first rows is used. `a@b.jsonl` means
    column a of the source b.jsonl only. If no name is found, the entry is for other sources.
    """
    own, there = {}, None
    for ours, theirs in columns.items():
        if "|" not in theirs and "@" not in theirs:
            own[ours] = theirs
            continue
        there = _columns_of(source) if there is None else there
        for one in (theirs, *theirs.split("|")):
            name, _, of = one.rpartition("@")
            if one in there or of in (source.name, Path(source.name).name):
                own[ours] = one if one in there else name
                break
    return own


def check_columns(sources: Sequence[Source], columns: Mapping[str, str]) -> None:
    """Raise UserError for alternatives of a mapping that no source has, and for sources named there that are none."""
    for ours, theirs in columns.items():
        if "|" not in theirs and "@" not in theirs:
            continue
        found = {name for source in sources for name in _columns_of(source)}
        named = [of for one in theirs.split("|") if one not in found for _, at, of in [one.rpartition("@")] if at]
        known = [name for source in sources for name in (source.name, Path(source.name).name)]
        if wrong := [of for of in named if of not in known]:
            raise UserError(
                f"data.columns: {ours}={theirs}: {wrong[0]!r} is none of the sources.{nearest(wrong[0], known)} "
                f"Known: {', '.join(source.name for source in sources)}."
            )
        if not any(own_columns(source, {ours: theirs}) for source in sources):
            hint = next(filter(None, (nearest(one, found) for one in theirs.split("|"))), "")
            raise UserError(
                f"data.columns: {ours}={theirs}: no source has one of these columns.{hint} "
                f"Columns found: {', '.join(sorted(found))}."
            )


def _columns_of(source: Source) -> set[str]:
    return {name for row in islice(_rows(source), SEEN) for name in row}


def _detect(where: str, found: list[str], columns: Mapping[str, str]) -> str:
    fits = [name for name, (needs, _) in FORMATS.items() if all(columns.get(c, c) in found for c in needs)]
    mapped = [name for name in fits if any(c in columns for c in FORMATS[name][0])]
    if not fits or (columns and not mapped and any(c in needs for needs, _ in FORMATS.values() for c in columns)):
        raise _no_columns(where, "the columns fit no known format", found, columns)
    return (mapped or fits)[0]


def _refuse_judged(where: str, found: Sequence[str]) -> None:
    """Raise UserError for texts with a second text or an answer, which are no plain text unless that is said."""
    for name in found:
        if name.lower() not in ("text_pair", *ANSWERED):
            continue
        learn = f"data.columns=prompt=text,completion={name} trains it as the answer"
        if name.lower() == "text_pair":
            learn = "objective.name=sequence_classification learns labels of pairs"
        raise UserError(
            f"{where}: a text with a column {name!r}, which training on the text alone would leave out: {learn}; "
            f"data.format=text leaves it out. Columns found: {', '.join(found)}."
        )


def _no_columns(where: str, problem: str, found: list[str], columns: Mapping[str, str]) -> UserError:
    if {"chosen", "rejected"} <= set(found):
        return _pairs(where, found)
    lower = {c.lower(): c for c in found}
    asked, answered = (next((lower[name] for name in names if name in lower), None) for names in (ASKED, ANSWERED))
    system = next((f",system={lower[name]}" for name, ours in MEANT.items() if ours == "system" != name in lower), "")
    turns = next((c for c in found if c.lower() in MESSAGES), None)
    other = next((name for name, (needs, _) in FORMATS.items() if all(columns.get(c, c) in found for c in needs)), None)
    if other:
        hint = f"These are the columns of data.format={other}."
    elif columns:
        hint = f"The mapping given was {', '.join(f'{a}={b}' for a, b in columns.items())}."
    elif "label" in lower or "labels" in lower:
        kind = "token" if "tokens" in lower else "sequence"
        hint = f"To learn the labels, set objective.name={kind}_classification."
    elif asked and answered:
        hint = f"Set data.columns, for example prompt={asked},completion={answered}{system}."
    elif turns:
        hint = f"Set data.columns, for example messages={turns}."
    elif len(found) == 1:
        hint = f"Set data.columns, for example text={found[0]}."
    else:
        hint = "Set data.columns (prompt=THEIRS,completion=THEIRS or text=THEIRS) or data.template ('{a}\\n{b}')."
    needs = "; ".join("+".join(needs) for needs, _ in FORMATS.values())
    hint += header_hint(where.rpartition(":")[0], found)
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


@dataclass(frozen=True)
class Columns:
    """A reader for one of FORMATS; the fields are the arguments of `make_reader`."""

    format: str
    columns: Mapping[str, str]
    ignore: tuple[str, ...]
    completion_from: str | None
    prompt_from: str | None
    system: str | None
    system_as_user: bool
    roles: Mapping[str, str]
    chat: bool
    first: tuple[str, dict]  # the first row, after its place
    notes: Notes = field(default_factory=Notes)

    def reader(self) -> Reader:
        needs, may = FORMATS[self.format]
        convert = {"chat": self.turns, "sharegpt": self.turns, "text": self.text}.get(self.format, self.pair)
        used = tuple(self.theirs(c) for c in needs + may if c not in self.ignore and not self.taken(c))
        expected = set(used) | set(self.ignore)

        _refuse_other_objectives(*self.first, expected, self.format != "text")

        def checked(where: str, row: dict) -> Example:
            if not row.keys() <= expected:
                self.unused(where, row, expected)
            return convert(where, row)

        return Reader(self.format, used, checked, self.notes)

    def theirs(self, column: str) -> str:
        return self.columns.get(column, column)

    def taken(self, column: str) -> bool:
        """Whether the file's column of this name is mapped to another of ours, and so is not read a second time."""
        return column not in self.columns and column in self.columns.values()

    def unused(self, where: str, row: dict, used: set[str]) -> None:
        """Refuse rows of another objective and unused columns that change what is trained; count other unused ones."""
        _refuse_other_objectives(where, row, used, self.format != "text")
        for name in row:
            if name in used:
                continue
            if name.lower() in MEANT and row[name] not in (None, "", [], {}) and self.format != "text":
                ours = MEANT[name.lower()]
                fits = ours in sum(FORMATS[self.format], ())
                use = f"read it with data.columns={ours}={name}, or " if ours and fits else ""
                raise UserError(
                    f"{where}: column {name!r} would change what is trained, and is not read as {self.format}: "
                    f"{use}ignore it with data.ignore={name}."
                )
            labels = self.format == "text" and name.lower() in LABELLED
            self.notes.add(UNLEARNT if labels else "columns that are not used", name, where)

    def given(self, row: dict, column: str) -> object:
        """The value of an optional column, None where it is empty."""
        value = None if column in self.ignore or self.taken(column) else row.get(self.theirs(column))
        return None if value in ("", [], {}) else value

    def optional(self, where: str, row: dict, column: str) -> str:
        return "" if self.given(row, column) is None else _text_value(where, row, self.theirs(column))

    def tools(self, where: str, row: dict) -> list[dict] | None:
        given = [c for c in ("tools", "functions") if self.given(row, c) is not None]
        found = [normalise_tools(where, row[self.theirs(c)], self.theirs(c)) for c in given]
        if len(found) == 2 and found[0] != found[1]:
            raise UserError(f"{where}: columns tools and functions name different tools; leave one.")
        return found[0] if found else None

    def messages(self, where: str, column: str, value: object) -> tuple[list[dict], list[int]]:
        return normalise_messages(where, column, value, self.roles, self.ignore, self.notes)

    def conversation(self, where: str, row: dict, messages: list[dict], untrained: Sequence[int] = ()) -> Conversation:
        """The conversation, with the system message and the tools of the row."""
        own = self.optional(where, row, "system")
        first = messages[0]
        if own and first["role"] == "system" and first["content"] != own:
            raise UserError(
                f"{where}: has a system message and another text in column {self.theirs('system')!r}: leave one, or "
                f"leave the column out with data.ignore={self.theirs('system')}."
            )
        before = len(messages)
        messages = with_system(messages, own or self.system)
        if self.system_as_user and messages[0]["role"] == "system":
            messages = _folded(where, messages)
        moved = len(messages) - before
        return Conversation(messages, self.tools(where, row), frozenset(i + moved for i in untrained))

    def turns(self, where: str, row: dict) -> Conversation:
        column = self.theirs(FORMATS[self.format][0][0])
        messages, untrained = self.messages(where, column, _value(where, row, column))
        return self.conversation(where, row, messages, untrained)

    def pair(self, where: str, row: dict) -> Example:
        asked, answered = (self.theirs(c) for c in FORMATS[self.format][0])
        if any(is_messages(row.get(c)) for c in (asked, answered)):
            return self.messages_pair(where, row, asked, answered)
        more = [self.optional(where, row, c) for c in ("input", "context") if c in FORMATS[self.format][1]]
        prompt = "\n\n".join([_text_value(where, row, asked), *filter(None, more)])
        completion = _text_value(where, row, answered)
        if self.chat:
            history = self.history(where, row)
            turns = [*history, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self.conversation(where, row, turns)
        for column in ("history", "tools", "functions"):
            if column in FORMATS[self.format][1] and self.given(row, column) is not None:
                raise UserError(
                    f"{where}: column {self.theirs(column)!r} needs a conversation, and the tokenizer has no chat "
                    f"template: give one as model.chat_template, or leave it out with data.ignore={column}."
                )
        if system := self.optional(where, row, "system") or self.system:
            prompt = f"{system}\n\n{prompt}"
        seam = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else "\n"
        return Document(((prompt + seam, False), (completion, True)))

    def messages_pair(self, where: str, row: dict, asked: str, answered: str) -> Conversation:
        """Prompt and completion as lists of messages, as in TRL; messages of the prompt are not trained."""
        sides = []
        for column, role in ((asked, "user"), (answered, "assistant")):
            value = _value(where, row, column)
            sides.append([{"role": role, "content": value}] if isinstance(value, str) else value)
        (before, _), (after, untrained) = (
            self.messages(where, column, side) for column, side in zip((asked, answered), sides)
        )
        more = [c for c in ("input", "context", "history") if c in FORMATS[self.format][1]]
        if extra := [self.theirs(c) for c in more if self.given(row, c) is not None]:
            raise UserError(
                f"{where}: column {extra[0]!r} beside a prompt of messages: put it into the messages, or leave it out "
                f"with data.ignore={extra[0]}."
            )
        kept = [i for i, m in enumerate(before) if m["role"] == "assistant"]
        return self.conversation(where, row, before + after, [*kept, *(len(before) + i for i in untrained)])

    def history(self, where: str, row: dict) -> list[dict]:
        """Earlier turns: [[question, answer], ...], or messages."""
        value, column = self.given(row, "history"), self.theirs("history")
        if isinstance(value, str):
            value = parse_json(where, f"column {column!r}", value)
        if not value:
            return []
        if is_messages(value):
            return self.messages(where, column, value)[0]
        pairs = value if isinstance(value, list) else []
        if not pairs or not all(isinstance(p, list) and list(map(type, p)) == [str, str] for p in pairs):
            raise UserError(f"{where}: column {column!r} is {kind(value)}, expected a list of [question, answer].")
        return [{"role": r, "content": t} for pair in pairs for r, t in zip(("user", "assistant"), pair)]

    def text(self, where: str, row: dict) -> Document:
        value = _text_value(where, row, self.theirs("text"))
        if not self.completion_from:
            return Document(((value, True),))
        return _marked(where, value, self.completion_from, self.prompt_from, self.notes)


def is_messages(value: object) -> bool:
    """Whether a value is a list of messages rather than a text."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _folded(where: str, messages: list[dict]) -> list[dict]:
    """The messages with the system message moved into the user's, for templates without a system role."""
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise UserError(f"{where}: data.system_as_user: no user's message follows the system message.")
    return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _refuse_other_objectives(where: str, row: dict, used: set[str], answered: bool) -> None:
    """Raise UserError for rows of preferences, unless the columns that make them so are `used` or ignored."""
    found = f"Columns found: {', '.join(row)}."
    if {"chosen", "rejected"} <= set(row) and not {"chosen", "rejected"} & used:
        raise _pairs(where, row)
    if answered and "label" in row and "label" not in used and _is_verdict(row["label"]):
        raise UserError(
            f"{where}: answers judged good or bad ('label' is true or false): set objective.name=kto, for plain tuning "
            "on all rows would teach the bad answers. If the label says something else, leave it out with "
            f"data.ignore=label. {found}"
        )


def _pairs(where: str, columns: Iterable[str]) -> UserError:
    return UserError(
        f"{where}: preference pairs (chosen, rejected): set objective.name=preference. To tune on the good answers "
        "alone, map one side: data.columns=prompt=prompt,completion=chosen. Columns found: " + ", ".join(columns) + "."
    )


def _is_verdict(label: object) -> bool:
    return label in (0, 1) if isinstance(label, (int, float)) else str(label).lower() in ("true", "false")


def _marked(where: str, text: str, marker: str, until: str | None, notes: Notes) -> Document:
    """The text in pieces: what follows `marker` is trained, up to the next `until`."""
    pieces, at = [], 0
    while (found := text.find(marker, at)) >= 0:
        start = found + len(marker)
        end = text.find(until, start) if until else -1
        end = len(text) if end < 0 else end
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
        if until is None:
            break
    if not pieces:
        raise UserError(f"{where}: data.completion_from={marker!r} does not occur in this text: {text[:80]!r}.")
    if until is None and marker in text[start:]:
        notes.add(
            f"texts that have data.completion_from={marker!r} more than once; everything after the first is trained, "
            "including later prompts (data.prompt_from names the text that they begin with)",
            "",
            where,
        )
    if at < len(text):
        pieces.append((text[at:], False))
    return Document(tuple(pieces))


def _template_reader(
    where: str, template: str, first: dict, completion_from: str | None, prompt_from: str | None
) -> Reader:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.template: {error} in {template!r}. Write {{{{ for a brace of the text.") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise UserError(f"data.template: no placeholder in {template!r}. Columns found: {', '.join(first)}.")
    for name in names:
        if name not in first:
            raise UserError(
                f"data.template: {where} has no column {name!r}.{nearest(name, first)} "
                f"Columns found: {', '.join(first)}."
            )
    last = max(i for i, (_, name, _, _) in enumerate(parts) if name is not None)
    notes, used = Notes(), set(names)

    def convert(where: str, row: dict) -> Document:
        for name in row.keys() - used:
            notes.add("columns that are not used", name, where)
        prompt, completion = [], []
        for i, (literal, name, spec, conversion) in enumerate(parts):
            (prompt if i <= last else completion).append(literal)
            if name is not None:
                (prompt if i < last else completion).append(_formatted(where, row, name, spec, conversion))
        prompt, completion = "".join(prompt), "".join(completion)
        if completion_from:
            return _marked(where, prompt + completion, completion_from, prompt_from, notes)
        return Document(((prompt, False), (completion, True)))

    return Reader("template", tuple(dict.fromkeys(names)), convert, notes)


def _formatted(where: str, row: dict, name: str, spec: str, conversion: str | None) -> str:
    """A column's text, formatted as `{name!conversion:spec}`."""
    if not spec and not conversion:
        return _text_value(where, row, name)
    value = _value(where, row, name)
    try:
        return format(string.Formatter().convert_field(value, conversion), spec)
    except (ValueError, TypeError) as error:
        form = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
        raise UserError(f"{where}: data.template: {form} of {value!r}, {kind(value)}: {error}.") from None


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """Put `system` first as a system message, if the messages have none."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


class ColumnTypes:
    """Finds columns that change their type between rows. Null has no type; integers and floats count as one type."""

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
                    "A column has one type: correct the rows."
                )
            self._usual[column] = type(value)


def text_sides(example: Example) -> tuple[str, str]:
    """Return what is given and what is to be answered, as plain text; of a conversation its last answer."""
    if isinstance(example, Document):
        given = answer = ""
        for text, trained in example.pieces:
            if trained:
                answer += text
            else:
                given += text
        return given, answer
    return _turns(example)


def _turns(conversation: Conversation) -> tuple[str, str]:
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    asked = "\n".join(_spoken(m) for m in messages[:last] if m["role"] != "system")
    return asked, _spoken(messages[last]) if last < len(messages) else ""


def _spoken(message: dict) -> str:
    calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls]) if calls else message["content"]
